"""Compare the first singular vectors of two matrices: overlaps, angles, and intruders.

An intruder dimension is a singular vector among the first k of a fine-tuned matrix that is like no
singular vector of the base: each cosine is below a threshold (Shuttleworth et al. 2024). A small
matrix is factorized. Of a large one only the first vectors are computed; three facts then decide:

1. A cosine with one of the base's first vectors is at the threshold: no intruder.
2. What those vectors leave of the vector is shorter than the threshold: an intruder.
3. Its mass is spread over the rest of the base's spectrum: an intruder. The weights of a Gauss
   quadrature bound the mass at any one singular value, without a factorization.

Where none applies, the vector is counted as undecided.
"""

from __future__ import annotations

from collections.abc import Callable
from math import atan2, degrees
from typing import NamedTuple

import numpy as np

from .._density import quadratures
from .._spectrum import top_triplets
from .entry import Stored

# Singular values whose difference is below this share of the largest have no vectors of their own:
# any rotation within their span is as good, so a cosine is taken with the span.
_EQUAL = 1e-9
_STEPS = 48  # of the quadrature
_TOLERANCE = 1e-4  # of the vectors of a large matrix, relative to the largest value
_MOST_PRODUCTS = 120
_MORE = 4  # vectors of the base beyond those that are compared
_NEGLIGIBLE = 1e-4  # of the largest singular value, in a large matrix


class Similarity(NamedTuple):
    """How like the first singular vectors of two matrices are: left ones first, then right ones.

    ``overlaps`` are |cos| of the first vectors, ``angles`` the largest principal angles between the
    spans of the first k in degrees, ``intruders`` the numbers of intruders among these k.
    """

    overlaps: tuple[float, float]
    angles: tuple[float, float]
    intruders: tuple[int, int]
    undecided: int
    converged: bool


class _Vectors(NamedTuple):
    """Singular values in falling order, and the vectors as rows, without those of zero."""

    sigma: Stored
    left: Stored
    right: Stored
    converged: bool = True


def similarity_of(before: Stored, after: Stored, k: int, threshold: float) -> Similarity:
    """Compare two matrices that are factorized.

    Parameters
    ----------
    before, after : array, shape (m, n)
        Finite and not zero, float64 or complex128.
    k : int
        Number of first vectors.
    threshold : float
        An intruder's cosines are below it.

    Returns
    -------
    Similarity

    Examples
    --------
    >>> W = np.diag([4.0, 3.0, 2.0, 1.0])
    >>> spread = np.full((4, 4), 5.0)  # its singular vector is the mean of all
    >>> similarity_of(W, W + spread, 1, 0.6).intruders
    (1, 1)
    """
    base, tuned = _factorized(before), _factorized(after)
    tuned = _first(tuned, k)
    found = [
        _cosines(base.sigma, x, y).max(axis=0)
        for x, y in ((base.left, tuned.left), (base.right, tuned.right))
    ]
    left, right = (int((cosines < threshold).sum()) for cosines in found)
    return _compared(_first(base, k), tuned, (left, right), 0)


def similarity_of_large(before: Stored, after: Stored, k: int, threshold: float) -> Similarity:
    """Compare two large matrices by their first vectors alone: see `similarity_of`."""
    tuned = _top(after, min(k, *after.shape))
    base = _top(before, min(k + _MORE, *before.shape))

    def adjoint_times(rows: Stored) -> Stored:
        return (rows.conj() @ before).conj()

    def times(rows: Stored) -> Stored:
        return rows @ before.T

    left = _decided(lambda x: times(adjoint_times(x)), base.sigma, base.left, tuned.left, threshold)
    right = _decided(
        lambda x: adjoint_times(times(x)), base.sigma, base.right, tuned.right, threshold
    )
    undecided = left.count(None) + right.count(None)
    return _compared(_first(base, k), tuned, (left.count(True), right.count(True)), undecided)


def _factorized(W: Stored) -> _Vectors:
    U, sigma, Vh = np.linalg.svd(W, full_matrices=False)
    rank = int((sigma > max(W.shape) * np.finfo(float).eps * sigma[0]).sum())
    return _Vectors(sigma[:rank], U.T[:rank], Vh.conj()[:rank])


def _top(W: Stored, k: int) -> _Vectors:
    found = top_triplets(W, k, tol=_TOLERANCE, max_iter=_MOST_PRODUCTS)
    sigma = np.asarray(found.sigma, float)
    rank = int((sigma > _NEGLIGIBLE * sigma[0]).sum())
    # It stops at the tolerance, or at the last product.
    converged = found.n_iter < _MOST_PRODUCTS
    return _Vectors(sigma[:rank], found.u[:rank], found.v[:rank], converged)


def _first(found: _Vectors, k: int) -> _Vectors:
    return found._replace(sigma=found.sigma[:k], left=found.left[:k], right=found.right[:k])


def _cosines(sigma: Stored, base: Stored, tuned: Stored) -> Stored:
    """Return the cosine of each vector with each span of the base's vectors of one value."""
    squares = np.abs(base.conj() @ tuned.T).astype(float) ** 2
    new = np.flatnonzero(-np.diff(sigma) > _EQUAL * sigma[0]) + 1
    return np.sqrt(np.add.reduceat(squares, np.concatenate([[0], new]), axis=0))


def _compared(
    base: _Vectors, tuned: _Vectors, intruders: tuple[int, int], undecided: int
) -> Similarity:
    sides = ((base.left, tuned.left), (base.right, tuned.right))
    left, right = (min(1.0, float(abs(x[0].conj() @ y[0]))) for x, y in sides)
    return Similarity(
        (left, right),
        (_angle(*sides[0]), _angle(*sides[1])),
        intruders,
        undecided,
        base.converged and tuned.converged,
    )


def _angle(base: Stored, tuned: Stored) -> float:
    """Return the largest principal angle between two spans of orthonormal rows, in degrees.

    Its cosine says nothing about small angles, and its sine nothing about those near 90°: both
    together are accurate everywhere.
    """
    if len(base) < len(tuned):  # the larger span cannot be near all of the smaller one
        base, tuned = tuned, base
    inner = tuned.conj() @ base.T
    outside = tuned - inner.conj() @ base
    sine = float(np.linalg.norm(outside, 2))
    return degrees(atan2(sine, float(np.linalg.svd(inner, compute_uv=False)[-1])))


def _decided(
    gram: Callable[[Stored], Stored],
    sigma: Stored,
    base: Stored,
    tuned: Stored,
    threshold: float,
) -> list[bool | None]:
    """Return True for an intruder, False for none, None where it is undecided."""
    found: list[bool | None] = [False] * len(tuned)
    inner = base.conj() @ tuned.T
    cosines = _cosines(sigma, base, tuned).max(axis=0)
    left = tuned - inner.T @ base
    lengths = np.linalg.norm(left, axis=1)
    open_ = []
    for i in range(len(tuned)):
        if cosines[i] >= threshold:
            continue
        found[i] = True if lengths[i] < threshold else None
        open_ += [i] if found[i] is None else []
    if open_:
        starts = left[open_] / lengths[open_, None]
        most = _largest_masses(gram, starts) * lengths[open_] ** 2
        for i, mass in zip(open_, most, strict=True):
            found[i] = True if mass < threshold**2 else None
    return found


def _largest_masses(gram: Callable[[Stored], Stored], starts: Stored) -> Stored:
    """Bound the mass that each vector has at one singular value of the base.

    The Chebyshev–Markov–Stieltjes inequalities say of each quadrature that the measure of the
    interval between two neighboring nodes, both included, is at most the sum of their weights; that
    before the first node and after the last, at most its weight. A node at zero has the part of the
    vector that the base maps to (nearly) nothing: no singular vector of the base is meant by it.
    """
    masses = []
    for nodes, weights in quadratures(gram, starts, min(_STEPS, starts.shape[1]), np):
        weights[nodes <= _NEGLIGIBLE**2 * nodes[-1]] = 0.0
        masses.append((weights + np.append(weights[1:], 0.0)).max())
    return np.array(masses)
