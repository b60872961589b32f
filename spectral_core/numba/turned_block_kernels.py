"""The loops of `NumbaEngine` for k > 1 vectors, where W is not in memory row by row.

V is permuted to the order of memory before a step, and back after it: W stays where it is.

What block_kernels.py computes from one reading of W needs its rows. Where the columns of W are the
rows in memory, W is read twice: each row in memory, weighted by a column of S, is a summand of
Y = SWᵀ, and its products with the whole of Y are a column of YW. Between the two readings, Y is
orthonormalized as in block_kernels.py.
"""

import numpy as np
from numba import carray, prange

from . import block_kernels, kernels

# What is kept on disk is compiled anew only where this file has changed: who changes one of these
# touches this file too.
from .block_kernels import (
    _add_row,
    _add_to_2,
    _add_to_4,
    _copy,
    _fill,
    _finish,
    _four,
    _matrix,
    _orthonormalize,
    _rows_of,
    _start,
    _times_2,
    _times_4,
    _times_row,
    _whole,
)
from .kernels import _compiled, _pointer, _wide

# Rows in memory of a transposed convolution that are turned at once: a multiple of four, since the
# products take four at a time.
TOGETHER = 4


@_compiled
def _permute(X, rows, window, Z, back):
    """Copy rows of X to Z, from the matrix's order of columns to that of memory, or back."""
    channels = X.shape[1] // window
    for a in range(rows):
        x, z = X[a], Z[a]
        for i in range(window):
            for c in range(channels):
                if back:
                    z[c * window + i] = x[i * channels + c]
                else:
                    z[i * channels + c] = x[c * window + i]


@_compiled
def _permute_all(matrices, starts, rows, back):
    """Permute V of each matrix in its place, by way of the room for S."""
    for k in range(matrices.shape[0] - 1):
        n, window = matrices[k, 1], matrices[k, 9]
        if window > 1:
            V = carray(_pointer(matrices[k, 4]), (rows, n), starts.dtype)
            S = _matrix(starts, matrices[k, 8], rows, n)
            _permute(V, rows, window, S, back)
            _copy(S, rows, V)


# The next two functions are alike on purpose. One function with a flag compiles both branches for
# each kind of arrays, which takes longer. And what has functions as arguments, or in a closure, is
# not found again on disk: it would be compiled in every process.


@_compiled
def _add_times(W, S, Y, lo, hi):
    """Add rows of W, weighted by these columns of S, to the rows of Y."""
    k, i = S.shape[0], lo
    while i + 4 <= hi:
        for c in range(0, k - 3, 4):
            _add_to_4(W, S, Y, i, c)
        if k % 4 > 0:
            _add_to_2(_four(W, i), S, Y, i, k - 2)
        i += 4
    while i < hi:
        _add_row(W, S, Y, i)
        i += 1


@_compiled
def _times(W, Y, Z, lo, hi):
    """Compute ``Z[:, lo:hi] = Y W[lo:hi]ᵀ``."""
    k, i = Y.shape[0], lo
    while i + 4 <= hi:
        for c in range(0, k - 3, 4):
            _times_4(W, Y, Z, i, c)
        if k % 4 > 0:
            _times_2(_four(W, i), Y, Z, i, k - 2)
        i += 4
    while i < hi:
        _times_row(W, Y, Z, i)
        i += 1


@_compiled
def _turn(W, lo, count, T):
    """Store these rows of a transposed convolution in T, whose rows are columns of the matrix.

    In memory, a row has the kernel positions of one output after another.
    """
    window = W.shape[1] // T.shape[1]
    for i in range(count):
        row = W[lo + i]
        for p in range(window):
            t = T[i * window + p]
            for o in range(t.size):
                t[o] = _wide(row[o * window + p])


@_compiled
def _read_between(W, S, Y, Z, T, bounds, second):
    """Compute both products of rows of a transposed convolution, by parts that are turned."""
    window = W.shape[1] // T.shape[1]
    lo, hi = bounds
    while lo < hi:
        count = min(TOGETHER, hi - lo)
        first, rows = lo * window, count * window
        _turn(W, lo, count, T)
        if second:
            _times(T, Y, Z[:, first : first + rows], 0, rows)
        else:
            _add_times(T, S[:, first : first + rows], Y, 0, rows)
        lo += count


@_compiled
def _read_chunk(p, second, table, arrays, rights):
    """Compute what one chunk adds to Y, or the elements of Z = YW that belong to it."""
    matrices, chunks, like, scratch = table[0], table[1], arrays[0], arrays[1]
    k, lo, hi, place = chunks[p, 0], chunks[p, 1], chunks[p, 2], chunks[p, 3]
    window = matrices[k, 10] - 1
    _, S, Y = _rows_of(k, table, arrays)
    pairs, n, m = S.shape[0], S.shape[1], Y.shape[1]
    Z = _matrix(rights, matrices[k, 8], pairs, n)
    if not second:
        Y = _matrix(scratch, place, pairs, m)
        _fill(Y, 0, 0)
    if window > 0:
        W = carray(_pointer(matrices[k, 2]), (n // window, m * window), like.dtype)
        T = _matrix(scratch, place + pairs * m, TOGETHER * window, m)
        _read_between(W, S, Y, Z, T, (lo, hi), second)
        return
    W = carray(_pointer(matrices[k, 2]), (n, matrices[k, 11]), like.dtype)
    if second:
        _times(W, Y, Z, lo, hi)
    else:
        _add_times(W, S, Y, lo, hi)


@_compiled
def _finish_one(k, second, table, arrays, rights):
    """Finish a reading of a matrix: orthonormalize Y, or store u, σ and the next V."""
    matrices, chunks, scratch, small = table[0], table[1], arrays[1], arrays[4]
    V, S, Y = _rows_of(k, table, arrays)
    room = _matrix(small, small[0].size * k, small.shape[1] * small.shape[2], small.shape[3])
    eps = np.finfo(scratch.dtype).eps
    if second:
        Z = _matrix(rights, matrices[k, 8], S.shape[0], S.shape[1])
        u = carray(_pointer(matrices[k, 5]), (Y.shape[1],), scratch.dtype)
        sigma = carray(_pointer(matrices[k, 6]), (1,), scratch.dtype)
        sigma[0] = _finish(Z, Y, room, V, S, u, eps)
        return
    _fill(Y, 0, 0)
    for p in range(matrices[k, 7], matrices[k + 1, 7]):
        part = _matrix(scratch, chunks[p, 3], Y.shape[0], Y.shape[1])
        for a in range(Y.shape[0]):
            y, x = Y[a], part[a]
            for j in range(y.size):
                y[j] += x[j]
    _orthonormalize(Y, room, eps)  # what it finds is good for YW, which is computed afterwards


@_compiled
def _iterate(p, table, arrays, rights, n_iter):
    """Run all iterations of a matrix that is one chunk: a small one is read from the cache."""
    k = table[1][p, 0]
    _start(k, table, arrays)
    for turn in range(2 * n_iter):
        _read_chunk(p, turn % 2 == 1, table, arrays, rights)
        _finish_one(k, turn % 2 == 1, table, arrays, rights)


@_compiled
def _work(t, turn, table, arrays, rights, n_iter):
    """Do the work of thread t in this turn: see `_together`."""
    matrices, chunks, parts = table[0], table[1], table[2]
    second = turn % 4 == 0
    if turn % 2 == 1:
        for p in range(parts[t], parts[t + 1]):
            if not _whole(chunks[p, 0], matrices):
                _read_chunk(p, turn % 4 == 3, table, arrays, rights)
        return
    if turn == 0:
        for p in range(parts[t], parts[t + 1]):
            if _whole(chunks[p, 0], matrices):
                _iterate(p, table, arrays, rights, n_iter)
    for k in range(t, matrices.shape[0] - 1, parts.size - 1):
        if not _whole(k, matrices):
            if turn == 0:
                _start(k, table, arrays)
            else:
                _finish_one(k, second, table, arrays, rights)


@_compiled
def _alone(matrices, chunks, parts, like, scratch, starts, places, lefts, small, rights, n_iter):
    """Run `_together` in this thread alone, without starting others."""
    table, arrays = (matrices, chunks, parts, places), (like, scratch, starts, lefts, small)
    for p in range(chunks.shape[0]):
        _iterate(p, table, arrays, rights, n_iter)


@_compiled(parallel=True)
def _together(matrices, chunks, parts, like, scratch, starts, places, lefts, small, rights, n_iter):
    """Run lines 7 and 8 of Algorithm 1 for many matrices whose columns are in memory.

    The parameters are those of `_together` in block_kernels.py, and:

    Parameters
    ----------
    rights : array
        Room for the rows of YW of each matrix.

    Turn 0 is that of matrices that belong to one thread alone, and of the starts of the others.
    Four turns follow for each of their iterations: read, orthonormalize, read, finish.
    """
    count = matrices.shape[0] - 1
    table, arrays = (matrices, chunks, parts, places), (like, scratch, starts, lefts, small)
    for turn in range(4 * n_iter + 1 if chunks.shape[0] > count else 1):
        for t in prange(parts.size - 1):
            _work(t, turn, table, arrays, rights, n_iter)


def run(
    count: int,
    division: tuple[np.ndarray, ...],
    numbers: np.ndarray,
    room: tuple[np.ndarray, ...],
    block: tuple[np.ndarray, ...],
    n_iter: int,
) -> None:
    """Run the step in ``count`` threads.

    ``block`` has room for the rows of YW where W is turned, and otherwise no such array.
    """
    matrices, starts, small = division[0], room[2], block[2]
    turned = len(block) > 3
    own = (_alone, _together) if turned else (block_kernels._alone, block_kernels._together)
    if n_iter > 0:
        _permute_all(matrices, starts, small.shape[2], False)
        try:
            kernels.call(count, own, *division, *room, *block, n_iter)
        finally:  # an interrupt from the keyboard must not leave V permuted
            _permute_all(matrices, starts, small.shape[2], True)
    # What follows the iterations knows the first row of V alone, as that of one vector.
    kernels.run(count, *division, numbers, *room, 0)
