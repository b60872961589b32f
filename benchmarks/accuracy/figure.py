"""The picture: error against readings of W, and the term's error over steps of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.style import STYLE

SHOWN = {  # color, dashes
    "power": ("#444444", "-"),
    "Golub–Kahan, 1 extra": ("#444444", ":"),
    "history, k = 2": ("#009e73", ":"),
    "block, k = 2": ("#009e73", "-"),
    "subspace, k = 4": ("#d55e00", ":"),
    "block, k = 4": ("#d55e00", "-"),
    "block, k = 8": ("#0072b2", "-"),
}


def save(path: Path, results: dict[str, Any]) -> None:
    tracks = {name: rows for name, rows in results["tracking"].items() if "vanilla" not in name}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 11), layout="constrained")
        axes = figure.subplots(3, 3, sharey="row")
        for axis, (ratio, rows) in zip(axes[0], results["static"].items(), strict=True):
            axis.set(title=f"static, cold start, σ₂/σ₁ = {ratio}", xlabel="readings of W")
            for name, look in SHOWN.items():
                row = rows[name]
                readings = row["passes"] * np.arange(1, len(row["sigma"]) + 1)
                draw(axis, readings, row["sigma"], name, look)
        axes[0, 0].set_ylabel("relative error of σ")
        for axis, (title, rows) in zip(axes[1:].flat, tracks.items(), strict=False):
            axis.set(title=title, xlabel="step")
            for name, look in SHOWN.items():
                draw(axis, np.arange(len(rows[name]["term"])), rows[name]["term"], name, look)
        axes[0, 0].set_ylim(1e-16, 1)
        for axis in axes[1:, 0]:
            axis.set_ylim(1e-8, 3)
            axis.set_ylabel("relative error of σuvᵀ")
        for axis in axes.flat[3 + len(tracks) :]:
            axis.axis("off")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        axes.flat[-1].legend(handles, labels, loc="center", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def draw(axis: Any, x: Any, y: Any, name: str, look: tuple[str, str]) -> None:
    axis.semilogy(x, np.maximum(y, 1e-16), look[1], color=look[0], label=name, linewidth=1.3)
