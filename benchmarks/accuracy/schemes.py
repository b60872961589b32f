"""The schemes that compete, all warm-started: a step takes (W, V) to (σ, u, v) and the next V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spectral_core.block import BlockIteration, block_iteration

Matrix = NDArray[Any]
Step = Callable[[Matrix, Matrix], BlockIteration]


class Scheme(NamedTuple):
    """``k`` vectors start it, and in every ``every``-th step it reads W ``passes`` times."""

    step: Step
    k: int
    passes: int = 2
    every: int = 1


def ritz(W: Matrix, V: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Rayleigh and Ritz on the left: all (σ, u, v) of WᴴQ, Q a basis of W·V."""
    Q = np.linalg.qr(W @ V.T)[0]
    C, s, Vh = np.linalg.svd(Q.T @ W, full_matrices=False)
    return s, Q @ C, Vh


def subspace(W: Matrix, V: Matrix) -> BlockIteration:
    """Subspace iteration: all k Ritz vectors are kept."""
    s, U, Vh = ritz(W, V)
    return BlockIteration(s[0], U[:, 0], Vh[0], Vh)


def history(W: Matrix, V: Matrix) -> BlockIteration:
    """Locally optimal momentum: v and the k − 1 vectors v before it."""
    s, U, Vh = ritz(W, V)
    return BlockIteration(s[0], U[:, 0], Vh[0], basis(np.vstack([Vh[:1], V[:-1]])))


def krylov(extra: int) -> Step:
    """Golub and Kahan: further steps of bidiagonalization, two readings each, from v alone."""

    def step(W: Matrix, V: Matrix) -> BlockIteration:
        rows = V
        for _ in range(extra):
            rows = basis(np.vstack([rows, (W @ rows[-1]) @ W]))
        s, U, Vh = ritz(W, rows)
        return BlockIteration(s[0], U[:, 0], Vh[0], Vh[:1])

    return step


def basis(rows: Matrix) -> Matrix:
    """Orthonormal rows, the first of which keeps its direction."""
    Q, R = np.linalg.qr(rows.T)
    return (Q * np.where(np.diag(R) < 0, -1, 1)).T


SCHEMES = {
    "power": Scheme(block_iteration, 1),
    "history, k = 2": Scheme(history, 2),
    "history, k = 3": Scheme(history, 3),
    "Golub–Kahan, 1 extra": Scheme(krylov(1), 1, 4),
    "Golub–Kahan, 2 extra": Scheme(krylov(2), 1, 6),
    "subspace, k = 3": Scheme(subspace, 3),
    "subspace, k = 4": Scheme(subspace, 4),
    "subspace, k = 8": Scheme(subspace, 8),
    "block, k = 2": Scheme(block_iteration, 2),
    "block, k = 3": Scheme(block_iteration, 3),
    "block, k = 4": Scheme(block_iteration, 4),
    "block, k = 8": Scheme(block_iteration, 8),
}

# Of matrices that stay, these are the same with fewer readings: they matter where W moves.
SELDOM = {
    f"{name}, every {every} steps": SCHEMES[name]._replace(every=every)
    for name in ("power", "block, k = 4")
    for every in (2, 4, 8, 16)
}
