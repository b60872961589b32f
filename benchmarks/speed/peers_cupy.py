"""Who is timed against whom in CuPy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cupy

import spectral_cupy

from .cases import Case, filled
from .forecast import require_memory
from .peers_numpy import NAIVE, naive
from .timing import LeftOutError, Step

OURS = "spectral_cupy"
FLOOR = "G += W"

NOTES = {
    OURS: "spectral_cupy.add_gradient_",
    NAIVE: "a Python loop over the layers with cupy.outer",
    FLOOR: "a loop over the layers",
}

Arrays = dict[str, Any]


def peers(case: Case, device: str, patience: float) -> dict[str, Callable[[], Step]]:
    del patience
    if device == "cpu":
        raise LeftOutError("CuPy computes on a GPU")
    if case.dtype == "bfloat16":
        raise LeftOutError("CuPy has no matrix products in bfloat16")
    require_memory(2 * case.size, device)
    weights, grads = arrays(case, 0), arrays(case, 1)
    return {
        OURS: partial(in_place, weights, grads),
        NAIVE: partial(naive, weights, grads, cupy),
        FLOOR: partial(floor, weights, grads),
    }


def arrays(case: Case, seed: int) -> Arrays:
    return {
        name: cupy.asarray(filled(shape, seed), dtype=case.dtype)
        for name, shape in case.shapes.items()
    }


def in_place(weights: Arrays, grads: Arrays) -> Step:
    state = spectral_cupy.init(weights)

    def step() -> None:
        nonlocal state
        state = spectral_cupy.add_gradient_(weights, grads, state)

    return step


def floor(weights: Arrays, grads: Arrays) -> Step:
    def step() -> None:
        for name, w in weights.items():
            grads[name] += w

    return step
