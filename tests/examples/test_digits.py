"""The demonstration: its data, its three frameworks, and what it reports."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

import digits
import digits_report
from digits import CHOSEN, Job

RESULTS = Path(digits.ROOT) / "benchmarks" / "results" / "digits.json"


def started(method: str, strength: float = 0.0, seed: int = 0, backend: str = "numpy"):
    if backend != "numpy":
        pytest.importorskip({"jax": "optax"}.get(backend, backend))
    job = Job(method, strength, batch=64, seed=seed, backend=backend)
    return digits.build(job, np.random.default_rng(seed))


def first_batches(steps: int):
    images, labels = digits.split(seed=0)["train"]
    order = digits.batches(np.random.default_rng(0), 64)
    return [(images[chosen], labels[chosen]) for chosen in islice(order, steps)]


def trained(steps: int, *args, **options):
    """Return the matrices of each layer after each step."""
    net, matrices = started(*args, **options), []
    for batch in first_batches(steps):
        net.step(*batch)
        matrices.append(net.matrices())
    return matrices


def sigmas(matrices):
    return np.array([[np.linalg.norm(W, 2) for W in layers] for layers in matrices])


def row(method, batch=64, strength=0.0, **values):
    return {"batch": batch, "method": method, "strength": strength, "sigma": [[1.0]], **values}


@pytest.mark.parametrize("seed", [0, 4])
def test_the_parts_of_the_data_are_disjoint_and_complete(seed):
    parts = digits.split(seed)
    assert [len(y) for _, y in parts.values()] == [800, 400, 597]
    images = np.concatenate([x for x, _ in parts.values()])
    assert len(np.unique(images, axis=0)) == len(images) == 1797
    assert images.min() == 0
    assert images.max() == 1


def test_the_test_part_is_the_same_for_all_seeds_and_the_others_are_not():
    first, second = digits.split(0), digits.split(1)
    np.testing.assert_array_equal(first["test"][0], second["test"][0])
    assert not np.array_equal(first["train"][0], second["train"][0])


def test_an_epoch_visits_each_image_at_most_once():
    epoch = list(islice(digits.batches(np.random.default_rng(0), 64), 12))
    assert {len(batch) for batch in epoch} == {64}
    assert len(np.unique(np.concatenate(epoch))) == 12 * 64
    (whole,) = islice(digits.batches(np.random.default_rng(0), 800), 1)
    assert sorted(whole) == list(range(800))


@pytest.mark.parametrize("backend", digits.NETS)
def test_all_methods_start_from_the_same_weights(backend):
    expected = started("vanilla").matrices()
    for method, strength in CHOSEN.items():
        found = started(method, strength, backend=backend).matrices()
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("method", ["vanilla", "weight decay"])
def test_the_frameworks_agree(method, backend):
    expected = trained(8, method, CHOSEN[method])
    found = trained(8, method, CHOSEN[method], backend=backend)
    np.testing.assert_allclose(sigmas(found), sigmas(expected), rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_frameworks_agree_on_the_spectral_term(backend):
    expected, found = (
        sigmas(trained(40, "spectral", CHOSEN["spectral"], backend=name))
        for name in ("numpy", backend)
    )
    # The start vectors depend on the weights' names, which differ, and PyTorch warms them up. The
    # term itself makes σ at the end at least 12 % smaller than vanilla's.
    np.testing.assert_allclose(found, expected, rtol=0.04)
    np.testing.assert_allclose(found[-1], expected[-1], rtol=0.02)


@pytest.mark.parametrize("backend", digits.NETS)
def test_decay_adds_its_multiple_of_the_weight(backend):
    decay = 0.5
    W0 = started("vanilla").matrices()
    (plain,), (decayed,) = (
        trained(1, method, decay, backend=backend) for method in ("vanilla", "weight decay")
    )
    # The first step of Nesterov's momentum moves by rate · (1 + momentum) times the gradient.
    moved = digits.RATE * (1 + digits.MOMENTUM) * decay
    for W, without, with_decay in zip(W0, plain, decayed, strict=True):
        np.testing.assert_allclose(with_decay, without - moved * W, atol=1e-6)


@pytest.mark.parametrize("backend", digits.NETS)
def test_spectral_lowers_sigma(backend):
    vanilla, spectral = (
        sigmas(trained(40, method, 0.1, backend=backend))[-1] for method in ("vanilla", "spectral")
    )
    assert (spectral < 0.95 * vanilla).all()


def test_a_run_is_repeatable_and_learns():
    job = Job("vanilla", 0.0, batch=64, seed=4, backend="numpy", steps=60)
    outcome = digits.train(job)
    assert digits.train(job) == outcome
    assert outcome.test > 80
    assert outcome.noise < outcome.test
    assert len(outcome.sigma) == 3


def test_the_search_measures_other_images_than_the_comparison():
    job = Job("vanilla", 0.0, batch=64, seed=4, backend="numpy", steps=20)
    # A quarter of a percent is one of the 400 validation images.
    validated = digits.train(job._replace(validate=True)).test
    assert validated * 4 == pytest.approx(round(validated * 4))
    assert digits.train(job).test * 5.97 == pytest.approx(round(digits.train(job).test * 5.97))
    assert not set(digits.SEARCH_SEEDS) & set(range(digits.FIRST_SEED, digits.FIRST_SEED + 100))


def test_wins_are_counted_against_all_other_methods_and_ties_do_not_count():
    rows = [
        row("vanilla", test=[90.0, 95.0, 92.0], gap=[5.0, 5.0, 5.0]),
        row("weight decay", test=[91.0, 94.0, 93.0], gap=[4.0, 4.0, 4.0]),
        row("spectral", test=[92.0, 94.5, 93.0], gap=[3.0, 4.5, 6.0]),
    ]
    assert digits_report.wins(rows, 64, "test") == 1
    assert digits_report.wins(rows, 64, "gap") == 1


def test_the_highest_validation_accuracy_over_both_batches_is_chosen():
    rows = [
        row("spectral", 64, 0.1, validation=[90.0, 96.0]),
        row("spectral", 800, 0.1, validation=[90.0, 90.0]),
        row("spectral", 64, 0.2, validation=[92.0, 92.0]),
        row("spectral", 800, 0.2, validation=[92.0, 92.0]),
    ]
    assert digits_report.best_strengths(rows) == {"spectral": 0.2}


def test_the_table_shows_the_rows(monkeypatch):
    monkeypatch.setattr(digits, "train_all", lambda jobs, *_: {job: made_up(job) for job in jobs})
    console = Console(record=True, width=140)
    rows = digits.compare(3, console, backend="numpy", batch_norm=False)
    text = console.export_text()
    for found in rows:
        cells = [
            f"{mean(found[key]):.1f} ± {np.std(found[key], ddof=1):.1f}" for key in ("test", "gap")
        ]
        assert any(
            all(cell in line for cell in (str(found["batch"]), found["method"], *cells))
            for line in text.splitlines()
        )
    assert [found["test"] for found in rows if found["method"] == "spectral"] == [
        [made_up(Job("spectral", 0.03, batch, seed)).test for seed in (4, 5, 6)]
        for batch in digits.BATCHES
    ]


def made_up(job: Job) -> digits.Outcome:
    rng = np.random.default_rng([job.seed, job.batch, len(job.method)])
    return digits.Outcome(*rng.uniform(1, 90, 3), sigma=[1.0, 2.0, 3.0])


def test_the_picture_is_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, "train_all", lambda jobs, *_: {job: made_up(job) for job in jobs})
    rows = digits.compare(2, Console(quiet=True), backend="numpy", batch_norm=False)
    digits.picture(rows, tmp_path / "new" / "digits.png")
    assert (tmp_path / "new" / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_file_of_results_can_be_read_back(tmp_path):
    content = {"command": "x", "rows": [row("vanilla", test=[1.23456789])]}
    digits_report.write_json(tmp_path / "digits.json", content)
    found = json.loads((tmp_path / "digits.json").read_text())
    assert found["rows"] == [row("vanilla", test=[1.2346])]


def test_the_strengths_are_those_that_the_committed_search_chose():
    result = json.loads(RESULTS.read_text())
    assert digits_report.best_strengths(result["search"]) == CHOSEN
    assert {row["strength"] for row in result["search"]} == {
        x for g in digits.GRID.values() for x in g
    }
    assert not set(result["settings"]["seeds"]) & set(result["settings"]["search_seeds"])
    for rows in (result["rows"], result["batch_norm"]):
        assert [row["method"] for row in rows] == [*CHOSEN] * len(digits.BATCHES)
        assert {row["method"]: row["strength"] for row in rows} == CHOSEN
