"""What runs of several seeds say about the methods, and how surely."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, isnan, log10, nan
from statistics import mean
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from .runs import DATA, MODELS, PAPERS, STRENGTHS, Result, Run, RunError

MEASURES = {"test accuracy": "test", "train minus test accuracy": "last_gap"}
MEASURES |= {"log₁₀ Π σ": "log_product"}
COLUMNS = ("best", *MEASURES.values(), "gradient", "hessian", "nll", "ece", "bound", "log_norms")

Spectra = Mapping[str, tuple[float, float]]  # σ₁ and ‖W‖_F²/σ₁² by weight


class Interval(NamedTuple):
    """A mean over seeds and half of its 95 % interval: NaN for one seed, so in no comparison."""

    mean: float
    half: float

    @property
    def sign(self) -> int:
        """1 if the whole interval is above 0, −1 if it is below, else 0."""
        return int(self.mean - self.half > 0) - int(self.mean + self.half < 0)

    def __str__(self) -> str:
        return points(self.mean) + ("" if isnan(self.half) else f" ±{points(self.half)}")


def interval(values: pd.Series, comparisons: int = 1) -> Interval:
    """Return Student's interval of a mean, wide enough for so many of them to hold together."""
    tail = 0.025 / comparisons
    return Interval(values.mean(), -float(stats.t.ppf(tail, len(values) - 1)) * values.sem())


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
        run = self.run
        parts = [f"{MODELS.get(run.model, run.model)} {DATA.get(run.data, run.data)}"]
        parts += [f"width {run.width:g}"] * (run.width != 1)
        parts += [f"{run.subset} images"] * (run.subset is not None)
        return ", ".join(parts + [run.framework] * (run.framework != "torch"))

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

    @property
    def seeds(self) -> int:
        """The least number of runs that a method of the paper has."""
        counts = self.runs["method"].value_counts()
        return int(counts[counts.index.isin(PAPERS)].min())

    def lost(self, method: str) -> tuple[int, int]:
        """Return how many of the method's runs diverged, and how many there are."""
        diverged = self.runs["diverged"][self.runs["method"] == method]
        return int(diverged.sum()), len(diverged)

    def values(self, column: str) -> pd.DataFrame:
        """Return a row for each seed and a column for each method; NaN where a run diverged."""
        if column not in self.runs:
            return pd.DataFrame(columns=self.methods, dtype=float)
        wide = self.kept.pivot(index="seed", columns="method", values=column)
        return wide.reindex(index=sorted(set(self.runs["seed"])), columns=self.methods)


def groups(results: Iterable[Result]) -> list[Group]:
    """Return the rows of Table 1, in its order, without the runs that only chose settings."""
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
    row = {"place": (*order, run.subset or 0), "rank": place(run.method, STRENGTHS)}
    row |= {**asdict(run), "diverged": result.diverged, "result": result}
    return row | (dict.fromkeys(COLUMNS, nan) if result.diverged else numbers(result))


def numbers(result: Result) -> dict[str, float]:
    """Return the numbers that methods are compared by; NaN for what was not measured."""
    final, test = result.final, result.last("test")
    found = dict.fromkeys(COLUMNS, nan) | {"best": max(result.curve("test").values())}
    # Rounded: a difference of decimals is not one, and would differ from an equal one.
    found |= {"test": test, "last_gap": round(result.last("train") - test, 6)}
    for name, curve in {"gradient": "test_gradient", "hessian": "test_hessian"}.items():
        found |= {name: result.last(curve)} if result.curve(curve) else {}
    if result.curve("sigma_product"):
        found["log_product"] = log10(result.last("sigma_product"))
    found |= {key: final[key] for key in ("gradient", "nll", "ece", "bound") if key in final}
    for key in ("noise", "one_step", "ten_steps"):
        found |= {f"{key} {k}": value for k, value in enumerate(final.get(key, ()))}
    if norms := [norm for *_, norm in final.get("layers", {}).values()]:
        found["log_norms"] = sum(map(log10, norms))
    return found


def threshold(runs: pd.DataFrame) -> float:
    """Return α: the highest hundredth below the best test accuracy of every method of the paper.

    Another method that fails would make a low threshold, at which any gap is small.
    """
    of_paper = runs["method"].isin(PAPERS)
    kept = (runs[of_paper] if of_paper.any() else runs).query("not diverged")
    # Rounded: 100 * 0.55 is a little above 55, and would make 0.55 its own threshold.
    return nan if kept.empty else (ceil(round(100 * kept["best"].min(), 6)) - 1) / 100


def gap_at(alpha: float, result: Result) -> float:
    """Return the least train minus test accuracy among the epochs that test better than α."""
    train, test = result.curve("train"), result.curve("test")
    gaps = [round(train[epoch] - test[epoch], 6) for epoch in test if test[epoch] > alpha]
    return nan if result.diverged else min(gaps, default=nan)


def verdict(group: Group) -> str:
    """Judge the claim that spectral has the smallest gap: it must hold against every method."""
    lost, runs = group.lost("spectral")
    if lost:
        return f"undecided, spectral diverged in {lost} of {runs} runs."
    if group.at_chance:
        return f"undecided, {group.at_chance} runs never left chance."
    gaps = group.values("gap")
    # Spectral's gap minus the other's, paired by seed.
    pairs = {name: (gaps["spectral"] - gaps[name]).dropna() for name in gaps if name in PAPERS}
    pairs = {name: one for name, one in pairs.items() if len(one) and name != "spectral"}
    # Each may refute the claim, so the intervals must hold together.
    found = {name: interval(one, len(pairs)) for name, one in pairs.items()}
    if not found:
        return "undecided, spectral has no run to compare with another method's."
    # The one that speaks most against the claim.
    name, worst = max(found.items(), key=lambda it: (it[1].sign, it[1].mean))
    own = interval(gaps["spectral"].dropna())
    what = f"spectral's gap at α = {hundredths(group.alpha)} is {own}, "
    against = f"{name}'s by {worst._replace(mean=abs(worst.mean))}"
    if worst.sign > 0:
        return f"refuted, {what}larger than {against}."
    if all(each.sign < 0 for each in found.values()):
        if missing := [name for name in PAPERS if name not in gaps]:
            return f"undecided, no run of {' or '.join(missing)} to compare with."
        return f"confirmed, {what}smaller than every other; than {against}."
    than = "larger" if worst.mean > 0 else "smaller"
    why = "one seed gives no interval" if isnan(worst.half) else "which may be chance"
    return f"undecided, {what}{than} than {against}, {why}."


def spectra_compared(found: Iterable[Group]) -> pd.DataFrame:
    """Return a row for each seed of spectral: its spectra and vanilla's from the same weights."""
    rows = []
    for group in found:
        if group.at_chance:
            continue
        kept = {(one.run.method, one.run.seed): summary(one) for one in group.kept["result"]}
        for (method, seed), ours in kept.items():
            theirs = kept.get(("vanilla", seed))
            if method == "spectral" and ours and theirs:
                rows.append({"title": f"{group.title}, seed {seed}", **flattened(ours, theirs)})
    return pd.DataFrame(rows)


def summary(result: Result) -> Spectra:
    """Return σ₁ and ‖W‖_F²/σ₁² of each weight."""
    if layers := result.final.get("layers"):
        return {name: (sigma, rank) for name, (sigma, rank, _) in layers.items()}
    return {name: (some[0], stable_rank(some)) for name, some in result.spectra.items()}


def flattened(ours: Spectra, theirs: Spectra) -> dict[str, Any]:
    """Compare two networks' largest singular values, and how flat their spectra are."""
    lower = [sigma < theirs[name][0] for name, (sigma, _) in ours.items()]
    largest, base = (max(sigma for sigma, _ in one.values()) for one in (ours, theirs))
    ranks = [mean(rank for _, rank in one.values()) for one in (ours, theirs)]
    found = {"lower": largest < base, "lower_weights": sum(lower), "weights": len(lower)}
    return found | {"rank": ranks[0], "vanilla": ranks[1], "flatter": ranks[0] > ranks[1]}


def agreements(found: Iterable[Group]) -> list[str]:
    """Return a sentence for each method in groups that differ in their framework only."""
    sentences, firsts = [], {}
    for group in found:
        name = (group.title.replace(f", {group.run.framework}", ""), group.run.subset)
        if group.at_chance:
            continue
        first = firsts.setdefault(name, group)
        for method in first.methods if first is not group else ():
            names = f"{method}, {first.run.framework} minus {group.run.framework}"
            both = [
                [each.values(column).get(method, pd.Series()).dropna() for each in (first, group)]
                for column in MEASURES.values()
            ]
            if any(len(values) < 2 for pair in both for values in pair):
                sentences.append(f"{names}: undecided, too few runs.")
                continue
            intervals = dict(zip(MEASURES, (unpaired(*pair) for pair in both), strict=True))
            differs = any(each.sign for each in intervals.values())
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
