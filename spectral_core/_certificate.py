"""Bound the largest singular value from above and below, rounding included.

A residual proves that some singular value is near an estimate, not that it is the largest: where
σ₂ ≈ σ₁, an iteration may stop between the two. A factorization proves it (Rump, *Verification of
positive definiteness*, 2006): if the Cholesky factorization of τ²I − WᴴW runs through in floating
point, then λ₁(WᴴW) is at most τ² and the allowance for rounding that is written out below.

Everything here expects a matrix whose largest element is between 2⁻¹⁶ and 2¹⁶: nothing overflows,
and what underflows is far below the allowances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from math import inf, ldexp, nextafter
from sys import float_info
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ._arrays import Array, Namespace, as_numpy, traits

Host: TypeAlias = np.ndarray[Any, Any]

# Largest number of multiplications: about a second. It is 2,154³.
_MOST = 10**10
_ROWS = 1024  # that are multiplied at a time
_PANEL = 320  # columns of the Gram matrix that are multiplied at a time, not a power of two
_CACHED = 2**16  # elements that are read several times
_TILE = 128  # rows that are copied at a time
_LARGE = 192  # rows from which SciPy's factorization pays
_LARGE_NARROW = 96  # and in float32, for which it is imported to do many
_UNIT = 2.0**-53


class Bounds(NamedTuple):
    """Numbers with lower ≤ σ₁ ≤ upper."""

    lower: float
    upper: float


def bounds(W: Array, v: Array, sigma: float, xp: Namespace) -> Bounds:
    """Return proven bounds of the largest singular value of a matrix.

    Parameters
    ----------
    W : array, shape (m, n)
        Its largest element is between 2⁻¹⁶ and 2¹⁶.
    v : array, shape (n,)
        An estimate of the first right singular vector. The bounds hold for any vector; they are
        close for a good one.
    sigma : float
        The estimate ‖Wᴴu‖ that was computed with the unit vector u.
    xp : namespace

    Returns
    -------
    Bounds
        Close ones where a factorization needs a second at most. Otherwise ``upper`` is the
        least of the Frobenius norm and the geometric mean of the row and column sum norms.
    """
    m, n = W.shape
    found = from_norms(W, sigma, xp)
    if m * n * min(m, n) > _MOST:
        return found
    host, x = as_numpy(W), as_numpy(v)
    close = close_bounds(host, found.upper, lambda _: [x if n <= m else host @ x])
    return Bounds(max(found.lower, close.lower), min(found.upper, close.upper))


def from_norms(W: Array, estimate: float, xp: Namespace) -> Bounds:
    """Return the bounds that sums over rows and columns give, in the dtype of ``W``.

    The lower one is the estimate less its rounding. The upper one also bounds the norm of |W|, by
    which the rounding of products with W is measured.
    """
    m, n = W.shape
    unit = 4 * traits(W, xp, "W").eps * (m + n + 8)  # of a sum of sums, and of complex products
    if xp is np:
        square, rows, columns = _sums(W)
    else:  # devices may round what products multiply
        size = xp.abs(W)
        square = float(xp.sum(xp.sum(size * size, axis=1), axis=0))
        rows, columns = (float(xp.max(xp.sum(size, axis=axis))) for axis in (1, 0))
    frobenius = square**0.5
    least = min(frobenius, (rows * columns) ** 0.5)
    return Bounds(max(0.0, estimate - unit * frobenius), least * (1 + unit))


def _sums(W: Host) -> tuple[float, float, float]:
    """Return ‖W‖_F², and the largest sums of |W| over a row and over a column.

    Some rows at a time stay in a cache. No element is added to more than m + n others.
    """
    square, rows, columns = 0.0, 0.0, np.zeros(W.shape[1], W.real.dtype)
    step = max(1, _CACHED // W.shape[1])
    for start in range(0, len(W), step):
        size = np.abs(W[start : start + step])
        square += float(np.einsum("ij,ij->i", size, size).sum())
        rows = max(rows, float(size.sum(axis=1).max()))
        columns += size.sum(axis=0)
    return square, rows, float(columns.max())


def close_bounds(host: Host, size: float, vectors: Callable[[Host], Iterable[Host]]) -> Bounds:
    """Return bounds by a factorization in float64.

    Parameters
    ----------
    host : array, shape (m, n)
        Its largest element is between 2⁻¹⁶ and 2¹⁶.
    size : float
        A bound of the norm of |W|.
    vectors : callable
        Returns better and better estimates of the first eigenvector of the Gram matrix that it is
        given, which is that of the shorter side. The next one is asked for if the factorization
        fails: an eigenvalue was larger than the estimate's.
    """
    W = host.astype(np.complex128 if np.iscomplexobj(host) else np.float64, copy=False)
    # NumPy's longdouble has more digits than float64.
    slack = 0.0 if host.dtype.itemsize <= W.dtype.itemsize else _UNIT * size
    W = W if W.shape[1] <= W.shape[0] else W.conj().T
    gram = _gram(W, size)
    lower = 0.0
    for v in vectors(gram.matrix):
        x = v.astype(W.dtype)
        lower = max(lower, _lower(W, x, size))
        value = float((x.conj() @ times(gram.matrix, x)).real / (x.conj() @ x).real)
        upper = _upper(gram, value)
        if upper < inf:
            return Bounds(lower - slack, upper + slack)
    upper = _upper(gram, float(np.linalg.eigvalsh(gram.matrix)[-1]))
    return Bounds(lower - slack, upper + slack)


def gamma(k: int, W: Host) -> float:
    """Return the relative error of a sum of k products, four times as much for complex ones."""
    unit = _unit(W)
    k = 4 * k if np.iscomplexobj(W) else k
    return k * unit / (1 - k * unit)


def _unit(W: Host) -> float:
    return 2.0**-24 if W.dtype.char in "fF" else _UNIT


def _lower(W: Host, v: Host, size: float) -> float:
    """Return ‖Wv‖/‖v‖ less what rounding may have added."""
    m, n = W.shape
    length = float(np.linalg.norm(v))
    if not 0 < length < np.inf:
        return 0.0
    product = float(np.linalg.norm(times(W, v))) * (1 - gamma(m + 2, W))
    error = gamma(n, W) * size * length * (1 + gamma(n + 2, W))
    return max(0.0, (product - error) / length * (1 - gamma(n + 4, W)))


class _Gram(NamedTuple):
    """WᴴW as it was computed, and a bound of the norm of its rounding."""

    matrix: Host
    error: float


def _gram(W: Host, size: float) -> _Gram:
    """Return the Gram matrix of the columns.

    A sum's rounding grows with its length, and decides how close the bounds are. So the rows are
    multiplied a thousand at a time: the products are added in a sum that is short.
    """
    parts = [W[start : start + _ROWS] for start in range(0, len(W), _ROWS)]
    blas = _blas() if W.shape[1] >= _LARGE else None
    total = _gram_by_numpy(parts) if blas is None else _gram_by_blas(parts, blas)
    return _Gram(total, gamma(len(parts[0]) + len(parts), W) * size**2)


def _gram_by_numpy(parts: list[Host]) -> Host:
    """Return the sum of the parts' Gram matrices.

    One half of the matrix is multiplied and the other is copied, in panels: NumPy does so itself
    for a product with the adjoint, but one element at a time. Rows are not a power of two apart.
    """
    n = parts[0].shape[1]
    total = np.empty((n, n + 8), parts[0].dtype)[:, :n]
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        panel = parts[0][:, start:stop].conj().T @ parts[0][:, :stop]
        for part in parts[1:]:
            panel += part[:, start:stop].conj().T @ part[:, :stop]
        total[start:stop, :stop] = panel
        total[:start, start:stop] = panel[:, :start].conj().T
    return total


def _gram_by_blas(parts: list[Host], blas: Any) -> Host:
    """Return the same by SciPy's BLAS, which multiplies one half. The other one is copied.

    Each part has its own product. A library that adds to what is there may add number by number,
    and a sum would be as long as all parts together.
    """
    product = blas.zherk if np.iscomplexobj(parts[0]) else blas.dsyrk
    # Columns are contiguous for BLAS: it sees the transpose of a part and of the Gram matrix.
    found = product(1.0, parts[0].T, lower=1)
    for part in parts[1:]:
        found += product(1.0, part.T, lower=1)
    total: Host = found.T
    for start in range(0, len(total), _TILE):
        stop = start + _TILE
        corner = total[start:stop, start:stop]
        corner[:] = np.triu(corner) + np.triu(corner, 1).conj().T
        for next_ in range(stop, len(total), _TILE):
            tile = slice(next_, next_ + _TILE)
            total[tile, start:stop] = total[start:stop, tile].conj().T
    return total


def times(A: Host, x: Host, *, transposed: bool = False) -> Host:
    """Return the product of a matrix, or of its transpose, with a vector.

    A large matrix is multiplied by the library that factors it. NumPy's and SciPy's threads wait
    in a loop after each product: there they slow down the other library's, for longer than a
    factorization takes.
    """
    is_same = A.dtype == x.dtype and A.dtype.char in "fdFD" and A.flags.c_contiguous
    blas = _blas() if is_same and A.shape[1] >= _LARGE else None
    if blas is None:
        found: Host = x @ A if transposed else A @ x
        return found
    gemv = {"f": blas.sgemv, "d": blas.dgemv, "F": blas.cgemv, "D": blas.zgemv}[A.dtype.char]
    return np.asarray(gemv(1.0, A.T, x, trans=int(not transposed)))  # BLAS has contiguous columns


def _upper(gram: _Gram, square: float) -> float:
    """Return the bound that a factorization proves just above ``square``, or infinity."""
    square = max(square, 0.0) * (1 + 16 * len(gram.matrix) * _UNIT)
    factor = _factor(gram.matrix, square)
    if factor is None:
        return inf
    hidden = min(allowance(gram.matrix, square), _allowance_of(factor, gram.matrix, square))
    return float(np.sqrt(square + gram.error + hidden)) * (1 + 8 * _UNIT)


def is_below(gram: Host, square: float) -> bool:
    """Return True if the factorization of square·I − gram runs through.

    Every eigenvalue of the Hermitian matrix ``gram`` is then at most ``square`` plus the
    `allowance`.
    """
    return _factor(gram, square) is not None


class Top(NamedTuple):
    """A unit vector v of float64 numbers, and how it lies to a Hermitian matrix G.

    The number vᴴGv is between ``lower`` and ``upper``, and ``rest`` is at least ‖Gv − (vᴴGv)v‖. The
    length of v may differ from 1 by its rounding, which the bounds allow for.
    """

    lower: float
    upper: float
    rest: float
    vector: Host


def pays_narrow(n: int) -> bool:
    """Return True if matrices are so large that it pays to try float32 first."""
    return n >= _LARGE_NARROW and _lapack() is not None


def hidden_narrow(n: int) -> float:
    """Return about what a factorization in float32 hides, as a share of the shift.

    The norm of |L||L|ᵀ is about √n times the shift for random matrices.
    """
    return 1.5 * n**0.5 * gamma(n + 8, np.empty(0, np.complex64))


def is_vague(top: Top, limit: float) -> bool:
    """Return True if a better vector may let float32 prove a limit, or refute it."""
    left = 0.5 * limit * hidden_narrow(len(top.vector)) * max(limit - top.upper, 0.0)
    return top.lower <= limit and top.rest**2 > left


def is_proven_below(gram: Host, limit: float) -> bool:
    """Return True if every eigenvalue of a Hermitian matrix is proven to be at most the limit."""
    square = limit - allowance(gram, limit)
    return square > 0 and is_below(gram, square)


def is_proven_narrow(narrow: Host, error: float, limit: float, top: Top | None = None) -> bool:
    r"""Return True if float32 proves that every eigenvalue of a Gram matrix is below the limit.

    Parameters
    ----------
    narrow : array, shape (n, n)
        The matrix in float32. Only its upper half counts.
    error : float
        Bound of the norm by which it differs from the matrix G that is meant.
    limit : float
    top : Top, optional
        About the first eigenvector of G. It is taken out.

    Notes
    -----
    The rounding of float32 may hide a few thousandths of the limit, and the first eigenvalue may be
    closer to it. So the first eigenvector v can be taken out. Let d bound the eigenvalues of
    G − μvvᴴ, and let a = vᴴGv and c = ‖Gv − av‖. A unit vector x is cos θ·v + sin θ·y, with a unit
    vector y orthogonal to v, and

    .. math:: x^HGx ≤ a·\cos^2θ + 2c·|\cos θ·\sin θ| + d·\sin^2θ

    is at most the limit T if a ≤ T, d ≤ T and (T − a)(T − d) ≥ c². Float32 has to prove d alone,
    which is about the second eigenvalue.
    """
    n, unit = len(narrow), _unit(narrow)
    hidden = limit * hidden_narrow(n)
    target, weight, taken = limit, 0.0, None
    if top is not None:
        if not top.upper < limit:
            return False
        target -= top.rest**2 / (limit - top.upper) * (1 + 2.0**-40) + 8 * _UNIT * limit
        weight, v = top.upper, top.vector.astype(narrow.dtype)
        taken = v.real.dtype.type(weight) * v, v.conj()
        # The matrix and the vector are rounded. The trace is at least the Frobenius norm.
        trace = float(narrow.diagonal().real.sum(dtype=float))
        error += 1.01 * unit * (1.01 * trace + error + 12 * weight)
    square = target - hidden - error
    if not 2.0**-20 < square < 2.0**60:  # so that underflow is far below the rounding
        return False
    factor = _factor(narrow, square, taken)
    if factor is None:
        return False
    # The largest element of the diagonal may have grown by the weight.
    left = target * (1 - 8 * _UNIT) - square - error - 4 * unit * weight
    return _allowance_of(factor, narrow, square, enough=left) <= left


def _factor(gram: Host, square: float, taken: tuple[Host, Host] | None = None) -> Host | None:
    """Return the Cholesky factor of square·I − gram or of its conjugate, or None if it has none.

    The outer product of the vectors in ``taken`` is subtracted from ``gram`` before.
    """
    n = len(gram)
    least = _LARGE_NARROW if gram.dtype.char in "fF" else _LARGE
    lapack = _lapack() if n >= least else None
    if lapack is None:
        if taken is not None:
            gram = gram - np.outer(*taken)
        return _factor_by_numpy(gram, square)
    # LAPACK reads and writes one half, in place. So the other one is left zero.
    factor = np.zeros((n, n), gram.dtype)
    for start in range(0, n, _TILE):
        stop = min(start + _TILE, n)
        rows, corner = factor[start:stop, start:], np.tri(stop - start, k=-1, dtype=bool)
        np.negative(gram[start:stop, start:], out=rows)
        if taken is not None:
            rows += np.outer(taken[0][start:stop], taken[1][start:])
        rows[:, : stop - start][corner] = 0
    factor[np.diag_indices(n)] += square
    potrf = {"f": lapack.spotrf, "d": lapack.dpotrf, "F": lapack.cpotrf, "D": lapack.zpotrf}
    # Columns are contiguous for LAPACK: it sees the transpose, and factors its lower half faster.
    lower, failed = potrf[gram.dtype.char](factor.T, lower=1, overwrite_a=1, clean=0)
    return None if failed else lower


def _lapack() -> Any:
    """Return SciPy's LAPACK, or None where it cannot be imported.

    NumPy copies a matrix to LAPACK and back, which takes longer than the factorization.
    """
    return _scipy("scipy.linalg.lapack")


def _blas() -> Any:
    """Return SciPy's BLAS, or None where it cannot be imported."""
    return _scipy("scipy.linalg.blas")


@cache
def _scipy(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def last_pair(diagonal: Host, beside: Host, n: int) -> tuple[float, Host]:
    """Return the largest eigenvalue of a tridiagonal matrix, and a unit eigenvector.

    It belongs to a matrix of n rows. Of a large one, SciPy computes this pair alone. NumPy would
    compute all, and wake its threads: see `times`.
    """
    scipy = _scipy("scipy.linalg") if n >= _LARGE else None
    if scipy is not None:
        last = (len(diagonal) - 1,) * 2
        values, vectors = scipy.eigh_tridiagonal(diagonal, beside, select="i", select_range=last)
    else:
        T = np.diag(diagonal)
        T[range(1, len(T)), range(len(T) - 1)] = beside
        values, vectors = np.linalg.eigh(T)
    return float(values[-1]), vectors[:, -1]


def _factor_by_numpy(gram: Host, square: float) -> Host | None:
    """Return the same without SciPy.

    NumPy copies columns to LAPACK and back. So it is given the transpose, whose columns are rows
    here, and rows that are not a power of two apart: those would displace each other in the cache.
    """
    n = len(gram)
    shifted = np.empty((n, n + 8), gram.dtype)[:, :n].T
    np.negative(gram.T, out=shifted)
    shifted[np.diag_indices(n)] += square
    try:
        return np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return None


def allowance(gram: Host, square: float) -> float:
    """Return what the rounding of a factorization may hide (Rump 2006, theorem 2.3)."""
    n, diagonal = len(gram), gram.diagonal().real
    trace = n * square * (1 + 4 * n * _UNIT) - float(diagonal.sum())
    return _hidden(trace, gram, square)


def _allowance_of(factor: Host, gram: Host, square: float, enough: float = 0.0) -> float:
    """Return the same for a factor L that is known: the trace bounds the norm of |L||L|ᵀ.

    A closer bound is the largest ratio (|L||L|ᵀx)_i/x_i, for any positive x (Collatz 1942). The
    search for a good x ends when the allowance is small enough.
    """
    size = np.abs(factor, out=None if np.iscomplexobj(factor) else factor)
    n, x, least, found = len(size), np.ones(len(size), size.dtype), inf, inf
    for _ in range(3):
        y = times(size.T, times(size.T, x), transposed=True)
        least = min(least, float((y / x).max()))
        found = _hidden(least * (1 + 4 * (n + 4) * _unit(size)), gram, square)
        if found <= enough:
            break
        x = np.maximum(y / y.max(), size.dtype.type(2.0**-10))
    return found


def _hidden(norm: float, gram: Host, square: float) -> float:
    """Return the rounding of a factor whose |L||L|ᵀ has at most this norm, and of the shift.

    The theorem has n + 1. Libraries multiply by the rounded reciprocals of the diagonal.
    """
    rate = gamma(len(gram) + 8, gram)
    return rate / (1 - rate) * norm + 4 * _unit(gram) * (square + float(gram.diagonal().real.max()))


def times_power_of_two(W: Array, exponent: int) -> Array:
    """Return W·2^exponent, in two steps where that number itself may be out of range."""
    if abs(exponent) < 126:  # of float32
        return W * 2.0**exponent if exponent else W
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
