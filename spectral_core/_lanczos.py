"""Compute the converged spectral norm with an error bound, to check and to report with.

Power iteration is slow where σ₂ ≈ σ₁, and the regularizer drives a spectrum there. The Lanczos
method keeps the iterates of WᴴW and returns the best vector of their span. When the basis is full,
it restarts with its best vectors (thick restart; Wu and Simon, 2000). Squaring is harmless for the
*largest* value: a relative error of ε in σ² is ε/2 in σ.
"""

from __future__ import annotations

from collections.abc import Callable
from math import frexp, isfinite, prod
from sys import float_info
from typing import Any, NamedTuple

import numpy as np

from ._arrays import (
    Array,
    Namespace,
    array_namespace,
    cast,
    conj,
    constant,
    device_of,
    is_complex,
    is_integral,
    norm,
    plain,
    to_host,
    traits,
)
from ._certificate import bounds
from ._layout import Layout, as_matrix, stack_layout
from ._power import matvec, rmatvec, start_vector
from ._validate import check_number
from .errors import DeviceError, DTypeError, ShapeError, check_int

_BASIS = 32  # vectors kept at most; half of them survive a restart


class SpectralNorm(NamedTuple):
    """Result of `spectral_norm`."""

    sigma: Array
    u: Array
    v: Array
    error_bound: Array
    converged: bool
    n_iter: int


def spectral_norm(
    W: Array,
    *,
    layout: Layout | str | None = None,
    tol: float | None = None,
    max_iter: int = 1000,
    seed: int = 0,
) -> SpectralNorm:
    """Compute the largest singular value to a tolerance, with an error bound.

    Parameters
    ----------
    W : array, or sequence of sequences of numbers
        A matrix, or a tensor that ``layout`` makes a matrix or a stack of matrices of. float16 and
        bfloat16 are computed in float32. Integers are converted to the library's default float,
        and Python's sequences to NumPy arrays.
    layout : Layout or str, optional
        The meaning of the axes. It is needed for three axes and more: ``"oihw"`` for a PyTorch
        convolution, ``"hwio"`` for a Flax or Keras one, ``"soi"`` for a stack of matrices.
    tol : float, optional
        Stop when the residual bounds the relative error of sigma by this. The default is
        ε^(2/3): 4e-11 in float64, 2e-5 in float32.
    max_iter : int
        Largest number of products with W and Wᴴ.
    seed : int
        Seed of the start vector.

    Returns
    -------
    sigma : array, shape (*stack,)
        A lower bound of σ₁, up to rounding. NaN where W is not finite.
    u : array, shape (*stack, m)
        Unit vector: Wᴴu = σv. Zeros for a zero matrix.
    v : array, shape (*stack, n)
        Unit vector, or zeros.
    error_bound : array, shape (*stack,)
        The largest singular value differs from ``sigma`` by at most this, rounding included. The
        proof is a Cholesky factorization in float64. Where that takes more than about 10¹⁰
        multiplications, such as for 2,200 × 2,200 elements, the bound comes from sums over rows and
        columns, and is many times larger than the error.
    converged : bool
        True if the residual ‖Wv − σu‖/√2 met ``tol``; for a stack, in every matrix. It proves that
        some singular value is this close, not that it is the largest.
    n_iter : int
        Number of iterations; for a stack, the largest.

    Raises
    ------
    ShapeError
        If W has fewer than two axes or an empty one, has three or more and no ``layout``, or does
        not fit its layout.
    DTypeError
        If W is not an array of numbers, or is sparse or masked.
    ArgumentError
        If ``tol`` is negative or not finite, ``max_iter`` is less than 1, or ``seed`` is negative.
        Also if ``layout`` cannot be read.

    Notes
    -----
    The function waits for the device at every iteration, and copies W to the host, so it does not
    run inside ``jax.jit``. No gradient passes through it. During training, use `power_iteration`.
    W is first scaled by a power of two. Nothing overflows then, and nothing underflows unless the
    backend flushes subnormal numbers (JAX).

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> result = sc.spectral_norm(np.array([[3.0, 3.0], [0.0, 3.0]]))
    >>> round(float(result.sigma), 10), result.converged
    (4.8541019662, True)
    >>> bool(result.error_bound < 1e-12)
    True
    """
    W = as_matrices(W, layout)
    xp = array_namespace(W)
    kind = traits(W, xp, "W")
    W = cast(constant(W), kind.iteration_dtype, xp)
    bound = kind.eps ** (2 / 3) if tol is None else check_number(tol, "tol")
    max_iter = check_int(max_iter, "max_iter")
    stack = tuple(W.shape[:-2])
    if not stack:
        return _spectral_norm(W, bound, max_iter, seed, xp)
    flat = xp.reshape(W, (prod(stack), *W.shape[-2:]))
    each = [_spectral_norm(flat[i, ...], bound, max_iter, seed, xp) for i in range(flat.shape[0])]

    def stacked(field: str) -> Array:
        parts = xp.stack([getattr(result, field) for result in each])
        return xp.reshape(parts, (*stack, *parts.shape[1:]))

    return SpectralNorm(
        sigma=stacked("sigma"),
        u=stacked("u"),
        v=stacked("v"),
        error_bound=stacked("error_bound"),
        converged=all(result.converged for result in each),
        n_iter=max(result.n_iter for result in each),
    )


def as_matrices(W: Array, layout: Layout | str | None) -> Array:
    """Return a floating-point matrix, or the stack of matrices that the layout makes of ``W``."""
    W = _as_floats(W)
    shape = tuple(W.shape)
    if len(shape) < 2 or 0 in shape:
        raise ShapeError(f"W has shape {shape}: it must be a matrix with no empty axis")
    if layout is not None:
        return as_matrix(W, layout, name="W")
    if len(shape) > 2:
        stack = stack_layout(len(shape)).axes
        raise ShapeError(
            f"W has shape {shape}: say which matrix it is by layout=, such as 'oihw' (PyTorch's "
            f"convolutions), 'hwio' (Flax, Keras) or {stack!r} (a stack of matrices)"
        )
    return W


def _as_floats(W: Array) -> Array:
    """Return an array of floats: sequences by NumPy, integers in their library's default float."""
    if isinstance(W, (list, tuple, int, float, complex)):
        W = _unmasked(W)
        try:
            W = np.asarray(W)
        except (TypeError, ValueError, RuntimeError):
            raise ShapeError("W: its rows must be numbers, and of one length") from None
    W = plain(W, "W")
    xp = array_namespace(W, name="W")
    if str(device_of(W, xp)) == "meta":
        raise DeviceError("W is on the device 'meta' and has no values")
    if is_integral(W, xp):
        W = xp.astype(W, xp.zeros(1, device=device_of(W, xp)).dtype)
    return W


def _unmasked(x: Any) -> Any:
    """Return ``x``; raise `DTypeError` if it or one of its rows is a masked array."""
    if isinstance(x, (list, tuple)):
        return [_unmasked(row) for row in x]
    return plain(x, "W")


def _spectral_norm(W: Array, tol: float, max_iter: int, seed: int, xp: Namespace) -> SpectralNorm:
    m, n = W.shape
    longest = xp.max(xp.abs(W))
    largest = float(longest)
    is_kept = isfinite(largest) and (largest > 0 or not bool(longest > 0))
    if not is_kept and bool(xp.isfinite(longest)):  # of NumPy's longdouble
        raise DTypeError("W has its largest element beyond the range of float64: scale it first")
    if not isfinite(largest) or largest == 0:
        return _trivial(W, largest, xp)
    scale = scale_of(W, largest, xp)
    W = W / scale
    # Iterate on the shorter side: a 1 × n matrix then needs one step, an m × n matrix at most m.
    if n <= m:
        v, steps = top_ritz(
            lambda x: rmatvec(W, matvec(W, x, xp), xp),
            start_vector((n,), W, seed=seed),
            tol,
            max_iter,
            xp,
        )
        u = matvec(W, v, xp)
        u = u / norm(u, xp)
    else:
        u, steps = top_ritz(
            lambda x: matvec(W, rmatvec(W, x, xp), xp),
            start_vector((m,), W, seed=seed),
            tol,
            max_iter,
            xp,
        )
    v = rmatvec(W, u, xp)
    sigma = norm(v, xp)
    v = v / sigma
    residual = norm(matvec(W, v, xp) - sigma * u, xp) / 2**0.5
    rounding = traits(W, xp, "W").eps * (m + n) ** 0.5
    return SpectralNorm(
        sigma * scale,
        u,
        v,
        _error_bound(W, v, sigma, scale, xp),
        converged=bool(residual <= max(tol, rounding) * sigma),
        n_iter=steps,
    )


def scale_of(W: Array, largest: float, xp: Namespace) -> float:
    """Return the power of two that brings the largest element of W to between 1 and 2.

    σ² would overflow or underflow for entries that σ survives. A power of two changes the exponent
    only, so the scaling is exact. The power and its inverse must both be normal numbers, or scaling
    back would round.
    """
    limit = frexp(min(float(xp.finfo(W.dtype).max), float_info.max))[1] - 4
    return float(2.0 ** max(-limit, min(limit, frexp(largest)[1] - 1)))


def _error_bound(W: Array, v: Array, sigma: Array, scale: float, xp: Namespace) -> Array:
    """Return a number ≥ the error of ``sigma * scale``, in the dtype of sigma."""
    estimate, info = float(sigma), xp.finfo(sigma.dtype)
    lower, upper = bounds(W, v, estimate, xp)
    error = max(upper - estimate, estimate - lower, 0.0) * (1 + 4 * float(info.eps)) * scale
    # Scaling back rounds where the result is subnormal, or is flushed to zero.
    normal = float(info.smallest_normal)
    if estimate * scale < 8 * normal:
        error += normal
    elif error < normal:
        error += 2 * float(info.eps) * normal
    return xp.asarray(error, dtype=sigma.dtype, device=device_of(sigma, xp))


def _trivial(W: Array, value: float, xp: Namespace) -> SpectralNorm:
    """Return the result for a zero matrix, or NaN for a matrix that is not finite."""
    value = 0.0 if value == 0 else float("nan")
    u, v = W[:, 0] * value, W[0, :] * value
    sigma = norm(v, xp)
    return SpectralNorm(sigma, u, v, sigma, converged=value == 0, n_iter=0)


def top_ritz(
    gram: Callable[[Array], Array], x: Array, tol: float, max_iter: int, xp: Namespace
) -> tuple[Array, int]:
    """Return the first eigenvector of a positive semidefinite operator, and the number of steps.

    The rows of ``basis`` are orthonormal, ``image`` is the operator applied to them, and ``T`` is
    the operator in that basis. Unused rows are zero: shapes stay the same, and JAX compiles once.
    """
    size = min(x.shape[0], _BASIS)
    rows = xp.arange(size)
    basis = x[None, :] * xp.zeros_like(x)[:size, None]
    image = basis + basis
    T = np.zeros((size, size), dtype=complex if is_complex(x, xp) else float)
    used, ritz = 0, x
    n_iter = 0
    while n_iter < max_iter:
        n_iter += 1
        Gx = gram(x)
        if xp is np:  # other arrays may be immutable, and are copied
            basis[used], image[used] = x, Gx
        else:
            slot = xp.astype(rows == used, x.dtype)[:, None]
            basis, image = basis + slot * x[None, :], image + slot * Gx[None, :]
        used += 1
        column = to_host(xp.matmul(conj(basis, xp), Gx))[:used]
        T[:used, used - 1] = column if np.iscomplexobj(T) else column.real
        T[used - 1, :used] = T[:used, used - 1].conj()
        values, vectors = np.linalg.eigh(T[:used, :used])
        top = _coefficients(vectors[:, -1:], size, x, xp)
        ritz = xp.matmul(top, basis)[0, :]
        residual = xp.matmul(top, image)[0, :] - float(values[-1]) * ritz
        length = float(norm(residual, xp))
        if length <= tol * values[-1] or used == x.shape[0]:
            break
        if used == size:
            used = size // 2
            kept = _coefficients(vectors[:, -used:], size, x, xp)
            basis, image = xp.matmul(kept, basis), xp.matmul(kept, image)
            T[:] = 0
            T[range(used), range(used)] = values[-used:]
        x, length_left = _orthonormal(residual / length, basis, xp)
        if length_left < 0.1 * traits(x, xp, "x").eps:
            break  # the basis spans an invariant subspace: there is nothing left to find in it
    return ritz / norm(ritz, xp), n_iter


def _coefficients(vectors: np.ndarray[Any, Any], size: int, like: Array, xp: Namespace) -> Array:
    """Return columns of ``vectors`` as rows of an array of ``size`` columns, zero elsewhere."""
    padded = np.zeros((1 if vectors.shape[1] == 1 else size, size), dtype=vectors.dtype)
    padded[: vectors.shape[1], : vectors.shape[0]] = vectors.T
    return xp.asarray(padded, dtype=like.dtype, device=like.device)


def _orthonormal(x: Array, basis: Array, xp: Namespace) -> tuple[Array, float]:
    """Return ``x`` made orthogonal to the rows, and its remaining length.

    Twice is enough: rounding leaves a component along the rows after the first time.
    """
    for _ in range(2):
        x = x - xp.matmul(xp.matmul(conj(basis, xp), x), basis)
    length = norm(x, xp)
    return x / length, float(length)
