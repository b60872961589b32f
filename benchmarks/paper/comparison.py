"""What runs of several seeds say about the methods, and how surely."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import cos, log10, pi, sin, sqrt, tan
from statistics import mean, stdev, variance

from benchmarks.gap import gap_at, threshold

from .results import PAPERS, STRENGTHS, Result, ResultsError

MODELS = {"vgg": "VGGNet", "nin": "NIN", "densenet-40": "DenseNet-40", "densenet-22": "DenseNet-22"}
DATA = {
    "digits": "digits",
    "fashion-mnist": "Fashion-MNIST",
    "cifar-10": "CIFAR-10",
    "cifar-100": "CIFAR-100",
    "stl-10": "STL-10",
}


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half of its 95 % interval, which one seed does not give."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        n = len(values)
        half = t_quantile(n - 1) * stdev(values) / sqrt(n) if n > 1 else None
        return cls(mean(values), half)

    @property
    def below(self) -> bool:
        """Whether all of it lies below zero."""
        return self.half is not None and self.mean + self.half < 0

    @property
    def above(self) -> bool:
        """Whether all of it lies above zero."""
        return self.half is not None and self.mean - self.half > 0


@dataclass(frozen=True)
class Network:
    """What is trained on what."""

    model: str
    data: str
    width: float
    framework: str
    subset: int | None = None

    @property
    def title(self) -> str:
        parts = [f"{MODELS.get(self.model, self.model)} {DATA.get(self.data, self.data)}"]
        parts += [f"width {self.width:g}"] if self.width != 1 else []
        parts += [self.framework] if self.framework != "torch" else []
        return ", ".join(parts)

    @property
    def is_papers(self) -> bool:
        """Whether it is as wide as the paper's, and sees as many images."""
        return self.width == 1 and self.subset is None

    @property
    def rank(self) -> tuple[int, int, float, str]:
        """In the order of the paper's Table 1."""
        return (place(self.model, MODELS), place(self.data, DATA), self.width, self.framework)


@dataclass(frozen=True)
class Group:
    """The runs that one row of Table 1 compares, by method, in the order of seeds."""

    network: Network
    batch: int
    runs: Mapping[str, Sequence[Result]]

    @property
    def title(self) -> str:
        return f"{self.network.title}, B = {self.batch}"

    def kept(self, method: str) -> list[Result]:
        """Those that did not diverge."""
        return [result for result in self.runs[method] if not result.diverged]

    @property
    def alpha(self) -> float | None:
        """The threshold of the paper's methods, or of those there are if none is the paper's.

        What is not in the paper's table does not set it: a method that fails would make a low
        one, at which any gap is small.
        """
        methods = [method for method in self.runs if method in PAPERS] or list(self.runs)
        best = [result.best for method in methods for result in self.kept(method)]
        return threshold(best) if best else None

    def accuracies(self, method: str) -> dict[int, float]:
        """On test data after the last epoch, by seed."""
        return {result.run.seed: result.epochs[-1]["test"] for result in self.kept(method)}

    def gaps(self, method: str) -> dict[int, float]:
        """At α, by seed, of the runs that exceed it."""
        alpha = self.alpha
        return {
            result.run.seed: gap_at(alpha, result.curve("train"), result.curve("test"))
            for result in self.kept(method)
            if alpha is not None and result.best > alpha
        }


@dataclass(frozen=True)
class Verdict:
    """Confirmed, refuted or undecided, and why."""

    word: str
    sentence: str


@dataclass(frozen=True)
class Pair:
    """The spectra that one seed left with the regularizer and without: how they differ."""

    title: str
    largest: tuple[float, float]  # σ₁ of all weights, spectral's and vanilla's
    lower: int  # the weights whose σ₁ is lower with the regularizer
    weights: int
    flatness: tuple[float, float]  # the mean over weights of ‖W‖_F²/σ₁²


def groups(results: Iterable[Result]) -> list[Group]:
    """In the order of Table 1. What was tested on held-out training images only chose settings.

    Raises
    ------
    ResultsError
        If two runs differ in what a row of the table does not show.
    """
    found: dict[tuple[Network, int], dict[str, list[Result]]] = defaultdict(dict)
    for result in sorted(results, key=lambda result: result.run.seed):
        run = result.run
        if not run.validate:
            network = Network(run.model, run.data, run.width, run.framework, run.subset)
            runs = found[network, run.batch].setdefault(run.method, [])
            if runs and runs[-1].run.seed == run.seed:
                raise ResultsError(f"two runs of {run.name} that cannot be told apart")
            runs.append(result)
    return [
        Group(
            network, batch, dict(sorted(runs.items(), key=lambda item: place(item[0], STRENGTHS)))
        )
        for (network, batch), runs in sorted(
            found.items(), key=lambda item: (item[0][0].rank, item[0][1])
        )
    ]


def large(found: Sequence[Group]) -> list[Group]:
    """The group of the largest batch, of each network that was trained at several."""
    by_network: dict[Network, list[Group]] = defaultdict(list)
    for group in found:
        by_network[group.network].append(group)
    return [sizes[-1] for sizes in by_network.values() if len(sizes) > 1]


def differences(group: Group) -> dict[str, Interval]:
    """Spectral's gap at α minus that of each other of the paper's methods, seed by seed."""
    gaps = {method: group.gaps(method) for method in group.runs if method in PAPERS}
    spectral, found = gaps.pop("spectral", {}), {}
    for method, other in gaps.items():
        if seeds := sorted(spectral.keys() & other.keys()):
            found[method] = Interval.of([spectral[seed] - other[seed] for seed in seeds])
    return found


def verdict(group: Group) -> Verdict:
    """Of the claim that spectral has the smallest gap: it must hold against every other method."""
    runs, found = group.runs.get("spectral", ()), differences(group)
    if lost := len(runs) - len(group.kept("spectral")):
        return _said("undecided", group, f"spectral diverged in {lost} of {len(runs)} runs")
    if not found:
        return _said("undecided", group, "spectral has no run to compare with another method's")
    worst = max(found, key=lambda method: _standing(found[method]))
    what = f"spectral's gap at α = {hundredths(group.alpha or 0)} is "
    what += f"{shown(Interval.of(list(group.gaps('spectral').values())))}, "
    against = f"{worst}'s by {shown(_size(found[worst]))}"
    if found[worst].above:
        return _said("refuted", group, f"{what}larger than {against}")
    if all(interval.below for interval in found.values()):
        if missing := [method for method in PAPERS if method not in (*found, "spectral")]:
            return _said("undecided", group, f"no run of {' or '.join(missing)} to compare with")
        return _said("confirmed", group, f"{what}smaller than every other; than {against}")
    than = "larger" if found[worst].mean > 0 else "smaller"
    why = "one seed gives no interval" if found[worst].half is None else "which may be chance"
    return _said("undecided", group, f"{what}{than} than {against}, {why}")


def _standing(interval: Interval) -> tuple[bool, bool, float]:
    """How far a difference is from what the claim needs."""
    return (interval.above, not interval.below, interval.mean)


def _size(interval: Interval) -> Interval:
    return Interval(abs(interval.mean), interval.half)


def _said(word: str, group: Group, why: str) -> Verdict:
    return Verdict(word, f"{group.title}: {word}, {why}.")


def pairs(found: Iterable[Group]) -> list[Pair]:
    """Spectral beside vanilla: runs of the same seed, hence from the same weights."""
    result = []
    for group in found:
        if {"spectral", "vanilla"} <= group.runs.keys():
            vanilla = {one.run.seed: one.spectra for one in group.kept("vanilla")}
            result += [
                _pair(f"{group.title}, seed {one.run.seed}", one.spectra, vanilla[one.run.seed])
                for one in group.kept("spectral")
                if vanilla.get(one.run.seed)
            ]
    return result


def _pair(
    title: str, spectral: Mapping[str, Sequence[float]], vanilla: Mapping[str, Sequence[float]]
) -> Pair:
    lower = [spectral[name][0] < values[0] for name, values in vanilla.items()]
    both = (spectral, vanilla)
    largest = [max(values[0] for values in spectra.values()) for spectra in both]
    flatness = [mean(stable_rank(values) for values in spectra.values()) for spectra in both]
    return Pair(title, (largest[0], largest[1]), sum(lower), len(lower), (flatness[0], flatness[1]))


def spectra_sentence(found: Sequence[Pair]) -> str:
    """In how many pairs the largest singular value is lower, and the spectrum flatter."""
    if not found:
        return ""
    lower = [pair for pair in found if pair.largest[0] < pair.largest[1]]
    flatter = [pair for pair in found if pair.flatness[0] > pair.flatness[1]]
    weights, total = sum(pair.lower for pair in found), sum(pair.weights for pair in found)
    ranks = [mean(pair.flatness[k] for pair in found) for k in (0, 1)]
    text = (
        "Beside vanilla from the same seed, spectral's largest singular value is lower in "
        f"{len(lower)} of {len(found)} runs (σ₁ of {weights} of {total} weights), and its spectrum "
        f"flatter in {len(flatter)} of {len(found)}: ‖W‖_F²/σ₁², averaged over the weights, is "
        f"{ranks[0]:.1f} instead of {ranks[1]:.1f}."
    )
    missed = [pair.title for pair in found if pair not in lower or pair not in flatter]
    return f"{text} Not so: {'; '.join(missed)}." if missed else text


def seeds_sentence(found: Iterable[Group]) -> str:
    """In how many rows spectral does better than vanilla from every seed, and in how many worse."""
    rows = {group.title: _beside_vanilla(group) for group in found}
    compared = {title: signs for title, signs in rows.items() if signs}
    if not compared:
        return ""
    better = [title for title, signs in compared.items() if signs == {1}]
    worse = [title for title, signs in compared.items() if signs == {-1}]
    names = f" ({'; '.join(better)})" if better else ""
    return (
        "From every seed spectral tests better than vanilla, with a smaller gap after the last "
        f"epoch, in {len(better)} of {len(compared)} rows{names}; worse, with a larger one, in "
        f"{len(worse)}."
    )


def _beside_vanilla(group: Group) -> set[int]:
    """Of the seeds: 1 for better in accuracy and gap, -1 for worse in both, 0 for neither."""
    if not {"spectral", "vanilla"} <= group.runs.keys():
        return set()
    ours, theirs = (
        {result.run.seed: result.epochs[-1] for result in group.kept(method)}
        for method in ("spectral", "vanilla")
    )
    signs = set()
    for seed in {result.run.seed for result in group.runs["spectral"]}:
        if seed not in ours or seed not in theirs:  # one of them diverged, or has not been run
            signs.add(0)
            continue
        test = ours[seed]["test"] - theirs[seed]["test"]
        gap = ours[seed]["train"] - theirs[seed]["train"] - test
        signs.add(1 if test > 0 > gap else -1 if test < 0 < gap else 0)
    return signs


def agreements(found: Iterable[Group]) -> list[str]:
    """Of groups that differ in their framework alone: a sentence for each method and measure."""
    by_network: dict[tuple[Network, int], list[Group]] = defaultdict(list)
    for group in found:
        by_network[replace(group.network, framework=""), group.batch].append(group)
    sentences = []
    for first, *others in by_network.values():
        for other in others:
            shared = [method for method in first.runs if method in other.runs]
            sentences += [_agreement(first, other, method) for method in shared]
    return sentences


def _agreement(first: Group, other: Group, method: str) -> str:
    measures = {
        "test accuracy": [list(group.accuracies(method).values()) for group in (first, other)],
        "train minus test accuracy": [_last_gaps(group, method) for group in (first, other)],
        "log₁₀ Π σ": [_log_products(group, method) for group in (first, other)],
    }
    names = f"{method}, {first.network.framework} minus {other.network.framework}"
    if any(len(values) < 2 for pair in measures.values() for values in pair):
        return f"{names}: undecided, too few runs."
    found = {name: unpaired(*pair) for name, pair in measures.items()}
    differs = any(interval.above or interval.below for interval in found.values())
    word = "they differ" if differs else "no difference is found"
    parts = ", ".join(f"{name} {shown(interval)}" for name, interval in found.items())
    return f"{names}: {word}: {parts}."


def _last_gaps(group: Group, method: str) -> list[float]:
    lasts = [result.epochs[-1] for result in group.kept(method)]
    return [line["train"] - line["test"] for line in lasts]


def _log_products(group: Group, method: str) -> list[float]:
    return [log10(result.epochs[-1]["sigma_product"]) for result in group.kept(method)]


def unpaired(one: Sequence[float], two: Sequence[float]) -> Interval:
    """The difference of two means of samples that have nothing to do with each other.

    Student's interval of equal variances; it takes two values of each.
    """
    difference, n, m = mean(one) - mean(two), len(one), len(two)
    if min(n, m) < 2:
        return Interval(difference, None)
    pooled = ((n - 1) * variance(one) + (m - 1) * variance(two)) / (n + m - 2)
    return Interval(difference, t_quantile(n + m - 2) * sqrt(pooled * (1 / n + 1 / m)))


def stable_rank(values: Sequence[float]) -> float:
    """‖W‖_F²/σ₁²: from 1, if one singular value is all, to their number, if all are equal."""
    return sum((value / values[0]) ** 2 for value in values) if values[0] else 0.0


def t_quantile(freedom: int) -> float:
    """Student's t that holds 95 % between −t and t.

    Without SciPy: README's numbers are tested where NumPy is all there is.
    """
    low, high = 0.0, pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < 0.95 else (low, middle)
    return sqrt(freedom) * tan(low)


def _within(theta: float, freedom: int) -> float:
    """Probability of |T| < √ν tan θ (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    term, total = cos(theta) if odd else 1.0, 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= (k - 1) / k * cos(theta) ** 2
    return 2 / pi * (theta + sin(theta) * total) if odd else sin(theta) * total


def points(value: float) -> str:
    """A share as the paper prints it: .898."""
    digits = f"{abs(value):.3f}"
    return ("−" if value < 0 and float(digits) else "") + digits.removeprefix("0")


def hundredths(alpha: float) -> str:
    """α as the paper prints it: .88."""
    return f"{alpha:.2f}".removeprefix("0")


def shown(interval: Interval) -> str:
    half = "" if interval.half is None else f" ±{points(interval.half)}"
    return points(interval.mean) + half


def place(name: str, known: Iterable[str]) -> int:
    """Among the known ones; others come last."""
    return [*known, name].index(name)
