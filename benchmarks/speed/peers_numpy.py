"""What is timed in NumPy and CuPy."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from itertools import count, product
from operator import iadd
from typing import Any

import numpy as np

import spectral_core as sc
from spectral_core._host import HostEngine

from .cases import Case, by_formula, filled
from .report import COMPILED, OURS
from .timing import LeftOutError, Makers, Options, Step, require_memory

Arrays = dict[str, Any]


def arrays(case: Case, device: str, group: str) -> tuple[Arrays, Arrays]:
    """Return W and G, or raise `LeftOutError`."""
    if (group == "numpy") != (device == "cpu"):
        raise LeftOutError("NumPy computes on the CPU, CuPy on a GPU")
    if case.dtype == "bfloat16":
        raise LeftOutError("no matrix products in bfloat16")
    require_memory(2 * case.size, device)
    arrays: tuple[Arrays, Arrays] = ({}, {})
    for (name, shape), seed in product(case.shapes.items(), (0, 1)):
        array = import_module(group).asarray(filled(shape, seed))
        arrays[seed][name] = array.astype(case.dtype, copy=False)
    return arrays


def peers(_: Case, device: str, weights: Arrays, grads: Arrays) -> Makers:
    """Return a function for each peer that prepares its step."""
    if device == "cuda":
        return {
            OURS["cupy"]: partial(in_place, of_cupy(), weights, grads),
            "paper's formula": partial(by_formula, import_module("cupy"), weights, grads),
            "G += W": lambda: lambda: [iadd(grads[name], w) for name, w in weights.items()],
        }
    return {
        OURS["numpy"]: partial(in_place, sc.add_gradient_, weights, grads, engines=[HostEngine()]),
        "paper's formula": partial(by_formula, np, weights, grads),
        COMPILED: partial(in_place, sc.add_gradient_, weights, grads),
    }


def variants(_: Case, device: str, weights: Arrays, grads: Arrays, common: Options) -> Makers:
    """Return the options of a step with the compiled engine."""
    add = sc.add_gradient_ if device == "cpu" else of_cupy()
    found: Makers = {n: partial(in_place, add, weights, grads, **one) for n, one in common.items()}
    if device == "cpu":
        found["bound, idle"] = partial(bounded, weights, 1e6)
        found["bound, acting"] = partial(bounded, weights, 1.0)
        found["HWIO"] = partial(channels_last, weights, grads)
    return found


def of_cupy() -> Callable[..., sc.SpectralState]:
    """Return CuPy's step with an engine, which keeps its tables from step to step."""
    package = import_module("spectral_cupy")
    return partial(package.add_gradient_, engine=package.CudaEngine())


def in_place(
    add: Callable[..., sc.SpectralState],
    *arrays: Arrays,
    n_vectors: int = 1,
    layouts: Mapping[str, str] | None = None,
    every_n_steps: int = 1,
    **options: Any,
) -> Step:
    state, turns = sc.init(arrays[0], n_vectors=n_vectors, layouts=layouts), count()

    def step() -> None:
        nonlocal state
        n_iter = int(next(turns) % every_n_steps == 0)
        state = add(*arrays, state, n_iter=n_iter, **options)

    step()  # compiles what it compiles
    return step


def bounded(weights: Arrays, bound: float) -> Step:
    """Bound copies, by a bound that falls in each step."""
    copies, turns = {name: w.copy() for name, w in weights.items()}, count()
    return in_place(lambda *a, **o: sc.constrain_(*a, bound * 0.999 ** next(turns), **o), copies)


def channels_last(weights: Arrays, grads: Arrays) -> Step:
    layouts = {name: "hwio" for name, w in weights.items() if w.ndim == 4}
    if not layouts:
        raise LeftOutError("no weight is a convolution")
    arrays = (
        {n: np.ascontiguousarray(x.transpose(2, 3, 1, 0)) if n in layouts else x for n, x in one}
        for one in (weights.items(), grads.items())
    )
    return in_place(sc.add_gradient_, *arrays, layouts=layouts)
