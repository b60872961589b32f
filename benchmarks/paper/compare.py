"""What runs of several seeds say about the methods, and how surely."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log10, nan
from statistics import mean
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from .runs import PAPERS, STRENGTHS, Result, Run, RunError

MODELS = {"vgg": "VGGNet", "nin": "NIN", "densenet-40": "DenseNet-40", "densenet-22": "DenseNet-22"}
DATA = {
    "digits": "digits",
    "fashion-mnist": "Fashion-MNIST",
    "cifar-10": "CIFAR-10",
    "cifar-100": "CIFAR-100",
    "stl-10": "STL-10",
}


class Interval(NamedTuple):
    """A mean over seeds and half of its 95 % interval: NaN for one seed, so in no comparison."""

    mean: float
    half: float

    @property
    def below(self) -> bool:
        return self.mean + self.half < 0

    @property
    def above(self) -> bool:
        return self.mean - self.half > 0

    def __str__(self) -> str:
        return points(self.mean) + ("" if self.half != self.half else f" ±{points(self.half)}")


def interval(values: pd.Series) -> Interval:
    """Return Student's interval of a mean."""
    return Interval(values.mean(), float(stats.t.ppf(0.975, len(values) - 1)) * values.sem())


def unpaired(one: pd.Series, two: pd.Series) -> Interval:
    """Return Student's interval of the difference of two means."""
    low, high = stats.ttest_ind(one, two).confidence_interval(0.95)
    return Interval(one.mean() - two.mean(), float(high - low) / 2)


@dataclass(frozen=True)
class Group:
    """The runs that one row of Table 1 compares, a row each: method, seed and what they left."""

    run: Run  # one of them: all are of the same network and batch
    runs: pd.DataFrame
    alpha: float  # NaN where all diverged

    @property
    def network(self) -> str:
        return network(self.run)

    @property
    def title(self) -> str:
        return f"{self.network}, B = {self.run.batch}"

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(self.runs["method"]))

    @property
    def kept(self) -> pd.DataFrame:
        """The runs that did not diverge."""
        return self.runs[~self.runs["diverged"]]

    @property
    def at_chance(self) -> int:
        """How many runs of the paper's methods never tested twice as well as guessing."""
        classes = 100 if self.run.data == "cifar-100" else 10
        kept = self.kept[self.kept["method"].isin(PAPERS)]
        return int((kept["best"] < 2 / classes).sum())

    def lost(self, method: str) -> tuple[int, int]:
        """Return how many of the method's runs diverged, and how many there are."""
        diverged = self.runs["diverged"][self.runs["method"] == method]
        return int(diverged.sum()), len(diverged)

    def values(self, column: str) -> pd.DataFrame:
        """Return a row for each seed and a column for each method; NaN where a run diverged."""
        wide = self.kept.pivot(index="seed", columns="method", values=column)
        return wide.reindex(index=sorted(set(self.runs["seed"])), columns=self.methods)


def network(run: Run) -> str:
    parts = [f"{MODELS.get(run.model, run.model)} {DATA.get(run.data, run.data)}"]
    parts += [f"width {run.width:g}"] if run.width != 1 else []
    return ", ".join(parts + [run.framework] * (run.framework != "torch"))


def groups(results: Iterable[Result]) -> list[Group]:
    """Return the rows of Table 1, in its order; runs tested on held-out images only chose settings.

    Raises `RunError` if two runs differ in what a row of the table does not show.
    """
    rows = pd.DataFrame(described(one) for one in results if not one.run.validate)
    if rows.empty:
        return []
    rows = rows.sort_values(["place", "batch", "rank", "seed"])
    found = []
    for _, runs in rows.groupby(["place", "batch"], sort=False):
        if (twice := runs.duplicated(["method", "seed"])).any():
            name = runs["result"][twice].iloc[0].run.name
            raise RunError(f"{name} and another run belong into the same cell of the table")
        alpha = threshold(runs)
        gaps = [gap_at(alpha, result) for result in runs["result"]]
        found.append(Group(runs["result"].iloc[0].run, runs.assign(gap=gaps), alpha))
    return found


def described(result: Result) -> dict[str, Any]:
    """Return a row for the run: what identifies it, and what it left."""
    run = result.run
    order = (place(run.model, MODELS), place(run.data, DATA), run.width, run.framework)
    row = {
        "place": (*order, run.subset or 0),
        "batch": run.batch,
        "rank": place(run.method, STRENGTHS),
        "method": run.method,
        "seed": run.seed,
        "diverged": result.diverged,
        "result": result,
    }
    if result.diverged:
        return row | dict.fromkeys(("best", "test", "last_gap", "log_product"), nan)
    test, product = result.last("test"), result.curve("sigma_product")
    return row | {
        "best": max(result.curve("test").values()),
        "test": test,
        "last_gap": result.last("train") - test,
        "log_product": log10([*product.values()][-1]) if product else nan,
    }


def threshold(runs: pd.DataFrame) -> float:
    """Return α: the highest hundredth below every run's best test accuracy.

    Methods outside the paper's table do not set it, unless there are no others: one that fails
    would make a low threshold, at which any gap is small.
    """
    of_paper = runs["method"].isin(PAPERS)
    kept = (runs[of_paper] if of_paper.any() else runs).query("not diverged")
    # Rounded: 100 * 0.55 is a little above 55, and would make 0.55 its own threshold.
    return nan if kept.empty else (ceil(round(100 * kept["best"].min(), 6)) - 1) / 100


def gap_at(alpha: float, result: Result) -> float:
    """Return the least train minus test accuracy among the epochs that test better than α."""
    train, test = result.curve("train"), result.curve("test")
    gaps = [train[epoch] - test[epoch] for epoch in test if test[epoch] > alpha]
    return nan if result.diverged else min(gaps, default=nan)


def large(found: Sequence[Group]) -> list[Group]:
    """Return the group of the largest batch, of each network that was trained at several."""
    networks = dict.fromkeys(group.network for group in found)
    sizes = [[group for group in found if group.network == name] for name in networks]
    return [groups[-1] for groups in sizes if len(groups) > 1]


def verdict(group: Group) -> str:
    """Judge the claim that spectral has the smallest gap: it must hold against every method."""
    lost, runs = group.lost("spectral")
    if lost:
        return f"undecided, spectral diverged in {lost} of {runs} runs."
    if group.at_chance:
        return f"undecided, {group.at_chance} runs never left chance."
    gaps = group.values("gap")
    others = [method for method in gaps if method in PAPERS and method != "spectral"]
    # Spectral's gap minus the other's, paired by seed.
    found = {name: interval((gaps["spectral"] - gaps[name]).dropna()) for name in others}
    found = {name: each for name, each in found.items() if each.mean == each.mean}
    if not found:
        return "undecided, spectral has no run to compare with another method's."
    # The one that speaks most against the claim.
    worst = max(
        found, key=lambda name: (found[name].above, not found[name].below, found[name].mean)
    )
    own = interval(gaps["spectral"].dropna())
    what = f"spectral's gap at α = {hundredths(group.alpha)} is {own}, "
    against = f"{worst}'s by {found[worst]._replace(mean=abs(found[worst].mean))}"
    if found[worst].above:
        return f"refuted, {what}larger than {against}."
    if all(each.below for each in found.values()):
        if missing := [name for name in PAPERS if name not in gaps]:
            return f"undecided, no run of {' or '.join(missing)} to compare with."
        return f"confirmed, {what}smaller than every other; than {against}."
    than = "larger" if found[worst].mean > 0 else "smaller"
    one = found[worst].half != found[worst].half
    why = "one seed gives no interval" if one else "which may be chance"
    return f"undecided, {what}{than} than {against}, {why}."


def better_seeds(group: Group) -> tuple[bool, bool] | None:
    """Return whether spectral is better than vanilla in accuracy and gap from every seed, or worse.

    None if there is nothing to compare.
    """
    if not {"spectral", "vanilla"} <= {*group.methods} or group.at_chance:
        return None
    test, gap = (
        wide["spectral"] - wide["vanilla"]
        for wide in (group.values("test"), group.values("last_gap"))
    )
    return bool(((test > 0) & (gap < 0)).all()), bool(((test < 0) & (gap > 0)).all())


def spectra_compared(found: Iterable[Group]) -> pd.DataFrame:
    """Return a row for each seed of spectral: its spectra and vanilla's from the same weights."""
    rows = []
    for group in found:
        kept = {(one.run.method, one.run.seed): one.spectra for one in group.kept["result"]}
        for (method, seed), ours in kept.items():
            theirs = kept.get(("vanilla", seed))
            if method == "spectral" and ours and theirs:
                lower = [values[0] < theirs[name][0] for name, values in ours.items()]
                largest = [max(values[0] for values in one.values()) for one in (ours, theirs)]
                rows.append(
                    {
                        "title": f"{group.title}, seed {seed}",
                        "lower": largest[0] < largest[1],
                        "lower weights": sum(lower),
                        "weights": len(lower),
                        "rank": mean(map(stable_rank, ours.values())),
                        "vanilla's rank": mean(map(stable_rank, theirs.values())),
                    }
                )
    return pd.DataFrame(rows)


def agreements(found: Iterable[Group]) -> list[str]:
    """Return a sentence for each method in groups that differ in their framework only."""
    columns = {
        "test accuracy": "test",
        "train minus test accuracy": "last_gap",
        "log₁₀ Π σ": "log_product",
    }
    sentences, firsts = [], {}
    for group in found:
        name = (group.title.replace(f", {group.run.framework}", ""), group.run.subset)
        first = firsts.setdefault(name, group)
        for method in first.methods if first is not group else ():
            names = f"{method}, {first.run.framework} minus {group.run.framework}"
            both = [
                [each.values(column).get(method, pd.Series()).dropna() for each in (first, group)]
                for column in columns.values()
            ]
            if any(len(values) < 2 for pair in both for values in pair):
                sentences.append(f"{names}: undecided, too few runs.")
                continue
            intervals = dict(zip(columns, (unpaired(*pair) for pair in both), strict=True))
            differs = any(each.above or each.below for each in intervals.values())
            word = "they differ" if differs else "no difference is found"
            parts = ", ".join(f"{name} {each}" for name, each in intervals.items())
            sentences.append(f"{names}: {word}: {parts}.")
    return sentences


def stable_rank(values: Sequence[float]) -> float:
    """Return ‖W‖_F²/σ₁²: 1 if one singular value is all, their number if all are equal."""
    return sum((value / values[0]) ** 2 for value in values) if values[0] else 0.0


def points(value: float) -> str:
    """Return a share as the paper prints it: .898."""
    digits = f"{abs(value):.3f}"
    return ("−" if value < 0 and float(digits) else "") + digits.removeprefix("0")


def hundredths(alpha: float) -> str:
    return f"{alpha:.2f}".removeprefix("0")


def place(name: str, known: Iterable[str]) -> int:
    """Return the place among the known names; others come last."""
    return [*known, name].index(name)
