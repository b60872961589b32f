"""What is said about runs made up here, and what pages have from the committed results."""

import re
from pathlib import Path

import pytest

for _package in ("pandas", "scipy"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: nox -s paper has it")

from benchmarks import accuracy, readme  # noqa: E402
from benchmarks.paper import compare, page  # noqa: E402
from benchmarks.paper.compare import groups, verdict  # noqa: E402
from benchmarks.paper.runs import Result, Run, RunError  # noqa: E402


def made(method="vanilla", seed=0, tests=(0.5, 0.9), gap=0.1, diverged=False, **run):
    """A run whose gap is the same after each epoch."""
    plan = {"data": "cifar-10", "model": "vgg", "batch": 4096, "strength": 0.01, "rate": 0.1}
    run = Run(method=method, seed=seed, epochs=len(tests), **plan | run)
    result = Result(run, diverged=diverged)
    for test in tests:
        result.record({"train": test + gap, "test": test, "sigma_product": 100.0 + seed})
    result.spectra = {"a": [1.5, 1.4, 1.3] if method == "spectral" else [4.0, 1.0, 0.5]}
    return result


def cells(runs):
    """The first row of the table, from its first accuracy on."""
    return page.table(groups(runs)).splitlines()[2].strip("| ").split(" | ")[2:]


@pytest.mark.parametrize("best", [k / 100 - less for k in range(3, 101) for less in (0, 0.0049)])
def test_alpha_is_the_highest_hundredth_below_every_best_accuracy(best):
    alpha = groups([made(tests=(best,)), made("normalization", tests=(0.01,))])[0].alpha
    assert alpha < best <= alpha + 0.01 + 1e-9


@pytest.mark.parametrize(
    ("gaps", "says"),
    [
        ({"decay": (0.08, 0.09, 0.1), "adversarial": (0.2, 0.21, 0.22)}, "confirmed, .*decay's by"),
        ({"decay": (0.02, 0.03, 0.04)}, r"refuted, .*larger than decay's by .030 ±.000"),
        ({"decay": (0.10, 0.03, 0.09)}, "undecided, .*smaller than decay's .*chance"),
        ({"decay": (0.05, 0.02, 0.09)}, "undecided, .*larger than decay's .*chance"),
        ({}, "undecided, no run of decay or adversarial"),
        ({"vanilla": (0.2,), "spectral": (0.1,)}, "undecided, .*one seed"),
    ],
)
def test_the_claim_must_hold_against_every_method_beyond_chance(gaps, says):
    gaps = {"vanilla": (0.2, 0.21, 0.22), "spectral": (0.05, 0.06, 0.07)} | gaps
    runs = [made(m, k, gap=gap) for m, all in gaps.items() for k, gap in enumerate(all)]
    assert re.match(says, verdict(*groups(runs)))


def test_the_claim_is_undecided_where_runs_diverged_or_never_left_chance():
    runs = [made(m, k) for m in ("vanilla", "spectral") for k in range(3)]
    lost = [*runs[:-1], made("spectral", 2, diverged=True)]
    assert "diverged in 1 of 3" in verdict(*groups(lost))
    stuck = groups([*runs[1:], made(tests=(0.1, 0.11))])
    assert "1 runs never left chance" in verdict(stuck[0])
    assert page.counts(stuck) == ""


def test_the_table_has_bold_bests_counts_of_diverged_and_the_papers_numbers():
    runs = [made("decay", k, tests=(0.5, 0.95), diverged=k > 0) for k in range(3)]
    runs += [made(m, k, tests=(0.5, 0.9001)) for m in ("vanilla", "spectral") for k in range(3)]
    assert cells(runs)[:2] == ["**.900 ±.000** (paper .858)", ".950, diverged 2/3 (paper .863)"]
    assert cells(runs)[2:4] == ["**.900 ±.000** (paper .885)", ".90 (paper .85)"]
    assert "paper" not in "".join(cells([made(width=0.25)]) + cells([made(subset=100)]))
    assert cells([made(diverged=True, data="digits")]) == ["diverged 1/1", "–", "diverged 1/1"]
    with pytest.raises(RunError, match="same cell"):
        groups([made("spectral"), made("spectral", strength=0.1)])


def test_rows_are_counted_where_all_seeds_agree():
    runs = [made(seed=k, tests=(0.5, 0.8), model=m) for m in ("vgg", "nin") for k in range(2)]
    runs += [made("spectral", k, (0.5, 0.9), 0.05) for k in range(2)]
    runs += [made("spectral", k, (0.5, 0.7), 0.2, model="nin") for k in range(2)]
    text = page.counts(groups(runs)) + page.spectra(groups(runs))
    assert "in 1 of 2 rows (VGGNet CIFAR-10, B = 4096). It is worse in both in 1." in text
    assert "4 of 4 runs (σ₁ of 4 of 4 weights), and its spectrum is flatter in 4 of 4" in text


JAX = {"no difference": (0.91, 0.9, 0.92), "they differ": (0.8, 0.82, 0.81), "too few": (0.9,)}


@pytest.mark.parametrize(("says", "tests"), JAX.items())
def test_two_frameworks_agree_where_the_seeds_cover_their_difference(says, tests):
    runs = [made(seed=k, tests=(t,)) for k, t in enumerate((0.90, 0.92, 0.91))]
    runs += [made(seed=k, tests=(t,), framework="jax") for k, t in enumerate(tests)]
    (sentence,) = compare.agreements(groups(runs))
    assert says in sentence


def test_a_grid_shows_each_rate_and_what_diverged():
    rates = ((0.1, 0.9), (0.3, 0.95), (3.0, 0.1))
    runs = [made(rate=r, tests=(t,), validate=True, diverged=r > 1) for r, t in rates]
    assert page.block(runs).endswith("| .900 | **.950** | diverged |")


@pytest.mark.parametrize("path", readme.pages(), ids=lambda path: path.name)
def test_blocks_are_what_the_committed_results_give(path):
    text = path.read_text(encoding="utf-8")
    assert readme.written(text, readme.blocks()) == text


def test_every_stack_that_is_tested_is_in_the_table():
    tests = Path(__file__).parents[1]
    files = {*tests.glob("integrations/test_*.py"), *tests.glob("keras/test_*.py")}
    assert {tests / f"{stack['test']}.py" for stack in readme.stack_list()} == files


@pytest.mark.parametrize("name", accuracy.SCHEMES)
def test_every_scheme_comes_to_the_svd(name):
    matrix = accuracy.close_pair(0.5, 0)
    found = accuracy.errors(accuracy.SCHEMES[name], [matrix] * 60, [accuracy.exact(matrix)] * 60)
    assert all(errors[-1] < 1e-6 for errors in found.values())
