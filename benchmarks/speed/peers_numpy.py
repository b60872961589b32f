"""What is timed in NumPy and CuPy."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from scipy.sparse.linalg import svds

import spectral_core as sc

from .cases import Case, by_formula, filled
from .report import COMPILED, OURS
from .timing import LeftOutError, Step, require_memory, require_short

Arrays = dict[str, Any]


def peers(case: Case, device: str, group: str) -> dict[str, Callable[[], Step]]:
    """Return a function for each peer that prepares its step."""
    if (group == "numpy") != (device == "cpu"):
        raise LeftOutError("NumPy computes on the CPU, CuPy on a GPU")
    if case.dtype == "bfloat16":
        raise LeftOutError("no matrix products in bfloat16")
    require_memory(2 * case.size, device)
    xp = import_module(group)
    weights, grads = (
        {
            name: xp.asarray(filled(shape, seed)).astype(case.dtype, copy=False)
            for name, shape in case.shapes.items()
        }
        for seed in (0, 1)
    )
    package = sc if group == "numpy" else import_module("spectral_cupy")
    plain = {"engines": ()} if group == "numpy" else {}
    found = {
        OURS[group]: partial(in_place, package, weights, grads, **plain),
        "paper's formula": partial(by_formula, xp, weights, grads),
    }
    if group == "cupy":
        return found | {"G += W": partial(floor, weights, grads)}
    compiled = partial(in_place, sc, weights, grads)
    return found | {COMPILED: compiled, "scipy svds(k=1)": partial(first_values, case, weights)}


def in_place(package: Any, weights: Arrays, grads: Arrays, **options: Any) -> Step:
    state = package.init(weights)

    def step() -> None:
        nonlocal state
        state = package.add_gradient_(weights, grads, state, **options)

    step()  # compiles what it compiles
    return step


def first_values(case: Case, weights: Arrays) -> Step:
    require_short(sum(m * n for m, n in case.matrices), 5e8)
    start = np.random.default_rng(0)
    matrices = [w.reshape(w.shape[0], -1) for w in weights.values()]
    return lambda: [
        svds(W, k=1, return_singular_vectors=False, rng=start) for W in matrices if min(W.shape) > 1
    ]


def floor(weights: Arrays, grads: Arrays) -> Step:
    def step() -> None:
        for name, w in weights.items():
            grads[name] += w

    return step
