"""Compute other norms than the largest singular value: Schatten norms, and that of an embedding."""

from __future__ import annotations

from math import inf
from typing import Any

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
    squared,
    traits,
)
from ._lanczos import as_matrices
from ._layout import Layout
from ._validate import check_number
from .errors import ArgumentError


def schatten_norm(W: Array, p: float, *, layout: Layout | str | None = None) -> Array:
    r"""Compute the Schatten norm of a matrix: the p-norm of its singular values.

    .. math:: ‖W‖_p = \left(\sum_i σ_i^p\right)^{1/p}

    p = 1 is the nuclear norm, p = 2 the Frobenius norm, and p = ∞ the spectral norm.

    Parameters
    ----------
    W : array, or sequence of sequences of numbers
        A matrix, or a tensor that ``layout`` makes a matrix or a stack of matrices of. float16 and
        bfloat16 are computed in float32.
    p : float
        At least 1; ``math.inf`` is allowed.
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
    ArgumentError
        If p is less than 1.

    Notes
    -----
    The norm has the gradient of what it computes, and runs inside ``jax.jit``. From p = 2 on, the
    singular values are the roots of the eigenvalues of the shorter side's Gram matrix. What that
    adds to small values does not count there. Below, it would, and the values come from an SVD.
    Where a backend has no linear algebra, NumPy's on the host is used, without a gradient.

    Examples
    --------
    >>> import math
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> W = np.diag([3.0, 4.0])
    >>> [round(float(sc.schatten_norm(W, p)), 6) for p in (1, 2, math.inf)]
    [7.0, 5.0, 4.0]
    """
    power = inf if p == inf else check_number(p, "p")
    if not power >= 1:
        raise ArgumentError(f"p must be at least 1, not {p!r}")
    W = as_matrices(W, layout)
    xp = array_namespace(W)
    W = cast(W, traits(W, xp, "W").iteration_dtype, xp)
    W, scale = _scaled(W, xp)
    if power == 2:
        found = _root(xp.sum(squared(W, xp), axis=(-2, -1)), 0.5, xp)
    elif power > 2:
        found = _root(_p_norm(_squares(W, xp), power / 2, xp), 0.5, xp)
    else:
        found = _p_norm(_linalg(W, "svdvals", xp), power, xp)
    return found * scale


def embedding_norm(W: Array, *, layout: Layout | str = "io") -> Array:
    """Compute the gain of an embedding: the largest norm of the vectors that it looks up.

    An embedding is a matrix that is applied to one-hot vectors only. So its gain is its longest
    vector. The spectral norm would be the gain for sums of one-hot vectors, and is larger.

    Parameters
    ----------
    W : array
        The table, or a stack of tables with ``layout="sio"``. float16 and bfloat16 are computed in
        float32.
    layout : Layout or str
        The meaning of the axes: the input axis counts the entries. The default is the order of
        PyTorch, Flax and Keras, one entry a row.

    Returns
    -------
    array, shape (*stack,)
        Zero for a table of zeros, NaN where W is not finite.

    Raises
    ------
    ShapeError, DTypeError
        As `spectral_norm`.

    Notes
    -----
    The norm has a gradient, and runs inside ``jax.jit``.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> float(sc.embedding_norm(np.array([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])))
    5.0
    """
    W = as_matrices(W, layout)
    xp = array_namespace(W)
    W = cast(W, traits(W, xp, "W").iteration_dtype, xp)
    W, scale = _scaled(W, xp)
    longest = xp.max(xp.sum(squared(W, xp), axis=-2), axis=-1)
    return _root(longest, 0.5, xp) * scale


def _scaled(W: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return the matrices with a largest element of 1, and their scales; NaN where not finite.

    Squares then neither overflow nor underflow. Factorizations refuse NaN: zeros stand for it.
    """
    largest = xp.max(xp.abs(constant(W)), axis=(-2, -1), keepdims=True)
    finite = xp.isfinite(largest)
    usable = finite & (largest > 0)
    scale = xp.where(usable, largest, xp.ones_like(largest))
    W = xp.where(finite, W, xp.zeros_like(W)) / xp.astype(scale, W.dtype)
    return W, xp.where(finite, scale, xp.full_like(scale, float("nan")))[..., 0, 0]


def _root(x: Array, power: float, xp: Namespace) -> Array:
    """Return x^power, and zero with a gradient of zero where x is zero."""
    positive = x > 0
    return xp.where(positive, xp.where(positive, x, xp.ones_like(x)) ** power, xp.zeros_like(x))


def _p_norm(values: Array, power: float, xp: Namespace) -> Array:
    """Return the p-norm of the last axis of numbers that are not negative."""
    largest = xp.max(values, axis=-1)
    if power == inf:
        return largest
    safe = xp.where(largest > 0, largest, xp.ones_like(largest))
    ratios = values / safe[..., None]
    return largest * _root(xp.sum(ratios**power, axis=-1), 1 / power, xp)


def _squares(W: Array, xp: Namespace) -> Array:
    """Return the squared singular values, by the Gram matrix of the shorter side."""
    adjoint = conj(xp.matrix_transpose(W), xp)
    gram = xp.matmul(adjoint, W) if W.shape[-1] <= W.shape[-2] else xp.matmul(W, adjoint)
    values = _linalg(gram, "eigvalsh", xp)
    return xp.where(values > 0, values, xp.zeros_like(values))


def _linalg(A: Array, name: str, xp: Namespace) -> Array:
    """Return the eigenvalues or singular values of the last two axes."""
    try:
        compute: Any = getattr(xp.linalg, name)
    except AttributeError:
        host = as_numpy(A)
        found = np.linalg.eigvalsh(host) if name == "eigvalsh" else np.linalg.svdvals(host)
        dtype = xp.abs(A[..., :1, 0]).dtype
        return xp.asarray(found.copy(), dtype=dtype, device=device_of(A, xp))
    return compute(A)
