"""The weights that are timed, and who times against whom."""

from __future__ import annotations

from collections.abc import Callable

import torch

import spectral_core as sc
from spectral_torch import SpectralNormRegularizer

Step = Callable[[], object]
Weights = dict[str, torch.Tensor]


def square(n: int) -> Weights:
    """One n × n matrix."""
    return {"w": torch.randn(n, n) / n**0.5}


def densenet_40() -> Weights:
    """The 3 × 3 and transition convolutions of a DenseNet of depth 40, growth 12, on 3 channels."""
    shapes, channels = [(16, 3, 3, 3)], 16
    for block in range(3):
        for _ in range(12):
            shapes.append((12, channels, 3, 3))
            channels += 12
        if block < 2:
            shapes.append((channels, channels, 1, 1))
    return {f"conv{i}": torch.randn(shape) * 0.05 for i, shape in enumerate(shapes)}


CASES: dict[str, Callable[[], Weights]] = {
    "512 × 512": lambda: square(512),
    "2048 × 2048": lambda: square(2048),
    "4096 × 4096": lambda: square(4096),
    "DenseNet-40, 39 convolutions": densenet_40,
}


def peers(weights: Weights) -> dict[str, Step]:
    """What is timed side by side, each with gradients and vectors of its own."""
    return {
        "spectral_torch": _hook(weights),
        "spectral_core.add_gradient (pure)": _pure(weights),
        "paper's formula, torch.outer": _naive(weights),
        "G.add_(W)": _floor(weights),
    }


def _hook(weights: Weights) -> Step:
    parameters = {name: torch.nn.Parameter(w) for name, w in weights.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    return SpectralNormRegularizer(parameters, warmup_iters=1).add_gradients_


def _pure(weights: Weights) -> Step:
    grads = {name: torch.zeros_like(w) for name, w in weights.items()}
    state = sc.init(weights)
    return lambda: sc.add_gradient(weights, grads, state)


def _naive(weights: Weights) -> Step:
    """A loop over layers as it is commonly copied, but for the misprint."""
    grads = {name: torch.zeros_like(w) for name, w in weights.items()}
    vectors = {name: torch.randn(w[0].numel()) for name, w in weights.items()}

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


def _floor(weights: Weights) -> Step:
    """One read of W, one read and write of G: no step can move fewer bytes."""
    grads = [torch.zeros_like(w) for w in weights.values()]
    return lambda: [grad.add_(w) for grad, w in zip(grads, weights.values(), strict=True)]
