"""What is said about runs made up here, and what pages have from the committed results."""

import re
from pathlib import Path

import pytest

for _package in ("pandas", "scipy"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: nox -s paper has it")

import pandas as pd  # noqa: E402

from benchmarks import accuracy, readme  # noqa: E402
from benchmarks.paper import compare, effects, page  # noqa: E402
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
    assert page.compared(stuck) == page.spectra(stuck) == ""


def test_the_table_has_bold_bests_counts_of_diverged_and_the_papers_numbers():
    runs = [made("decay", k, tests=(0.5, 0.95), diverged=k > 0) for k in range(3)]
    runs += [made(m, k, tests=(0.5, 0.9001)) for m in ("vanilla", "spectral") for k in range(3)]
    assert cells(runs)[:2] == ["**.900 ±.000** (paper .858)", ".950, diverged 2/3 (paper .863)"]
    assert cells(runs)[2:4] == ["**.900 ±.000** (paper .885)", ".90 (paper .85)"]
    assert "paper" not in "".join(cells([made(width=0.25)]) + cells([made(subset=100)]))
    assert cells([made(diverged=True, data="digits")]) == ["diverged 1/1", "–", "diverged 1/1"]
    with pytest.raises(RunError, match="same cell"):
        groups([made("spectral"), made("spectral", strength=0.1)])


def test_spectra_are_compared_by_their_largest_values_and_ranks():
    runs = [made(seed=k, model=m) for m in ("vgg", "nin") for k in range(2)]
    runs += [made("spectral", k, (0.5, 0.9), 0.05) for k in range(2)]
    runs += [made("spectral", k, (0.5, 0.7), 0.2, model="nin") for k in range(2)]
    text = page.spectra(groups(runs))
    assert "4 of 4 runs (σ₁ of 4 of 4 weights), and its spectrum is flatter in 4 of 4" in text
    for run in runs:  # of later seeds only these numbers are kept
        final = {"layers": {"a": [run.spectra["a"][0], 2.0, 3.0]}}
        run.spectra, run.final = {}, final
    assert "lower in 4 of 4 runs" in page.spectra(groups(runs))
    assert "is flatter in 0 of 4" in page.spectra(groups(runs))


def trio(noise, tests=(0.90, 0.91, 0.92)):
    """Vanilla and spectral from three seeds; spectral's differences under noise are these."""
    runs = []
    for k, (test, more) in enumerate(zip(tests, noise, strict=True)):
        for method, added in (("vanilla", 0.0), ("spectral", more)):
            run = made(method, k, tests=(test,))
            run.final = {"noise": [0.5 + added] * 4, "nll": 0.5 - added}
            runs.append(run)
    return runs


def test_a_difference_is_marked_where_it_holds_among_all_comparisons():
    sure, maybe = (groups(trio(noise))[0] for noise in ((0.1, 0.1001, 0.0999), (0.1, 0.02, 0.1)))
    assert "+.100 ±.000 ✓" in effects.table(sure)
    assert "−0.1 ±0.000248 ✓" in effects.table(sure)  # a smaller loss is better
    assert "✓" not in effects.table(maybe)
    (said,) = effects.sentences(sure)
    assert "spectral against vanilla: better in 5 and worse in 0 of 7 measures, 3 seeds." in said
    (worse,) = effects.sentences(groups(trio((-0.1, -0.1001, -0.0999)))[0])
    assert "worse in 5 of 7 measures (worse: accuracy, noise of s.d. 0.25; " in worse
    alone = groups([run for run in trio((0.1, 0.1, 0.1)) if run.run.seed == 0])[0]
    assert "fewer than 3 seeds decide nothing" in next(effects.sentences(alone))
    assert "✓" not in effects.table(alone)


def test_the_summary_counts_the_marks_of_rows_that_were_measured():
    runs = trio((0.1, 0.1001, 0.0999))
    text = page.summary([runs, [made(m, data="digits") for m in ("vanilla", "spectral")]])
    row = text.splitlines()[-1].strip("| ").split(" | ")
    assert row[1:] == ["3", "5 / 0", "0 / 0", "0 / 0", "7", "undecided"]
    assert "digits" not in text


def test_the_summary_leaves_out_rows_of_few_seeds():
    runs = trio((0.1, 0.1001, 0.0999))
    few = [run for run in runs if run.run.seed < 2]
    assert len(page.summary([runs]).splitlines()) == len(page.summary([few]).splitlines()) + 1


def test_numbers_that_are_equal_in_print_are_no_difference():
    runs = [made(m, k, tests=(0.7,)) for m in ("vanilla", "spectral") for k in (0, 1)]
    for run, (train, test) in zip(runs, [(0.9, 0.8)] * 2 + [(0.8, 0.7)] * 2, strict=True):
        run.curves |= {"train": [train], "test": [test]}
    assert 0.9 - 0.8 != 0.8 - 0.7
    gaps = [each for each in effects.effects(groups(runs)[0]) if each.measure.column == "last_gap"]
    assert [each.sign for each in gaps] == [0]
    assert effects.chance(pd.Series([0.1, 0.1, 0.1])) == 1.0  # three equal counts prove no spread


@pytest.mark.parametrize(
    ("chances", "found"),
    [
        ((0.01, 0.04, 0.03), (True, False, False)),  # 0.03 > 0.05/2, and then no larger one
        ((0.016, 0.025, 0.05), (True, True, True)),
        ((0.017, 0.0, 0.9), (True, True, False)),
        ((), ()),
    ],
)
def test_holm_goes_on_until_a_chance_is_too_large(chances, found):
    assert effects.holm(chances) == [*found]


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


def test_a_grid_shows_what_each_strength_does_at_the_rate_of_vanilla():
    runs = [
        made(rate=r, tests=(t,), validate=True, strength=0.0) for r, t in ((0.1, 0.9), (0.3, 0.8))
    ]
    for strength, test in ((0.1, 0.91), (0.01, 0.92)):
        runs.append(made("spectral", tests=(test,), validate=True, strength=strength))
    for run in runs:
        run.final = {"noise": [0.5] * 4, "ten_steps": [0.25] * 3}
    rates, strengths = page.block(runs).split("\n\n")
    assert rates.endswith("| VGGNet | 4096 | vanilla 0 | **.900** | .800 |")
    rows = [line.split(" | ")[2:7] for line in strengths.splitlines()[2:]]
    assert rows == [
        ["vanilla 0", "**.900**", ".100", ".500", ".250"],
        ["spectral 0.01", "**.920**", ".100", ".500", ".250"],
        ["spectral 0.1", ".910", ".100", ".500", ".250"],
    ]


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
