"""Write numbers, names and rows as text: in the cells of a table, in CSV, and below a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from math import isfinite
from typing import Any

_MOST_NAMES = 10  # in a sentence


def finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return float(value) if isfinite(value) else None


def number(value: float | None, digits: int = 5) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def above(value: float | None) -> str:
    """Return a number rounded up: a bound must hold as it is printed."""
    return _rounded(value, ROUND_CEILING)


def below(value: float | None) -> str:
    return _rounded(value, ROUND_FLOOR)


def _rounded(value: float | None, rounding: str, digits: int = 5) -> str:
    if value is None:
        return "–"
    near = Context(prec=digits, rounding=rounding).create_decimal_from_float(value)
    return f"{float(near):.{digits}g}"


def interval(lower: float | None, upper: float | None, method: str) -> str:
    """Return two bounds, and how they are known where that is no proof.

    >>> interval(0.5, 2.0, "p = 1e-09")
    '[0.5, 2] p = 1e-09'
    """
    if lower is None:
        return ""
    text = f"[{below(lower)}, {above(upper)}]"
    return text if method in ("proven", "") else f"{text} {method}"


def printable(text: str) -> str:
    """Return a text of one line that a terminal only shows: names come from a file."""
    return "".join(c if c.isprintable() else "�" for c in text)


def aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """Return rows of cells as lines of equally wide columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]


def first(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Collection[str]) -> str:
    """Return a line of names, and one a row: of its values in these columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(_csv_cell(row[column]) for column in columns)
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return printable(value) if isinstance(value, str) else value
