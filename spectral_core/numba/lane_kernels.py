"""The loops of `NumbaEngine` for stacks of small matrices, such as depthwise convolutions.

A matrix of nine elements costs other kernels a hundred times what it costs to read: each of its
loops is too short for the processor's vectors, and has to be set up. Here the loops run over
matrices. `LANES` of them are gathered so that equal elements follow each other, and each operation
is one of vectors, whatever the shape of the matrices is. Any order in memory is read alike, by
three strides.

One thread runs all: waking another costs more than it would save.
"""

import numpy as np
from numba import carray

# What is kept on disk is compiled anew only where this file has changed: who changes one of these
# touches this file too.
from .kernels import (
    AT_MOST,
    FRESH,
    FRESH_64,
    _compiled,
    _force,
    _fraction,
    _inverse,
    _pointer,
    _scale,
    _store,
    _wide,
)

# As many float32 as the largest vector of a processor has.
LANES = 16

# The columns of the table of stacks: matrices; rows and columns of one; addresses of W, G, v, u
# and σ; elements of W from a matrix to the next, from a row and from a column in memory; kernel
# positions that come before the inputs in memory.
WIDTH = 12
(
    COUNT,
    ROWS,
    COLUMNS,
    WEIGHT,
    GRADIENT,
    RIGHT,
    LEFT,
    SIGMA,
    TO_MATRIX,
    TO_ROW,
    TO_COLUMN,
    WINDOW,
) = range(WIDTH)


@_compiled
def _stack(address, size, like):
    """Return ``size`` elements in memory."""
    return carray(_pointer(address), (size,), like.dtype)


@_compiled
def _gather(x, first, count, step, lanes):
    """Store the elements of ``count`` matrices, ``step`` from each other, and zeros after them."""
    for lane in range(count):
        lanes[lane] = _wide(x[first + lane * step])
    for lane in range(count, LANES):
        lanes[lane] = 0


@_compiled
def _scatter(lanes, x, first, count, step):
    """Store the elements of ``count`` lanes, ``step`` from each other."""
    for lane in range(count):
        x[first + lane * step] = lanes[lane]


@_compiled
def _place(j, columns, window):
    """Return the column of the matrix that is the j-th in memory."""
    channels = columns // window
    return j % channels * window + j // channels


@_compiled
def _inverse_lengths(x, squares, lengths, inverses):
    """Store the length of the vector of each lane, and its inverse: as `_length`, `_inverse`."""
    for lane in range(LANES):
        squares[lane] = 0.0
    for i in range(x.shape[0]):
        for lane in range(LANES):
            squares[lane] += np.float64(x[i, lane]) * np.float64(x[i, lane])
    for lane in range(LANES):
        lengths[lane] = np.sqrt(squares[lane])
        inverses[lane] = _inverse(np.sqrt(squares[lane]))


@_compiled
def _iterate(W, v, start, u, w, numbers, sigma):
    """Iterate the matrices of all lanes once; v and ``start`` keep what has no direction."""
    squares, lengths, inverses = numbers
    for i in range(u.shape[0]):
        for lane in range(LANES):
            u[i, lane] = 0
        for j in range(v.shape[0]):
            for lane in range(LANES):
                u[i, lane] += W[i * v.shape[0] + j, lane] * start[j, lane]
    _inverse_lengths(u, squares, lengths, inverses)
    for j in range(v.shape[0]):
        for lane in range(LANES):
            w[j, lane] = 0
    for i in range(u.shape[0]):
        for lane in range(LANES):
            u[i, lane] *= inverses[lane]
        for j in range(v.shape[0]):
            for lane in range(LANES):
                w[j, lane] += W[i * v.shape[0] + j, lane] * u[i, lane]
    _inverse_lengths(w, squares, lengths, inverses)
    for lane in range(LANES):
        sigma[lane] = lengths[lane]
    for j in range(v.shape[0]):
        for lane in range(LANES):
            unit = v.dtype.type(w[j, lane] * inverses[lane])
            v[j, lane] = unit if inverses[lane] > 0.0 else v[j, lane]
            start[j, lane] = v[j, lane]


@_compiled
def _scales(sigma, weights, target, code):
    """Scale sigma of each lane to its bound; store the scales and return True if one acts."""
    acts = False
    for lane in range(LANES):
        weights[lane] = _scale(sigma[lane], target, code)
        sigma[lane] *= sigma.dtype.type(weights[lane])
        acts |= weights[lane] != 1.0
    return acts


@_compiled
def _scale_lanes(G, weights, like, rows_and_columns, lanes, steps):
    """Multiply the matrix of each lane by its scale."""
    m, n = rows_and_columns
    first, count = lanes
    for i in range(m):
        for j in range(n):
            place = first * steps[0] + i * steps[1] + j * steps[2]
            for lane in range(count):
                here = place + lane * steps[0]
                _store(G, here, _wide(G[here]) * like.dtype.type(weights[lane]))


@_compiled
def _add_lanes(G, u, v, weights, scaled, lanes, steps):
    """Add the weighted ``u vᵀ`` of each lane to its gradient."""
    first, count = lanes
    for i in range(u.shape[0]):
        for lane in range(LANES):
            scaled[lane] = u.dtype.type(weights[lane] * u[i, lane])
        for j in range(v.shape[0]):
            place = first * steps[0] + i * steps[1] + j * steps[2]
            for lane in range(count):
                here = place + lane * steps[0]
                _store(G, here, _wide(G[here]) + scaled[lane] * v[j, lane])


@_compiled
def _rooms(room, m, n):
    """Return the parts of the scratch: W, v, the start of an iteration, Wᵀu, u, σ."""
    mn = m * n
    return (
        room[:mn],
        room[mn : mn + n],
        room[mn + n : mn + 2 * n],
        room[mn + 2 * n : mn + 3 * n],
        room[mn + 3 * n : mn + 3 * n + m],
        room[mn + 3 * n + m],
    )


@_compiled
def _load(V, v, start, first, count, window):
    """Gather v of each lane, in the order of memory, and that plus the `fresh_direction`."""
    n = v.shape[0]
    largest = v.dtype.type((FRESH if v.itemsize == 4 else FRESH_64) / 2**31)
    for j in range(n):
        column = _place(j, n, window)
        _gather(V, first * n + column, count, n, v[j])
        fresh = v.dtype.type(_fraction(column)) * largest
        for lane in range(LANES):
            start[j, lane] = v[j, lane] + fresh


@_compiled
def _run_block(k, first, table, numbers, like, room, wide, n_iter):
    """Run the step of `LANES` matrices of a stack, or of as many as are left."""
    m, n, size = table[k, ROWS], table[k, COLUMNS], table[k, COUNT]
    count, window = min(LANES, size - first), table[k, WINDOW]
    V, U = _stack(table[k, RIGHT], size * n, room), _stack(table[k, LEFT], size * m, room)
    sigmas = _stack(table[k, SIGMA], size, room)
    steps = table[k, TO_MATRIX], table[k, TO_ROW], table[k, TO_COLUMN]
    tile, v, start, w, u, sigma = _rooms(room, m, n)
    _load(V, v, start, first, count, window)
    if n_iter > 0:
        W = _stack(table[k, WEIGHT], size * m * n, like)
        for i in range(m):
            for j in range(n):
                place = first * steps[0] + i * steps[1] + j * steps[2]
                _gather(W, place, count, steps[0], tile[i * n + j])
        for _ in range(n_iter):
            _iterate(tile, v, start, u, w, (wide[0], wide[1], wide[2]), sigma)
        for i in range(m):
            _scatter(u[i], U, first * m + i, count, m)
        for j in range(n):
            _scatter(v[j], V, first * n + _place(j, n, window), count, n)
    else:
        for i in range(m):
            _gather(U, first * m + i, count, m, u[i])
        _gather(sigmas, first, count, 1, sigma)
    target, code, changes = u.dtype.type(numbers[k, 1]), numbers[k, 2], table[k, GRADIENT] > 0
    G = _stack(table[k, GRADIENT], size * m * n, like)
    if code >= AT_MOST:
        # A bound that does not act leaves the weights in peace.
        if _scales(sigma, wide[0], target, code) and changes:
            _scale_lanes(G, wide[0], room, (m, n), (first, count), steps)
    elif changes:
        for lane in range(LANES):
            wide[0, lane] = numbers[k, 0] * _force(sigma[lane], target, code)
        _add_lanes(G, u, v, wide[0], start[0], (first, count), steps)
    _scatter(sigma, sigmas, first, count, 1)


@_compiled
def run(table, numbers, like, room, wide, n_iter):
    """Run lines 5–9 of Algorithm 1 for stacks of small matrices.

    Parameters
    ----------
    table : int64, (K, 12)
        See `WIDTH`.
    numbers : float64, (K, 3)
        λ, target and code of each stack, as in kernels.py.
    like : array
        An array with the dtype of W and G.
    room : array, (R, LANES)
        Scratch, in the dtype of the vectors.
    wide : float64, (3, LANES)
        Scratch.
    n_iter : int
        Power iterations. The update follows them, where G has an address.
    """
    for k in range(table.shape[0]):
        for first in range(0, table[k, COUNT], LANES):
            _run_block(k, first, table, numbers, like, room, wide, n_iter)
