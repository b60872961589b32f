"""What is made of the paper's runs: table, verdict, page and figures, from runs made up here."""

import re

import numpy as np
import pytest

from benchmarks.gap import gap_at, threshold
from benchmarks.paper import comparison, page
from benchmarks.paper.comparison import Interval, differences, groups, pairs, verdict
from benchmarks.paper.results import Result, ResultsError, Run, append, read, write
from benchmarks.paper.table import PAPER, table

SPECTRA = {
    "vanilla": {"first": [4.0, 1.0, 0.5], "last": [3.0, 0.1, 0.1]},
    "spectral": {"first": [1.5, 1.4, 1.3], "last": [1.0, 0.9, 0.8]},
}


def made(method="vanilla", seed=0, tests=(0.5, 0.9), gap=0.1, diverged=False, **run):
    """A run whose gap is the same after each epoch."""
    plan = {"data": "cifar-10", "model": "vgg", "batch": 4096, "strength": 0.01, "rate": 0.1}
    return Result(
        Run(**plan | {"method": method, "seed": seed, "epochs": len(tests)} | run),
        epochs=[
            {
                "epoch": epoch,
                "train": test + gap,
                "test": test,
                "train_gradient": 0.5 / epoch,
                "test_gradient": 0.5 + gap,
                **({"train_hessian": 3.0, "test_hessian": 9.0} if epoch % 2 == 0 else {}),
            }
            for epoch, test in enumerate(tests, start=1)
        ],
        spectra={} if diverged else SPECTRA.get(method, SPECTRA["vanilla"]),
        diverged=diverged,
        done=True,
    )


def of_gaps(**gaps):
    """A group whose methods have these gaps, a seed each."""
    (group,) = groups(
        made(method, seed, gap=gap) for method, all in gaps.items() for seed, gap in enumerate(all)
    )
    return group


def cells(text, line=2):
    return [cell.strip() for cell in text.splitlines()[line].strip("|").split("|")]


@pytest.mark.parametrize("hundredth", range(1, 101))
def test_every_best_accuracy_lies_above_its_threshold_by_at_most_a_hundredth(hundredth):
    for best in (hundredth / 100, hundredth / 100 - 0.0049):
        alpha = threshold([best, 1.0])
        assert alpha < best <= alpha + 0.01 + 1e-12
        assert gap_at(alpha, [best + 0.2], [best]) == pytest.approx(0.2)


def test_the_gap_is_the_least_where_the_test_accuracy_exceeds_alpha():
    assert gap_at(0.6, [0.6, 0.9, 0.95], [0.6, 0.7, 0.65]) == pytest.approx(0.2)


def test_alpha_is_set_by_the_worst_run_that_did_not_diverge():
    (group,) = groups(
        [made(tests=(0.3, 0.874)), made("decay"), made("spectral", tests=(0.2,), diverged=True)]
    )
    assert group.alpha == 0.87


def test_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats", reason="SciPy is not installed")
    for n in (2, 3, 4, 5, 10, 31):
        values = np.random.default_rng(n).standard_normal(n).tolist()
        expected = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
        found = Interval.of(values)
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx(expected)


def test_one_seed_has_a_mean_and_no_interval():
    assert Interval.of([0.3]) == Interval(0.3, None)
    assert cells(table(groups([made()])))[2] == "**.900** (paper .858)"


def test_differences_are_taken_seed_by_seed():
    runs = [made("vanilla", seed, gap=gap) for seed, gap in ((2, 0.3), (0, 0.1), (1, 0.2))]
    runs += [made("spectral", seed, gap=gap) for seed, gap in ((1, 0.15), (2, 0.25), (3, 0.9))]
    found = differences(groups(runs)[0])["vanilla"]
    assert found.mean == pytest.approx(-0.05)
    assert found.half == pytest.approx(0, abs=1e-12)


def test_rows_are_in_the_papers_order_and_held_out_runs_are_none_of_them():
    runs = [
        made(data="cifar-100", model="nin"),
        made(batch=4096),
        made(batch=64),
        made(batch=128, validate=True),
    ]
    assert [(g.network.model, g.batch) for g in groups(runs)] == [
        ("vgg", 64),
        ("vgg", 4096),
        ("nin", 4096),
    ]


def test_two_runs_that_no_column_tells_apart_are_refused():
    with pytest.raises(ResultsError, match="vgg-b4096-spectral-s0"):
        groups([made("spectral"), made("spectral", strength=0.1)])


def test_the_best_are_bold_also_where_they_are_equal_in_print():
    runs = [
        made("vanilla", tests=(0.5, 0.81), gap=0.05),
        made("decay", tests=(0.5, 0.9001), gap=0.08),
        made("spectral", tests=(0.5, 0.9), gap=0.04),
    ]
    row = cells(table(groups(runs)))
    assert [cell.startswith("**") for cell in row[2:5]] == [False, True, True]
    assert [cell.startswith("**") for cell in row[6:9]] == [False, False, True]


def test_columns_are_of_the_methods_present_and_an_absent_one_is_a_dash():
    text = table(groups([made("vanilla"), made("normalization", batch=64)]))
    assert cells(text, 0) == [
        *("model, data", "B", "accuracy: vanilla", "normalization"),
        *("α", "gap: vanilla", "normalization"),
    ]
    assert cells(text, 2)[2] == "– (paper .898)"


def test_what_diverged_is_counted_and_never_the_best():
    runs = [made("vanilla", seed) for seed in range(3)]
    runs += [made("decay", seed, tests=(0.5, 0.95), diverged=seed > 0) for seed in range(3)]
    runs += [made("spectral", seed, diverged=True) for seed in range(3)]
    row = cells(table(groups(runs)))
    assert row[2].startswith("**.900 ±.000**")
    assert row[3].startswith(".950, diverged 2/3")
    assert row[4].startswith("diverged 3/3")


def test_a_row_in_which_all_diverged_has_no_threshold():
    row = cells(table(groups([made(diverged=True, data="digits")])))
    assert row[2:] == ["diverged 1/1", "–", "diverged 1/1"]


def test_the_papers_numbers_stand_beside_those_of_the_same_data():
    row = cells(table(groups([made("spectral")])))
    assert row[2].endswith("(paper .885)")
    assert row[3] == ".89 (paper .85)"
    assert row[4].endswith("(paper .045)")
    assert "paper" not in table(groups([made("spectral", data="fashion-mnist")]))
    assert "paper" not in table(groups([made("spectral", batch=1024)]))


def test_the_papers_numbers_are_those_of_its_table():
    assert len(PAPER) == 8
    # In the paper's prose: spectral has the smallest gap at the large batch, but on STL-10.
    for (_, data, batch), row in PAPER.items():
        if batch == 4096:
            smallest = min(row.gap, key=row.gap.get)
            assert smallest == ("adversarial" if data == "stl-10" else "spectral")
            assert max(row.accuracy, key=row.accuracy.get) == "spectral"


def test_the_claim_is_confirmed_if_every_other_gap_is_larger_beyond_chance():
    group = of_gaps(
        vanilla=(0.10, 0.11, 0.12),
        decay=(0.08, 0.09, 0.1),
        adversarial=(0.2, 0.21, 0.22),
        spectral=(0.05, 0.06, 0.07),
    )
    found = verdict(group)
    assert found.word == "confirmed"
    assert "decay's by .030 ±.000" in found.sentence


def test_the_claim_is_refuted_if_some_other_gap_is_smaller_beyond_chance():
    group = of_gaps(
        vanilla=(0.10, 0.11, 0.12), decay=(0.02, 0.03, 0.04), spectral=(0.05, 0.06, 0.07)
    )
    found = verdict(group)
    assert found.word == "refuted"
    assert "larger than decay's by .030 ±.000" in found.sentence


@pytest.mark.parametrize(
    ("decay", "says"),
    [((0.10, 0.03, 0.09), "smaller than decay's"), ((0.05, 0.02, 0.09), "larger than decay's")],
)
def test_the_claim_is_undecided_if_chance_explains_the_difference_to_some_other(decay, says):
    group = of_gaps(vanilla=(0.2, 0.21, 0.22), decay=decay, spectral=(0.05, 0.06, 0.07))
    found = verdict(group)
    assert found.word == "undecided"
    assert says in found.sentence


def test_the_claim_is_undecided_with_one_seed_or_where_spectral_diverged():
    assert verdict(of_gaps(vanilla=(0.2,), spectral=(0.1,))).word == "undecided"
    runs = [made("vanilla", seed, gap=0.2) for seed in range(3)]
    runs += [made("spectral", seed, diverged=seed == 2) for seed in range(3)]
    found = verdict(groups(runs)[0])
    assert found.word == "undecided"
    assert "diverged in 1 of 3" in found.sentence


def test_the_verdict_is_on_the_large_batch_of_each_network():
    runs = [
        made(method, batch=batch, model=model)
        for model, batches in (("vgg", (64, 4096)), ("nin", (64, 1024)))
        for batch in batches
        for method in ("vanilla", "spectral")
    ]
    runs += [made(method, batch=64, model="densenet-22") for method in ("vanilla", "spectral")]
    said = page.verdicts(groups(runs)).splitlines()[2:]
    assert [line.split(":")[0] for line in said] == [
        "- VGGNet CIFAR-10, B = 4096",
        "- NIN CIFAR-10, B = 1024",
    ]


def test_stable_rank_is_the_number_of_equal_singular_values():
    assert comparison.stable_rank([2.0] * 5) == pytest.approx(5)
    assert comparison.stable_rank([2.0, 0.0]) == pytest.approx(1)
    assert comparison.stable_rank([0.0, 0.0]) == 0


def test_spectra_are_compared_seed_by_seed():
    runs = [made(method, seed) for method in ("vanilla", "spectral") for seed in range(2)]
    runs[-1].spectra = {"first": [5.0, 4.9, 4.8], "last": [1.0, 0.9, 0.8]}
    found = pairs(groups(runs))
    assert [pair.lower for pair in found] == [2, 1]
    text = comparison.spectra_sentence(found)
    assert "lower in 1 of 2 runs (σ₁ of 3 of 4 weights)" in text
    assert "flatter in 2 of 2" in text
    assert "Not so: VGGNet CIFAR-10, B = 4096, seed 1." in text


def test_spectra_of_a_run_that_diverged_are_left_out():
    runs = [made("vanilla"), made("spectral"), made("vanilla", 1, diverged=True)]
    assert len(pairs(groups([*runs, made("spectral", 1)]))) == 1


def test_rows_are_counted_where_all_seeds_agree():
    def row(model, ours, **run):
        for seed, (test, gap) in enumerate(ours):
            yield made("vanilla", seed, (0.5, 0.8), 0.1, model=model)
            yield made("spectral", seed, (0.5, test), gap, model=model, **run)

    better, worse = [(0.9, 0.05), (0.85, 0.09)], [(0.7, 0.2), (0.75, 0.15)]
    rows = {
        "vgg": row("vgg", better),
        "nin": row("nin", worse),
        "densenet-22": row("densenet-22", [better[0], worse[0]]),
        "densenet-40": row("densenet-40", [better[0], (0.9, 0.15)]),
    }
    text = comparison.seeds_sentence(groups([run for runs in rows.values() for run in runs]))
    assert "in 1 of 4 rows (VGGNet CIFAR-10, B = 4096); worse, with a larger one, in 1." in text
    lost = [*row("vgg", better), made("spectral", 2, diverged=True), made("vanilla", 2)]
    assert "in 0 of 1 rows; worse, with a larger one, in 0." in comparison.seeds_sentence(
        groups(lost)
    )
    assert comparison.seeds_sentence(groups([made("vanilla")])) == ""


def test_half_a_line_at_the_end_is_a_run_that_is_not_done(tmp_path):
    result = made()
    result.done = False
    path = tmp_path / "suite" / f"{result.run.name}.jsonl"
    write(path, result)
    append(path, {"epoch": 3, "train": 0.9, "test": 0.8})
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[:-9], encoding="utf-8")
    found = read(path)
    assert not found.done
    assert found.curve("test") == [0.5, 0.9]
    assert page.suites(tmp_path) == {}


@pytest.fixture
def root(tmp_path):
    """The results of one suite: two networks, two batches, three methods, two seeds."""
    for model, data in (("vgg", "cifar-10"), ("nin", "cifar-100")):
        for batch in (64, 4096):
            for k, method in enumerate(("vanilla", "decay", "spectral")):
                for seed in range(2):
                    plan = {"model": model, "data": data, "batch": batch}
                    tests = [0.9 - 0.5 / (epoch + seed + 1) for epoch in range(300)]
                    result = made(method, seed, tests, 0.1 - 0.02 * k, **plan)
                    write(tmp_path / "small" / f"{result.run.name}.jsonl", result)
    return tmp_path


def test_the_page_is_written_between_markers_and_the_same_twice(root):
    text = "# Title\n\n<!-- small -->\nold\n<!-- /small -->\n\nafter\n"
    found = page.written(text, root)
    assert found.startswith("# Title\n\n<!-- small -->\n24 runs; 2 seeds")
    assert found.endswith("<!-- /small -->\n\nafter\n")
    assert "old" not in found
    assert table(groups(page.suites(root)["small"])) in found
    assert page.written(found, root) == found


def test_a_new_suite_comes_at_the_end_of_the_page(root):
    found = page.written("# Title\n", root)
    assert found.startswith("# Title\n\n## small\n\n<!-- small -->\n")
    assert page.written(found, root) == found


def test_the_page_shows_the_pictures_that_were_drawn(root):
    assert "![" not in page.written("", root)
    (root / "small" / "figure-4.png").touch()
    assert re.findall(r"\((.*figure.*)\)", page.written("", root)) == ["results/small/figure-4.png"]


def test_the_summary_has_vanilla_and_spectral_and_the_threshold_of_all(root):
    found = page.summary(root)
    assert "accuracy: vanilla | spectral | α" in found
    assert "The claim that spectral has the smallest gap" in found
    assert "decay |" not in found


def test_the_committed_page_is_that_of_the_committed_results():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text) == text


@pytest.fixture
def drawing():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks.paper import figures

    return figures


def test_figures_are_the_same_files_twice(root, tmp_path, drawing):
    results = page.suites(root)["small"]
    first, second = (drawing.figures(results, tmp_path / name) for name in "ab")
    assert [path.name for path in first] == [
        f"figure-{number}.{kind}" for number in range(1, 7) for kind in ("png", "svg")
    ]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_figure_without_data_is_left_out(tmp_path, drawing):
    result = made()
    for line in result.epochs:
        line.pop("train_hessian", None)
    assert {path.stem for path in drawing.figures([result], tmp_path)} == {
        *("figure-1", "figure-2", "figure-4")
    }
    assert drawing.figures([made(diverged=True)], tmp_path) == []
    assert drawing.figures([], tmp_path) == []


def test_a_line_is_thinned_and_keeps_its_ends(drawing):
    kept = drawing.thinned(list(range(1, 1001)))
    assert len(kept) <= drawing.MOST
    assert (kept[0], kept[-1]) == (1, 1000)
    assert drawing.thinned([1, 2, 3]) == [1, 2, 3]


def test_the_mean_over_seeds_is_drawn_where_all_have_a_value(drawing):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    drawing.band(axis, [{1: 0.0, 2: 1.0, 3: 5.0}, {2: 3.0, 3: 7.0}], "#000000", "-")
    (line,) = axis.get_lines()
    assert line.get_xydata().tolist() == [[2, 2], [3, 6]]


def test_a_spectrum_is_of_a_middle_weight_among_the_large(drawing):
    result = made()
    sizes = {"a": 64, "b": 512, "c": 512, "d": 300, "e": 10}
    result.spectra = {name: [1.0] * size for name, size in sizes.items()}
    assert drawing.telling(groups([result])[0]) == "c"


def test_a_method_that_is_not_the_papers_sets_no_threshold():
    runs = [made("vanilla"), made("spectral"), made("normalization", tests=(0.1, 0.2))]
    (group,) = groups(runs)
    assert group.alpha == pytest.approx(0.89)
    assert group.gaps("normalization") == {}
    assert differences(group).keys() == {"vanilla"}
    assert cells(table([group]))[-1] == "–"


def of_frameworks(accuracies):
    return groups(
        made(seed=seed, tests=(0.5, accuracy), framework=framework)
        for framework, found in accuracies.items()
        for seed, accuracy in enumerate(found)
    )


def with_products(found, value=100.0):
    for group in found:
        for runs in group.runs.values():
            for k, result in enumerate(runs):
                result.epochs[-1]["sigma_product"] = value * (1 + k)
    return found


def test_two_frameworks_agree_where_the_seeds_cover_their_difference():
    near = with_products(of_frameworks({"torch": [0.90, 0.92, 0.91], "jax": [0.91, 0.90, 0.92]}))
    far = with_products(of_frameworks({"torch": [0.90, 0.92, 0.91], "jax": [0.80, 0.82, 0.81]}))
    (agreeing,) = comparison.agreements(near)
    (differing,) = comparison.agreements(far)
    assert "no difference is found" in agreeing
    assert "they differ" in differing
    assert comparison.agreements(near[:1]) == []
    few = with_products(of_frameworks({"torch": [0.9], "jax": [0.9, 0.8]}))
    assert "undecided" in comparison.agreements(few)[0]


@pytest.mark.parametrize(
    ("one", "two"), [([1.0, 2.0, 4.0], [1.5, 1.0, 3.0, 2.0]), ([0, 1], [5, 7])]
)
def test_the_interval_of_two_samples_is_scipys(one, two):
    stats = pytest.importorskip("scipy.stats")
    found = comparison.unpaired(one, two)
    expected = stats.ttest_ind(one, two).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(expected.low)
    assert found.mean + found.half == pytest.approx(expected.high)


def test_the_claim_is_not_confirmed_where_a_method_is_missing():
    group = of_gaps(vanilla=(0.10, 0.11, 0.12), spectral=(0.05, 0.06, 0.07))
    found = verdict(group)
    assert found.word == "undecided"
    assert "decay or adversarial" in found.sentence


@pytest.mark.parametrize("change", [{"width": 0.25}, {"subset": 100}])
def test_the_papers_numbers_stand_beside_its_own_setting_alone(change):
    assert "paper" in table(groups([made()]))
    assert "paper" not in table(groups([made(**change)]))


def test_a_grid_shows_each_rate_and_what_diverged():
    runs = [
        made(rate=rate, tests=(0.1, test), validate=True, diverged=rate > 1)
        for rate, test in ((0.1, 0.9), (0.3, 0.95), (3.0, 0.1))
    ]
    text = page.block(runs, page.RESULTS)
    assert cells(text, 0)[-3:] == ["rate 0.1", "rate 0.3", "rate 3"]
    assert cells(text)[-3:] == [".900", "**.950**", "diverged"]
    assert groups(runs) == []
