"""What is timed in PyTorch. W and G are shared: their values do not matter here."""

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

Tensors = dict[str, Tensor]


def tensors(case: Case, device: str, seed: int) -> Tensors:
    dtype = getattr(torch, case.dtype)
    return {
        name: torch.from_numpy(filled(shape, seed)).to(device, dtype)
        for name, shape in case.shapes.items()
    }


def peers(case: Case, device: str, _: str) -> dict[str, Callable[[], Step]]:
    """Return a function for each peer that prepares its step, or raises `LeftOutError`."""
    require_memory(2 * case.size, device)
    weights, grads = tensors(case, device, 0), tensors(case, device, 1)
    return {
        OURS["torch"]: partial(adapter, weights, grads, kernels=True),
        "kernels=False": partial(adapter, weights, grads, kernels=False),
        "sc.add_gradient": partial(pure, case, device, weights, grads),
        "paper's formula": partial(by_formula, torch, weights, grads),
        "torch spectral_norm": partial(normalization, case, device, weights, grads),
        "matrix_norm(ord=2)": partial(svd, case, weights),
        "G.add_(W)": partial(floor, weights, grads),
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
    return partial(torch._foreach_add_, list(grads.values()), list(weights.values()))
