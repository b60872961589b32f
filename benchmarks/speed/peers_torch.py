"""What is timed in PyTorch. W and G are shared: their values do not matter here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import spectral_core as sc
from spectral_torch import SpectralNormRegularizer

from .cases import Case, by_formula, filled
from .report import OURS
from .timing import LeftOutError, Step, require_memory, require_short

UNCOMPILED = "kernels=False"
PURE = "sc.add_gradient"
FORMULA = "paper's formula"
NORMALIZATION = "torch spectral_norm"
SVD = "matrix_norm(ord=2)"
FLOOR = "G.add_(W)"

Tensors = dict[str, Tensor]


def tensors(case: Case, device: str, seed: int) -> Tensors:
    dtype = getattr(torch, case.dtype)
    return {
        name: torch.from_numpy(filled(shape, seed)).to(device, dtype)
        for name, shape in case.shapes.items()
    }


def peers(case: Case, device: str, group: str) -> dict[str, Callable[[], Step]]:
    """Return a function for each peer that prepares its step, or raises `LeftOutError`."""
    del group
    require_memory(2 * case.size, device)
    weights, grads = tensors(case, device, 0), tensors(case, device, 1)
    return {
        OURS["torch"]: partial(adapter, weights, grads, kernels=True),
        UNCOMPILED: partial(adapter, weights, grads, kernels=False),
        PURE: partial(pure, case, device, weights, grads),
        FORMULA: partial(by_formula, torch, weights, grads),
        NORMALIZATION: partial(normalization, case, device, weights, grads),
        SVD: partial(svd, case, weights),
        FLOOR: partial(floor, weights, grads),
    }


def regularizer_of(weights: Tensors, grads: Tensors, **options: Any) -> SpectralNormRegularizer:
    parameters = {name: nn.Parameter(w) for name, w in weights.items()}
    for name, parameter in parameters.items():
        parameter.grad = grads[name]
    return SpectralNormRegularizer(parameters, warmup_iters=1, **options)


def adapter(weights: Tensors, grads: Tensors, *, kernels: bool) -> Step:
    step = regularizer_of(weights, grads, kernels=kernels).add_gradients_
    step()  # compiles what it compiles
    return step


def pure(case: Case, device: str, weights: Tensors, grads: Tensors) -> Step:
    require_memory(2 * case.size, device)
    state = sc.init(weights)

    def step() -> None:
        nonlocal state
        _, state = sc.add_gradient(weights, grads, state)

    return step


class Holder(nn.Module):
    """A layer that is nothing but its weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def normalization(case: Case, device: str, weights: Tensors, grads: Tensors) -> Step:
    require_memory(3 * case.size, device)
    layers = [parametrizations.spectral_norm(Holder(w)) for w in weights.values()]
    originals = [layer.parametrizations.weight.original for layer in layers]
    upstream = list(grads.values())

    def step() -> None:
        # Through autograd as in training: gradients arrive where there were none.
        for original in originals:
            original.grad = None
        torch.autograd.backward([layer.weight for layer in layers], upstream)

    return step


def svd(case: Case, weights: Tensors) -> Step:
    if case.dtype == "bfloat16":
        raise LeftOutError("PyTorch has no SVD of bfloat16")
    require_short(sum(m * n * min(m, n) for m, n in case.matrices), 1e11)
    return lambda: [torch.linalg.matrix_norm(w.flatten(1), ord=2) for w in weights.values()]


def floor(weights: Tensors, grads: Tensors) -> Step:
    ws, gs = list(weights.values()), list(grads.values())
    return lambda: torch._foreach_add_(gs, ws)
