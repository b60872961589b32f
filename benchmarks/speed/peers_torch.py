"""Who is timed against whom in PyTorch. W and G are shared: their values do not matter here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import spectral_core as sc
from spectral_torch import SpectralNormRegularizer

from .cases import Case, Shape, filled
from .forecast import require_memory, require_patience
from .timing import LeftOutError, Step

OURS = "spectral_torch"
UNCOMPILED = "kernels=False"
PURE = "sc.add_gradient"
NAIVE = "paper's formula"
NORMALIZATION = "torch spectral_norm"
SVD = "matrix_norm(ord=2)"
FLOOR = "G.add_(W)"

NOTES = {
    OURS: "SpectralNormRegularizer(…).add_gradients_()",
    UNCOMPILED: "the same without compiled kernels, as where Numba or Triton is not installed",
    PURE: "the core without the adapter: new gradients, the old ones stay",
    NAIVE: "a Python loop over the layers with torch.outer",
    NORMALIZATION: "torch.nn.utils.parametrizations.spectral_norm: all weights computed in "
    "training mode, and a fixed gradient taken back through them; a plain layer spends nothing",
    SVD: "the exact σ of each matrix by SVD, no gradient",
    FLOOR: "torch._foreach_add_ over all: it moves the fewest bytes that any step can",
}

Tensors = dict[str, Tensor]


def tensors(case: Case, device: str, seed: int) -> Tensors:
    dtype = getattr(torch, case.dtype)
    return {
        name: torch.from_numpy(filled(shape, seed)).to(device, dtype)
        for name, shape in case.shapes.items()
    }


def peers(case: Case, device: str, patience: float) -> dict[str, Callable[[], Step]]:
    """Each a function that prepares a step, or says by `LeftOutError` why there is none."""
    require_memory(2 * case.size, device)
    weights, grads = tensors(case, device, 0), tensors(case, device, 1)
    return {
        OURS: partial(adapter, weights, grads, kernels=True),
        UNCOMPILED: partial(adapter, weights, grads, kernels=False),
        PURE: partial(pure, case, weights, grads),
        NAIVE: partial(naive, weights, grads),
        NORMALIZATION: partial(normalization, case, weights, grads),
        SVD: partial(svd, case, weights, patience),
        FLOOR: partial(floor, weights, grads),
    }


def adapter(weights: Tensors, grads: Tensors, *, kernels: bool) -> Step:
    parameters = {name: nn.Parameter(w) for name, w in weights.items()}
    for name, parameter in parameters.items():
        parameter.grad = grads[name]
    step = SpectralNormRegularizer(parameters, warmup_iters=1, kernels=kernels).add_gradients_
    step()  # compiles what it compiles
    return step


def pure(case: Case, weights: Tensors, grads: Tensors) -> Step:
    require_memory(2 * case.size, str(next(iter(weights.values())).device))
    state = sc.init(weights)

    def step() -> None:
        nonlocal state
        _, state = sc.add_gradient(weights, grads, state)

    return step


def naive(weights: Tensors, grads: Tensors) -> Step:
    """A loop over layers as it is commonly copied, but for the misprint."""
    vectors = {name: torch.randn_like(w[0].flatten()) for name, w in weights.items()}

    def step() -> None:
        for name, w in weights.items():
            matrix = w.reshape(w.shape[0], -1)
            u = matrix @ vectors[name]
            v = matrix.t() @ u
            sigma = v.norm() / u.norm()
            u, v = u / u.norm(), v / v.norm()
            vectors[name] = v
            grads[name] += (0.01 * sigma * torch.outer(u, v)).reshape(w.shape)

    return step


class Holder(nn.Module):
    """A layer that is nothing but its weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def normalization(case: Case, weights: Tensors, grads: Tensors) -> Step:
    require_memory(3 * case.size, str(next(iter(weights.values())).device))
    layers = [parametrizations.spectral_norm(Holder(w)) for w in weights.values()]
    originals = [layer.parametrizations.weight.original for layer in layers]
    upstream = list(grads.values())

    def step() -> None:
        # Through autograd as in training: gradients arrive where there were none.
        for original in originals:
            original.grad = None
        torch.autograd.backward([layer.weight for layer in layers], upstream)

    return step


def svd(case: Case, weights: Tensors, patience: float) -> Step:
    if case.dtype == "bfloat16":
        raise LeftOutError("PyTorch has no SVD of bfloat16")
    device = str(next(iter(weights.values())).device)
    small = partial(small_svd, device, case.dtype)
    require_patience(SVD, device, case.dtype, small, svd_work(case.matrices), patience)
    return lambda: [torch.linalg.matrix_norm(w.flatten(1), ord=2) for w in weights.values()]


def svd_work(matrices: list[tuple[int, int]]) -> float:
    return float(sum(m * n * min(m, n) for m, n in matrices))


def small_svd(device: str, dtype: str) -> tuple[Step, float]:
    """An SVD from whose time that of a larger one is foretold, and its work."""
    shape: Shape = (1024, 1024)
    small = torch.from_numpy(filled(shape)).to(device, getattr(torch, dtype))

    def step() -> Any:
        return torch.linalg.matrix_norm(small, ord=2).item()

    return step, svd_work([(1024, 1024)])


def floor(weights: Tensors, grads: Tensors) -> Step:
    ws, gs = list(weights.values()), list(grads.values())
    return lambda: torch._foreach_add_(gs, ws)
