"""The paper's Figures 1–6 from our results."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.style import STYLE

from .comparison import Group, groups, place
from .results import STRENGTHS, Result

# Okabe & Ito's colours, which the colour-blind can tell apart.
COLORS = dict(
    zip(STRENGTHS, ("#0072b2", "#009e73", "#cc79a7", "#d55e00", "#e69f00", "#56b4e9"), strict=True)
)
GREY = "#444444"
STEADY = {"svg.hashsalt": "spectral-core"}  # the same picture is the same file
MOST = 200  # points of a line: more make the file larger, and the line no finer

Grid = list[list[Group | None]]  # None: an empty place
Draw = Callable[[Sequence[Axes], Group], None]
Line = tuple[Callable[[Result], Mapping[float, float]], str]


def figures(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write those that have data; the files of each, as PNG and as SVG."""
    found = groups(results)
    networks = list(dict.fromkeys(group.network for group in found))
    first = [group for group in found if group.network in networks[:1]]
    others = [group for group in found if group.network in networks[1:]]
    plan: list[tuple[int, Sequence[Group], str, str, int, Draw]] = [
        (1, first, "Accuracy", "train", 2, draw_accuracy),
        (2, first, "Sensitivity to the input, ‖∇ₓ loss‖₂", "train_gradient", 1, draw_gradient),
        (3, found, "Largest eigenvalue of the Hessian", "train_hessian", 1, draw_hessian),
        (4, found, "Singular values of one weight matrix", "", 1, draw_spectrum),
        (5, others, "Accuracy", "train", 2, draw_accuracy),
        (
            6,
            others,
            "Sensitivity to the input, ‖∇ₓ loss‖₂",
            "train_gradient",
            1,
            draw_gradient,
        ),
    ]
    files = []
    for number, chosen, title, key, height, draw in plan:
        shown = [group for group in chosen if has(group, key)]
        if shown:
            figure = drawn(shown, title, height, draw, trains=number != 4)
            files += save(figure, folder / f"figure-{number}")
    return files


def has(group: Group, key: str) -> bool:
    """Whether a run has these values at several epochs, or with no key singular values."""
    kept = [result for method in group.runs for result in group.kept(method)]
    return any(len(result.curve(key)) > 1 if key else result.spectra for result in kept)


def drawn(
    found: Sequence[Group], title: str, height: int, draw: Draw, *, trains: bool = True
) -> Figure:
    """A panel for each group: ``height`` axes above each other, which share the epochs."""
    grid = arranged(found)
    rows, columns = len(grid), len(grid[0])
    with mpl.rc_context(STYLE):
        size = (max(4.1 * columns, 6.4), 1.1 + rows * (2.2 + 1.2 * (height - 1) + 0.6))
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(f"{title}: mean and range over seeds", fontweight="bold")
        ratios = [2.2, 1.2][:height] * rows
        axes = figure.subplots(rows * height, columns, squeeze=False, height_ratios=ratios)
        for j, row in enumerate(grid):
            for k, group in enumerate(row):
                panel = list(axes[j * height : (j + 1) * height, k])
                if group is None:
                    for axis in panel:
                        axis.remove()
                else:
                    draw(panel, group)
                    finish(panel, group)
        handles = keys(found, trains, height)
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles) if len(handles) < 8 else (len(handles) + 1) // 2,
            columnspacing=1.3,
            handlelength=1.8,
        )
    return figure


def arranged(found: Sequence[Group]) -> Grid:
    """A column for each network and a row for each batch size; of one network, all in a row."""
    networks = dict.fromkeys(group.network for group in found)
    columns = [[group for group in found if group.network == network] for network in networks]
    if len(columns) == 1:
        return [list(columns[0])]
    return [list(row) for row in zip_longest(*columns)]


def finish(panel: Sequence[Axes], group: Group) -> None:
    lost = sum(result.diverged for runs in group.runs.values() for result in runs)
    note = f" ({lost} {'run' if lost == 1 else 'runs'} diverged)" if lost else ""
    above = panel[0].get_title(loc="left")
    panel[0].set_title(f"{group.title}{note}" + (f"\n{above}" if above else ""))
    for axis in panel[:-1]:
        axis.sharex(panel[-1])
        axis.tick_params(labelbottom=False)
    panel[-1].set_xlabel(panel[-1].get_xlabel() or "epoch")


def keys(found: Sequence[Group], trains: bool, height: int) -> list[Line2D]:
    present = {method for group in found for method in group.runs if group.kept(method)}
    handles = [
        Line2D([], [], color=color(method), label=method)
        for method in sorted(present, key=lambda method: place(method, STRENGTHS))
    ]
    kinds = [("train", "--"), ("test", "-"), *([("train − test", ":")] if height > 1 else [])]
    for label, dashes in kinds if trains else []:
        handles.append(Line2D([], [], color=GREY, linestyle=dashes, label=label))
    return handles


def draw_accuracy(panel: Sequence[Axes], group: Group) -> None:
    accuracy, gap = panel
    lines(accuracy, group, [(values("train"), "--"), (values("test"), "-")])
    lines(gap, group, [(gaps, ":")])
    accuracy.set_ylabel("accuracy")
    gap.set_ylabel("train − test")
    if group.alpha is not None:
        label = f"α = {group.alpha:.2f}"
        # The first epochs are the same everywhere; what differs lies about α and above.
        accuracy.set_ylim(max(0, 3 * group.alpha - 2.02), 1.01)
        accuracy.axhline(group.alpha, color=GREY, linewidth=0.7, zorder=1)
        accuracy.annotate(
            label,
            (1, group.alpha),
            (-3, -3),
            xycoords=accuracy.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
            va="top",
            color=GREY,
            fontsize=8,
        )


def draw_gradient(panel: Sequence[Axes], group: Group) -> None:
    lines(panel[0], group, [(values("train_gradient"), "--"), (values("test_gradient"), "-")])
    panel[0].set_ylabel("‖∇ₓ loss‖₂")
    logarithmic(panel[0])


def draw_hessian(panel: Sequence[Axes], group: Group) -> None:
    lines(panel[0], group, [(values("train_hessian"), "--"), (values("test_hessian"), "-")])
    panel[0].set_ylabel("largest eigenvalue")
    logarithmic(panel[0])


def draw_spectrum(panel: Sequence[Axes], group: Group) -> None:
    name = telling(group)

    def of(result: Result) -> Mapping[float, float]:
        return dict(enumerate(result.spectra.get(name, ()), start=1))

    lines(panel[0], group, [(of, "-")])
    panel[0].set(title=f"layer {name}", xlabel="index", ylabel="singular value", ylim=(0, None))


def telling(group: Group) -> str:
    """The weight whose spectrum is shown: in the middle of those with many singular values."""
    kept = [result for method in group.runs for result in group.kept(method)]
    spectra = next(result.spectra for result in kept if result.spectra)
    most = max(map(len, spectra.values()))
    large = [name for name, found in spectra.items() if 2 * len(found) >= most]
    return large[len(large) // 2]


def values(key: str) -> Callable[[Result], Mapping[float, float]]:
    """By epoch, of those that have it."""
    return lambda result: {
        line["epoch"]: line[key] for line in result.epochs if line.get(key) is not None
    }


def gaps(result: Result) -> Mapping[float, float]:
    train, test = values("train")(result), values("test")(result)
    return {epoch: train[epoch] - test[epoch] for epoch in train if epoch in test}


def lines(axis: Axes, group: Group, chosen: Sequence[Line]) -> None:
    for method in group.runs:
        for measure, dashes in chosen:
            found = [known for result in group.kept(method) if (known := measure(result))]
            if found:
                band(axis, found, color(method), dashes)


def band(axis: Axes, found: Sequence[Mapping[float, float]], tint: str, dashes: str) -> None:
    """The mean over seeds, and from the lowest to the highest of them, where all have a value."""
    if not (x := thinned(sorted(set.intersection(*(set(known) for known in found))))):
        return
    y = np.array([[known[at] for at in x] for known in found])
    marker = "." if len(x) < 12 else ""
    if len(found) > 1:
        axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=tint, alpha=0.12, lw=0)
    axis.plot(x, y.mean(axis=0), color=tint, linestyle=dashes, marker=marker, linewidth=1.3)


def thinned(x: Sequence[float]) -> list[float]:
    """Evenly, with the first and the last."""
    kept = np.linspace(0, len(x) - 1, min(len(x), MOST)).round().astype(int)
    return [x[k] for k in kept]


def logarithmic(axis: Axes) -> None:
    """If all that is drawn is positive."""
    if all((np.asarray(line.get_ydata()) > 0).all() for line in axis.get_lines()):
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}" if high < 500 * low else NullFormatter())


def color(method: str) -> str:
    return COLORS.get(method, "#000000")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Without a date or the name of a version, so that nothing changes but with the results."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = stem.with_suffix(".png"), stem.with_suffix(".svg")
    with mpl.rc_context(STYLE | STEADY):
        figure.savefig(png, dpi=120, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    svg.write_text(rounded(svg.read_text(encoding="utf-8")), encoding="utf-8")
    return [png, svg]


def rounded(svg: str) -> str:
    """Paths to a tenth of a point: nobody sees more, and the file is half as large."""

    def tenths(path: re.Match[str]) -> str:
        return re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", path[0])

    return re.sub(r' d="[^"]*"', tenths, svg)
