"""The report: one row a matrix, what was skipped and why, and numbers about the whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from math import log10
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .._select import numbered
from .matrix import Spectrum
from .spectrum import sparkline
from .texts import above, aligned, as_csv, first, interval, number, printable

if TYPE_CHECKING:
    from .drift import Drift

Named = TypeVar("Named", "Row", "Drift")
_SHOWN = (
    "name",
    "matrix",
    "layout",
    "σ₁",
    "interval",
    "σ₂/σ₁",
    "‖W‖",
    "rank",
    "σ/√(o/i)",
    "conv",
    "",
)
_FEWEST = 8  # matrices from which on outliers mean anything
_FAR = 4.0  # robust standard deviations of log σ/√(o/i)
_LEAST = log10(2.0)  # layers of equal norms have no spread: half and double are no outliers yet


@dataclass(frozen=True)
class Row:
    """The measurements of one matrix; missing ones are None.

    ``relative`` is σ/√(rows/columns), which is about the same for all layers of a network whose
    features keep their size (Yang, Simon & Bernstein 2023). ``convolution_lower`` and
    ``convolution_upper`` bound the norm of a convolution as a map of images of any size.
    ``spectrum`` has all singular values in falling order. For a large matrix it is a dict: "values"
    from 0 to a little more than the largest one, and their "density" there, with the integral 1.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    guessed: bool
    rows: int
    columns: int
    sigma: float | None
    lower: float | None
    upper: float | None
    method: str
    ratio: float | None
    frobenius: float | None
    stable_rank: float | None
    relative: float | None
    convolution_lower: float | None
    convolution_upper: float | None
    largest: float | None
    zeros: float
    dead_rows: int
    dead_columns: int
    nonfinite: int
    note: str = ""
    spectrum: Spectrum | None = None

    @property
    def is_dead(self) -> bool:
        """Return True if the matrix is zero."""
        return self.zeros == 1.0

    def problems(self) -> str:
        """Return what is wrong with the matrix, or ""."""
        if self.nonfinite:
            return f"{self.nonfinite:,} NaN or Inf"
        if self.is_dead:
            return "zero"
        dead = [(self.dead_rows, "dead outputs"), (self.dead_columns, "dead inputs")]
        return ", ".join(f"{count:,} {what}" for count, what in dead if count)


@dataclass(frozen=True)
class HeadNorms:
    """Norms of the heads of an attention layer, in one matrix or product.

    ``part`` is "W_q", "W_k", "W_v", "W_o", "W_qᵀW_k" or "W_oW_v". ``rows`` and ``columns`` are
    those of one head's matrix. ``sigma``, ``lower`` and ``upper`` have an element a head: σ₁ and
    its bounds, or None where a number is not finite. Queries that share keys have one head of keys.
    """

    layer: str
    part: str
    rows: int
    columns: int
    sigma: tuple[float | None, ...]
    lower: tuple[float | None, ...]
    upper: tuple[float | None, ...]


class Report(Mapping[str, Row]):
    """What `report` returns: a mapping of the name of each matrix to its `Row`.

    Parameters
    ----------
    source : str
        What was read.
    rows : iterable of Row
    skipped : mapping of name to str
        The reason why each other tensor is not measured.
    nonfinite : mapping of name to int
        Number of NaN and Inf in vectors, such as biases.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> report = sc.report({"w": np.diag([4.0, 2.0, 1.0])})
    >>> round(report["w"].sigma, 10), report["w"].ratio, report.skipped
    (4.0, 0.5, {})
    """

    columns: ClassVar[tuple[str, ...]] = _SHOWN

    def __init__(
        self,
        source: str,
        rows: list[Row],
        skipped: Mapping[str, str],
        nonfinite: Mapping[str, int] | None = None,
    ) -> None:
        self.source = source
        self._rows = by_name(rows)
        self.skipped = dict(skipped)
        self.nonfinite = dict(nonfinite or {})
        self.heads: list[HeadNorms] = []
        self.without_heads: dict[str, str] = {}

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def sigma(self) -> dict[str, float | None]:
        """The largest singular value of each matrix."""
        return {name: row.sigma for name, row in self.items()}

    @property
    def log10_product(self) -> float | None:
        """The sum of log₁₀ σ₁ over all matrices that are finite and not zero."""
        found = [log10(row.sigma) for row in self.values() if row.sigma]
        return sum(found) if found else None

    @property
    def largest(self) -> str | None:
        """The name of the matrix with the largest σ₁."""
        found = {name: row.sigma for name, row in self.items() if row.sigma is not None}
        return max(found, key=lambda name: found[name] or 0.0) if found else None

    @property
    def outliers(self) -> list[str]:
        """Names of matrices whose σ/√(o/i) is far from the median of all, on a logarithmic scale.

        Far is four robust standard deviations (1.4826 times the median absolute deviation), and a
        factor of two at least. Fewer than eight matrices have no outliers.
        """
        logs = {name: log10(row.relative) for name, row in self.items() if row.relative}
        if len(logs) < _FEWEST:
            return []
        middle = median(logs.values())
        spread = 1.4826 * median(abs(x - middle) for x in logs.values())
        far = max(_FAR * spread, _LEAST)
        return [name for name, x in logs.items() if abs(x - middle) > far]

    def above(self, bound: float) -> list[str]:
        """Return the names of matrices whose σ₁, or norm as a convolution, may exceed a bound.

        A matrix that is not finite exceeds every bound.
        """
        return [
            name
            for name, row in self.items()
            if row.upper is None or max(row.upper, row.convolution_upper or 0.0) > bound
        ]

    def summary(self) -> dict[str, Any]:
        """Return the numbers about the whole."""
        return {
            "source": self.source,
            "matrices": len(self),
            "skipped": len(self.skipped),
            "log10_product": self.log10_product,
            "largest": self.largest,
            "outliers": self.outliers,
            "nonfinite": [name for name, row in self.items() if row.nonfinite]
            + list(self.nonfinite),
            "dead": [name for name, row in self.items() if row.is_dead],
        }

    def to_json(self) -> str:
        """Return the report as JSON: "summary", "matrices", "skipped", and "heads" if measured."""
        content = {
            "summary": self.summary(),
            "matrices": [asdict(row) for row in self.values()],
            "skipped": self.skipped,
        }
        if self.heads or self.without_heads:
            content["heads"] = [asdict(head) for head in self.heads]
            content["without_heads"] = self.without_heads
        return json.dumps(content, indent=2, allow_nan=False)

    def to_csv(self) -> str:
        """Return one line a matrix, after a line of names."""
        columns = [field.name for field in fields(Row) if field.name != "spectrum"]
        return as_csv([asdict(row) for row in self.values()], columns)

    def to_pandas(self) -> Any:
        """Return a DataFrame with one row a matrix. It needs pandas."""
        pandas = import_module("pandas")
        return pandas.DataFrame([asdict(row) for row in self.values()]).set_index("name")

    def cells(self, top: int | None = None) -> list[tuple[str, ...]]:
        """Return the table as text, a tuple a row: all, or the ``top`` largest σ₁."""
        rows = list(self.values())
        if top is not None:
            rows = sorted(rows, key=lambda row: -(row.sigma or 0.0))[:top]
        outliers = set(self.outliers)
        return [_cells(row, row.name in outliers) for row in rows]

    def footer(self) -> list[str]:
        """Return the sentences below the table, after the lines of the heads."""
        found = self.summary()
        lines = [f"{len(self):,} matrices; {len(self.skipped):,} tensors are skipped"]
        if self.log10_product is not None:
            lines[0] += f"; log₁₀ Πσ = {self.log10_product:.2f}; the largest σ₁ is {self.largest}"
        for key, what in (
            ("nonfinite", "NaN or Inf in"),
            ("dead", "Zero"),
            ("outliers", "Outliers"),
        ):
            if found[key]:
                lines.append(f"{what}: {first(found[key])}")
        if any(row.guessed for row in self.values()):
            lines.append("? after a layout: guessed. Correct it by --layout PATTERN=AXES.")
        return lines + head_lines(self.heads, self.without_heads)

    def table(self, top: int | None = None) -> str:
        """Return the table as plain text."""
        text = aligned([_SHOWN, *self.cells(top)])
        return "\n".join(map(printable, (self.source, *text, *self.footer())))

    def __repr__(self) -> str:
        return self.table()

    def to_html(self) -> str:
        """Return one page that loads nothing: a table to sort and search, and plots.

        It needs Jinja2. Equal reports give equal pages: there is no date in it.

        Examples
        --------
        >>> import numpy as np
        >>> import spectral_core as sc
        >>> page = sc.report({"w": np.eye(2)}).to_html()
        >>> page.startswith("<!DOCTYPE html>"), page.count('<th scope="row">')
        (True, 1)
        """
        from .page import page

        return page(self)

    def plot(self, column: str = "sigma", *, ax: Any = None) -> Any:
        """Draw one number of each matrix against depth, in file order, and return the axes.

        It needs Matplotlib. The scale is logarithmic where the values differ tenfold.

        Parameters
        ----------
        column : str
            "sigma", "relative", "frobenius", "stable_rank", "ratio" or "convolution_upper": see
            `Row`.
        ax : matplotlib.axes.Axes, optional
            Axes to draw into, instead of a new figure.

        Raises
        ------
        SpectralError
            If Matplotlib is not installed, or ``column`` is another name.
        """
        from .plot import plot

        return plot(self, column, ax)

    def _repr_html_(self) -> str:
        from .page import fragment

        return fragment(self)


def _cells(row: Row, is_outlier: bool) -> tuple[str, ...]:
    line = "" if row.spectrum is None else sparkline(row.spectrum)
    notes = [row.problems(), "outlier" if is_outlier else "", row.note, line]
    return (
        row.name,
        f"{row.rows}×{row.columns}",
        row.layout + "?" * row.guessed,
        number(row.sigma),
        interval(row.lower, row.upper, row.method),
        number(row.ratio, 3),
        number(row.frobenius),
        number(row.stable_rank, 3),
        number(row.relative),
        above(row.convolution_upper),
        "; ".join(note for note in notes if note),
    )


def by_name(rows: Iterable[Named]) -> dict[str, Named]:
    """Return rows by name. One whose name occurred before gets a number, so that none is lost.

    A file may hold the tensor "w[0]" beside a stack "w", whose first matrix has that name.
    """
    rows = list(rows)
    names = numbered(row.name for row in rows)
    return {
        name: row if row.name == name else replace(row, name=name)
        for name, row in zip(names, rows, strict=True)
    }


def head_lines(heads: list[HeadNorms], left_out: Mapping[str, str]) -> list[str]:
    """Return a line for each part of an attention layer: the smallest, median and largest σ₁."""
    lines = []
    for head in heads:
        known = [x for x in head.sigma if x is not None]
        if known:
            most = max(known)
            numbers = (number(x) for x in (min(known), median(known), most))
            shown = "σ₁ from {} (median {}) to {}".format(*numbers)
            shown += f" in head {head.sigma.index(most)}"
        else:
            shown = "not finite"
        lines.append(f"{head.layer} {head.part}, {len(head.sigma)} heads: {shown}")
    return lines + [f"{name}: no heads: {reason}" for name, reason in left_out.items()]
