"""The matrices: one with a close pair, one that drifts, and those of a network in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

import spectral_core as sc

from .schemes import Matrix

SHAPE = (256, 384)
RATIOS = (0.9, 0.99, 0.999)
EPOCHS = 50  # of 7 steps at batch 64


def close_pair(ratio: float, seed: int) -> Matrix:
    """σ₁ = 1, σ₂ = ratio, and below a Gaussian matrix's singular values."""
    rng = np.random.default_rng(seed)
    U, s, Vh = np.linalg.svd(rng.standard_normal(SHAPE), full_matrices=False)
    return U * np.r_[1, ratio * s[:-1] / s[0]] @ Vh


def drifting(steps: int = 300, seed: int = 0) -> Iterator[Matrix]:
    """σ₁ falls through σ₂ and the bulk, as if regularized, and all turns a little each step."""
    rng = np.random.default_rng(seed)
    U, s, Vh = np.linalg.svd(rng.standard_normal(SHAPE), full_matrices=False)
    s = s / s[0]
    turn = rng.standard_normal(SHAPE) * 2e-5
    for step in range(steps):
        s[0] = 1.3 - 0.4 * step / steps
        yield U * s @ Vh + step * turn


def training() -> dict[str, list[Mapping[str, Matrix]]]:
    """The demonstration's layers as matrices after each step, without the regularizer and with."""
    from benchmarks.demo.data import batches, digits
    from benchmarks.demo.train import METHODS, backend, plan

    data, runs = digits(), {}
    for method in METHODS:
        chosen = plan(data, method, 64, 0, EPOCHS)
        net, runs[method] = backend("torch")(chosen), []
        for epoch in range(EPOCHS):
            for images, labels in batches(data, 64, 0, epoch):
                net.step(images, labels)
                runs[method].append(
                    {
                        layer: sc.as_matrix(weight, net.layouts[layer]).astype(float)
                        for layer, weight in net.weights().items()
                    }
                )
    return runs
