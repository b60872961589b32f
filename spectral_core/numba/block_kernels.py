"""The loops of `NumbaEngine` for k > 1 vectors, compiled when a model first has several.

An iteration is that of the core's `iterate_rows`: Y = VWᵀ, Q = orth(Y), Z = QW, and rotations that
sort the rows of Z. Written like that it reads W twice, and needs many short loops. Two identities
avoid both:

- Orthonormalizing commutes with the second product. With Y = LQ and a lower triangular L,
  Z = L⁻¹(YW). So the rows of W that Y was just computed from are used for YW while they are in the
  cache. L⁻¹ is applied afterwards, to k short rows.
- L follows from the inner products of the rows of Y, and the rotations from those of YW. These are
  k × k matrices. Only the product T of all transformations is applied to vectors: u is the first
  row of TY, and the sorted rows are those of T(YW).

Inner products square the range of numbers and the condition of a matrix, so they are in float64.
Where rounding errors could still grow, `_orthonormalize` asks for a second reading of W.

Rows of scratch come in pairs: for an odd k there is one more, of zeros.
"""

from functools import partial

import numpy as np
from numba import carray, prange

from . import kernels

# What is kept on disk is compiled anew only where this file has changed: who changes one of these
# touches this file too.
from .kernels import FRESH, FRESH_64, _compiled, _fraction, _inverse, _pointer, _wide

# The rounding errors of Z = L⁻¹(YW) are at most those of QW times this number. Otherwise W is read
# again.
_AMPLIFIED = 16.0

# Numba puts the code of such a function into its caller. Each level of calls is optimized anew,
# with all that is below it: with fewer levels, the kernels compile faster.
_inlined = partial(_compiled, inline="always")


@_compiled
def _four(W, i):
    """Return four rows of W, from row i on."""
    return W[i], W[i + 1], W[i + 2], W[i + 3]


@_compiled
def _times_2(four, S, Y, i, c):
    """Multiply rows i to i + 3 of W, which are ``four``, with two rows of S, from row c on."""
    W0, W1, W2, W3 = four
    p, q = S[c], S[c + 1]
    p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = S.dtype.type(0)
    for j in range(p.size):
        a, b, c_, d = _wide(W0[j]), _wide(W1[j]), _wide(W2[j]), _wide(W3[j])
        p0 += a * p[j]
        p1 += b * p[j]
        p2 += c_ * p[j]
        p3 += d * p[j]
        q0 += a * q[j]
        q1 += b * q[j]
        q2 += c_ * q[j]
        q3 += d * q[j]
    Y[c, i], Y[c, i + 1], Y[c, i + 2], Y[c, i + 3] = p0, p1, p2, p3
    Y[c + 1, i], Y[c + 1, i + 1], Y[c + 1, i + 2], Y[c + 1, i + 3] = q0, q1, q2, q3


@_compiled
def _times_4(W, S, Y, i, c):
    """Multiply four rows of W, from row i on, with four rows of S, from row c on.

    Why 4 × 4: sixteen sums, and what they are computed from, fit into the registers. Each element
    that is loaded is used four times.
    """
    W0, W1, W2, W3 = W[i], W[i + 1], W[i + 2], W[i + 3]
    p, q, r, s = S[c], S[c + 1], S[c + 2], S[c + 3]
    p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = S.dtype.type(0)
    r0 = r1 = r2 = r3 = s0 = s1 = s2 = s3 = S.dtype.type(0)
    for j in range(p.size):
        a, b, c_, d = _wide(W0[j]), _wide(W1[j]), _wide(W2[j]), _wide(W3[j])
        p0 += a * p[j]
        p1 += b * p[j]
        p2 += c_ * p[j]
        p3 += d * p[j]
        q0 += a * q[j]
        q1 += b * q[j]
        q2 += c_ * q[j]
        q3 += d * q[j]
        r0 += a * r[j]
        r1 += b * r[j]
        r2 += c_ * r[j]
        r3 += d * r[j]
        s0 += a * s[j]
        s1 += b * s[j]
        s2 += c_ * s[j]
        s3 += d * s[j]
    Y[c, i], Y[c, i + 1], Y[c, i + 2], Y[c, i + 3] = p0, p1, p2, p3
    Y[c + 1, i], Y[c + 1, i + 1], Y[c + 1, i + 2], Y[c + 1, i + 3] = q0, q1, q2, q3
    Y[c + 2, i], Y[c + 2, i + 1], Y[c + 2, i + 2], Y[c + 2, i + 3] = r0, r1, r2, r3
    Y[c + 3, i], Y[c + 3, i + 1], Y[c + 3, i + 2], Y[c + 3, i + 3] = s0, s1, s2, s3


@_compiled
def _add_to_2(four, Y, Z, i, c):
    """Add four rows, weighted by columns i to i + 3 of Y, to two rows of Z."""
    W0, W1, W2, W3 = four
    p, q = Z[c], Z[c + 1]
    p0, p1, p2, p3 = Y[c, i], Y[c, i + 1], Y[c, i + 2], Y[c, i + 3]
    q0, q1, q2, q3 = Y[c + 1, i], Y[c + 1, i + 1], Y[c + 1, i + 2], Y[c + 1, i + 3]
    for j in range(p.size):
        a, b, c_, d = _wide(W0[j]), _wide(W1[j]), _wide(W2[j]), _wide(W3[j])
        p[j] += p0 * a + p1 * b + p2 * c_ + p3 * d
        q[j] += q0 * a + q1 * b + q2 * c_ + q3 * d


@_compiled
def _add_to_4(W, Y, Z, i, c):
    """Add four rows of W, weighted by columns i to i + 3 of Y, to four rows of Z."""
    W0, W1, W2, W3 = W[i], W[i + 1], W[i + 2], W[i + 3]
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
def _times_row(W, S, Y, i):
    """Multiply one row of W with all rows of S."""
    row = W[i]
    for c in range(S.shape[0]):
        p, total = S[c], S.dtype.type(0)
        for j in range(p.size):
            total += _wide(row[j]) * p[j]
        Y[c, i] = total


@_compiled
def _add_row(W, Y, Z, i):
    """Add one row of W, weighted by a column of Y, to all rows of Z."""
    row = W[i]
    for c in range(Z.shape[0]):
        p, y = Z[c], Y[c, i]
        for j in range(p.size):
            p[j] += y * _wide(row[j])


@_inlined
def _read(W, S, Y, Z, lo, hi, again):
    """Compute ``Y[:, lo:hi] = S Wᵀ`` and ``Z = Y W`` of these rows of W, reading them once.

    With ``again``, Y is known, and only Z is computed.
    """
    k = S.shape[0]
    _fill(Z, 0, 0)
    i = lo
    while i + 4 <= hi:
        for c in range(0, k - 3, 4):
            if not again:
                _times_4(W, S, Y, i, c)
            _add_to_4(W, Y, Z, i, c)
        if k % 4 > 0:
            if not again:
                _times_2(_four(W, i), S, Y, i, k - 2)
            _add_to_2(_four(W, i), Y, Z, i, k - 2)
        i += 4
    while i < hi:
        if not again:
            _times_row(W, S, Y, i)
        _add_row(W, Y, Z, i)
        i += 1


@_compiled
def _dot(x, y):
    """Return the inner product, summed in float64."""
    total = 0.0
    for j in range(x.size):
        total += np.float64(x[j]) * np.float64(y[j])
    return total


@_compiled
def _subtract(x, weight, y):
    """Subtract ``weight * y`` from x."""
    weight = x.dtype.type(weight)
    for j in range(x.size):
        x[j] -= weight * y[j]


@_compiled
def _copy(X, rows, Y):
    """Copy the first rows of X to those of Y."""
    for a in range(rows):
        x, y = X[a], Y[a]
        for j in range(x.size):
            y[j] = x[j]


@_compiled
def _fill(X, first, value):
    """Store the value in the rows of X, from the first one on."""
    for a in range(first, X.shape[0]):
        x = X[a]
        for j in range(x.size):
            x[j] = value


@_compiled
def _scale(x, factor):
    """Multiply x by a factor."""
    for j in range(x.size):
        x[j] *= factor


@_compiled
def _dot_2(x, y, z):
    """Return the inner products of x with y and with z: x is loaded and converted once."""
    first = second = 0.0
    for j in range(x.size):
        first += np.float64(x[j]) * np.float64(y[j])
        second += np.float64(x[j]) * np.float64(z[j])
    return first, second


@_compiled
def _products(X, G):
    """Store the inner products of the rows of X in the lower triangle of G."""
    for a in range(G.shape[0]):
        for b in range(0, a, 2):
            G[a, b], G[a, b + 1] = _dot_2(X[a], X[b], X[b + 1])
        if a % 2 == 0:
            G[a, a] = _dot(X[a], X[a])


@_compiled(fastmath=False)
def _factorize(G, L, T, eps):
    """Factorize G = LLᵀ and store L⁻¹ in T; return False where that is not accurate.

    A row of T is zero where the row adds no direction. G is not zero.
    """
    k, total, accurate = G.shape[0], 0.0, True
    for a in range(k):
        total += G[a, a]
    for a in range(k):
        left = G[a, a]
        for b in range(k):
            T[a, b] = 0.0
        for b in range(a):
            entry = G[a, b]
            for c in range(b):
                entry -= L[a, c] * L[b, c]
            L[a, b] = entry * T[b, b]
            left -= L[a, b] * L[a, b]
        # Relative to all rows together, as the core's `left_rows`.
        adds = left > 0.0 if a == 0 else left > eps * eps * total
        # In float64 the difference says nothing about rows that are nearly dependent. For float32
        # it says enough: eps² is well above the rounding errors of float64.
        if left * (_AMPLIFIED * _AMPLIFIED) < G[a, a] and (adds or eps < 1e-12):
            accurate = False
        if not adds:
            continue
        T[a, a] = 1.0 / np.sqrt(left)
        amplified = np.sqrt(G[a, a]) * T[a, a]
        for b in range(a):
            entry = 0.0
            for c in range(b, a):
                entry -= L[a, c] * T[c, b]
            T[a, b] = entry * T[a, a]
            amplified += abs(T[a, b]) * np.sqrt(G[b, b])
        accurate &= amplified <= _AMPLIFIED
    return accurate


@_compiled
def _gram_schmidt(Y, k, eps):
    """Orthonormalize the rows of Y as the core's `left_rows`: twice, for accuracy.

    Rows that add no direction become zero.
    """
    total = 0.0
    for a in range(k):
        total += _dot(Y[a], Y[a])
    scale = _inverse(np.sqrt(total))
    for a in range(k):
        _scale(Y[a], scale)
        for _ in range(2):
            for b in range(a):
                _subtract(Y[a], _dot(Y[a], Y[b]), Y[b])
        length = np.sqrt(_dot(Y[a], Y[a]))
        _scale(Y[a], _inverse(length) if a == 0 or length > eps else 0.0)


@_inlined
def _thirds(room):
    """Return the three k × k matrices in 3k rows."""
    k = room.shape[1]
    return room[:k], room[k : 2 * k], room[2 * k :]


@_compiled(fastmath=False)
def _orthonormalize(Y, room, eps):
    """Find T with TY orthonormal; return False if W must be read again with the new Y.

    The second reading is rare. It is for rows of Y that are nearly dependent, as where the rank of
    W is below k.
    """
    G, L, T = _thirds(room)
    k = G.shape[0]
    _products(Y, G)
    total = 0.0
    for a in range(k):
        total += G[a, a]
    if not 0.0 < total < np.inf:
        _fill(T, 0, 0.0 if total == 0.0 else np.nan)
        return True
    if _factorize(G, L, T, eps):
        return True
    _gram_schmidt(Y, k, eps)
    _fill(T, 0, 0.0)
    for a in range(k):
        T[a, a] = 1.0
    return False


@_compiled(fastmath=False)
def _rotation(p, q, b):
    """Return (c, s), which make two rows orthogonal, the longer one first.

    p and q are their squared lengths, b their inner product. See `_rotation` of the core.
    """
    size = p + q + 1e-300
    d, b = (p - q) / size, 2.0 * b / size
    w = np.sqrt(d * d + b * b) + abs(d) + 1e-150
    inverse = 1.0 / np.sqrt(w * w + b * b)
    return (w * inverse, b * inverse) if d >= 0.0 else (b * inverse, w * inverse)


@_compiled(fastmath=False)
def _rotate(X, i, j, c, s):
    """Rotate two rows of X."""
    for a in range(X.shape[1]):
        x, y = X[i, a], X[j, a]
        X[i, a], X[j, a] = c * x + s * y, c * y - s * x


@_compiled(fastmath=False)
def _sort(H, T):
    """Rotate the rows of T, and H with them, as one Jacobi sweep; the longest row is first."""
    k = H.shape[0]
    for i in range(k):
        for j in range(i + 1, k):
            c, s = _rotation(H[i, i], H[j, j], H[i, j])
            _rotate(H, i, j, c, s)
            _rotate(H.T, i, j, c, s)
            _rotate(T, i, j, c, s)


@_compiled(fastmath=False)
def _sandwich(T, G, H):
    """Compute H = TGTᵀ from a lower triangular T and the lower triangle of G, overwriting G."""
    k = G.shape[0]
    for a in range(k):
        for b in range(a + 1, k):
            G[a, b] = G[b, a]
    for a in range(k):
        for b in range(k):
            H[a, b] = 0.0
            for c in range(a + 1):
                H[a, b] += T[a, c] * G[c, b]
    for a in range(k):
        for b in range(a + 1):
            total = 0.0
            for c in range(b + 1):
                total += H[a, c] * T[b, c]
            G[a, b] = total
    for a in range(k):
        for b in range(a + 1):
            H[a, b] = H[b, a] = G[a, b]


@_compiled
def _combine(X, weights, scale, out):
    """Store the sum of the rows of X in ``out``, each times its weight times ``scale``.

    Weights of a large or a small σ are out of float32's range. So they are relative to the largest
    one, which the sum is multiplied by in float64.
    """
    k, largest = weights.size, 0.0
    for a in range(k):
        largest = max(largest, abs(weights[a]))
    unit, scale = _inverse(largest), scale * largest
    kind = X.dtype.type
    p, q, a, b = X[0], X[1], kind(weights[0] * unit), kind(weights[1] * unit)
    if k < 4:
        r, s, c, d = p, q, kind(0), kind(0)
    else:
        r, s, c, d = X[2], X[3], kind(weights[2] * unit), kind(weights[3] * unit)
    for j in range(out.size):
        out[j] = scale * np.float64(a * p[j] + b * q[j] + c * r[j] + d * s[j])
    for i in range(2 if k < 4 else 4, k):
        p, a = X[i], weights[i] * scale * unit
        for j in range(out.size):
            out[j] += a * p[j]


@_compiled
def _near_dot(x, y):
    """Return the inner product of rows that are not much longer than unit vectors."""
    total = x.dtype.type(0)
    for j in range(x.size):
        total += x[j] * y[j]
    return total


@_compiled
def _less(x, weight, y):
    """Subtract ``weight * y`` from x, and return the square of what is left, as `_near_dot`."""
    left = x.dtype.type(0)
    for j in range(x.size):
        x[j] -= weight * y[j]
        left += x[j] * x[j]
    return left


@_compiled
def _mixed(x, weight, y, z):
    """Add ``weight * (y + z/2)`` to x, and return the square of the sum, as `_near_dot`."""
    square, half = x.dtype.type(0), x.dtype.type(0.5)
    for j in range(x.size):
        x[j] += weight * (y[j] + half * z[j])
        square += x[j] * x[j]
    return square


@_compiled
def _make_new(x, square, S, dots):
    """Make x a unit vector orthogonal to the first rows of S: zero if it lies in their span.

    ``square`` is that of x, and ``dots`` has room for one number of each of these rows. See
    `_orthogonal_unit` of the core. After a single row that took little away, nothing is left for a
    second turn.
    """
    for _ in range(2):
        before = square
        for a in range(dots.size):
            dots[a] = _near_dot(x, S[a])
        for a in range(dots.size):
            square = _less(x, x.dtype.type(dots[a]), S[a])
        if dots.size == 1 and square > before / 4:
            break
    length = np.sqrt(np.float64(square))
    _scale(x, x.dtype.type(_inverse(length) if square > before / 4 else 0.0))


@_inlined
def _renew(Z, T, V, S, inverse, eps, dots):
    """Store the next V in S and V: see `_next` of the core. ``inverse`` is 1/σ."""
    k, eps = V.shape[0], V.dtype.type(eps)
    for a in range(max(2, k - 1)):
        _combine(Z, T[a], inverse, S[a])
        if a > 0:
            _make_new(S[a], _mixed(S[a], eps, V[a], V[0]), S, dots[:1])
    if k > 2:
        _copy(V, 1, S[k - 1 :])
        _make_new(S[k - 1], _near_dot(V[0], V[0]), S, dots[: k - 1])
    _copy(S, k, V)


@_inlined
def _finish(Z, Y, room, V, S, u, eps):
    """Sum the parts of Z = YW, sort its rows, store u and the next V, and return σ.

    V does not change where σ is zero or not finite.
    """
    (G, H, T), rows = _thirds(room), S.shape[0]
    for a in range(rows, Z.shape[0]):
        z, part = Z[a % rows], Z[a]
        for j in range(z.size):
            z[j] += part[j]
    _products(Z, G)
    _sandwich(T, G, H)
    _sort(H, T)
    _combine(Y, T[0], 1.0, u)
    sigma = np.sqrt(max(H[0, 0], 0.0)) if H[0, 0] == H[0, 0] else np.nan
    inverse = _inverse(sigma)
    if inverse > 0.0:
        _renew(Z, T, V, S, inverse, eps, G[0])
    else:
        _copy(V, V.shape[0], S)
    return sigma


@_compiled
def _matrix(x, place, rows, columns):
    """Return a part of x as a matrix, by its address: slices of x would count references to x."""
    return carray(_pointer(x.ctypes.data + place * x.itemsize), (rows, columns), x.dtype)


@_compiled
def _rows_of(k, table, arrays):
    """Return V, S and Y of one matrix: its state, and its rows in ``starts`` and ``lefts``."""
    matrices, _, _, places = table
    _, _, starts, lefts, small = arrays
    m, n, rows = matrices[k, 0], matrices[k, 1], small.shape[2]
    pairs = rows + rows % 2
    V = carray(_pointer(matrices[k, 4]), (rows, n), starts.dtype)
    return V, _matrix(starts, matrices[k, 8], pairs, n), _matrix(lefts, places[k], pairs, m)


@_inlined
def _start_from(V, S, window):
    """Store V plus the core's `fresh_direction` in S.

    V is in the order of memory, in which ``window`` kernel positions come first.
    """
    fresh = S[0]
    largest = FRESH if fresh.itemsize == 4 else FRESH_64
    scale = fresh.dtype.type(largest / 2**31)
    channels = fresh.size // window
    for i in range(window):
        for c in range(channels):
            j = c * window + i
            fresh[i * channels + c] = fresh.dtype.type(_fraction(j)) * scale
    for a in range(1, V.shape[0]):
        start, v = S[a], V[a]
        for j in range(v.size):
            start[j] = v[j] + fresh[j]
    v = V[0]
    for j in range(v.size):
        fresh[j] += v[j]
    _fill(S, V.shape[0], 0)


@_compiled
def _start(k, table, arrays):
    """Store V plus the core's `fresh_direction`, from which the step starts."""
    V, S, _ = _rows_of(k, table, arrays)
    _start_from(V, S, table[0][k, 9])


@_compiled
def _read_chunk(p, second, table, arrays):
    """Compute both products of one chunk; or the second one, where W is read again."""
    matrices, chunks, like, scratch = table[0], table[1], arrays[0], arrays[1]
    k, lo, hi, place = chunks[p, 0], chunks[p, 1], chunks[p, 2], chunks[p, 3]
    _, S, Y = _rows_of(k, table, arrays)
    W = carray(_pointer(matrices[k, 2]), (Y.shape[1], S.shape[1]), like.dtype)
    _read(W, S, Y, _matrix(scratch, place, S.shape[0], S.shape[1]), lo, hi, second)


@_compiled
def _finish_one(k, second, table, arrays):
    """Finish a matrix, all of whose chunks are read; return False if it must be read again."""
    matrices, chunks, scratch, small = table[0], table[1], arrays[1], arrays[4]
    V, S, Y = _rows_of(k, table, arrays)
    room = _matrix(small, small[0].size * k, small.shape[1] * small.shape[2], small.shape[3])
    eps = np.finfo(scratch.dtype).eps
    if not (second or _orthonormalize(Y, room, eps)):
        return False
    first, end = matrices[k, 7], matrices[k + 1, 7]
    Z = _matrix(scratch, chunks[first, 3], (end - first) * S.shape[0], S.shape[1])
    u = carray(_pointer(matrices[k, 5]), (Y.shape[1],), scratch.dtype)
    sigma = carray(_pointer(matrices[k, 6]), (1,), scratch.dtype)
    sigma[0] = _finish(Z, Y, room, V, S, u, eps)
    return True


@_inlined
def _iterate(p, table, arrays, n_iter):
    """Run all iterations of a matrix that is one chunk: its vectors stay in the nearest cache."""
    k = table[1][p, 0]
    _start(k, table, arrays)
    for _ in range(n_iter):
        for turn in range(2):
            _read_chunk(p, turn > 0, table, arrays)
            if _finish_one(k, turn > 0, table, arrays):
                break


# The stages of a step. The first is that of matrices that belong to one thread alone. After it come
# those of an iteration of the others.
_WHOLES, _STARTS, _READS, _FINISHES, _READS_AGAIN, _FINISHES_AGAIN = range(6)


@_compiled
def _whole(k, matrices):
    """Return True for a matrix that is one chunk."""
    return matrices[k + 1, 7] - matrices[k, 7] == 1


@_inlined
def _work_on_chunks(t, stage, again, table, arrays, n_iter):
    """Do the work of thread t in a stage of chunks."""
    matrices, chunks, parts = table[0], table[1], table[2]
    for p in range(parts[t], parts[t + 1]):
        k = chunks[p, 0]
        if _whole(k, matrices):
            if stage == _WHOLES:
                _iterate(p, table, arrays, n_iter)
        elif stage == _READS or (stage == _READS_AGAIN and again[k]):
            _read_chunk(p, stage == _READS_AGAIN, table, arrays)


@_inlined
def _work_on_matrices(t, stage, again, table, arrays):
    """Do the work of thread t in a stage of matrices that several threads share."""
    for k in range(t, again.size, table[2].size - 1):
        if not _whole(k, table[0]):
            if stage == _STARTS:
                _start(k, table, arrays)
            elif stage == _FINISHES or again[k]:
                again[k] = not _finish_one(k, stage == _FINISHES_AGAIN, table, arrays)


@_compiled
def _work(t, stage, again, table, arrays, n_iter):
    """Do the work of thread t in this stage."""
    if stage in (_WHOLES, _READS, _READS_AGAIN):
        _work_on_chunks(t, stage, again, table, arrays, n_iter)
    else:
        _work_on_matrices(t, stage, again, table, arrays)


@_compiled
def _stage(turn, again, shared):
    """Return the stage of this turn, or -1 where it has nothing to do."""
    if turn == 0:
        return _WHOLES
    stage = (turn - 1) % _FINISHES_AGAIN + 1
    started = stage == _STARTS and turn > 1
    accurate = stage >= _READS_AGAIN and not again.any()
    return stage if shared and not started and not accurate else -1


@_compiled
def _alone(matrices, chunks, parts, like, scratch, starts, places, lefts, small, n_iter):
    """Run `_together` in this thread alone, without starting others."""
    table, arrays = (matrices, chunks, parts, places), (like, scratch, starts, lefts, small)
    for p in range(chunks.shape[0]):
        _iterate(p, table, arrays, n_iter)


@_compiled(parallel=True)
def _together(matrices, chunks, parts, like, scratch, starts, places, lefts, small, n_iter):
    """Run lines 7 and 8 of Algorithm 1 for many matrices, with k vectors each.

    The parameters are those of `_together` in kernels.py, and:

    Parameters
    ----------
    scratch : array
        Room for the rows of YW of each chunk.
    starts : array
        Room for the rows from which an iteration of each matrix starts.
    places : int64, (K,)
        Place of each matrix in ``lefts``.
    lefts : array
        Room for the rows of Y of each matrix.
    small : float64, (K, 3, k, k)
        Room for the k × k matrices of each matrix.

    Why one loop over stages: each parallel loop takes as long to compile as all other code.
    """
    count = matrices.shape[0] - 1
    again = np.zeros(count, np.bool_)
    table, arrays = (matrices, chunks, parts, places), (like, scratch, starts, lefts, small)
    for turn in range(_FINISHES_AGAIN * n_iter + 1):
        stage = _stage(turn, again, chunks.shape[0] > count)
        if stage >= 0:
            for t in prange(parts.size - 1):
                _work(t, stage, again, table, arrays, n_iter)


def run(
    count: int,
    division: tuple[np.ndarray, ...],
    numbers: np.ndarray,
    room: tuple[np.ndarray, ...],
    block: tuple[np.ndarray, ...],
    n_iter: int,
) -> None:
    """Run the step in ``count`` threads."""
    if n_iter > 0:
        kernels.call(count, (_alone, _together), *division, *room, *block, n_iter)
    # What follows the iterations knows the first row of V alone, as that of one vector.
    kernels.run(count, *division, numbers, *room, 0)
