"""Bound the largest singular value from above and below, rounding included.

A residual proves that some singular value is near an estimate, not that it is the largest: where
σ₂ ≈ σ₁, an iteration may stop between the two. A factorization proves it (Rump, *Verification of
positive definiteness*, 2006): if the Cholesky factorization of τ²I − WᴴW runs through in floating
point, then λ₁(WᴴW) is at most τ² and the allowance for rounding that is written out below.

Everything here expects a matrix whose largest element is between 1 and 2, as `spectral_norm` scales
it: nothing overflows, and what underflows is far below the allowances.
"""

from __future__ import annotations

from math import inf, ldexp, nextafter
from sys import float_info
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ._arrays import Array, Namespace, as_numpy, is_complex, squared, traits

Host: TypeAlias = np.ndarray[Any, Any]

# Largest number of multiplications: about a second. It is 2,154³.
_MOST = 10**10
_UNIT = 2.0**-53


class Bounds(NamedTuple):
    """Numbers with lower ≤ σ₁ ≤ upper."""

    lower: float
    upper: float


def bounds(W: Array, v: Array, sigma: float, xp: Namespace, *, most: float | None = None) -> Bounds:
    """Return proven bounds of the largest singular value of a matrix.

    Parameters
    ----------
    W : array, shape (m, n)
        Its largest element is between 1 and 2.
    v : array, shape (n,)
        An estimate of the first right singular vector. The bounds hold for any vector; they are
        close for a good one.
    sigma : float
        The estimate ‖Wᴴu‖ that was computed with the unit vector u.
    xp : namespace
    most : float, optional
        Largest number of multiplications of a factorization. The default is about a second.

    Returns
    -------
    Bounds
        Close ones where a factorization needs no more than that. Otherwise ``upper`` is the
        least of the Frobenius norm and the geometric mean of the row and column sum norms.
    """
    m, n = W.shape
    found = _from_norms(W, sigma, xp)
    if m * n * min(m, n) > (_MOST if most is None else most):
        return found
    wide = np.complex128 if is_complex(W, xp) else np.float64
    host, x = as_numpy(W), as_numpy(v).astype(wide)
    exact = host.astype(wide)
    # NumPy's longdouble has more digits than float64.
    slack = 0.0 if host.dtype.itemsize <= exact.dtype.itemsize else _UNIT * _frobenius(exact)
    lower = max(found.lower, _lower(exact, x) - slack)
    upper = _upper(exact if n <= m else exact.conj().T, lower)
    return Bounds(lower, min(found.upper, upper + slack))


def _from_norms(W: Array, sigma: float, xp: Namespace) -> Bounds:
    """Return the bounds that sums over rows and columns give, in the dtype of ``W``."""
    m, n = W.shape
    unit = 4 * traits(W, xp, "W").eps * (m + n + 8)  # of a sum of sums, and of complex products
    size = xp.abs(W)
    frobenius = float(xp.sum(xp.sum(squared(W, xp), axis=1), axis=0)) ** 0.5
    rows, columns = (float(xp.max(xp.sum(size, axis=axis))) for axis in (1, 0))
    least = min(frobenius, (rows * columns) ** 0.5)
    return Bounds(max(0.0, sigma - unit * frobenius), least * (1 + unit))


def gamma(k: int, W: Host) -> float:
    """Return the relative error of a sum of k products, four times as much for complex ones."""
    k = 4 * k if np.iscomplexobj(W) else k
    return k * _UNIT / (1 - k * _UNIT)


def _frobenius(W: Host) -> float:
    return float(np.linalg.norm(W)) * (1 + W.size * _UNIT)


def _lower(W: Host, v: Host) -> float:
    """Return ‖Wv‖/‖v‖ less what rounding may have added."""
    m, n = W.shape
    length = float(np.linalg.norm(v))
    if not 0 < length < np.inf:
        return 0.0
    product = float(np.linalg.norm(W @ v)) * (1 - gamma(m + 2, W))
    error = gamma(n, W) * _frobenius(W) * length * (1 + gamma(n + 2, W))
    return max(0.0, (product - error) / length * (1 - gamma(n + 4, W)))


def _upper(W: Host, lower: float) -> float:
    """Return the upper bound by a factorization, at best just above the lower one."""
    m, n = W.shape
    gram = W.conj().T @ W
    error = gamma(m, W) * _frobenius(W) ** 2
    # Most often the lower bound is σ₁ but for rounding. If it is not, the eigenvalues say what is.
    for again in (False, True):
        start = float(np.linalg.eigvalsh(gram)[-1]) if again else lower**2
        square = max(start, 0.0) * (1 + 8 * n * _UNIT) + error + 8 * n * _UNIT * lower**2
        if is_below(gram, square):
            return float(np.sqrt(square + error + allowance(gram, square))) * (1 + 8 * _UNIT)
    return np.inf


def is_below(gram: Host, square: float) -> bool:
    """Return True if the factorization of square·I − gram runs through.

    Every eigenvalue of the Hermitian matrix ``gram`` is then at most ``square`` plus the
    `allowance`.
    """
    shifted = -gram
    shifted[np.diag_indices(len(gram))] += square
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return True


def allowance(gram: Host, square: float) -> float:
    """Return what the rounding of a factorization may hide (Rump 2006, theorem 2.3)."""
    n, diagonal = len(gram), gram.diagonal().real
    rate = gamma(n + 1, gram)
    trace = n * square * (1 + 4 * n * _UNIT) - float(diagonal.sum())
    return rate / (1 - rate) * trace + 4 * _UNIT * (square + float(diagonal.max()))


def times_power_of_two(W: Array, exponent: int) -> Array:
    """Return W·2^exponent, in two steps: the number itself may be out of range."""
    first = exponent // 2
    return W * 2.0**first * 2.0 ** (exponent - first)


def scaled_down(value: float, exponent: int) -> float:
    """Return value·2^exponent, rounded down where it is subnormal."""
    try:
        found = ldexp(value, exponent)
    except OverflowError:
        return float_info.max
    return found if found >= float_info.min else max(0.0, nextafter(found, -inf))


def scaled_up(value: float, exponent: int) -> float:
    """Return value·2^exponent, rounded up where it is subnormal."""
    try:
        found = ldexp(value, exponent)
    except OverflowError:
        return inf
    return found if found >= float_info.min else nextafter(found, inf)
