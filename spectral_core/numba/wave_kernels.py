"""The loops of `WaveEngine` that read weights, compiled when a model first has waves.

An iteration is that of the core's `iterate_waves`. What it costs is arithmetic, not memory: each
element of W meets two rows of every wave, in both products. So all products are made of tiles of
4 × 4 sums, which stay in registers. Z = QᵀW is stored tap by tap: then its Gram matrix and the next
amplitudes are products of rows too. Rows of one class of taps are together, and classes are padded
with zeros to a multiple of 4 rows.

Where the waves would span all outputs, Z is W itself: only one copy of W is read, three times, and
it stays in the cache.
"""

from math import frexp, ldexp

import numpy as np
from numba import carray, prange

from . import kernels

# What is kept on disk is compiled anew only where this file has changed: who changes one of these
# touches this file too.
from .block_kernels import _add_to_4, _fill, _inlined, _matrix, _times_4, _times_row
from .kernels import (
    AT_MOST,
    FRESH,
    FRESH_64,
    _compiled,
    _force,
    _fraction,
    _inverse,
    _multiply,
    _pointer,
    _scale,
    _scale_sigmas,
    _store,
    _wide,
)
from .wave_climb import _climb, _dot, _phases

# The table of matrices: see `WaveDivision`.
M, N, WEIGHT, GRAD, ROWS, LEFT, SIGMA, WAVES, TAPS, FIRST, INPUTS, ROOM, SMALL = range(13)
# Columns of Z that are computed at once: they stay in the nearest cache.
_BLOCK = 256
# Squares of numbers with exponents below this neither overflow nor underflow in float32.
_SAFE = 30


@_compiled
def _taps(k, table):
    """Return what waves need of the taps of a matrix, sorted by classes.

    These are their places in memory, their places in strides, the first of each class, the
    differences, and the number of the difference of each pair, negative for minus that one.
    """
    numbers = table[1][table[0][k, TAPS] :]
    T, d, R, H = numbers[0], numbers[1], numbers[2], numbers[3]
    at = 4
    order = numbers[at : at + T]
    places = numbers[at + T : at + T + T * d].reshape((T, d))
    at += T + T * d
    first = numbers[at : at + R + 1]
    at += R + 1
    steps = numbers[at : at + H * d].reshape((H, d))
    pairs = numbers[at + H * d : at + H * d + T * T].reshape((T, T))
    return order, places, first, steps, pairs


@_compiled
def _row(first, r, k):
    """Return the first row of Z of a class: classes are padded to a multiple of 4 rows."""
    row = 0
    for c in range(r):
        row += ((first[c + 1] - first[c]) * k + 3) // 4 * 4
    return row


@_compiled
def _load(V, B, classes, fresh):
    """Store the amplitudes of waves, class by class, plus the core's `fresh_direction`."""
    inputs, pairs = B.shape[1], B.shape[0] // classes
    largest = FRESH if B.itemsize == 4 else FRESH_64
    scale = B.dtype.type(fresh * largest / 2**31)
    _fill(B, 0, 0)
    for f in range(min(V.shape[0], pairs // 2)):
        for part in range(2):
            for r in range(classes):
                b, start = B[r * pairs + 2 * f + part], (part * classes + r) * inputs
                v = V[f, start : start + inputs]
                for i in range(inputs):
                    b[i] = v[i] + B.dtype.type(_fraction(start + i)) * scale


@_compiled
def _spread(B, ω, taps, phases, in_order, S):
    """Store the waves as pairs of rows of W's inputs, in the order of memory."""
    order, places, first, _, _ = taps
    T, classes, inputs = order.size, first.size - 1, B.shape[1]
    pairs = B.shape[0] // classes
    _fill(S, 2 * ω.shape[0], 0)
    for f in range(ω.shape[0]):
        re, im = S[2 * f], S[2 * f + 1]
        _phases(ω[f], places, phases[0], phases[1])
        for r in range(classes):
            b, c = B[r * pairs + 2 * f], B[r * pairs + 2 * f + 1]
            for t in range(first[r], first[r + 1]):
                p, q = B.dtype.type(phases[1][0, t]), B.dtype.type(phases[1][1, t])
                if in_order:
                    start, leap = order[t], T
                    for i in range(inputs):
                        re[start + i * leap] = p * b[i] + q * c[i]
                        im[start + i * leap] = p * c[i] - q * b[i]
                else:
                    start = order[t] * inputs
                    x, y = re[start : start + inputs], im[start : start + inputs]
                    for i in range(inputs):
                        x[i] = p * b[i] + q * c[i]
                        y[i] = p * c[i] - q * b[i]


@_compiled
def _times(W, S, Y):
    """Compute Y = SWᵀ. The number of rows of S is a multiple of 4."""
    i = 0
    while i + 4 <= W.shape[0]:
        for c in range(0, S.shape[0], 4):
            _times_4(W, S, Y, i, c)
        i += 4
    while i < W.shape[0]:
        _times_row(W, S, Y, i)
        i += 1


@_compiled
def _size(X):
    """Return the sum of the absolute values."""
    total = X.dtype.type(0)
    for a in range(X.shape[0]):
        x = X[a]
        for j in range(x.size):
            total += abs(x[j])
    return np.float64(total)


@_compiled(fastmath=False)
def _power_of_two(size):
    """Return 1, or the power of two that brings numbers of this size near 1."""
    if not 0.0 < size < np.inf:
        return 1.0
    exponent = frexp(size)[1]
    return 1.0 if abs(exponent) < _SAFE else ldexp(1.0, max(-1000, min(-exponent, 1000)))


@_compiled
def _less(x, weight, y):
    for j in range(x.size):
        x[j] -= weight * y[j]


@_compiled(fastmath=False)
def _orthonormalize(E, found, eps):
    """Make the rows of E orthonormal, and store their old ones' coordinates: Gram–Schmidt, twice.

    A row that adds no direction becomes one that is not among the others.
    """
    total = 0.0
    for a in range(E.shape[0]):
        total += _dot(E[a], E[a])
    for a in range(E.shape[0]):
        row, least = E[a], eps * np.sqrt(total)
        for b in range(E.shape[0]):
            found[a, b] = 0.0
        for turn in range(4):
            for b in range(a):
                part = _dot(row, E[b])
                _less(row, part, E[b])
                found[a, b] += part if turn < 2 else 0.0
            length = np.sqrt(_dot(row, row))
            if turn == 1:
                if length > least:
                    found[a, a] = length
                    break
                for j in range(row.size):
                    row[j] = _fraction(j + a * row.size) / 2.0**31
        inverse = _inverse(length)
        for j in range(row.size):
            row[j] *= inverse


@_compiled
def _add_columns(W, Q, Z, lo):
    """Compute Z = QW for the columns of W from ``lo`` on. Q has a multiple of 4 rows."""
    end, i = lo + Z.shape[1], 0
    _fill(Z, 0, 0)
    while i + 4 <= W.shape[0]:
        W0, W1, W2, W3 = W[i, lo:end], W[i + 1, lo:end], W[i + 2, lo:end], W[i + 3, lo:end]
        for c in range(0, Q.shape[0], 4):
            _add_tile(W0, W1, W2, W3, Q, Z, i, c)
        i += 4
    while i < W.shape[0]:
        row = W[i, lo:end]
        for c in range(Q.shape[0]):
            z, q = Z[c], Q[c, i]
            for j in range(z.size):
                z[j] += q * _wide(row[j])
        i += 1


@_compiled
def _add_tile(W0, W1, W2, W3, Y, Z, i, c):
    """Add four rows, weighted by columns i to i + 3 of Y, to four rows of Z."""
    p, q, r, s = Z[c], Z[c + 1], Z[c + 2], Z[c + 3]
    p0, p1, p2, p3 = Y[c, i], Y[c, i + 1], Y[c, i + 2], Y[c, i + 3]
    q0, q1, q2, q3 = Y[c + 1, i], Y[c + 1, i + 1], Y[c + 1, i + 2], Y[c + 1, i + 3]
    r0, r1, r2, r3 = Y[c + 2, i], Y[c + 2, i + 1], Y[c + 2, i + 2], Y[c + 2, i + 3]
    s0, s1, s2, s3 = Y[c + 3, i], Y[c + 3, i + 1], Y[c + 3, i + 2], Y[c + 3, i + 3]
    for j in range(p.size):
        a, b, c_, d = _wide(W0[j]), _wide(W1[j]), _wide(W2[j]), _wide(W3[j])
        p[j] += p0 * a + p1 * b + p2 * c_ + p3 * d
        q[j] += q0 * a + q1 * b + q2 * c_ + q3 * d
        r[j] += r0 * a + r1 * b + r2 * c_ + r3 * d
        s[j] += s0 * a + s1 * b + s2 * c_ + s3 * d


@_compiled
def _by_taps(X, taps, in_order, k, first_input, Z):
    """Store k rows of inputs × taps tap by tap, from an input on."""
    order, _, first, _, _ = taps
    T = order.size
    inputs = X.shape[1] // T
    for r in range(first.size - 1):
        start = _row(first, r, k) - first[r] * k
        for t in range(first[r], first[r + 1]):
            for a in range(k):
                row, z = X[a], Z[start + t * k + a, first_input : first_input + inputs]
                if in_order:
                    for i in range(inputs):
                        z[i] = _wide(row[i * T + order[t]])
                else:
                    for i in range(inputs):
                        z[i] = _wide(row[order[t] * inputs + i])


@_compiled
def _pad(first, k, Z):
    """Fill the rows between the classes with zeros."""
    for r in range(first.size - 1):
        end = _row(first, r + 1, k)
        for row in range(_row(first, r, k) + (first[r + 1] - first[r]) * k, end):
            z = Z[row]
            for i in range(z.size):
                z[i] = 0


@_compiled
def _adjoint_times(W, Q, taps, in_order, k, block, Z):
    """Compute the first k rows of QW tap by tap, a block of columns at a time."""
    T, inputs = taps[0].size, Z.shape[1]
    if in_order:
        step = max(1, _BLOCK // T)
        for i in range(0, inputs, step):
            count = min(step, inputs - i)
            part = block[: Q.shape[0] * count * T].reshape((Q.shape[0], count * T))
            _add_columns(W, Q, part, i * T)
            _by_taps(part, taps, in_order, k, i, Z)
        return
    order, _, first, _, _ = taps
    for r in range(first.size - 1):
        start = _row(first, r, k) - first[r] * k
        for t in range(first[r], first[r + 1]):
            for i in range(0, inputs, _BLOCK):
                count = min(_BLOCK, inputs - i)
                part = block[: Q.shape[0] * count].reshape((Q.shape[0], count))
                _add_columns(W, Q, part, order[t] * inputs + i)
                for a in range(k):
                    z = Z[start + t * k + a, i : i + count]
                    z[:] = part[a]


@_compiled
def _images(P, ω, taps, phases, k, found):
    """Add up the products of taps with amplitudes to the images of the waves."""
    _, places, first, _, _ = taps
    _fill(found, 0, 0)
    for f in range(ω.shape[0]):
        p, q, out = P[2 * f], P[2 * f + 1], found[f]
        _phases(ω[f], places, phases[0], phases[1])
        for r in range(first.size - 1):
            start = _row(first, r, k) - first[r] * k
            for t in range(first[r], first[r + 1]):
                cos, sin, at = phases[1][0, t], phases[1][1, t], start + t * k
                for a in range(k):
                    out[a] += cos * p[at + a] + sin * q[at + a]
                    out[k + a] += cos * q[at + a] - sin * p[at + a]


@_compiled
def _gram(Z, first, pairs, k, place, room, R):
    """Store R, as `_climb` reads it: sums of the inner products of the rows of Z."""
    _fill(R, 0, 0)
    half = R.shape[0] // 2
    for r in range(first.size - 1):
        start, rows = _row(first, r, k), _row(first, r + 1, k) - _row(first, r, k)
        part = Z[start : start + rows]
        C = _matrix(room, place, rows, rows)
        for i in range(0, rows, 4):
            for c in range(i, rows, 4):
                _times_4(part, part, C, i, c)
        for t in range(first[r], first[r + 1]):
            x = (t - first[r]) * k
            _add_square(C, x, k, R[0])
            for s in range(t + 1, first[r + 1]):
                h, y = pairs[t, s], (s - first[r]) * k
                _add_block(C, y, x, k, 1.0 if h > 0 else -1.0, R[abs(h)], R[half + abs(h)])


@_compiled
def _add_square(C, x, k, total):
    """Add the triangle of a block of inner products of one tap."""
    p = 0
    for a in range(k):
        for b in range(a + 1):
            total[p] += C[x + a, x + b]
            p += 1


@_compiled
def _add_block(C, y, x, k, sign, sums, differences):
    """Add the triangles of a block plus, and minus, its transpose."""
    p = 0
    for a in range(k):
        for b in range(a + 1):
            one, other = np.float64(C[y + b, x + a]), np.float64(C[y + a, x + b])
            sums[p] += one + other
            differences[p] += sign * (one - other)
            p += 1


@_compiled
def _weigh(to, taps, phases, scale, out):
    """Store the weights of the rows of Z in the next amplitudes: K̂(ω)ᴴQc divided by σ."""
    ω, c, value = to
    _, places, first, _, _ = taps
    k = c.shape[1] // 2
    _fill(out, 0, 0)
    for f in range(ω.shape[0]):
        p, q, inverse = out[2 * f], out[2 * f + 1], _inverse(np.sqrt(value[f] * scale))
        _phases(ω[f], places, phases[0], phases[1])
        for r in range(first.size - 1):
            start = _row(first, r, k) - first[r] * k
            for t in range(first[r], first[r + 1]):
                cos, sin = phases[1][0, t] * inverse, phases[1][1, t] * inverse
                at = start + t * k
                for a in range(k):
                    p[at + a] = cos * c[f, a] - sin * c[f, k + a]
                    q[at + a] = sin * c[f, a] + cos * c[f, k + a]


@_compiled
def _turn(Z, weights, first, k, B):
    """Compute the next amplitudes, class by class."""
    pairs = weights.shape[0]
    _fill(B, 0, 0)
    for r in range(first.size - 1):
        out = B[r * pairs : (r + 1) * pairs]
        for i in range(_row(first, r, k), _row(first, r + 1, k), 4):
            for c in range(0, pairs, 4):
                _add_to_4(Z, weights, out, i, c)


@_compiled
def _keep(B, ω, V):
    """Store the next amplitudes and frequencies in the rows of the state."""
    inputs, d = B.shape[1], ω.shape[1]
    classes = (V.shape[1] - d) // (2 * inputs)
    pairs = B.shape[0] // classes
    for f in range(ω.shape[0]):
        for part in range(2):
            for r in range(classes):
                b, start = B[r * pairs + 2 * f + part], (part * classes + r) * inputs
                v = V[f, start : start + inputs]
                for i in range(inputs):
                    v[i] = b[i]
        for j in range(d):
            V[f, V.shape[1] - d + j] = ω[f, j]


@_compiled
def _vector(x, place, size):
    """Return a part of x, by its address."""
    return carray(_pointer(x.ctypes.data + place * x.itemsize), (size,), x.dtype)


@_compiled
def _shapes(k, table):
    """Return m, n, the waves, the rows of the basis, the inputs and the padded pairs of rows."""
    m, n, waves = table[0][k, M], table[0][k, N], table[0][k, WAVES]
    return m, n, waves, min(2 * waves, m), table[0][k, INPUTS], (2 * waves + 3) // 4 * 4


@_compiled
def _basis_size(k, table):
    """Return the elements of the basis in float64: none where it is that of all outputs."""
    m, waves = table[0][k, M], table[0][k, WAVES]
    return 2 * waves * m if m > 2 * waves else 0


@_compiled
def _small_of(k, taps, room, table):
    """Return the arrays of `_climb`, the images first, and room for the phases of the taps."""
    _, places, _, steps, _ = taps
    (H, d), T, reach = steps.shape, places.shape[0], 1
    for h in range(H):
        for j in range(d):
            reach = max(reach, abs(steps[h, j]) + 1)
    for t in range(T):
        for j in range(d):
            reach = max(reach, places[t, j] + 1)
    _, _, waves, rank, _, _ = _shapes(k, table)
    at, triangle = table[0][k, SMALL], rank * (rank + 1) // 2
    at += _basis_size(k, table)
    images = _matrix(room, at, 2 * waves, rank)
    at += 2 * waves * rank
    near = _waves_in(room, at, waves, d, rank)
    at += waves * (d + 2 * rank + 1)
    far = _waves_in(room, at, waves, d, rank)
    at += waves * (d + 2 * rank + 1)
    to = _waves_in(room, at, waves, d, rank)
    at += waves * (d + 2 * rank + 1)
    R, phases = _matrix(room, at, 2 * H, triangle), _matrix(room, at + 2 * H * triangle, 2, H)
    at += 2 * H * (triangle + 1)
    halves, G = _matrix(room, at, 2, triangle), _matrix(room, at + 2 * triangle, 2 * rank, rank)
    at += 2 * triangle + 2 * rank * rank
    quotients, system = _matrix(room, at, 2, H), _matrix(room, at + 2 * H, d, d + 1)
    at += 2 * H + d * (d + 1)
    moved, vector = _vector(room, at, d), _vector(room, at + d, 2 * rank)
    at += d + 2 * rank
    before, keys = _vector(room, at, waves), _vector(room, at + waves, waves)
    at += 2 * waves
    powers = _matrix(room, at, 2 * d, reach)
    of_taps = _matrix(room, at + 2 * d * reach, 2, T)
    work = (powers, phases, halves, G, quotients, system, moved, vector, before, keys)
    return images, near, far, to, R, work, (powers, of_taps)


@_compiled
def _waves_in(room, at, waves, d, rank):
    """Return frequencies, vectors and values."""
    ω, c = _matrix(room, at, waves, d), _matrix(room, at + waves * d, waves, 2 * rank)
    return ω, c, _vector(room, at + waves * (d + 2 * rank), waves)


@_compiled
def _read_all(W, B, ω, taps, phases, in_order, images, Z, P):
    """Store W itself tap by tap, and the images of the waves; return the scale of both."""
    first, k = taps[2], W.shape[0]
    _by_taps(W, taps, in_order, k, 0, Z)
    _pad(first, k, Z)
    scale = _scaled(Z)
    pairs = P.shape[0]
    for r in range(first.size - 1):
        rows = B[r * pairs : (r + 1) * pairs]
        for i in range(_row(first, r, k), _row(first, r + 1, k), 4):
            for c in range(0, pairs, 4):
                _times_4(Z, rows, P, i, c)
    _images(P, ω, taps, phases, k, images.reshape((ω.shape[0], 2 * k)))
    return scale


@_compiled
def _scaled(Z):
    """Bring Z into the range whose squares are safe; return the factor."""
    scale = _power_of_two(_size(Z))
    if scale != 1.0:
        for a in range(Z.shape[0]):
            z = Z[a]
            for j in range(z.size):
                z[j] *= scale
    return scale


@_compiled
def _read_within(W, B, ω, taps, phases, in_order, images, Z, rows):
    """Find the basis Q of the images, and store QW; return the scale of QW and of the images."""
    S, Q, block, E, eps = rows
    _spread(B, ω, taps, phases, in_order, S)
    _times(W, S, Q)
    scale = _power_of_two(_size(Q))
    for a in range(E.shape[0]):
        for j in range(E.shape[1]):
            E[a, j] = np.float64(Q[a, j]) * scale
    _orthonormalize(E, images, eps)
    for a in range(E.shape[0]):
        for j in range(E.shape[1]):
            Q[a, j] = E[a, j]
    _fill(Q, E.shape[0], 0)
    _adjoint_times(W, Q, taps, in_order, E.shape[0], block, Z)
    _pad(taps[2], E.shape[0], Z)
    found = _scaled(Z)
    for a in range(images.shape[0]):
        for j in range(images.shape[1]):
            images[a, j] *= found / scale
    return found


@_compiled
def _large_of(k, taps, room, table):
    """Return the arrays in the dtype of the vectors: amplitudes, Z, weights, and room.

    The room is the place of a Gram matrix, rows of the waves, those of Q, and a block of columns.
    """
    m, n, _, rank, inputs, pairs = _shapes(k, table)
    first, at = taps[2], table[0][k, ROOM]
    classes, widest = first.size - 1, 0
    rows = _row(first, classes, rank)
    for r in range(classes):
        widest = max(widest, _row(first, r + 1, rank) - _row(first, r, rank))
    B = _matrix(room, at, classes * pairs, inputs)
    at += classes * pairs * inputs
    Z, weights = _matrix(room, at, rows, inputs), _matrix(room, at + rows * inputs, pairs, rows)
    gram = at + rows * (inputs + pairs)
    S = _matrix(room, gram + widest * widest, pairs, n)
    at = gram + widest * widest + pairs * n
    Q, block = _matrix(room, at, pairs, m), pairs * max(_BLOCK, taps[0].size)
    return B, Z, weights, gram, S, Q, _vector(room, at + pairs * m, block)


@_compiled
def _state_of(k, room, table):
    """Return the rows of the state, u as pairs of numbers, and σ."""
    matrices, (m, _, waves, _, inputs, _) = table[0], _shapes(k, table)
    numbers = table[1][matrices[k, TAPS] :]
    V = carray(
        _pointer(matrices[k, ROWS]), (waves, 2 * numbers[2] * inputs + numbers[1]), room.dtype
    )
    u = carray(_pointer(matrices[k, LEFT]), (m, 2), room.dtype)
    return V, u, carray(_pointer(matrices[k, SIGMA]), (1,), room.dtype)


@_compiled
def _store_left(c, Q, whole, u):
    """Store u = Qc of the best wave."""
    rank = c.size // 2
    for o in range(u.shape[0]):
        re = im = 0.0
        if whole:
            re, im = c[o], c[rank + o]
        else:
            for a in range(rank):
                re += c[a] * Q[a, o]
                im += c[rank + a] * Q[a, o]
        u[o, 0], u[o, 1] = re, im


@_compiled
def _iterate(k, table, arrays, n_iter):
    """Iterate the waves of one matrix: `iterate_waves` of the core."""
    like, room, small, order = arrays
    taps = _taps(k, table)
    _, _, first, steps, pairs = taps
    d, in_order, eps = steps.shape[1], table[0][k, FIRST] == 0, np.finfo(room.dtype).eps
    V, u, sigma = _state_of(k, room, table)
    m, n, waves, rank, _, _ = _shapes(k, table)
    W = carray(_pointer(table[0][k, WEIGHT]), (m, n), like.dtype)
    B, Z, weights, gram, S, Q, block = _large_of(k, taps, room, table)
    images, near, far, to, R, work, phases = _small_of(k, taps, small, table)
    E = _matrix(small, table[0][k, SMALL], rank, m)
    ω, order = near[0], order[2 * k : 2 * k + 2, :waves]
    for turn in range(n_iter):
        for f in range(waves):
            for j in range(d):
                ω[f, j] = V[f, V.shape[1] - d + j]
        _load(V, B, first.size - 1, 1.0 if turn == 0 else 0.0)
        if rank == m:
            scale = _read_all(W, B, ω, taps, phases, in_order, images, Z, weights)
        else:
            rows = (S, Q, block, E, eps)
            scale = _read_within(W, B, ω, taps, phases, in_order, images, Z, rows)
        _gram(Z, first, pairs, rank, gram, room, R)
        of_each = images.reshape((waves, 2 * rank))
        size = _climb(near, far, to, of_each, R, steps, table[2][k, :d], work, order, eps)
        least = eps * max(to[2].max(), 0.0)
        for f in range(waves):
            to[2][f] = max(to[2][f], least)
        sigma[0] = np.sqrt(to[2][0] * size) / scale
        if 0.0 < sigma[0] < np.inf:
            _weigh(to, taps, phases, size, weights)
            _turn(Z, weights, first, rank, B)
            _keep(B, to[0], V)
    if n_iter > 0:
        _store_left(to[1][0], Q, rank == m, u)


@_compiled
def _add_terms(G, u, S, weight):
    """Add both terms of rank one to a gradient."""
    x, y = S[0], S[1]
    for o in range(G.shape[0]):
        row, a, b = G[o], x.dtype.type(weight * u[o, 0]), x.dtype.type(weight * u[o, 1])
        if a == 0 and b == 0:
            continue
        for j in range(row.size):
            _store(row, j, _wide(row[j]) + (a * x[j] + b * y[j]))


@_compiled
def _change(k, table, numbers, arrays):
    """Add the terms to the gradient, or scale the weight."""
    like, room, small, _ = arrays
    if table[0][k, GRAD] == 0:
        return
    V, u, sigma = _state_of(k, room, table)
    m, n, _, _, _, _ = _shapes(k, table)
    G = carray(_pointer(table[0][k, GRAD]), (m, n), like.dtype)
    target, code = room.dtype.type(numbers[k, 1]), numbers[k, 2]
    if code >= AT_MOST:
        factor = _scale(sigma[0], target, code)
        if factor != 1:  # a bound that does not act leaves the weight in peace
            _multiply(G, factor, 0, m)
        return
    taps = _taps(k, table)
    B, _, _, _, S, _, _ = _large_of(k, taps, room, table)
    _, near, _, _, _, _, phases = _small_of(k, taps, small, table)
    ω = near[0][:1]
    for j in range(ω.shape[1]):
        ω[0, j] = V[0, V.shape[1] - ω.shape[1] + j]
    _load(V[:1], B, taps[2].size - 1, 0.0)
    _spread(B, ω, taps, phases, table[0][k, FIRST] == 0, S[:2])
    _add_terms(G, u, S, numbers[k, 0] * _force(sigma[0], target, code))


@_inlined
def _work(t, starts, members, table, numbers, arrays, n_iter):
    """Run the step of the matrices of thread t, each while it is in the cache."""
    for p in range(starts[t], starts[t + 1]):
        _iterate(members[p], table, arrays, n_iter)
        _change(members[p], table, numbers, arrays)


@_compiled
def _alone(starts, members, matrices, taps, leaps, numbers, like, room, small, order, n_iter):
    """Run `_together` in this thread alone, without starting others."""
    arrays = like, room, small, order
    _work(0, starts, members, (matrices, taps, leaps), numbers, arrays, n_iter)
    _scale_sigmas(matrices, numbers, room)


@_compiled(parallel=True)
def _together(starts, members, matrices, taps, leaps, numbers, like, room, small, order, n_iter):
    """Run lines 5–9 of Algorithm 1 for many matrices with waves.

    Parameters
    ----------
    starts, members : int64, (T + 1,) and (K,)
        The matrices of each thread.
    matrices : int64, (K + 1, 13)
        See the names above: m, n; addresses of W, G, V, u, σ; waves; place of the taps; 1 where
        taps come before inputs in memory; inputs; places in ``room`` and ``small``.
    taps : int64
        See `_taps`.
    leaps : float64, (K, 3)
        From a frequency that an explorer leaves to the next one.
    numbers : float64, (K, 3)
        As for the other kernels.
    like : array
        An array with the dtype of W and G.
    room, small : arrays
        Room in the dtype of the vectors, and in float64.
    order : int64, (2K, F)
        Room for the order of the waves.
    n_iter : int
        Iterations. The update follows them, where G has an address.
    """
    for t in prange(starts.size - 1):
        arrays = like, room, small, order
        _work(t, starts, members, (matrices, taps, leaps), numbers, arrays, n_iter)
    _scale_sigmas(matrices, numbers, room)


def run(count: int, *arguments: object) -> None:
    """Run the step in ``count`` threads."""
    kernels.call(count, (_alone, _together), *arguments)
