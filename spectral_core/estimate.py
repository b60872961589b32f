"""The converged spectral norm, with a bound of its error: to check and to report with.

One vector of power iteration is slow where σ₂ ≈ σ₁, which is where the regularizer drives a
spectrum. Here the iterates of WᴴW are kept and the best vector of their span is taken: the Lanczos
method, restarted with several of its best vectors when the basis is full (thick restart; Wu and
Simon, 2000). The square is harmless for the *largest* value: an error of ε in σ² is ε/2 in σ.
"""

from __future__ import annotations

from collections.abc import Callable
from math import frexp, inf, isfinite, prod
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from ._arrays import (
    Array,
    Namespace,
    array_namespace,
    cast,
    conj,
    constant,
    is_complex,
    norm,
    to_host,
    traits,
)
from .errors import ArgumentError, ShapeError, checked_int
from .power import matvec, rmatvec, start_vector

_BASIS = 32  # vectors kept at most; half of them survive a restart


class SpectralNorm(NamedTuple):
    """What `spectral_norm` returns."""

    sigma: Array
    u: Array
    v: Array
    error_bound: Array
    converged: bool
    n_iter: int


def spectral_norm(
    W: Array, *, tol: float | None = None, max_iter: int = 1000, seed: int = 0
) -> SpectralNorm:
    """Compute the largest singular value to a tolerance, and say how far off it can be.

    Parameters
    ----------
    W : array, shape (..., m, n)
        A matrix or a stack of them. float16 and bfloat16 are computed in float32.
    tol : float, optional
        Stop when the residual bounds the relative error of sigma by this. By default ε^(2/3):
        4e-11 in float64, 2e-5 in float32.
    max_iter : int
        Products with W and Wᴴ at most.
    seed : int
        Of the start vector.

    Returns
    -------
    sigma : array, shape (...)
        A lower bound of σ₁, up to rounding. NaN where W is not finite.
    u : array, shape (..., m)
    v : array, shape (..., n)
        Unit vectors with Wᴴu = σv.
    error_bound : array, shape (...)
        ‖Wv − σu‖/√2 and an allowance for rounding: some singular value of W lies within this of
        sigma. That it is the largest is sure but for a start vector without a part along v₁,
        which no residual can exclude and a Gaussian makes improbable.
    converged : bool
        Whether the residual met ``tol``; of a stack, that of every matrix.
    n_iter : int
        The iterations taken, the most of a stack's.

    Raises
    ------
    ShapeError
        If W has fewer than two axes or an empty one.
    DTypeError
        If W is not floating-point.
    ArgumentError
        If ``tol`` is negative or not finite, ``max_iter`` < 1 or ``seed`` < 0.

    Notes
    -----
    Waits for the device at every iteration, and so does not run inside ``jax.jit``; no gradient
    flows through it. During training, use `power_iteration`. W is scaled by a power of two first:
    no overflow, and no underflow but where the backend flushes subnormal numbers (JAX).

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
    xp = array_namespace(W)
    if W.ndim < 2 or 0 in W.shape:
        raise ShapeError(f"W has shape {tuple(W.shape)}: it must be a matrix with no empty axis")
    kind = traits(W, xp, "W")
    W = cast(constant(W), kind.iteration_dtype, xp)
    wanted = kind.eps ** (2 / 3) if tol is None else tol
    if not isinstance(wanted, Real) or not 0 <= (bound := float(wanted)) < inf:
        raise ArgumentError(f"tol must be a finite number ≥ 0, not {tol!r}")
    max_iter = checked_int(max_iter, "max_iter")
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


def _spectral_norm(W: Array, tol: float, max_iter: int, seed: int, xp: Namespace) -> SpectralNorm:
    m, n = W.shape
    largest = float(xp.max(xp.abs(W)))
    if not isfinite(largest) or largest == 0:
        return _trivial(W, largest, xp)
    # A power of two that is normal and whose inverse is: then to scale is exact.
    limit = frexp(float(xp.finfo(W.dtype).max))[1] - 4
    scale = 2.0 ** max(-limit, min(limit, frexp(largest)[1] - 1))
    W = W / scale
    # Iterate on the shorter side: a 1×n matrix then takes one step, an m×n one at most m.
    if n <= m:
        v, steps = _top_ritz(
            lambda x: rmatvec(W, matvec(W, x), xp),
            start_vector((n,), W, seed=seed),
            tol,
            max_iter,
            xp,
        )
        u = matvec(W, v)
        u = u / norm(u, xp)
    else:
        u, steps = _top_ritz(
            lambda x: matvec(W, rmatvec(W, x, xp)),
            start_vector((m,), W, seed=seed),
            tol,
            max_iter,
            xp,
        )
    v = rmatvec(W, u, xp)
    sigma = norm(v, xp)
    v = v / sigma
    residual = norm(matvec(W, v) - sigma * u, xp) / 2**0.5
    rounding = traits(W, xp, "W").eps * (m + n) ** 0.5
    return SpectralNorm(
        sigma * scale,
        u,
        v,
        (residual + rounding * sigma) * scale,
        converged=bool(residual <= max(tol, rounding) * sigma),
        n_iter=steps,
    )


def _trivial(W: Array, value: float, xp: Namespace) -> SpectralNorm:
    """Of a zero matrix, whose σ is known, or of one that is not finite, which has none."""
    value = 0.0 if value == 0 else float("nan")
    u, v = W[:, 0] * value, W[0, :] * value
    sigma = norm(v, xp)
    return SpectralNorm(sigma, u, v, sigma, converged=value == 0, n_iter=0)


def _top_ritz(
    gram: Callable[[Array], Array], x: Array, tol: float, max_iter: int, xp: Namespace
) -> tuple[Array, int]:
    """The first eigenvector of a positive semidefinite operator, and the steps it took.

    Rows of ``basis`` are orthonormal, ``image`` is what the operator makes of them, and ``T`` is
    the operator seen in the basis. Rows not in use are zero, so that shapes stay the same, which
    spares JAX a compilation each step.
    """
    size = min(x.shape[0], _BASIS)
    rows = xp.arange(size)
    basis = image = x[None, :] * xp.zeros_like(x)[:size, None]
    T = np.zeros((size, size), dtype=complex)
    used, ritz = 0, x
    n_iter = 0
    while n_iter < max_iter:
        n_iter += 1
        Gx = gram(x)
        slot = xp.astype(rows == used, x.dtype)[:, None]
        basis, image = basis + slot * x[None, :], image + slot * Gx[None, :]
        used += 1
        T[:used, used - 1] = to_host(xp.matmul(conj(basis, xp), Gx))[:used]
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
    """Columns of ``vectors`` as rows of an array of ``size`` columns, zero elsewhere."""
    padded = np.zeros((1 if vectors.shape[1] == 1 else size, size), dtype=complex)
    padded[: vectors.shape[1], : vectors.shape[0]] = vectors.T
    host = padded if is_complex(like, xp) else padded.real
    return xp.asarray(host.copy(), dtype=like.dtype, device=like.device)


def _orthonormal(x: Array, basis: Array, xp: Namespace) -> tuple[Array, float]:
    """``x`` made orthogonal to the rows, twice as rounding asks for, and what was left of it."""
    for _ in range(2):
        x = x - xp.matmul(xp.matmul(conj(basis, xp), x), basis)
    length = norm(x, xp)
    return x / length, float(length)
