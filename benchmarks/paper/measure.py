"""What is measured of a network: during training, and once at its end."""

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import spectral_core as sc
import spectral_torch

from .methods import unit

CHUNK = 500  # images at a time, where nothing is trained
NOISES = (0.25, 0.5, 1.0, 2.0)  # standard deviations; a normalized image's pixels have 1
SIZES = (0.5, 1.0, 2.0)  # of gradient perturbations, in ‖·‖₂; an image of 28 × 28 has norm 28
STEPS = 10  # of the larger attack (projected gradient)
ATTACKED = 2000  # images that are attacked
BINS = 15  # of confidence, for the calibration error
TOL = 0.01  # of convolutions' norms: seeds differ by more


def final(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """Return what is measured at the end, on test images: sensitivity, calibration and bounds."""
    generator = torch.Generator().manual_seed(seed)
    some = x[:ATTACKED], y[:ATTACKED]
    found: dict[str, Any] = {"gradient": input_gradient(model, x, y), **calibration(model, x, y)}
    found["noise"] = [noisy_accuracy(model, x, y, sd, generator) for sd in NOISES]
    found["one_step"] = [attacked_accuracy(model, *some, size, 1) for size in SIZES]
    found["ten_steps"] = [attacked_accuracy(model, *some, size, STEPS) for size in SIZES]
    bound = spectral_torch.lipschitz_bound(model, x[:1], max_iter=0, tol=TOL)
    return found | {"bound": bound.log10_upper, "layers": layers(model)}


def chunks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(CHUNK), y.split(CHUNK), strict=True)


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    right = sum((model(some).argmax(1) == labels).sum() for some, labels in chunks(x, y))
    return float(right) / len(y)


def noisy_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, deviation: float, generator: torch.Generator
) -> float:
    """Return the accuracy with Gaussian noise on each pixel, drawn once."""
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return accuracy(model, x + deviation * noise, y)


def attacked_accuracy(model: nn.Module, x: Tensor, y: Tensor, size: float, steps: int) -> float:
    """Return the accuracy after steps along the gradient, each image's change within ``size``.

    One step is the paper's η = ε·g/‖g‖₂. Several are projected gradient steps from the image, of
    2.5·ε/steps each (Madry et al., 2018).
    """
    length = size if steps == 1 else 2.5 * size / steps
    right = 0.0
    for some, labels in chunks(x, y):
        change = torch.zeros_like(some)
        for _ in range(steps):
            rows = unit(gradients(model, some + change, labels).flatten(1))
            moved = change.flatten(1) + length * rows
            scale = (size / moved.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
            change = (moved * scale).view_as(some)
        right += accuracy(model, some + change, labels) * len(labels)
    return right / len(y)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return ∇ₓ loss of each image."""
    x = x.detach().requires_grad_()
    loss = cross_entropy(model(x), y, reduction="sum")
    return torch.autograd.grad(loss, x)[0]


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the mean over images of ‖∇ₓ loss‖₂ (paper, figures 2 and 6)."""
    norms = (gradients(model, *some).flatten(1).norm(dim=1).sum() for some in chunks(x, y))
    return float(sum(norms)) / len(x)


@torch.inference_mode()
def calibration(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Return the mean loss and the expected calibration error (Guo et al., 2017)."""
    outputs = torch.cat([model(some) for some in x.split(CHUNK)])
    confidence, guess = outputs.softmax(1).max(1)
    surplus = confidence - (guess == y).float()
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    sums = torch.zeros(BINS, device=x.device).index_add_(0, bins, surplus)
    return {"nll": float(cross_entropy(outputs, y)), "ece": float(sums.abs().sum()) / len(y)}


def hessian(model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> float:
    """Return the largest eigenvalue of the loss's Hessian, within some 2 % (paper, figure 3).

    By Lanczos: the paper's power iteration needs more products, and finds the largest magnitude.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(cross_entropy(model(x), y), parameters, create_graph=True)
    sizes = [p.numel() for p in parameters]

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        parts = torch.from_numpy(vector.ravel()).to(x.device, torch.float32).split(sizes)
        pieces = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        products = torch.autograd.grad(gradients, parameters, pieces, retain_graph=True)
        return torch.cat([part.flatten() for part in products]).double().cpu().numpy()

    size = sum(sizes)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    try:
        values = eigsh(operator, 1, which="LA", v0=start, ncv=6, tol=0.02, maxiter=30)[0]
    except ArpackError:  # not converged, or a Hessian that is zero or not finite
        return float("nan")
    return float(values[0])


@torch.no_grad()
def spectra(model: nn.Module) -> dict[str, list[float]]:
    """Return all singular values of each weight, the largest first (paper, figure 4)."""
    return {name: torch.linalg.svdvals(W).tolist() for name, W in matrices(model).items()}


@torch.no_grad()
def sigma_product(model: nn.Module) -> float:
    """Return Π σ, a bound on how much the weights, without batch normalization, can amplify."""
    # From the smaller of WWᵀ and WᵀW: much faster than an SVD, and as good for σ₁.
    squares = (W @ W.T if len(W) < W.shape[1] else W.T @ W for W in matrices(model).values())
    return prod(float(torch.linalg.eigvalsh(square)[-1]) ** 0.5 for square in squares)


def layers(model: nn.Module) -> dict[str, list[float]]:
    """Return σ₁ of each weight's matrix, ‖W‖_F²/σ₁², and the norm as a map, a bound from above."""
    modules, found = dict(model.named_modules()), {}
    for name, values in spectra(model).items():
        rank = sum((value / values[0]) ** 2 for value in values) if values[0] else 0.0
        found[name] = [values[0], rank, norm(modules[name], values[0])]
    return found


def norm(module: nn.Module, sigma: float) -> float:
    """Return the norm of a convolution on images of any size; σ of a linear layer."""
    if not isinstance(module, nn.Conv2d):
        return sigma
    kernel = module.weight.detach().cpu()
    return sc.convolution_norm(kernel, "oihw", stride=module.stride, tol=TOL).upper


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of convolutions and linear layers, in float64."""
    layouts = {nn.Conv2d: "oihw", nn.Linear: "oi"}
    return {
        name: sc.as_matrix(module.weight.detach(), layout).double()
        for name, module in model.named_modules()
        for kind, layout in layouts.items()
        if isinstance(module, kind)
    }
