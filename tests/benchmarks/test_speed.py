"""The speed comparison: its parts, what is merged, and what is said about the goals."""

import sys
from types import SimpleNamespace

import pytest

for _package in ("torch", "scipy", "psutil", "rich"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: nox -s paper has it")

from benchmarks.speed import peers_numpy, report, sharded  # noqa: E402
from benchmarks.speed.cases import Case, sweeps  # noqa: E402
from benchmarks.speed.suite import Part, Settings, case_result, parts, run  # noqa: E402
from benchmarks.speed.timing import Budget  # noqa: E402

CASE = Case("options-tiny", "tiny", {"a": (6, 2, 3, 3), "b": (5, 4)})


def test_every_option_is_timed_and_words_leave_steps_out():
    settings = Settings(groups=["numpy"], budget=Budget(0, 2, 2))
    case = case_result("options", CASE, settings, 1e9)
    steps = report.steps_of(case, "numpy")
    assert {"target=0.5", "n_vectors=8", "every_n_steps=4", "bound, acting", "HWIO"} <= {*steps}
    assert next(iter(steps.values()))["ratio_to_ours"] == 1
    table = report.options_table(report.EMPTY | {"options": [case]}, "numpy")
    assert all(f"`{name}`" in table for name in steps)
    settings = Settings(without=["SVD", "bound"])
    assert [settings.wants(name) for name in ("matrix_norm(ord=2)", "bound, idle", "SGD")] == [
        0,
        0,
        1,
    ]


def test_groups_and_patterns_choose_parts_and_a_group_is_merged_into_a_case():
    names = {part.name for part in parts(Settings(groups=["jax"], only=["comp*", "training-*"]))}
    assert names <= {"compilation"}
    assert max(len(case.shapes) for case in sweeps()) == 10_000
    result = dict(report.EMPTY)
    for group in ("torch", "numpy"):
        measured = {"name": "x", "peers": {group: {"steps": {}}}}
        (result,) = run([Part("x", "cases", lambda measured=measured: measured)], result)
    assert [*result["cases"][0]["peers"]] == ["torch", "numpy"]
    assert "x" in result["seconds_of"]


def test_a_goal_is_met_by_the_worst_case_or_not():
    def case(name, ratio):
        steps = {"spectral_torch": {"ratio_to_ours": 1.0}, "n_vectors=4": {"ratio_to_ours": ratio}}
        return {"name": f"options-{name}", "peers": {"torch": {"steps": steps}}}

    options = [case("gpt2-a", 1.5), case("gpt2-b", 1.6), case("vgg-a", 1.5)]
    result = report.EMPTY | {"machine": {"device": "cpu"}, "options": options}
    rows = [row for row in report.goals(result).splitlines() if "n_vectors=4" in row]
    assert "worst in options-gpt2-b | not met | 1.6 | 1.5" in rows[0]
    assert "| met | 1.5 | 1.5" in rows[1]
    assert "not measured" in report.goals(result)


def test_the_account_counts_the_messages_of_all_vectors(monkeypatch):
    layers = {"q": (512, 64), "down": (256, 96)}
    monkeypatch.setattr(sharded, "llama", lambda *_, **__: dict(layers))
    found = sharded.account()
    layers["head"] = (128256, 8192)
    plain, several = found["rows"].values()
    assert (plain["messages"], several["messages"]) == (1, 2)
    assert plain["sent"] == 4 * sum(m + n for m, n in layers.values()) == several["sent"] / 4
    shards = 4 * sum(m * n for m, n in layers.values()) / 256
    # W is read twice, G read and written, beside the work on vectors.
    assert 4 * shards <= plain["moved"] <= 4 * shards + 20 * plain["sent"]
    assert "| `n_vectors=4` |" in report.account(report.EMPTY | {"account": found})


def test_the_engine_of_cupy_is_kept_from_step_to_step(monkeypatch):
    package = SimpleNamespace(CudaEngine=object, add_gradient_=lambda engine: engine)
    monkeypatch.setitem(sys.modules, "spectral_cupy", package)
    step = peers_numpy.of_cupy()
    assert step() is step()
