"""The picture: accuracy against epoch (paper, figure 1) and singular values (figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.style import STYLE

from .net import SHAPES
from .results import select, threshold
from .train import METHODS, RATES, Run

COLORS = {"vanilla": "#0072b2", "spectral": "#d55e00", "start": "#9a9a9a"}


def save(path: Path, runs: Sequence[Run], title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 10), layout="constrained")
        figure.suptitle(title, fontweight="bold")
        curves, spectra = figure.subfigures(2, 1, height_ratios=(1.05, 1))
        draw_curves(curves.subplots(2, 2, sharex=True, height_ratios=(2, 1)), runs)
        draw_spectra(spectra.subplots(2, 4, sharex="col"), runs)
        figure.savefig(path, dpi=120)


def draw_curves(axes: np.ndarray, runs: Sequence[Run]) -> None:
    for (accuracy, gap), batch in zip(axes.T, RATES, strict=True):
        for method in METHODS:
            chosen, color = select(runs, method, batch), COLORS[method]
            accuracy.plot(*mean([run.train for run in chosen]), "--", color=color)
            band(accuracy, [run.test for run in chosen], color, "-")
            band(gap, [run.gaps for run in chosen], color, ":")
        alpha = threshold(runs, batch)
        accuracy.set(title=f"batch {batch}", ylim=(min(0.875, alpha - 0.05), 1.005))
        accuracy.axhline(alpha, color="#666666", linewidth=0.7)
        end = len(chosen[0].test)
        accuracy.text(end, alpha - 0.002, f"α = {alpha:.2f}", va="top", ha="right", color="#444444")
        gap.set(xlabel="epoch", ylim=(0, 0.075))
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("generalization gap")
    handles = [Line2D([], [], color=COLORS[method], label=method) for method in METHODS]
    for label, dashes in (("train", "--"), ("test", "-"), ("train − test", ":")):
        handles.append(Line2D([], [], color="#444444", linestyle=dashes, label=label))
    axes[0, 1].legend(handles=handles, loc="lower right", ncols=2)


def draw_spectra(axes: np.ndarray, runs: Sequence[Run]) -> None:
    for row, batch in zip(axes, RATES, strict=True):
        for axis, (layer, shape) in zip(row, SHAPES.items(), strict=True):
            start = [run.before[layer] for run in select(runs, "vanilla", batch)]
            axis.plot(*mean(start), color=COLORS["start"], label="at the start")
            for method in METHODS:
                values = [run.after[layer] for run in select(runs, method, batch)]
                band(axis, values, COLORS[method], "-", label=f"{method}, at the end")
            axis.set_title(f"{layer}: {shape[0]} × {int(np.prod(shape[1:]))}, batch {batch}")
            axis.set_ylim(0)
        row[0].set_ylabel("singular value")
    for axis in axes[-1]:
        axis.set_xlabel("index")
    axes[0, 1].legend(loc="upper right")


def band(
    axis: Axes, curves: Sequence[Sequence[float]], color: str, dashes: str, label: str | None = None
) -> None:
    """The mean over seeds, and from the lowest to the highest of them."""
    x, y = mean(curves)
    axis.fill_between(
        x, np.min(curves, axis=0), np.max(curves, axis=0), color=color, alpha=0.13, lw=0
    )
    axis.plot(x, y, color=color, linestyle=dashes, label=label)


def mean(curves: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Over seeds, against 1, 2, …"""
    y = np.mean(curves, axis=0)
    return np.arange(1, len(y) + 1), y
