"""Write a report as one HTML page that loads nothing, and the short table of a notebook.

The names of tensors come from a file and are hostile. Jinja2 escapes each text, the script writes
by ``textContent`` alone, and a Content-Security-Policy with hashes admits only our own style and
scripts. The table in the page is the data: the script reads its cells to sort and to plot.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Container, Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .hdf5 import needed
from .result import head_lines
from .texts import printable

if TYPE_CHECKING:
    from .result import Report, Row

_MOST_LISTED = 200  # names in a list of the page
_MOST_REASONS = 20  # lists of skipped tensors
_MOST_SHOWN = 60  # rows in a notebook
_POINTS = 128  # of a spectrum: a screen shows no more
_NUMBER = re.compile(r"–|-?[\d.]+(e[+-]?\d+)?", re.ASCII)
_BARS = re.compile(r"(; )?\|[ ▁▂▃▄▅▆▇█]+\|$")
_MEANINGS = {
    "#": "place in the file",
    "shape": "sizes of the stored tensor",
    "matrix": "outputs × inputs",
    "layout": "axes of the tensor; ? marks a guess",
    "σ₁": "the largest singular value",
    "interval": "bounds of σ₁ for the stored numbers: proven, or with the probability p that the "
    "upper one is too small",
    "σ₂/σ₁": "how close the second singular value is",
    "‖W‖": "the Frobenius norm",
    "rank": "the stable rank ‖W‖²/σ₁²",
    "σ/√(o/i)": "σ₁ for the shape: layers that keep the size of features have about the same",
    "conv": "upper bound of the norm as a map of images of any size, with stride 1",
}


class _Column(NamedTuple):
    label: str
    numeric: bool
    meaning: str

    @property
    def plotted(self) -> bool:
        """Return True if the plot can show the column."""
        return self.numeric and self.label != "#"


class _Line(NamedTuple):
    """A row of the table in the page: ``kind`` is "far" for an outlier, "bad" or ""."""

    kind: str
    number: int
    name: str
    cells: Sequence[tuple[str, bool]]


def page(report: Report) -> str:
    """Return the page of a report. It needs Jinja2."""
    jinja2 = needed("jinja2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    style, theme, script = map(_template, ("page.css", "theme.js", "page.js"))
    columns, lines = _table(report)
    content = {
        "policy": _policy([style], [theme, script]),
        "style": style,
        "theme": theme,
        "script": script,
        "title": printable(Path(report.source).name or report.source),
        "source": printable(report.source),
        "facts": _facts(report),
        "lists": _lists(report),
        "columns": columns,
        "rows": lines,
        "spectra": _spectra(report),
    }
    return str(environment.from_string(_template("page.html.jinja")).render(content))


def _template(name: str) -> str:
    return files("spectral_core._report").joinpath("templates", name).read_text("utf-8")


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """Return a Content-Security-Policy that admits these texts, and nothing else.

    A script in a name would have another hash, so it would not run even if an escape were missed.
    Trusted types forbid our own script to parse a text as HTML.
    """
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for kind, texts in (("style-src", styles), ("script-src", scripts)):
        hashes = (b64encode(sha256(text.encode()).digest()).decode() for text in texts)
        rules.append(" ".join([kind, *(f"'sha256-{x}'" for x in hashes)]))
    return "; ".join([*rules, "require-trusted-types-for 'script'", "trusted-types 'none'"])


def _table(report: Report) -> tuple[list[_Column], list[_Line]]:
    """Return columns and rows: the cells of `Report.cells`, with the stored shape and dtype.

    What says nothing is left out, such as a dtype that all matrices have: the facts name it.
    """
    labels = ["shape", "dtype", *(label or "notes" for label in report.columns[1:])]
    rows = list(report.values())
    texts = [
        ("×".join(map(str, row.shape)), *map(_text, (row.dtype, *cells[1:])))
        for row, cells in zip(rows, report.cells(), strict=True)
    ]
    columns = {
        i: _Column(label, all(map(_NUMBER.fullmatch, column)), _MEANINGS.get(label, ""))
        for i, (label, column) in enumerate(zip(labels, zip(*texts, strict=True), strict=False))
        if _is_shown(label, column, rows)
    }
    outliers = set(report.outliers)
    lines = [
        _Line(
            _kind(row, outliers),
            number,
            printable(row.name),
            [(text[i], column.numeric) for i, column in columns.items()],
        )
        for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1)
    ]
    first = [_Column("#", True, _MEANINGS["#"]), _Column("name", False, "")]
    return [*first, *columns.values()], lines


def _text(content: str) -> str:
    """Return the text of a cell. The page draws a spectrum, and needs no bars of characters."""
    return _BARS.sub("", printable(content))


def _is_shown(label: str, column: Sequence[str], rows: Sequence[Row]) -> bool:
    """Return False for a column without any value, and for shapes that the matrices repeat."""
    if label == "shape":
        return any(row.shape != (row.rows, row.columns) for row in rows)
    if label == "dtype":
        return len(set(column)) > 1
    return any(text not in ("", "–") for text in column)


def _kind(row: Row, outliers: Container[str]) -> str:
    if row.nonfinite or row.is_dead:
        return "bad"
    return "far" if row.name in outliers else ""


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return the numbers about the whole, each with its label."""
    found = report.summary()
    facts = [("matrices", f"{len(report):,}"), ("skipped tensors", f"{len(report.skipped):,}")]
    dtypes = {row.dtype for row in report.values()}
    if len(dtypes) == 1:
        facts.insert(1, ("dtype", printable(*dtypes)))
    if found["largest"] is not None:
        largest = found["largest"]
        facts.append(("largest σ₁", f"{report.sigma[largest]:.5g}: {printable(largest)}"))
    if found["log10_product"] is not None:
        facts.append(("log₁₀ Πσ", f"{found['log10_product']:.2f}"))
    for key, label in (("outliers", "outliers"), ("nonfinite", "NaN or Inf"), ("dead", "zero")):
        facts.append((label, f"{len(found[key]):,}"))
    return facts


def _lists(report: Report) -> list[tuple[str, list[str], int]]:
    """Return the lists below the numbers: a label, names, and how many more there are."""
    found = report.summary()
    lists: dict[str, list[str]] = {
        "Outliers": found["outliers"],
        "NaN or Inf": found["nonfinite"],
        "Zero": found["dead"],
    }
    heads = head_lines(report.heads, report.without_heads)
    if heads:
        lists["Heads of attention"] = heads
    reasons: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        reasons.setdefault(reason, []).append(name)
    common = [reason for reason, names in reasons.items() if len(names) > 1][:_MOST_REASONS]
    for reason in common:
        lists[f"Skipped, {reason}"] = reasons.pop(reason)
    lists["Skipped"] = [f"{name}: {why}" for why, names in reasons.items() for name in names]
    return [
        (
            printable(f"{label} ({len(names):,})"),
            [printable(name) for name in names[:_MOST_LISTED]],
            max(0, len(names) - _MOST_LISTED),
        )
        for label, names in lists.items()
        if names
    ]


def _spectra(report: Report) -> dict[str, Any]:
    """Return the points of the spectra by the place of their row, and the places of the values.

    Spectra of one length have the same places, which are written once.
    """
    rows: dict[int, dict[str, Any]] = {}
    places: dict[int, list[int]] = {}
    for i, row in enumerate(report.values()):
        if isinstance(row.spectrum, Mapping):
            x, y = ([*map(_short, row.spectrum[key])] for key in ("values", "density"))
            rows[i] = {"count": len(x), "density": True, "x": x, "y": y}
        elif row.spectrum is not None:
            n = len(row.spectrum)
            drawn = places.setdefault(n, _places(n))
            y = [_short(row.spectrum[j - 1]) for j in drawn]
            rows[i] = {"count": n, "density": False, "y": y}
    return {"places": places, "rows": rows}


def _places(n: int) -> list[int]:
    """Return which of n singular values are drawn, from 1: the largest, and others evenly."""
    if n <= _POINTS:
        return list(range(1, n + 1))
    even = (1 + round(i * (n - 1) / (_POINTS - 1)) for i in range(_POINTS))
    return sorted({*range(1, _POINTS // 4), *even})


def _short(value: float) -> float:
    rounded = float(f"{value:.4g}")
    return rounded if isfinite(rounded) else value  # the largest numbers round to infinity


def fragment(report: Report) -> str:
    """Return a table without style and script, for a notebook: the first rows, and what is left."""
    cells = report.cells()
    head = "".join(f'<th scope="col">{escape(label or "notes")}</th>' for label in report.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(printable(name))}</th>'
        + "".join(f"<td>{escape(printable(text))}</td>" for text in line)
        + "</tr>"
        for name, *line in cells[:_MOST_SHOWN]
    )
    below = report.footer()
    if len(cells) > _MOST_SHOWN:
        below.insert(0, f"{len(cells) - _MOST_SHOWN:,} more rows: to_html() returns all")
    return (
        f"<table><caption>{escape(printable(report.source))}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{'<br>'.join(escape(printable(line)) for line in below)}</p>"
    )
