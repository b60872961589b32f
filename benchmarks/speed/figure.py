"""The picture: time over n, and whole networks as multiples of our time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.common import STYLE, save_figure

from .report import COMPILED, OURS, TITLES, where

Result = dict[str, Any]

# Okabe & Ito's colors, which the color-blind can tell apart. Alike in all panels: ours, the formula
# by hand, spectral normalization, the exact σ, and the floor.
COLORS = {
    **dict.fromkeys(OURS.values(), "#d55e00"),
    **dict.fromkeys(("kernels=False", COMPILED), "#999999"),
    "sc.add_gradient": "#e69f00",
    **dict.fromkeys(("paper's formula", "jitted loop"), "#0072b2"),
    **dict.fromkeys(("torch spectral_norm", "nnx.SpectralNorm"), "#009e73"),
    **dict.fromkeys(("matrix_norm(ord=2)", "scipy svds(k=1)"), "#cc79a7"),
    **dict.fromkeys(("G.add_(W)", "add_decayed_weights", "G += W"), "#56b4e9"),
}


def save(path: Path, result: Result) -> None:
    """Draw a column for each framework: one n × n matrix above, whole networks below."""
    table = pd.DataFrame(
        {
            "group": group,
            "step": name,
            "n": case["n"],
            "network": f"{case['title']}\n{case['dtype']}",
            "dtype": case["dtype"],
            "ms": step["median_ms"],
            "multiple of our time": step["ratio_to_ours"],
        }
        for case in result["cases"]
        for group, outcome in case["peers"].items()
        for name, step in outcome["steps"].items()
    )
    squares = table[table["n"].notna() & (table["dtype"] == "float32")]
    networks = table[table["n"].isna()]
    known = [group for group in OURS if (table["group"] == group).any()]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(known), 10), layout="constrained")
        figure.suptitle(f"Time of one step, {where(result['machine'])}", fontweight="bold")
        axes = figure.subplots(2, len(known), squeeze=False, sharey="row")
        for k, group in enumerate(known):
            looks = {"hue": "step", "palette": COLORS}
            one, many = (part[part["group"] == group] for part in (squares, networks))
            sns.lineplot(one, x="n", y="ms", marker="o", ax=axes[0, k], **looks)
            x, y = "multiple of our time", "network"
            sns.scatterplot(many, x=x, y=y, s=45, legend=False, ax=axes[1, k], **looks)
            axes[0, k].set(title=f"{TITLES[group]}: n × n, float32", xscale="log", yscale="log")
            axes[1, k].set(title=f"{TITLES[group]}: all layers of a network", xscale="log")
            sns.move_legend(axes[0, k], "lower right", title=None, fontsize=8)
            axes[0, k].set_xticks(sorted(one["n"].unique()))
            axes[0, k].minorticks_off()
            axes[0, k].xaxis.set_major_formatter("{x:.0f}")
            axes[0, k].tick_params(axis="x", labelrotation=45)
            for axis in (axes[0, k].yaxis, axes[1, k].xaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
        save_figure(figure, path, dpi=90)
