"""Tables, a picture and a file of results for ``digits.py``.

A row holds one method at one batch size: its strength (λ or the decay), and for each measure a list
with one value a seed. The seeds come in the same order in all rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image
from rich import box
from rich.table import Table

Row = Mapping[str, Any]

MEASURES = ("test", "gap", "noise")
NAMES = {
    "test": "test accuracy",
    "validation": "validation accuracy",
    "gap": "generalization gap",
    "noise": "accuracy under noise",
}
COLORS = {"vanilla": "#757575", "weight decay": "#0072b2", "spectral": "#d55e00"}


def table(rows: Sequence[Row], title: str) -> Table:
    """Tabulate mean ± standard deviation over the seeds."""
    found = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    measures = [measure for measure in NAMES if measure in rows[0]]
    for name in ("batch", "method", "strength", *(NAMES[measure] for measure in measures)):
        found.add_column(name, justify="left" if name == "method" else "right")
    found.add_column("σ of each layer", justify="right")
    for row in rows:
        found.add_row(
            str(row["batch"]),
            row["method"],
            f"{row['strength']:g}",
            *(spread(row[measure]) for measure in measures),
            " ".join(f"{sigma:.2f}" for sigma in np.mean(row["sigma"], axis=0)),
            style="bold" if row["method"] == "spectral" else "",
        )
    return found


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}"


def wins(rows: Sequence[Row], batch: int, measure: str) -> int:
    """Count the seeds in which spectral is strictly better than every other method."""
    values = {row["method"]: row[measure] for row in rows if row["batch"] == batch}
    spectral, sign = values.pop("spectral"), -1 if measure == "gap" else 1
    return sum(
        all(sign * ours > sign * other for other in others)
        for ours, *others in zip(spectral, *values.values(), strict=True)
    )


def verdicts(rows: Sequence[Row]) -> list[str]:
    """State for each batch size in how many seeds spectral is better than all other methods."""
    seeds = len(rows[0]["test"])
    return [
        f"Batch {batch}: spectral is better than every other method in "
        + ", ".join(f"{wins(rows, batch, key)} of {seeds} seeds ({NAMES[key]})" for key in MEASURES)
        + "."
        for batch in sorted({row["batch"] for row in rows})
    ]


def best_strengths(rows: Sequence[Row]) -> dict[str, float]:
    """Return each method's strength of highest validation accuracy, averaged over batch sizes."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        by_strength = found.setdefault(row["method"], {})
        by_strength.setdefault(row["strength"], []).extend(row["validation"])
    return {method: max(by, key=lambda s: mean(by[s])) for method, by in found.items()}


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw a panel a measure: a dot a run, a line a seed, a bar the mean."""
    style = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, 5), layout="constrained", facecolor="white")
        figure.suptitle(title, fontsize=15, fontweight="bold")
        for axes, measure in zip(figure.subplots(1, 3), MEASURES, strict=True):
            better = "lower" if measure == "gap" else "higher"
            axes.set_title(f"{NAMES[measure]} (%)\n{better} is better", fontsize=12)
            draw_panel(axes, rows, measure)
        handles = [Line2D([], [], marker="o", ls="", color=color) for color in COLORS.values()]
        handles += [Line2D([], [], color="black", lw=3.5), Line2D([], [], color="#c8c8c8")]
        figure.legend(
            handles,
            [*COLORS, "mean", "same seed"],
            loc="outside lower center",
            ncols=5,
            frameon=False,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = BytesIO()
        figure.savefig(buffer, dpi=110)
        # The picture has few colors: a palette makes the file three times smaller.
        Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


def draw_panel(axes: Axes, rows: Sequence[Row], measure: str) -> None:
    sizes = sorted({row["batch"] for row in rows})
    for left, batch in zip(range(0, 4 * len(sizes), 4), sizes, strict=True):
        chosen = [row for row in rows if row["batch"] == batch]
        values = np.array([row[measure] for row in chosen])
        axes.plot(range(left, left + len(chosen)), values, color="#c8c8c8", lw=1, zorder=1)
        for x, (row, ys) in enumerate(zip(chosen, values, strict=True), start=left):
            color = COLORS[row["method"]]
            axes.scatter([x] * len(ys), ys, s=30, color=color, alpha=0.6, linewidths=0, zorder=2)
            axes.hlines(ys.mean(), x - 0.36, x + 0.36, color=color, lw=3.5, zorder=3)
            axes.annotate(
                f"{ys.mean():.1f}",
                (x, ys.max()),
                (0, 7),
                textcoords="offset points",
                ha="center",
                color=color,
                fontweight="bold",
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )
    axes.set_xticks([4 * i + 1 for i in range(len(sizes))], [f"batch {size}" for size in sizes])
    axes.tick_params(axis="x", length=0)
    axes.margins(x=0.08, y=0.1)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one line a row, and numbers with four decimals."""
    rounded = json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 4))
    parts = []
    for key, value in rounded.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        parts.append(f' "{key}": {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
