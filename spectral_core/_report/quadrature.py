"""Compute where a vector's mass is among the singular values of a matrix, by Lanczos steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .entry import Stored


def quadratures(
    gram: Callable[[Stored], Stored], starts: Stored, steps: int
) -> tuple[Stored, Stored]:
    """Return the Gauss quadratures of the spectral measures of some vectors.

    The measure of a vector y with respect to a symmetric operator has the mass |⟨x, y⟩|² at the
    eigenvalue of each eigenvector x. The eigenvalues of the tridiagonal matrix that Lanczos steps
    from y give are the nodes, and the squares of its eigenvectors' first elements are the weights.
    All vectors are multiplied at once, so a step reads the matrix as often as for one.

    Parameters
    ----------
    gram : callable
        Return the products of an array of rows, shape (k, n), with the operator.
    starts : array, shape (k, n)
        Unit vectors.
    steps : int

    Returns
    -------
    nodes, weights : array, shape (k, steps)
        The nodes rise. Each row of weights has the sum 1.

    Examples
    --------
    >>> nodes, weights = quadratures(lambda x: x * [1.0, 4.0], np.array([[0.6, 0.8]]), 2)
    >>> nodes.round(6), weights.round(6)
    (array([[1., 4.]]), array([[0.36, 0.64]]))
    """
    count, n = starts.shape
    steps = min(steps, n)
    basis = np.zeros((count, steps, n), starts.dtype)
    T = np.zeros((count, steps, steps))
    x = starts
    for k in range(steps):
        basis[:, k] = x
        y = gram(x)
        diagonal = np.einsum("jn,jn->j", x.conj(), y).real
        T[:, k, k] = diagonal
        done = basis[:, : k + 1]
        # Twice, against all vectors before: rounding would let old directions come back.
        for _ in range(2):
            y = y - np.einsum("jk,jkn->jn", np.einsum("jkn,jn->jk", done.conj(), y), done)
        if k + 1 == steps:
            break
        lengths = np.linalg.norm(y, axis=1).astype(float)
        # The span is invariant: what is left is rounding. Zeros decouple the steps that follow,
        # whose weights are then zero.
        largest = np.abs(T[:, : k + 1]).max(axis=(1, 2))
        lengths[lengths <= 64 * np.finfo(y.dtype).eps * largest] = 0.0
        T[:, k, k + 1] = T[:, k + 1, k] = lengths
        x = y / np.where(lengths > 0, lengths, np.inf)[:, None].astype(lengths.dtype)
        x = x.astype(starts.dtype)
    nodes, vectors = np.linalg.eigh(T)
    return nodes, np.abs(vectors[:, 0, :]) ** 2
