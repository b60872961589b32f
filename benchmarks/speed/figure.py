"""The picture: time over n beside the bandwidth floor, and layer sets as multiples of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import style as look

from .markdown import OURS, where

Result = dict[str, Any]

# Okabe and Ito's colors: told apart by all. Ours is the same in every panel.
COLORS = {
    "spectral_torch": "#d55e00",
    "spectral_jax": "#d55e00",
    "sc.add_gradient_": "#d55e00",
    "spectral_cupy": "#d55e00",
    "kernels=False": "#999999",
    "step=NumbaStep()": "#999999",
    "sc.add_gradient": "#e69f00",
    "paper's formula": "#0072b2",
    "jitted loop": "#0072b2",
    "torch spectral_norm": "#009e73",
    "nnx.SpectralNorm": "#009e73",
    "matrix_norm(ord=2)": "#cc79a7",
    "scipy svds(k=1)": "#cc79a7",
    "G.add_(W)": "#56b4e9",
    "add_decayed_weights": "#56b4e9",
    "G += W": "#56b4e9",
}
TITLES = {"torch": "PyTorch", "jax": "JAX", "numpy": "NumPy", "cupy": "CuPy"}

STYLE = {**look.STYLE, "axes.axisbelow": True, "lines.linewidth": 1.5, "lines.markersize": 4}


def save(path: Path, result: Result) -> None:
    groups = [group for group in OURS if any(steps_of(case, group) for case in result["cases"])]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(groups), 10), layout="constrained")
        figure.suptitle(f"Time of one step, {where(result['machine'])}", fontweight="bold")
        axes = figure.subplots(2, len(groups), squeeze=False, height_ratios=(1, 1.15))
        for column, group in enumerate(groups):
            draw_squares(axes[0, column], result, group)
            draw_sets(axes[1, column], result, group, named=column == 0)
        align_times(axes[0])
        figure.savefig(path, dpi=110)


def steps_of(case: Result, group: str) -> dict[str, Any]:
    return dict(case["peers"][group]["steps"])


def draw_squares(axis: Axes, result: Result, group: str) -> None:
    """One n × n matrix, float32: time over n."""
    cases = [case for case in result["cases"] if case["n"] and case["dtype"] == "float32"]
    for name in names(cases, group):
        known = [case for case in cases if name in steps_of(case, group)]
        rows = [steps_of(case, group)[name] for case in known]
        n = [case["n"] for case in known]
        axis.plot(n, [row["median_ms"] for row in rows], **style(name, group))
        low, high = zip(*(row["quartiles_ms"] for row in rows), strict=True)
        axis.fill_between(n, low, high, color=COLORS[name], alpha=0.15, lw=0)
    floor = [case["bytes_over_bandwidth_ms"] for case in cases]
    sizes = [case["n"] for case in cases]
    axis.plot(sizes, floor, "--", color="#444444", lw=1, label="bytes / bandwidth")
    axis.set(xscale="log", yscale="log", xlabel="n", ylabel="ms")
    axis.set_title(f"{TITLES[group]}: one n × n matrix, float32")
    axis.set_xticks(sizes, [str(n) for n in sizes], rotation=45)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2, fontsize=8)


def draw_sets(axis: Axes, result: Result, group: str, *, named: bool) -> None:
    """All layers of a network: what each peer takes, as a multiple of ours."""
    cases = [case for case in result["cases"] if not case["n"]]
    for name in names(cases, group):
        known = [(k, steps_of(case, group)) for k, case in enumerate(cases)]
        points = [(k, steps[name]["ratio_to_ours"]) for k, steps in known if name in steps]
        if name == OURS[group]:
            axis.axvline(1, color=COLORS[name], lw=1.5, label=f"{name} = 1")
        elif points:
            rows, ratios = zip(*points, strict=True)
            axis.plot(ratios, rows, "o", color=COLORS[name], label=name, markersize=6)
    axis.set(xscale="log", xlabel="multiple of the time of ours", ylim=(len(cases) - 0.5, -0.5))
    axis.set_title(f"{TITLES[group]}: all layers of a network")
    axis.set_yticks(
        range(len(cases)), [f"{case['title']}\n{case['dtype']}" for case in cases] if named else []
    )
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", labelsize=8)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)


def names(cases: list[Result], group: str) -> list[str]:
    """Of the peers that any of the cases has, in their order."""
    return list(dict.fromkeys(name for case in cases for name in steps_of(case, group)))


def style(name: str, group: str) -> dict[str, Any]:
    ours = name == OURS[group]
    width, order = (2.4, 3) if ours else (1.5, 2)
    return {"marker": "o", "color": COLORS[name], "label": name, "lw": width, "zorder": order}


def align_times(axes: Any) -> None:
    """One scale for all panels, so that they can be compared."""
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)
