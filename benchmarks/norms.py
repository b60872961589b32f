"""Time the bounds of norms beside their peers, and say how far each is from the truth.

One matrix of 2,048 rows by factorization, one of 4,096 from products alone, and the convolutions of
a ResNet-18 with random weights.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from math import prod
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

import spectral_core as sc

from .common import RESULTS, add_output, machine, markdown, output_of, read_json, write_json

Matrix = NDArray[Any]
Found = dict[str, Any]
FILE = "norms.json"
ROUNDS = 3
TOL = 1e-6
# Outputs, inputs, taps along an axis, stride: one entry for each convolution of a ResNet-18.
RESNET_18 = [
    (64, 3, 7, 2),
    *[(64, 64, 3, 1)] * 4,
    *[
        shape
        for c in (128, 256, 512)
        for shape in [
            (c, c // 2, 3, 2),
            (c, c, 3, 1),
            (c, c // 2, 1, 2),
            (c, c, 3, 1),
            (c, c, 3, 1),
        ]
    ],
]
COMPARED = {0: 224, 1: 56}  # convolutions by index, and the size of their images for the FFT


def timed(methods: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Return the seconds of each method in each round; the rounds are interleaved."""
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            start = perf_counter()
            method()
            found[name].append(perf_counter() - start)
    return found


def factorization(n: int = 2048) -> Found:
    """Return times and the distance of the proven bounds, beside an SVD's values."""
    import torch
    from scipy.sparse.linalg import svds

    W = np.random.default_rng(0).standard_normal((n, n))
    tensor = torch.from_numpy(W)
    bounds = sc.bounds(W)
    norm = float(np.linalg.svd(W, compute_uv=False)[0])
    ours = "`sc.bounds`, proven"
    methods = {
        ours: lambda: sc.bounds(W),
        "`np.linalg.svd`, values": lambda: np.linalg.svd(W, compute_uv=False),
        "`torch.linalg.matrix_norm(ord=2)`": lambda: torch.linalg.matrix_norm(tensor, 2),
        "`scipy…svds(k=1)`, from below": lambda: svds(W, k=1, return_singular_vectors=False),
        "`sc.spectral_norm`, with its bound": lambda: sc.spectral_norm(W),
        "`sc.bounds(probability=1e-9)`": lambda: sc.bounds(W, probability=1e-9),
        '`sc.bounds(method="cheap")`': lambda: sc.bounds(W, method="cheap"),
    }
    seconds = timed(methods)
    rows = {}
    for name, times in seconds.items():
        ratios = [t / first for t, first in zip(times, seconds[ours], strict=True)]
        rows[name] = {"seconds": median(times), "ratio": median(ratios)}
    for name, found in {
        ours: bounds,
        "`sc.bounds(probability=1e-9)`": sc.bounds(W, probability=1e-9),
        '`sc.bounds(method="cheap")`': sc.bounds(W, method="cheap"),
    }.items():
        rows[name]["above"] = float(found.upper) / norm - 1
        rows[name]["gap"] = float(found.upper / found.lower) - 1
    return {"n": n, "rows": rows}


def probable(n: int = 4096, products: int = 100) -> Found:
    """Return how far the bound from products is above the truth, which a factorization gives."""
    W = np.random.default_rng(0).standard_normal((n, n))
    start = perf_counter()
    found = sc.bounds(W, probability=1e-9, n_iter=products)
    seconds = perf_counter() - start
    exact = sc.bounds(W)
    above = float(found.upper) / float(exact.lower) - 1
    return {"n": n, "products": products, "seconds": seconds, "above": above}


def kernel(index: int) -> Matrix:
    """Return a kernel with He's initialization, in float32."""
    o, i, k, _ = RESNET_18[index]
    normal = np.random.default_rng(index).standard_normal((o, i, k, k))
    return (normal * (2 / (o * k * k)) ** 0.5).astype(np.float32)


def certified(index: int) -> tuple[float, float, float]:
    """Return the bounds of one convolution, and the seconds that they took."""
    start = perf_counter()
    found = sc.convolution_norm(kernel(index), "oihw", stride=RESNET_18[index][3], tol=TOL)
    return found.lower, found.upper, perf_counter() - start


def resnet(processes: int = 2) -> Found:
    """Bound all convolutions, in processes of one thread: more only wait for each other."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    order = sorted(range(len(RESNET_18)), key=lambda i: -prod(RESNET_18[i][:3]))  # long ones first
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        [*pool.map(abs, range(processes))]  # they import NumPy before the clock starts
        start = perf_counter()
        found = [*pool.map(certified, order)]
        seconds = perf_counter() - start
    gaps = [upper / lower - 1 for lower, upper, _ in found]
    each = sum(time for *_, time in found)
    return {"processes": processes, "seconds": seconds, "each": each, "gap": max(gaps)}


def compared(index: int, size: int) -> Found:
    """Return what other methods say of one convolution with stride 1."""
    K = kernel(index).astype(float)
    methods = {
        "`sc.convolution_norm`": lambda: sc.convolution_norm(K, "oihw", tol=TOL).upper,
        f"FFT at {size}² and SVDs (Sedghi et al.), from below": lambda: sedghi(K, size),
        f"FFT at {size}² and Gram iteration (Delattre et al.)": lambda: delattre(K, size),
        "four unfoldings (Singla & Feizi)": lambda: unfoldings(K),
        "the flattened kernel": lambda: float(np.linalg.norm(K.reshape(len(K), -1), 2)),
    }
    norm = sc.convolution_norm(K, "oihw", tol=1e-9).upper
    rows = {}
    for name, method in methods.items():
        start = perf_counter()
        value = method()
        rows[name] = {"seconds": perf_counter() - start, "value": value / norm}
    return {"shape": RESNET_18[index][:3], "size": size, "rows": rows}


def spectrum(K: Matrix, size: int) -> Matrix:
    """Return the symbol on half of the grid of frequencies: the other half are conjugates."""
    found = np.fft.rfft2(K, (size, size))
    return found.transpose(2, 3, 0, 1).reshape(-1, *K.shape[:2])


def sedghi(K: Matrix, size: int) -> float:
    return max(
        float(np.linalg.svd(part, compute_uv=False).max())
        for part in np.array_split(spectrum(K, size), 32)
    )


def delattre(K: Matrix, size: int) -> float:
    """Return the norm with circular padding at that size from above, by six products."""
    parts = np.array_split(spectrum(K, size), 32)
    return max(float(np.max(sc.gram_bound(part, n_iter=6))) for part in parts)


def unfoldings(K: Matrix) -> float:
    """Return √(taps) times the least norm of four matrices that hold the kernel."""
    o, i, h, w = K.shape
    matrices = (
        K.reshape(o, -1),
        K.swapaxes(0, 1).reshape(i, -1),
        K.transpose(0, 2, 1, 3).reshape(o * h, -1),
        K.transpose(0, 3, 1, 2).reshape(o * w, -1),
    )
    return float((h * w) ** 0.5 * min(np.linalg.norm(matrix, 2) for matrix in matrices))


PARTS: dict[str, Callable[[], Any]] = {
    "factorization": factorization,
    "probable": probable,
    "resnet": resnet,
    "compared": lambda: [compared(index, size) for index, size in COMPARED.items()],
}


def seconds_of(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def page(folder: Path = RESULTS) -> str:
    """Return the tables of the performance page."""
    result = read_json(folder / FILE)
    about, found = result["machine"], result["factorization"]
    rows = []
    for name, row in found["rows"].items():
        above = f"{row['above']:.1e}" if "above" in row else ""
        rows.append([name, seconds_of(row["seconds"]), f"{row['ratio']:.2g} ×", above])
    lines = [
        f"Measured on {about['date']} on {about['cores']} cores of {about['processor']} "
        f"({about['architecture']}).",
        f"A Gaussian matrix of {found['n']:,} rows and columns in float64, in interleaved rounds; "
        f"the proven bounds are {found['rows']['`sc.bounds`, proven']['gap']:.1e} apart:",
        markdown(["", "time", "multiple of ours", "upper bound above σ₁"], rows),
    ]
    chance, network = result["probable"], result["resnet"]
    lines.append(
        f"At {chance['n']:,} rows, {chance['products']} products give a bound that is "
        f"{100 * chance['above']:.2g} % above σ₁ and fails with a probability of 1e-9, in "
        f"{seconds_of(chance['seconds'])}. The {len(RESNET_18)} convolutions of a ResNet-18 with "
        f"random weights are bounded to {network['gap']:.1e} for every size of image in "
        f"{seconds_of(network['seconds'])}, by {network['processes']} processes of one thread."
    )
    for one in result["compared"]:
        o, i, k = one["shape"]
        rows = [
            [name, seconds_of(row["seconds"]), f"{row['value']:.6g}"]
            for name, row in one["rows"].items()
        ]
        lines.append(f"A convolution of {i} to {o} channels and {k} × {k} taps:")
        lines.append(markdown(["", "time", "share of the norm"], rows))
    return "\n\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.norms", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    add_output(parser, "norms-output")
    options = parser.parse_args()
    path = output_of(options) / FILE
    result = read_json(path) if path.exists() else {}
    for part in options.parts:
        result[part] = PARTS[part]()
        result["machine"] = machine("cpu")
        write_json(path, result, 4)
        print(part, result[part], flush=True)


if __name__ == "__main__":
    main()
