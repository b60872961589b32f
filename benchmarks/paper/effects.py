"""Spectral against the other methods: paired by seed, and corrected for how many tests are made."""

from collections.abc import Iterator, Sequence
from math import isnan
from typing import NamedTuple

import pandas as pd
from scipy import stats

from benchmarks.common import markdown

from .compare import Group, Interval, interval, place, points
from .measure import NOISES, SIZES
from .runs import STRENGTHS

LEVEL = 0.05  # of all comparisons of one row together
FEWEST = 3  # seeds: the spread of two says little


class Measure(NamedTuple):
    """A column of the runs: its name on the page, and whether more of it is better.

    ``better`` is 0 for what the regularizer changes by itself: it is shown, and no comparison.
    """

    title: str
    column: str
    better: int

    def text(self, value: float, sign: str = "") -> str:
        """Return an accuracy as the paper prints it, anything else with three digits."""
        if self.column in ACCURACIES:
            text = points(value)
            return f"+{text}" if sign and not text.startswith("−") else text
        return f"{value:{sign}.3g}".replace("-", "−")


PERTURBED = {f"accuracy, noise of s.d. {level:g}": ("noise", k) for k, level in enumerate(NOISES)}
for _kind, _name in {"one_step": "one step", "ten_steps": "ten steps"}.items():
    PERTURBED |= {f"accuracy, {_name} of {s:g}": (_kind, k) for k, s in enumerate(SIZES)}
MEASURES = [Measure("test accuracy", "test", 1), Measure("train − test accuracy", "last_gap", -1)]
MEASURES += [Measure(title, f"{key} {k}", 1) for title, (key, k) in PERTURBED.items()]
ACCURACIES = {each.column for each in MEASURES}
MEASURES += [
    Measure("‖∇ₓ loss‖₂ on test images", "gradient", -1),
    Measure("largest eigenvalue of the Hessian, test", "hessian", -1),
    Measure("mean loss on test images", "nll", -1),
    Measure("calibration error", "ece", -1),
    Measure("log₁₀ Π σ", "log_product", 0),
    Measure("log₁₀ Π norms as maps", "log_norms", 0),
    Measure("log₁₀ Lipschitz bound", "bound", 0),
]


class Effect(NamedTuple):
    """Spectral minus another method: an interval, and 1 if surely better, −1 if worse, else 0."""

    measure: Measure
    other: str
    difference: Interval
    sign: int


def effects(group: Group, ours: str = "spectral") -> list[Effect]:
    """Compare in all measures with all methods that ran from the same seeds.

    By paired t-tests. Holm's method holds the probability of one wrong sign in the group to 5 %.
    """
    found = []
    for measure in MEASURES:
        wide = group.values(measure.column)
        for other in wide if ours in wide else ():
            # Rounded: what is equal in the results must not differ by a rounding error.
            pairs = (wide[ours] - wide[other]).dropna().round(6)
            if other != ours and len(pairs):
                found.append((measure, other, pairs))
    tested = [
        k for k, (measure, _, pairs) in enumerate(found) if measure.better and len(pairs) >= FEWEST
    ]
    sure = dict(zip(tested, holm([chance(found[k][2]) for k in tested]), strict=True))
    return [
        Effect(measure, other, span := interval(pairs), sure.get(k, False) * side(span, measure))
        for k, (measure, other, pairs) in enumerate(found)
    ]


def side(span: Interval, measure: Measure) -> int:
    return measure.better * (1 if span.mean > 0 else -1)


def chance(pairs: pd.Series) -> float:
    """Return the p-value of a paired t-test."""
    # Accuracies are counts of images, so equal differences are luck, and no proof of no spread.
    return 1.0 if pairs.nunique() == 1 else float(stats.ttest_1samp(pairs, 0.0).pvalue)


def holm(chances: Sequence[float]) -> list[bool]:
    """Return which are significant together (Holm, 1979)."""
    order = sorted(range(len(chances)), key=chances.__getitem__)
    found = [False] * len(chances)
    for rank, k in enumerate(order):
        if chances[k] > LEVEL / (len(chances) - rank):
            break
        found[k] = True
    return found


def table(group: Group) -> str:
    """Return means by method, and spectral's differences: ✓ surely better, ✗ surely worse."""
    found, lines = effects(group), []
    methods = sorted(group.methods, key=lambda method: place(method, STRENGTHS))
    others = [method for method in methods if method in {each.other for each in found}]
    for measure in MEASURES:
        values = group.values(measure.column)
        if values.isna().all(axis=None):
            continue
        means = [values[method].mean() for method in methods]
        cells = ["–" if isnan(mean) else measure.text(mean) for mean in means]
        by_other = {each.other: each for each in found if each.measure == measure}
        cells += [cell(by_other[other]) if other in by_other else "–" for other in others]
        lines.append([measure.title, *cells])
    header = [group.title, *methods, *(f"spectral − {other}" for other in others)]
    return markdown(header, lines)


def cell(effect: Effect) -> str:
    span, text = effect.difference, effect.measure.text
    half = "" if isnan(span.half) else f" ±{text(span.half)}"
    return text(span.mean, "+") + half + {1: " ✓", -1: " ✗", 0: ""}[effect.sign]


def sentences(group: Group) -> Iterator[str]:
    """Say against each method where spectral is surely better, and where it is worse."""
    by_other: dict[str, list[Effect]] = {}
    for each in effects(group):
        if each.measure.better:
            by_other.setdefault(each.other, []).append(each)
    for other, found in by_other.items():
        counts = [sum(each.sign == sign for each in found) for sign in (1, -1)]
        seeds = len(group.values("test")[["spectral", other]].dropna())
        text = "better in {} and worse in {} of {} measures".format(*counts, len(found))
        worse = "; ".join(each.measure.title for each in found if each.sign < 0)
        text += f" (worse: {worse})" if worse else ""
        few = (
            f", {seeds} seeds" if seeds >= FEWEST else f"; fewer than {FEWEST} seeds decide nothing"
        )
        yield f"{group.title}, spectral against {other}: {text}{few}."
