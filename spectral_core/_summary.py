"""Show what is regularized, what is left out, and why: one table for every framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec
from io import StringIO
from typing import NamedTuple

_COLUMNS = ("name", "shape", "matrix", "layout", "λ", "σ", "optimizer", "last step", "note")


class Row(NamedTuple):
    """One weight in a `Summary`."""

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, ...]
    layout: str
    factor: float | str | None = None
    sigma: float | None = None
    attached: str = ""
    last_step: int | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, one string a column."""
        numbers = [_number(x) for x in (self.factor, self.sigma)]
        step = "–" if self.last_step is None else str(self.last_step)
        sizes = (_sizes(self.shape), _sizes(self.matrix))
        return (self.name, *sizes, self.layout, *numbers, self.attached, step, self.note)


class Summary:
    """A table of the weights, and a list of what is left out and why.

    Printed, it is a table of ``rich`` where that is installed, and plain text otherwise. In a
    notebook it is HTML.

    Parameters
    ----------
    title : str
    rows : sequence of Row
        One for each weight.
    left_out : mapping of name to str
        The reason why each other array with two axes or more is no weight.
    notes : sequence of str
        Sentences about the whole, shown below the table.

    Examples
    --------
    >>> row = Row("w", (4, 3), (4, 3), "oi", 0.01, 2.5, "SGD", 7)
    >>> summary = Summary("one weight", [row], {"embed": "an embedding"})
    >>> summary.rows[0].sigma, summary.left_out
    (2.5, {'embed': 'an embedding'})
    """

    def __init__(
        self,
        title: str,
        rows: Sequence[Row],
        left_out: Mapping[str, str],
        *,
        notes: Sequence[str] = (),
    ) -> None:
        self.title = title
        self.rows = tuple(rows)
        self.left_out = dict(left_out)
        self.notes = tuple(notes)

    def __str__(self) -> str:
        table = self._rich() if find_spec("rich") is not None else self._plain()
        left_out = [f"  {name}: {reason}" for name, reason in self.left_out.items()]
        heading = ["left out:"] if left_out else []
        return "\n".join([self.title, table, *heading, *left_out, *self.notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        columns, cells = self._shown()
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells
        )
        items = "".join(
            f"<li><code>{escape(name)}</code>: {escape(reason)}</li>"
            for name, reason in self.left_out.items()
        )
        left_out = f"<p>left out:</p><ul>{items}</ul>" if items else ""
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return (
            f"<table><caption>{escape(self.title)}</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table>{left_out}{notes}"
        )

    def _shown(self) -> tuple[list[str], list[list[str]]]:
        """Return the columns that hold anything, and their cells."""
        cells = [row.cells() for row in self.rows]
        used = [
            i for i in range(len(_COLUMNS)) if i == 0 or any(row[i] not in "–" for row in cells)
        ]
        return [_COLUMNS[i] for i in used], [[row[i] for i in used] for row in cells]

    def _rich(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        columns, cells = self._shown()
        table = Table(*columns)
        for row in cells:
            table.add_row(*map(Text, row))  # as it is: a name may hold rich's markup
        text = StringIO()
        # The width of the contents: a name that is cut cannot be copied into `exclude`.
        console = Console(file=text, width=10_000, color_system=None)
        console.print(table)
        return text.getvalue().rstrip()

    def _plain(self) -> str:
        columns, cells = self._shown()
        lines = [columns, *cells]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def _sizes(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _number(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.4g}"
