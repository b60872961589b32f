"""The result of a comparison: one row a matrix, and what is in one of the two alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from math import hypot, inf
from typing import Any, ClassVar

from .result import by_name
from .texts import aligned, as_csv, finite, first, interval, number, printable


@dataclass(frozen=True)
class Drift:
    """How one matrix moved; missing numbers are None.

    ``drift`` is ‖B − A‖/‖A‖ in Frobenius norms, for A before and B after. ``sigma`` is that of
    B − A, between ``lower`` and ``upper``. The other fields are explained at `Comparison`.
    """

    name: str
    tensor: str
    shape: tuple[int, ...]
    layout: str
    guessed: bool
    rows: int
    columns: int
    drift: float | None
    sigma: float | None
    lower: float | None
    upper: float | None
    method: str
    sigma_before: float | None
    upper_before: float | None
    sigma_after: float | None
    upper_after: float | None
    stable_rank_before: float | None
    stable_rank_after: float | None
    frobenius_before: float | None
    frobenius_after: float | None
    frobenius: float | None
    left_overlap: float | None
    right_overlap: float | None
    left_angle: float | None
    right_angle: float | None
    left_intruders: int | None
    right_intruders: int | None
    undecided: int
    note: str = ""

    @property
    def intruders(self) -> int | None:
        """The larger number of the two sides."""
        if self.left_intruders is None or self.right_intruders is None:
            return None
        return max(self.left_intruders, self.right_intruders)


class Comparison(Mapping[str, Drift]):
    """What `compare` returns: a mapping of the name of each matrix to its `Drift`.

    Parameters
    ----------
    sources : pair of str
        What was compared.
    rows : list of Drift
    only_before, only_after : list of str
        Names of tensors that are in one of the two alone.
    shapes : mapping of name to pair of shapes
        Tensors whose shapes differ.
    skipped : mapping of name to str
        The reason why each other tensor is not compared.
    n_vectors : int
        Number of first singular vectors that are compared.
    similarity : float
        Intruders have no cosine of this or more with a singular vector of the base.

    Notes
    -----
    ``left_overlap`` and ``right_overlap`` are |cos| between the first singular vectors before and
    after. Where σ₂ ≈ σ₁, they may be small although little has changed. ``left_angle`` and
    ``right_angle`` are the largest principal angles between the spans of the first ``n_vectors``
    singular vectors, in degrees. ``left_intruders`` and ``right_intruders`` count the first
    ``n_vectors`` singular vectors after that are like no singular vector before (Shuttleworth et
    al. 2024); ``undecided`` counts those of which a large matrix leaves this open.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> found = sc.compare({"w": np.diag([4.0, 3.0])}, {"w": np.diag([4.0, 2.0])})
    >>> found["w"].drift, found["w"].sigma, found["w"].left_intruders
    (0.2, 1.0, 0)
    """

    columns: ClassVar[tuple[str, ...]] = (
        "name",
        "matrix",
        "drift",
        "σ₁(Δ)",
        "interval",
        "σ₁ before",
        "σ₁ after",
        "rank before",
        "rank after",
        "overlap",
        "angle",
        "intruders",
        "",
    )

    def __init__(
        self,
        sources: tuple[str, str],
        rows: list[Drift],
        *,
        only_before: list[str],
        only_after: list[str],
        shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
        skipped: Mapping[str, str],
        n_vectors: int,
        similarity: float,
    ) -> None:
        self.before, self.after = sources
        self._rows = by_name(rows)
        self.only_before, self.only_after = only_before, only_after
        self.shapes, self.skipped = dict(shapes), dict(skipped)
        self.n_vectors, self.similarity = n_vectors, similarity

    def __getitem__(self, name: str) -> Drift:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def source(self) -> str:
        """Both sources, as the title of the table."""
        return f"{self.before} → {self.after}"

    @property
    def drift(self) -> float | None:
        """The relative drift of all matrices together, or None if the base is zero."""
        lengths = [
            (row.frobenius, row.frobenius_before)
            for row in self.values()
            if row.frobenius is not None and row.frobenius_before is not None
        ]
        moved, base = (hypot(*x) for x in zip(*lengths, strict=True)) if lengths else (0.0, 0.0)
        return finite(moved / base) if base else None

    @property
    def largest(self) -> str | None:
        """The name of the matrix with the largest relative drift."""
        found = {name: row.drift for name, row in self.items() if row.drift is not None}
        return max(found, key=lambda name: found[name] or 0.0) if found else None

    def above(self, bound: float) -> list[str]:
        """Return the names of matrices whose σ₁, before or after, may exceed a bound.

        A matrix that is not finite exceeds every bound.
        """
        found = []
        for name, row in self.items():
            uppers = (row.upper_before, row.upper_after)
            if any(upper is None or upper > bound for upper in uppers):
                found.append(name)
        return found

    def drifted(self, bound: float) -> list[str]:
        """Return the names of matrices whose relative drift exceeds a bound, or is no number."""
        return [
            name
            for name, row in self.items()
            if row.frobenius is None or (row.frobenius > 0 and not _at_most(row.drift, bound))
        ]

    def summary(self) -> dict[str, Any]:
        """Return the numbers about the whole."""
        return {
            "before": self.before,
            "after": self.after,
            "matrices": len(self),
            "drift": self.drift,
            "largest": self.largest,
            "n_vectors": self.n_vectors,
            "similarity": self.similarity,
            "intruders": sum(row.intruders or 0 for row in self.values()),
            "undecided": sum(row.undecided for row in self.values()),
        }

    def to_json(self) -> str:
        """Return the comparison as JSON."""
        content = {
            "summary": self.summary(),
            "matrices": [asdict(row) for row in self.values()],
            "only_before": self.only_before,
            "only_after": self.only_after,
            "shapes": self.shapes,
            "skipped": self.skipped,
        }
        return json.dumps(content, indent=2, allow_nan=False)

    def to_csv(self) -> str:
        """Return one line a matrix, after a line of names."""
        columns = [field.name for field in fields(Drift)]
        return as_csv([asdict(row) for row in self.values()], columns)

    def to_pandas(self) -> Any:
        """Return a DataFrame with one row a matrix. It needs pandas."""
        pandas = import_module("pandas")
        return pandas.DataFrame([asdict(row) for row in self.values()]).set_index("name")

    def cells(self, top: int | None = None) -> list[tuple[str, ...]]:
        """Return the table as text, a tuple a row: all, or the ``top`` largest drifts.

        A drift that is no number comes first: that of a matrix that is not finite, or was zero.
        """
        rows = list(self.values())
        if top is not None:
            rows = sorted(rows, key=_smallness)[:top]
        return list(map(_cells, rows))

    def footer(self) -> list[str]:
        """Return the sentences below the table."""
        found = self.summary()
        lines = [f"{len(self):,} matrices are in both; {len(self.skipped):,} tensors are skipped"]
        if found["drift"] is not None:
            lines[0] += f"; drift of all {number(found['drift'])}; the largest is {self.largest}'s"
        if self.n_vectors:
            lines.append(
                f"Intruders: of the first {self.n_vectors} singular vectors after, those without a "
                f"cosine of {self.similarity:g} or more with any before"
            )
        if found["undecided"]:
            lines.append(f"Undecided: {found['undecided']:,} vectors. --proven decides them.")
        shapes = [f"{name} {_size(a)} and {_size(b)}" for name, (a, b) in self.shapes.items()]
        for what, names in (
            ("Only before", self.only_before),
            ("Only after", self.only_after),
            ("Of two shapes", shapes),
        ):
            if names:
                lines.append(f"{what}: {first(names)}")
        if any(row.guessed for row in self.values()):
            lines.append("? after a matrix: its layout is guessed. --layout PATTERN=AXES corrects.")
        return lines

    def table(self, top: int | None = None) -> str:
        """Return the table as plain text."""
        text = aligned([self.columns, *self.cells(top)])
        return "\n".join(map(printable, (self.source, *text, *self.footer())))

    def __repr__(self) -> str:
        return self.table()


def _smallness(row: Drift) -> float:
    return -inf if row.drift is None else -row.drift


def _at_most(drift: float | None, bound: float) -> bool:
    return drift is not None and drift <= bound


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _cells(row: Drift) -> tuple[str, ...]:
    overlaps = [x for x in (row.left_overlap, row.right_overlap) if x is not None]
    angles = [x for x in (row.left_angle, row.right_angle) if x is not None]
    return (
        row.name,
        f"{row.rows}×{row.columns}" + "?" * row.guessed,
        number(row.drift, 3),
        number(row.sigma),
        interval(row.lower, row.upper, row.method),
        number(row.sigma_before),
        number(row.sigma_after),
        number(row.stable_rank_before, 3),
        number(row.stable_rank_after, 3),
        number(min(overlaps, default=None), 3),
        f"{max(angles):.1f}°" if angles else "–",
        ("–" if row.intruders is None else str(row.intruders)) + "?" * bool(row.undecided),
        row.note,
    )
