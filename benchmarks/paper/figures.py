"""The paper's Figures 1–6 from our results, and 7: accuracy under perturbations of the input."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import panels, save_figure

from .compare import Group, groups
from .measure import NOISES, SIZES
from .runs import STRENGTHS, Result

# Okabe & Ito's colors, which the color-blind can tell apart; methods of one's own follow.
COLORS = ("#0072b2", "#009e73", "#cc79a7", "#d55e00", "#e69f00", "#56b4e9", "#000000", "#999999")
DASHES = {"train": (4, 2), "test": "", "train − test": (1, 1)}
# The figures that docs/reproduction.md shows.
ON_PAGES = {"fashion-mlp": (1, 4, 7), "fashion-2000": (7,), "fashion-lenet": (1, 7)}
PERTURBED = {"noise": ("noise of s.d.", NOISES)}
PERTURBED |= {key: (f"{key.replace('_', ' ')} of size", SIZES) for key in ("one_step", "ten_steps")}

Row = dict[str, Any]


def figures(
    results: Sequence[Result], folder: Path, numbers: Sequence[int] = range(1, 8)
) -> list[Path]:
    """Draw the figures that have data; figures 1 and 2 show the first network only."""
    found = groups(results)
    first = [group for group in found if group.network == found[0].network]
    others = [group for group in found if group.network != found[0].network]
    plan: dict[int, tuple[str, Iterable[Row]]] = {
        3: ("largest eigenvalue of the Hessian", curves(found, "_hessian")),
        4: ("singular value", spectra(found)),
        7: ("accuracy", perturbed(found)),
    }
    for number, some in {1: first, 5: others}.items():
        plan[number] = "accuracy", curves(some, "")
        plan[number + 1] = "‖∇ₓ loss‖₂", curves(some, "_gradient")
    paths = []
    for number in numbers:
        label, rows = plan[number]
        if not (table := pd.DataFrame(rows)).empty:
            paths.append(folder / f"figure-{number}.png")
            draw(table, label, paths[-1])
    return paths


def curves(found: Sequence[Group], suffix: str) -> Iterator[Row]:
    """Yield the values at each epoch; gaps follow accuracies, in panels of their own."""
    for group in found:
        for result, part in product(group.kept["result"], ("train", "test")):
            place = {"panel": group.title, "method": result.run.method, "part": part}
            for epoch, y in result.curve(part + suffix).items():
                yield {**place, "epoch": epoch, "y": y}
    for group in found if not suffix else ():
        panel = f"{group.title}\ntrain − test; α = {group.alpha}"
        for result in group.kept["result"]:
            place = {"panel": panel, "method": result.run.method, "part": "train − test"}
            test = result.curve("test")
            for epoch, y in result.curve("train").items():
                yield {**place, "epoch": epoch, "y": y - test[epoch]}


def spectra(found: Iterable[Group]) -> Iterator[Row]:
    """Yield the singular values of the middle one of the weights with many of them."""
    for group in found:
        known = [result for result in group.kept["result"] if result.spectra]
        for result in known:
            most = max(map(len, known[0].spectra.values()))
            large = [name for name, values in known[0].spectra.items() if 2 * len(values) >= most]
            name = large[len(large) // 2]
            place = {"panel": f"{group.title}\nlayer {name}", "method": result.run.method}
            for index, y in enumerate(result.spectra.get(name, ()), 1):
                yield {**place, "index": index, "y": y}


def perturbed(found: Iterable[Group]) -> Iterator[Row]:
    """Yield accuracies by the size of the perturbation, from size 0 on."""
    for group in found:
        known = [result for result in group.kept["result"] if result.final]
        for result, (key, (name, sizes)) in product(known, PERTURBED.items()):
            place = {"panel": f"{group.title}\n{name}", "method": result.run.method}
            for size, y in zip(
                (0.0, *sizes), (result.last("test"), *result.final[key]), strict=True
            ):
                yield {**place, "size": size, "y": y}


def draw(table: pd.DataFrame, label: str, path: Path) -> None:
    """Draw a panel for each network and batch: means over seeds, and the range of the seeds."""
    x = next(name for name in ("index", "size", "epoch") if name in table)
    methods = sorted(table["method"].unique(), key=[*STRENGTHS, *table["method"]].index)
    looks: Row = {"hue": "method", "hue_order": methods, "palette": COLORS[: len(methods)]}
    looks |= {"style": "part", "dashes": DASHES} if "part" in table else {}
    looks |= {"errorbar": ("pi", 100), "err_kws": {"alpha": 0.1, "lw": 0}}
    with panels(
        table, x=x, col_wrap=min(3 if x == "size" else 2, table["panel"].nunique()), **looks
    ) as grid:
        grid.set_axis_labels(x, label)
        for panel, axis in grid.axes_dict.items():
            if (
                label == "accuracy" and x == "epoch" and "−" not in panel
            ):  # the first epochs are alike
                axis.set_ylim(table["y"][table["panel"] == panel].quantile(0.03), 1.01)
        if label not in ("accuracy", "singular value") and (table["y"] > 0).all():
            grid.set(yscale="log")
        save_figure(grid.figure, path, dpi=90)
