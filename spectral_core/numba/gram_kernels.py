"""The loops of a report: products with a stored matrix in float64, and sums over it.

A row is read where it is stored, and each number is widened in a register: float64 holds it
exactly. Four rows are read together. So an element of x or z is loaded once for all of them, and
the second product finds them in the nearest cache. The compiler reorders sums for vectors, which
the allowance for rounding admits: a sum of n terms has at most n roundings in any order.

Memory is given by an address: a map that may not be written to would be another type of array.
"""

import numpy as np
from numba import carray, types
from numba.extending import overload

# What is kept on disk is compiled anew only where this file has changed: who changes one of these
# touches this file too.
from .block_kernels import _add_to_2, _times_2
from .kernels import _compiled, _pointer, _wide

BOTH, FIRST, SECOND = range(3)  # products of a reading


def _bits(x):
    """Return the bits of |x|, whose order is that of |x|; those of NaN are above those of Inf."""


@overload(_bits, inline="always")
def _bits_of(x):
    if x == types.float64:
        return lambda x: np.uint64(np.float64(x).view(np.uint64) & np.uint64(0x7FFFFFFFFFFFFFFF))
    return lambda x: np.uint32(np.float32(_wide(x)).view(np.uint32) & np.uint32(0x7FFFFFFF))


@_compiled
def _row(place, stride, i, n, like):
    """Return row i in memory."""
    return carray(_pointer(place + i * stride), (n,), like.dtype)


@_compiled
def _four_rows(place, stride, i, n, like):
    """Return four rows in memory, from i on."""
    a, b = _row(place, stride, i, n, like), _row(place, stride, i + 1, n, like)
    return a, b, _row(place, stride, i + 2, n, like), _row(place, stride, i + 3, n, like)


@_compiled
def _times_four(a, b, c, d, x, y, i):
    """Store the products of four rows with x in y, from i on."""
    p = q = r = s = 0.0
    for j in range(x.size):
        p += np.float64(_wide(a[j])) * x[j]
        q += np.float64(_wide(b[j])) * x[j]
        r += np.float64(_wide(c[j])) * x[j]
        s += np.float64(_wide(d[j])) * x[j]
    y[i], y[i + 1], y[i + 2], y[i + 3] = p, q, r, s


@_compiled
def _add_four(a, b, c, d, y, i, z):
    """Add four rows to z, weighted by y from i on."""
    p, q, r, s = y[i], y[i + 1], y[i + 2], y[i + 3]
    for j in range(z.size):
        z[j] += (
            p * np.float64(_wide(a[j]))
            + q * np.float64(_wide(b[j]))
            + r * np.float64(_wide(c[j]))
            + s * np.float64(_wide(d[j]))
        )


@_compiled
def _times_one(a, x, y, i):
    """Store the product of a row with x in y."""
    p = 0.0
    for j in range(x.size):
        p += np.float64(_wide(a[j])) * x[j]
    y[i] = p


@_compiled
def _add_one(a, y, i, z):
    """Add a row to z, weighted by an element of y."""
    weight = y[i]
    for j in range(z.size):
        z[j] += weight * np.float64(_wide(a[j]))


@_compiled
def multiply(place, stride, lo, hi, X, Y, Z, like, which):
    """Compute ``Y = X Wᵀ`` and add ``Y W`` to Z, for the rows of W from ``lo`` to ``hi``.

    Parameters
    ----------
    place, stride : int
        The address of W, and the bytes from one row to the next.
    lo, hi : int
    X, Z : array of float64, shape (1, n)
    Y : array of float64, shape (1, m)
        Elements ``lo`` to ``hi`` belong to these rows. They are known where ``which`` is SECOND.
    like : array of the dtype of W
        uint16 stands for bfloat16, and int16 for float16.
    which : int
        BOTH products, or the FIRST or the SECOND one alone.
    """
    x, y, z = X[0], Y[0], Z[0]
    i = lo
    while i + 4 <= hi:
        a, b, c, d = _four_rows(place, stride, i, x.size, like)
        if which != SECOND:
            _times_four(a, b, c, d, x, y, i)
        if which != FIRST:
            _add_four(a, b, c, d, y, i, z)
        i += 4
    while i < hi:
        a = _row(place, stride, i, x.size, like)
        if which != SECOND:
            _times_one(a, x, y, i)
        if which != FIRST:
            _add_one(a, y, i, z)
        i += 1


@_compiled
def multiply_pairs(place, stride, lo, hi, X, Y, Z, like, which):
    """Do the same as `multiply` for an even number of vectors: two share each widened number."""
    n = X.shape[1]
    i = lo
    while i + 4 <= hi:
        four = _four_rows(place, stride, i, n, like)
        for k in range(0, X.shape[0], 2):
            if which != SECOND:
                _times_2(four, X, Y, i, k)
            if which != FIRST:
                _add_to_2(four, Y, Z, i, k)
        i += 4
    while i < hi:
        a = _row(place, stride, i, n, like)
        for k in range(X.shape[0]):
            if which != SECOND:
                _times_one(a, X[k], Y[k], i)
            if which != FIRST:
                _add_one(a, Y[k], i, Z[k])
        i += 1


@_compiled
def look(place, stride, lo, hi, rows, columns, like, infinite):
    """Sum the absolute values of rows ``lo`` to ``hi``, and look at each number.

    The largest one is found by its bits: a comparison of numbers that may be NaN is not compiled to
    vectors.

    Parameters
    ----------
    rows, columns : array of float64
        The sums are added to them.
    infinite : array of unsigned integers, shape (1,)
        The bits of Inf in the format that the numbers are widened to first.

    Returns
    -------
    largest : int
        The bits of the largest absolute value that is not NaN.
    square : float
        The sum of squares.
    zeros, nonfinite : int
    """
    n, kind, end = columns.size, infinite.dtype.type, infinite[0]
    largest, square, zeros, nonfinite = kind(0), 0.0, 0, 0
    for i in range(lo, hi):
        a = _row(place, stride, i, n, like)
        total, zero, broken = 0.0, np.int32(0), np.int32(0)
        for j in range(n):
            bits = _bits(a[j])
            size = np.float64(abs(_wide(a[j])))
            total += size
            square += size * size
            columns[j] += size
            zero = np.int32(zero + np.int32(bits == 0))
            broken = np.int32(broken + np.int32(bits >= end))
            largest = kind(max(largest, bits if bits <= end else kind(0)))
        rows[i] += total
        zeros += zero
        nonfinite += broken
    return largest, square, zeros, nonfinite
