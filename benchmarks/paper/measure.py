"""What is measured of a model: accuracy, ‖∇ₓ loss‖₂, the Hessian's eigenvalue, singular values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import spectral_core as sc

CHUNK = 500  # images at a time


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """As at test time: no dropout, batch normalization by the running statistics."""
    model.eval()
    try:
        yield
    finally:
        model.train()


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that are classified rightly."""
    pairs = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    right = sum((model(some).argmax(1) == labels).sum() for some, labels in pairs)
    return float(right) / len(y)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean over images of ‖∇ₓ loss‖₂ (paper, figures 2 and 6)."""
    total = torch.zeros((), device=x.device)
    for some, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        some = some.detach().requires_grad_()
        loss = cross_entropy(model(some), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, some)
        total += gradient.flatten(1).norm(dim=1).sum()
    return float(total) / len(x)


def hessian(model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> float:
    """The largest eigenvalue of the loss's Hessian, within some 2 % (paper, figure 3).

    By Lanczos' method on Hessian-vector products, which takes fewer of them than the paper's power
    iteration, and finds the largest eigenvalue rather than the largest in magnitude.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    shapes = [p.numel() for p in parameters]

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        parts = torch.from_numpy(vector.ravel()).to(x.device, torch.float32).split(shapes)
        pieces = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        products = torch.autograd.grad(gradients, parameters, pieces, retain_graph=True)
        return torch.cat([part.flatten() for part in products]).double().cpu().numpy()

    size = sum(shapes)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    try:
        values = eigsh(operator, 1, which="LA", v0=start, ncv=6, tol=0.02, maxiter=30)[0]
    except ArpackError:  # not converged, or of a Hessian that is zero or not finite
        return float("nan")
    return float(values[0])


@torch.no_grad()
def spectra(model: nn.Module) -> dict[str, list[float]]:
    """All singular values of each weight as a matrix, the largest first (paper, figure 4)."""
    return {name: torch.linalg.svdvals(W).tolist() for name, W in matrices(model).items()}


@torch.no_grad()
def sigma_product(model: nn.Module) -> float:
    """Π σ, which bounds how much the model can amplify a perturbation, but for normalization.

    From the smaller of WWᵀ and WᵀW, which is much faster than an SVD and as good for σ₁.
    """
    squares = (W @ W.T if len(W) < W.shape[1] else W.T @ W for W in matrices(model).values())
    return prod(float(torch.linalg.eigvalsh(square)[-1]) ** 0.5 for square in squares)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers, in float64."""
    layouts = {nn.Conv2d: "oihw", nn.Linear: "oi"}
    return {
        name: sc.as_matrix(module.weight.detach(), layout).double()
        for name, module in model.named_modules()
        for kind, layout in layouts.items()
        if isinstance(module, kind)
    }
