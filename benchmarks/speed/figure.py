"""The pictures: time over n and whole networks as multiples of our time; cost over size."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.common import STYLE, panels, save_figure

from .report import NOTES, OURS, TITLES, Result, grown, where

COLORS = {step: color for color, steps in NOTES["colors"].items() for step in steps}
LOOKS = {"hue": "step", "palette": COLORS}
SERIES = {"depth": "layers of 512²", "width": "bytes of 8 layers", "weights": "layers of 16²"}


def save(path: Path, result: Result) -> None:
    """Draw a column for each framework: one n × n matrix above, whole networks below."""
    table = pd.DataFrame(
        {
            **case,
            "group": group,
            "step": name,
            "network": f"{case['title']}\n{case['dtype']}",
            "ms": step["median_ms"],
            "multiple of our time": step["ratio_to_ours"],
        }
        for case in result["cases"]
        for group, outcome in case["peers"].items()
        for name, step in outcome["steps"].items()
    )
    if table.empty:
        return
    squares = table[table["n"].notna() & (table["dtype"] == "float32")]
    networks = table[table["n"].isna()]
    known = [group for group in OURS if (table["group"] == group).any()]
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(4.6 * len(known), 10), layout="constrained")
        figure.suptitle(f"Time of one step, {where(result['machine'])}", fontweight="bold")
        axes = figure.subplots(2, len(known), squeeze=False, sharey="row")
        for (above, below), group in zip(axes.T, known, strict=True):
            one, many = (part[part["group"] == group] for part in (squares, networks))
            sns.lineplot(one, x="n", y="ms", marker="o", ax=above, **LOOKS)
            x, y = "multiple of our time", "network"
            sns.scatterplot(many, x=x, y=y, s=45, legend=False, ax=below, **LOOKS)
            above.set(title=f"{TITLES[group]}: n × n, float32", xscale="log", yscale="log")
            below.set(title=f"{TITLES[group]}: all layers of a network", xscale="log")
            sns.move_legend(above, "lower right", title=None, fontsize=8)
            above.set_xticks(sorted(one["n"].unique()))
            above.minorticks_off()
            above.xaxis.set_major_formatter("{x:.0f}")
            above.tick_params(axis="x", labelrotation=45)
            for axis in (above.yaxis, below.xaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
        save_figure(figure, path, dpi=90)


def save_scaling(path: Path, result: Result) -> None:
    """Draw time above and peak memory below; what is linear is parallel to the dotted line."""
    points = grown(result).items()
    rows = [
        {"panel": f"{what} over {SERIES[series]}", "x": point["x"], "y": point[key]}
        | {"step": step, "framework": TITLES[group]}
        for key, what in {"ms": "ms", "bytes": "peak bytes"}.items()
        for (series, group, step), of_step in points
        for point in of_step
        if point[key]
    ]
    if not rows:
        return
    with panels(
        rows, x="x", col_wrap=len(SERIES), style="framework", markers=True, **LOOKS
    ) as grid:
        grid.set(xscale="log", yscale="log").set_axis_labels("", "")
        for panel, axis in grid.axes_dict.items():
            x, y = (max(row[key] for row in rows if row["panel"] == panel) for key in "xy")
            axis.axline((x, y), (x / 10, y / 10), color="0.5", linestyle=":")
        save_figure(grid.figure, path, dpi=80)
