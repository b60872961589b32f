"""Draw the norms of a report against depth, by Matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError
from .hdf5 import needed
from .texts import printable

if TYPE_CHECKING:
    from .result import Report, Row

_LABELS = {
    "sigma": "σ₁",
    "relative": "σ/√(o/i)",
    "frobenius": "‖W‖",
    "stable_rank": "stable rank",
    "ratio": "σ₂/σ₁",
    "convolution_upper": "norm of the convolution",
}
_LOGARITHMIC = 10.0  # ratio of the largest value to the smallest
_MOST_NAMED = 40  # matrices whose names fit below the axis
_LONGEST = 28  # characters of a name


def plot(report: Report, column: str = "sigma", ax: Any = None) -> Any:
    """Return the axes with one point a matrix, in file order: see `Report.plot`."""
    if column not in _LABELS:
        raise ArgumentError(f"column must be one of {', '.join(_LABELS)}, not {column!r}")
    if ax is None:
        pyplot = needed("matplotlib.pyplot", "report-plot")
        size = (8, 6) if len(report) <= _MOST_NAMED else (8, 4)  # inches, with room for names
        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    rows = list(enumerate(report.values(), start=1))
    outliers = set(report.outliers)
    groups: dict[str, list[tuple[int, float]]] = {"": [], "outlier": []}
    for i, row in rows:
        value = getattr(row, column)
        if value:  # neither missing nor zero, which a logarithmic axis does not have
            groups["outlier" if row.name in outliers else ""].append((i, value))
    for label, marker in (("", "o"), ("outlier", "D")):
        if groups[label]:
            ax.plot(*zip(*groups[label], strict=True), marker, label=label or _LABELS[column])
    bad = [i for i, row in rows if row.nonfinite or row.is_dead]
    if bad:
        # At the lower edge of the axes: such a matrix has no place on the scale.
        edge = ax.get_xaxis_transform()
        ax.plot(
            bad, [0.0] * len(bad), "xC3", transform=edge, clip_on=False, label="zero, NaN or Inf"
        )
    _finish(ax, [row for _, row in rows], [y for points in groups.values() for _, y in points])
    ax.set_ylabel(_LABELS[column])
    ax.set_title(printable(report.source), parse_math=False)
    return ax


def _finish(ax: Any, rows: list[Row], values: list[float]) -> None:
    """Choose the scale, and write the names: a dollar sign in one starts no formula."""
    if values and max(values) > _LOGARITHMIC * min(values):
        ax.set_yscale("log")
    ax.set_xlabel("matrix in file order")
    if len(rows) <= _MOST_NAMED:
        names = [_end(printable(row.name)) for row in rows]
        ax.set_xticks(range(1, len(rows) + 1), names, rotation=90, size="x-small", parse_math=False)
    if len(ax.get_lines()) > 1:
        ax.legend()


def _end(name: str) -> str:
    """Return the last characters of a name, which tell layers apart."""
    return name if len(name) <= _LONGEST else "…" + name[1 - _LONGEST :]
