"""Measure how near one warm-started iteration a step comes to the SVD: schemes side by side.

The matrices stay, drift, or are those of a small network in training.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import spectral_core as sc

from .common import (
    RESULTS,
    add_output,
    markdown,
    output_of,
    panels,
    read_json,
    save_figure,
    write_json,
)

Matrix = NDArray[Any]
Outcome = tuple[Any, Matrix, Matrix, Matrix]  # σ, u, v, and the rows V to start the next step from
Triplet = tuple[float, Matrix, Matrix]  # σ₁, u₁, v₁
Step = Callable[[Matrix, Matrix], Outcome]

FILE = "accuracy.json.gz"
BUDGET = 120  # readings of W from a cold start
SHAPE, RATIOS = (256, 384), (0.9, 0.99, 0.999)
SKIPPED = 50  # steps of training, before the vectors have settled
QUANTILES = {0.5: "median", 0.95: "p95", 1.0: "max"}
GROUPS = ("vanilla", "spectral", "synthetic")


class Scheme(NamedTuple):
    """``k`` vectors start it, and in every ``every``-th step it reads W ``passes`` times."""

    step: Step
    k: int
    passes: int = 2
    every: int = 1


def block(W: Matrix, V: Matrix) -> Outcome:
    """The library's own iteration."""
    found = sc.block_iteration(W, V)
    return found.sigma, found.u, found.v, found.V


def ritz(keep: Callable[[Matrix, Matrix], Matrix], extra: int = 0) -> Step:
    """Take the best of all u in a basis of W·V, then start the next step from ``keep(Vh, V)``.

    ``extra`` steps of Golub and Kahan's bidiagonalization, two readings each, extend V before.
    """

    def step(W: Matrix, V: Matrix) -> Outcome:
        rows = V
        for _ in range(extra):
            rows = basis(np.vstack([rows, (W @ rows[-1]) @ W]))
        Q = np.linalg.qr(W @ rows.T)[0]
        C, s, Vh = np.linalg.svd(Q.T @ W, full_matrices=False)
        return s[0], Q @ C[:, 0], Vh[0], keep(Vh, V)

    return step


def basis(rows: Matrix) -> Matrix:
    """Return orthonormal rows, the first of which keeps its direction."""
    Q, R = np.linalg.qr(rows.T)
    return (Q * np.where(np.diag(R) < 0, -1, 1)).T


SUBSPACE = ritz(lambda Vh, _: Vh)  # all k Ritz vectors
HISTORY = ritz(lambda Vh, V: basis(np.vstack([Vh[:1], V[:-1]])))  # v and those before it
EXTRA = {k: Scheme(ritz(lambda Vh, _: Vh[:1], k), 1, 2 + 2 * k) for k in (1, 2)}
SCHEMES = {
    "power": Scheme(block, 1),
    **{f"history, k = {k}": Scheme(HISTORY, k) for k in (2, 3)},
    **{f"Golub–Kahan, {k} extra": scheme for k, scheme in EXTRA.items()},
    **{f"subspace, k = {k}": Scheme(SUBSPACE, k) for k in (3, 4, 8)},
    **{f"block, k = {k}": Scheme(block, k) for k in (2, 3, 4, 8)},
}
# On matrices that stay, these are the same with fewer readings: they matter where W moves.
SELDOM = {
    f"{name}, every {every} steps": SCHEMES[name]._replace(every=every)
    for name in ("power", "block, k = 4")
    for every in (2, 4, 8, 16)
}


def exact(W: Matrix) -> Triplet:
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    return float(s[0]), U[:, 0], Vh[0]


def errors(
    scheme: Scheme, matrices: Iterable[Matrix], truths: Iterable[Triplet], seed: int = 0
) -> dict[str, list[float]]:
    """Return three errors a step, each step starting from the V of the one before.

    They are |σ₁ − σ| / σ₁, the sine of the angle between v and v₁, and ‖σuvᴴ − σ₁u₁v₁ᴴ‖ / σ₁.
    """
    found: dict[str, list[float]] = {"sigma": [], "angle": [], "term": []}
    V = None
    for step, (W, (sigma_1, u_1, v_1)) in enumerate(zip(matrices, truths, strict=True)):
        if V is None:  # the same first vectors for every scheme
            V = np.random.default_rng(seed).standard_normal((8, W.shape[1]))[: scheme.k]
        if step % scheme.every == 0:
            sigma, u, v, V = scheme.step(W, V)
        # Through scalars: the difference of two matrices of rank one would round.
        sign, ratio = np.sign(v @ v_1), float(sigma) / sigma_1
        du, dv = u - u_1 * sign, v - v_1 * sign
        a, b = du @ du / 2, dv @ dv / 2
        found["sigma"].append(max(abs(1 - ratio), 1e-16))
        found["angle"].append(float(np.linalg.norm(v - v_1 * (v @ v_1))))
        found["term"].append(float(((ratio - 1) ** 2 + 2 * ratio * (a + b - a * b)) ** 0.5))
    return found


def close_pair(ratio: float, seed: int) -> Matrix:
    """Return a matrix with σ₁ = 1, σ₂ = ratio, and below it a Gaussian matrix's spectrum."""
    rng = np.random.default_rng(seed)
    U, s, Vh = np.linalg.svd(rng.standard_normal(SHAPE), full_matrices=False)
    return U * np.r_[1, ratio * s[:-1] / s[0]] @ Vh


def drifting(steps: int = 300, seed: int = 0) -> Iterator[Matrix]:
    """Yield matrices whose σ₁ falls through σ₂ and the bulk, and that turn a little each step."""
    rng = np.random.default_rng(seed)
    U, s, Vh = np.linalg.svd(rng.standard_normal(SHAPE), full_matrices=False)
    s = s / s[0]
    turn = rng.standard_normal(SHAPE) * 2e-5
    for step in range(steps):
        s[0] = 1.3 - 0.4 * step / steps
        yield U * s @ Vh + step * turn


def training(factor: float, epochs: int = 50, batch: int = 64) -> list[Mapping[str, Matrix]]:
    """Return a small network's layers as matrices, after each step of training on digits."""
    import torch
    from torch import nn

    import spectral_torch

    from .paper.data import batches, digits

    torch.set_num_threads(1)  # so small a network runs no faster on several
    convs = [nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, stride=2, padding=1)]
    dense = [nn.Linear(1024, 128), nn.Linear(128, 10)]
    layers = dict(zip(("conv1", "conv2", "dense1", "dense2"), convs + dense, strict=True))
    before = (part for conv in convs for part in (conv, nn.ReLU()))
    model = nn.Sequential(*before, nn.Flatten(), dense[0], nn.ReLU(), dense[1])
    rng = np.random.default_rng(0)
    for layer in layers.values():
        shape = tuple(layer.weight.shape)
        weight = rng.normal(0, (2 / prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        layer.weight.data.copy_(torch.from_numpy(weight))
        layer.bias.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    images, labels, *_ = map(torch.as_tensor, digits(test_share=0.75))
    found, steps = [], epochs * (len(labels) // batch)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])
    if factor:
        weights = {f"{name}.weight": layer.weight for name, layer in layers.items()}
        spectral_torch.SpectralNormRegularizer(weights, factor=factor).attach(optimizer)
    for epoch in range(epochs):
        for chosen in batches(len(labels), batch, 0, epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            scheduler.step()
            weights = {name: layer.weight.detach().flatten(1) for name, layer in layers.items()}
            found.append({name: w.numpy().astype(float) for name, w in weights.items()})
    return found


def static(seeds: int) -> dict[str, Any]:
    """Return the errors after each step on a matrix that stays, the median over seeds."""
    found: dict[str, Any] = {}
    for ratio in RATIOS:
        cases = [(seed, W, exact(W)) for seed in range(seeds) for W in [close_pair(ratio, seed)]]
        found[str(ratio)] = {}
        for name, scheme in SCHEMES.items():
            n = BUDGET // scheme.passes
            runs = [errors(scheme, [W] * n, [truth] * n, seed) for seed, W, truth in cases]
            medians = {key: np.median([run[key] for run in runs], axis=0) for key in runs[0]}
            found[str(ratio)][name] = {"passes": scheme.passes, **medians}
    return found


def tracking() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the errors of every fifth step on matrices that move, and the settled quantiles."""
    paths: dict[str, list[Matrix]] = {}
    for method, factor in {"vanilla": 0.0, "spectral": 0.01}.items():
        steps = training(factor)
        for layer in steps[0]:
            paths[f"{method} training, {layer}"] = [step[layer] for step in steps]
    paths["synthetic drift"] = list(drifting())
    tracks: dict[str, Any] = {title: {} for title in paths}
    summary: dict[str, Any] = {title: {} for title in paths}
    for title, matrices in paths.items():
        truths = [exact(W) for W in matrices]
        for name, scheme in (SCHEMES | SELDOM).items():
            found = pd.DataFrame(errors(scheme, matrices, truths))
            tracks[title][name] = {"passes": scheme.passes, **found[::5].to_dict("list")}
            quantiles = found[SKIPPED:].quantile(list(QUANTILES)).rename(QUANTILES)
            summary[title][name] = quantiles.to_dict()
    return tracks, summary


def page(folder: Path = RESULTS) -> str:
    """Return the table of the performance page: the term's error while a network trains."""
    result = read_json(folder / FILE)["summary"]
    shown = {
        "power": "one vector (the default)",
        "block, k = 2": "`n_vectors=2`",
        "block, k = 4": "`n_vectors=4`",
        "power, every 4 steps": "`every_n_steps=4`",
        "block, k = 4, every 4 steps": "`n_vectors=4, every_n_steps=4`",
    }
    rows = []
    for scheme, title in shown.items():
        quantiles = [worst(result, method, scheme)[:2] for method in ("vanilla", "spectral")]
        rows.append([title, *map(", ".join, quantiles)])
    return markdown(["", "without the regularizer", "with it"], rows)


def worst(result: Mapping[str, Any], group: str, scheme: str) -> list[str]:
    """Return the quantiles of the term's error, each on the path of the group where it is worst."""
    paths = [rows[scheme]["term"] for title, rows in result.items() if title.startswith(group)]
    largest = (100 * max(path[key] for path in paths) for key in QUANTILES.values())
    return [f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %" for percent in largest]


def everything(results: Mapping[str, Any]) -> str:
    """Return a table of all schemes: σ after 48 and 120 readings, and the term on moving paths."""
    rows = []
    for name, scheme in (SCHEMES | SELDOM).items():
        row = [name, f"{scheme.passes / scheme.every:g}"]
        for found in results["static"].values():
            at = [p // scheme.passes - 1 for p in (48, BUDGET)] if name in found else []
            row.append(" ".join(f"{found[name]['sigma'][k]:.0e}" for k in at))
        rows.append([*row, *(", ".join(worst(results["summary"], g, name)) for g in GROUPS)])
    header = ["scheme", "readings a step", *(f"σ₂/σ₁ = {ratio}" for ratio in RATIOS)]
    return markdown([*header, *GROUPS], rows)


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Draw the error against readings of W, and the term's error over steps of training."""
    shown = ("power", "Golub–Kahan, 1 extra", "history, k = 2", "block, k = 2")
    shown += ("subspace, k = 4", "block, k = 4", "block, k = 8")
    found = {f"one matrix, σ₂/σ₁ = {title}": one for title, one in results["static"].items()}
    found |= {title: one for title, one in results["tracking"].items() if "vanilla" not in title}
    rows = []
    for (panel, one), name in product(found.items(), shown):
        still = panel.startswith("one matrix")
        unit = one[name]["passes"] if still else 5
        for k, error in enumerate(one[name]["sigma" if still else "term"], 1):
            rows.append({"panel": panel, "x": k * unit, "y": error, "scheme": name})
    looks = {"hue": "scheme", "style": "scheme", "palette": "colorblind"}
    with panels(rows, x="x", col_wrap=3, **looks) as grid:
        grid.set_axis_labels("step", "relative error of σuvᵀ").figure.subplots_adjust(hspace=0.4)
        for panel, axis in grid.axes_dict.items():
            still = panel.startswith("one matrix")
            axis.set(yscale="log", ylim=(1e-16, 1) if still else (1e-8, 3))
            if still:
                axis.set(xlabel="readings of W", ylabel="relative error of σ")
        save_figure(grid.figure, path, dpi=90)


def main() -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of the static matrices")
    add_output(parser, "accuracy-output")
    options = parser.parse_args()
    tracks, summary = tracking()
    results = {"static": static(options.seeds), "tracking": tracks, "summary": summary}
    Console(width=170).print(Markdown(everything(results)))
    folder = output_of(options)
    write_json(folder / FILE, results, 4)
    draw(folder / "accuracy.png", results)
    print(f"wrote accuracy.png and {FILE} into {folder.name}")


if __name__ == "__main__":
    main()
