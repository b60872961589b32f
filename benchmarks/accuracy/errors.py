"""Errors against the SVD in float64, one matrix after the other with the V of the one before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .schemes import Matrix, Scheme


class Triple(NamedTuple):
    sigma: float
    u: Matrix
    v: Matrix


class Errors(NamedTuple):
    """One entry a step."""

    sigma: list[float]  # |σ₁ − σ| / σ₁: an old σ may be too large
    angle: list[float]  # sine of the angle between v and v₁
    term: list[float]  # ‖σuvᴴ − σ₁u₁v₁ᴴ‖ / σ₁


def exact(W: Matrix) -> Triple:
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    return Triple(float(s[0]), U[:, 0], Vh[0])


def errors(
    scheme: Scheme, matrices: Iterable[Matrix], truths: Iterable[Triple], seed: int = 0
) -> Errors:
    found, V = Errors([], [], []), None
    for step, (W, truth) in enumerate(zip(matrices, truths, strict=True)):
        if V is None:
            V = start(scheme, W.shape[1], seed)
        if step % scheme.every == 0:
            sigma, u, v, V = scheme.step(W, V)
        # Through scalars: ‖σuvᵀ − σ₁u₁v₁ᵀ‖² without two matrices whose difference rounds.
        du, dv = u - truth.u * np.sign(v @ truth.v), v - truth.v * np.sign(v @ truth.v)
        ratio, a, b = float(sigma) / truth.sigma, du @ du / 2, dv @ dv / 2
        found.sigma.append(max(abs(1 - ratio), 1e-16))
        found.angle.append(float(np.linalg.norm(v - truth.v * (v @ truth.v))))
        found.term.append(float(((ratio - 1) ** 2 + 2 * ratio * (a + b - a * b)) ** 0.5))
    return found


def start(scheme: Scheme, n: int, seed: int) -> Matrix:
    """The same first vectors for every scheme."""
    return np.random.default_rng(seed).standard_normal((8, n))[: scheme.k]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    q = np.quantile(values, [0.5, 0.95, 1.0])
    return {"median": float(q[0]), "p95": float(q[1]), "max": float(q[2])}
