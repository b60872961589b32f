"""Measure more of a spectrum than its largest value: the first k triplets, and norms of all."""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import numpy as np

from ._arrays import (
    Array,
    Namespace,
    array_namespace,
    as_numpy,
    cast,
    conj,
    constant,
    device_of,
    norm,
    squared,
    traits,
)
from ._lanczos import as_matrices, scale_of, spectral_norm
from ._layout import Layout, stack_layout
from ._operator import thin_qr
from ._power import start_vector
from ._validate import check_number
from .errors import ShapeError, check_int

_MORE = 4  # vectors of a block beyond those that are asked for
_BLOCKS = 6  # of a basis: that many products, then it starts again from its best vectors


class TopTriplets(NamedTuple):
    """Result of `top_triplets`."""

    sigma: Array
    u: Array
    v: Array
    converged: bool
    n_iter: int


def top_triplets(
    W: Array,
    k: int,
    *,
    layout: Layout | str | None = None,
    tol: float | None = None,
    max_iter: int = 1000,
    seed: int = 0,
) -> TopTriplets:
    """Compute the k largest singular values of a matrix and their vectors.

    The method is block Lanczos: a block of k + 4 vectors is multiplied a few times, and the best
    vectors of the space of all products start the next round. A block finds values that occur
    several times, which a single vector cannot.

    Parameters
    ----------
    W : array, or sequence of sequences of numbers
        A matrix, or a tensor that ``layout`` makes one matrix of. float16 and bfloat16 are computed
        in float32.
    k : int
        Number of singular values, at most the shorter side.
    layout : Layout or str, optional
        The meaning of the axes. It is needed for three axes and more.
    tol : float, optional
        Stop when each residual is at most this share of the largest value. The default is ε^(2/3):
        4e-11 in float64, 2e-5 in float32.
    max_iter : int
        Largest number of products of a block with W and Wᴴ.
    seed : int
        Seed of the start vectors.

    Returns
    -------
    sigma : array, shape (k,)
        In falling order; lower bounds, up to rounding. NaN where W is not finite.
    u : array, shape (k, m)
        Orthonormal rows: Wᴴu_i = σ_i v_i.
    v : array, shape (k, n)
        Orthonormal rows.
    converged : bool
        True if every residual met ``tol``.
    n_iter : int
        Number of products of a block.

    Raises
    ------
    ShapeError
        If W is not one matrix with no empty axis, or has fewer than k rows or columns.
    DTypeError
        If W is not an array of numbers, or is sparse or masked.
    ArgumentError
        If ``k`` or ``max_iter`` is less than 1, or ``tol`` or ``seed`` is out of its range.

    Notes
    -----
    The function waits for the device once a round, so it does not run inside ``jax.jit``.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> W = np.diag([1.0, 5.0, 3.0, 3.0])
    >>> sc.top_triplets(W, 3).sigma.round(6)
    array([5., 3., 3.])
    """
    W = constant(as_matrices(W, layout))
    xp = array_namespace(W)
    kind = traits(W, xp, "W")
    W = cast(W, kind.iteration_dtype, xp)
    k, max_iter = check_int(k, "k"), check_int(max_iter, "max_iter")
    bound = kind.eps ** (2 / 3) if tol is None else check_number(tol, "tol")
    if W.ndim != 2:
        raise ShapeError(
            f"W is a stack of shape {tuple(W.shape)}: call the function for each matrix"
        )
    if k > min(W.shape):
        raise ShapeError(f"W has shape {tuple(W.shape)}: it has no {k} singular values")
    largest = float(xp.max(xp.abs(W)))
    if not isfinite(largest):
        nan = xp.astype(xp.zeros((k, 1), device=device_of(W, xp)), W.dtype) * float("nan")
        return TopTriplets(xp.abs(nan[:, 0]), nan + W[:, 0], nan + W[0, :], False, 0)
    scale = scale_of(W, largest, xp) if largest > 0 else 1.0
    W = W / scale
    wide = W.shape[0] < W.shape[1]
    if wide:
        W = conj(xp.matrix_transpose(W), xp)
    v, n_iter = _top_rows(W, k, bound, max_iter, seed, xp)
    # The factors of W·v, and not the roots of a Gram matrix's eigenvalues: small values keep their
    # digits, and u is orthonormal.
    Q, R = thin_qr(xp.matrix_transpose(_times(W, v, xp)), xp)
    P, values, Th = np.linalg.svd(as_numpy(R))
    left, right, sigma = (
        xp.asarray(x.copy(), dtype=dtype, device=device_of(W, xp))
        for x, dtype in ((P.T, W.dtype), (Th.conj(), W.dtype), (values, xp.abs(W[:1, 0]).dtype))
    )
    u, v = xp.matmul(left, xp.matrix_transpose(Q)), xp.matmul(right, v)
    residual = float(xp.max(norm(_adjoint_times(W, u, xp) - sigma[:, None] * v, xp)))
    rounding = kind.eps * sum(W.shape) ** 0.5
    converged = residual <= max(bound, rounding) * float(xp.max(sigma))
    return TopTriplets(sigma * scale, v if wide else u, u if wide else v, converged, n_iter)


def stable_rank(W: Array, *, layout: Layout | str | None = None) -> Array:
    """Return ‖W‖_F²/σ₁²: a number between 1 and the rank that small singular values do not change.

    Parameters
    ----------
    W : array
        A matrix, or a tensor that ``layout`` makes a matrix or a stack of matrices of.
    layout : Layout or str, optional
        The meaning of the axes. It is needed for three axes and more.

    Returns
    -------
    array, shape (*stack,)
        Zero for a zero matrix, NaN where W is not finite.

    Raises
    ------
    ShapeError, DTypeError
        As `spectral_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> float(sc.stable_rank(np.diag([2.0, 2.0, 1.0])))
    2.25
    """
    W = constant(as_matrices(W, layout))
    xp = array_namespace(W)
    W = cast(W, traits(W, xp, "W").iteration_dtype, xp)
    largest = xp.max(xp.abs(W), axis=(-2, -1), keepdims=True)
    W = W / xp.where(largest == 0, xp.ones_like(largest), largest)
    sigma = spectral_norm(W, layout=stack_layout(W.ndim)).sigma
    square = xp.sum(squared(W, xp), axis=(-2, -1))
    zero = sigma == 0
    return xp.where(zero, sigma, square / xp.where(zero, xp.ones_like(sigma), sigma * sigma))


def _times(W: Array, rows: Array, xp: Namespace) -> Array:
    return xp.matmul(rows, xp.matrix_transpose(W))


def _adjoint_times(W: Array, rows: Array, xp: Namespace) -> Array:
    return conj(xp.matmul(conj(rows, xp), W), xp)


def _top_rows(
    W: Array, k: int, tol: float, max_iter: int, seed: int, xp: Namespace
) -> tuple[Array, int]:
    """Return the k best right vectors as rows, and the number of products of a block."""
    n = W.shape[1]
    block = start_vector((min(k + _MORE, n), n), W, seed=seed)
    if block.shape[0] * _BLOCKS >= n:  # one block of all dimensions: the first round is exact
        block = xp.astype(xp.eye(n, device=device_of(W, xp)), W.dtype)
    n_iter = 0
    while True:
        space = new = _rows(block, xp)
        rounds = min(_BLOCKS if block.shape[0] < n else 1, max_iter - n_iter)
        for _ in range(rounds - 1):
            new = _adjoint_times(W, _times(W, new, xp), xp)
            # Twice: where the products add nothing new, all that the first time leaves is rounding.
            for _ in range(2):
                new = new - xp.matmul(xp.matmul(new, conj(xp.matrix_transpose(space), xp)), space)
                new = _rows(new, xp)
            space = xp.concat([space, new], axis=0)
        n_iter += rounds
        # The singular values of W on the space, by the eigenvectors of its small Gram matrix.
        image = _times(W, space, xp)
        gram = xp.matmul(conj(image, xp), xp.matrix_transpose(image))
        vectors = np.linalg.eigh(as_numpy(gram))[1][:, ::-1][:, : block.shape[0]]
        turn = xp.asarray(vectors.T.copy(), dtype=W.dtype, device=device_of(W, xp))
        block = xp.matmul(turn, space)
        y = _times(W, block[:k, :], xp)
        squares = xp.sum(squared(y, xp), axis=-1)
        residual = norm(_adjoint_times(W, y, xp) - squares[:, None] * block[:k, :], xp)
        if float(xp.max(residual)) <= tol * float(xp.max(squares)) or n_iter >= max_iter:
            return _rows(block[:k, :], xp), n_iter


def _rows(X: Array, xp: Namespace) -> Array:
    """Return orthonormal rows with the span of the rows of X."""
    return xp.matrix_transpose(thin_qr(xp.matrix_transpose(X), xp)[0])
