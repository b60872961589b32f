"""Who is timed against whom in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import svds

import spectral_core as sc
from spectral_core.numba_step import NumbaStep
from spectral_core.step import Step as StepOfWeights
from spectral_core.step import plain_step_

from .cases import Case, filled
from .forecast import require_memory, require_patience
from .timing import LeftOutError, Step

OURS = "sc.add_gradient_"
COMPILED = "step=NumbaStep()"
NAIVE = "paper's formula"
SVDS = "scipy svds(k=1)"

NOTES = {
    OURS: "the core in place, on NumPy arrays",
    COMPILED: "the same with the compiled step",
    NAIVE: "a Python loop over the layers with np.outer",
    SVDS: "scipy.sparse.linalg.svds: the converged σ of each matrix, no gradient",
}

Arrays = dict[str, NDArray[Any]]


def peers(case: Case, device: str, patience: float) -> dict[str, Callable[[], Step]]:
    if device != "cpu":
        raise LeftOutError("NumPy computes on the CPU")
    if case.dtype == "bfloat16":
        raise LeftOutError("NumPy has no bfloat16")
    require_memory(2 * case.size, device)
    weights, grads = arrays(case, 0), arrays(case, 1)
    return {
        OURS: partial(in_place, weights, grads, plain_step_),
        COMPILED: partial(in_place, weights, grads, NumbaStep()),
        NAIVE: partial(naive, weights, grads),
        SVDS: partial(truncated_svd, case, weights, patience),
    }


def arrays(case: Case, seed: int) -> Arrays:
    return {
        name: filled(shape, seed).astype(case.dtype, copy=False)
        for name, shape in case.shapes.items()
    }


def in_place(weights: Arrays, grads: Arrays, how: StepOfWeights) -> Step:
    state = sc.init(weights)

    def step() -> None:
        nonlocal state
        state = sc.add_gradient_(weights, grads, state, step=how)

    step()  # compiles what it compiles
    return step


def naive(weights: Arrays, grads: Arrays, xp: Any = np) -> Step:
    """The formula in NumPy, or in what is written like it."""
    vectors = {name: xp.ones(w[0].size, w.dtype) for name, w in weights.items()}
    norm, outer = xp.linalg.norm, xp.outer

    def step() -> None:
        for name, w in weights.items():
            matrix = w.reshape(w.shape[0], -1)
            u = matrix @ vectors[name]
            v = matrix.T @ u
            sigma = norm(v) / norm(u)
            u, v = u / norm(u), v / norm(v)
            vectors[name] = v
            grads[name] += (0.01 * sigma * outer(u, v)).reshape(w.shape)

    return step


def truncated_svd(case: Case, weights: Arrays, patience: float) -> Step:
    small = partial(small_svds, case.dtype)
    work = float(sum(m * n for m, n in case.matrices))
    require_patience(SVDS, "cpu", case.dtype, small, work, patience)
    return partial(first_values, [w.reshape(w.shape[0], -1) for w in weights.values()])


def small_svds(dtype: str) -> tuple[Step, float]:
    return partial(first_values, [filled((1024, 1024)).astype(dtype)]), 1024.0**2


def first_values(matrices: list[NDArray[Any]]) -> list[float]:
    start = np.random.default_rng(0)
    return [
        float(svds(W, k=1, return_singular_vectors=False, rng=start)[0])
        for W in matrices
        if min(W.shape) > 1
    ]
