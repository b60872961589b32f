"""The loops of `NumbaEngine`, compiled at first use and kept on disk."""

import platform
from collections.abc import Callable
from functools import partial
from threading import Lock

import numba
import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import carray, njit, prange, types
from numba.extending import intrinsic, overload

# Sums may be reordered and products contracted. NaN and Inf keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}
# Normalizing fewer elements than this is faster than waking the threads for it.
_WORTH_THREADS = 65536
# As in the core's `fresh_direction`. Not imported: what is kept on disk is compiled anew only where
# this file has changed.
FRESH, FRESH_64 = 2.0**-20, 2.0**-27
_GOLDEN = 0x9E3779B1
# Elements of a row of a transposed convolution that are worked on at once: see `_piece`.
PIECE = 128
AT_MOST, EXACTLY = 3, 4  # as in the core's `Bound`


def _compiled(function=None, **options):
    """Compile with ``njit``, and keep the result on disk where a folder is writeable."""
    if function is None:
        return partial(_compiled, **options)
    options = {"fastmath": _FAST, "nogil": True, **options}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # "no locator available": a read-only installation
        return njit(**options)(function)


@intrinsic
def _pointer(_, address):
    def codegen(__, builder, ___, args):
        from llvmlite import ir

        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), codegen


@intrinsic
def _half_to_float(_, bits):
    def codegen(__, builder, ___, args):
        from llvmlite import ir

        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), codegen


@intrinsic
def _float_to_half(_, number):
    def codegen(__, builder, ___, args):
        from llvmlite import ir

        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(number), codegen


def _converts_half():
    """Return True if the processor converts float16 itself, which is 3 times as fast.

    Otherwise LLVM would call a function that the process may not have.
    """
    if numba.config.CPU_NAME or numba.config.CPU_FEATURES:  # compiled for another processor
        return False
    if platform.machine() in ("arm64", "aarch64"):
        return True
    return bool(get_host_cpu_features().get("f16c"))


CONVERTS_HALF = _converts_half()


@njit(inline="always")
def _of_half(x):
    """Return a float16, whose bits are those of an int16, as a float32.

    Shifted, its exponent is too small by 112. A product mends that for subnormal numbers too. Inf
    and NaN have the largest exponent of either format. Without branches, it is compiled to vectors.
    """
    bits = np.uint32(np.uint16(x))
    shifted = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
    number = np.float32(shifted.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    special = np.uint32(shifted | np.uint32(0x7F800000))
    size = special if shifted >= np.uint32(0x0F800000) else number
    return np.uint32(size | np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)


@njit(inline="always")
def _to_half(value):
    """Return the int16 with the bits of a float16: the nearest, and of two the even one.

    A number below 2⁻¹⁴ is added to one whose last bit is worth 2⁻²⁴, as that of a subnormal
    float16: the sum rounds it. The exponent of a larger one is lowered by 112, and half of the last
    bit that stays is added, less one where that bit is even.
    """
    bits = np.float32(value).view(np.uint32)
    sign = np.uint32(bits & np.uint32(0x80000000))
    size = np.uint32(bits ^ sign)
    low = np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32)
    low = np.uint32(low - np.uint32(0x3F000000))
    odd = np.uint32((size >> np.uint32(13)) & np.uint32(1))
    high = np.uint32(np.uint32(size + np.uint32(0xC8000FFF)) + odd) >> np.uint32(13)
    special = np.uint32(0x7E00) if size > np.uint32(0x7F800000) else np.uint32(0x7C00)
    near = low if size < np.uint32(0x38800000) else np.uint32(high)
    half = special if size >= np.uint32(0x47800000) else near
    return np.int16(np.uint16(np.uint32(half | (sign >> np.uint32(16)))))


def _wide(x):
    """Return an element as a number to calculate with."""


@overload(_wide, inline="always")
def _wide_of(x):
    if x == types.uint16:  # bfloat16: the upper half of a float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    if x == types.int16:
        return (lambda x: _half_to_float(x)) if CONVERTS_HALF else (lambda x: _of_half(x))
    return lambda x: x


def _store(x, i, value):
    """Assign ``x[i] = value``, rounded to the nearest."""


@overload(_store, inline="always")
def _store_in(x, i, value):  # noqa: ARG001
    if x.dtype == types.uint16:

        def store(x, i, value):
            bits = np.float32(value).view(np.uint32)
            odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
            rounded = np.uint32(bits + np.uint32(0x7FFF) + odd)
            quiet = np.uint32(bits | np.uint32(0x400000))  # a NaN must not round to Inf
            x[i] = np.uint16(np.uint32(quiet if value != value else rounded) >> np.uint32(16))

        return store

    if x.dtype == types.int16:

        def store_half(x, i, value):
            x[i] = _float_to_half(np.float32(value))

        def store_bits(x, i, value):
            x[i] = _to_half(np.float32(value))

        return store_half if CONVERTS_HALF else store_bits

    def assign(x, i, value):
        x[i] = value

    return assign


@_compiled
def _read(W, v, u, w, lo, hi):
    """Compute ``u[lo:hi] = W v`` and ``w = Wᵀu`` of these rows, reading them once.

    Why four rows at a time: one loop computes the first product of four rows and the second product
    of the four rows before, which are still in the cache. Memory is never idle.
    """
    zero = v.dtype.type(0)
    for j in range(v.size):
        w[j] = zero
    a = b = c = d = zero
    i = h = lo
    while i + 4 <= hi:
        p = q = r = s = zero
        for j in range(v.size):
            x = v[j]
            p += _wide(W[i, j]) * x
            q += _wide(W[i + 1, j]) * x
            r += _wide(W[i + 2, j]) * x
            s += _wide(W[i + 3, j]) * x
            w[j] += (
                a * _wide(W[h, j])
                + b * _wide(W[h + 1, j])
                + c * _wide(W[h + 2, j])
                + d * _wide(W[h + 3, j])
            )
        a, b, c, d = p, q, r, s
        u[i], u[i + 1], u[i + 2], u[i + 3] = p, q, r, s
        h = i
        i += 4
    if i > lo:
        for j in range(v.size):
            w[j] += (
                a * _wide(W[h, j])
                + b * _wide(W[h + 1, j])
                + c * _wide(W[h + 2, j])
                + d * _wide(W[h + 3, j])
            )
    while i < hi:
        p = zero
        for j in range(v.size):
            p += _wide(W[i, j]) * v[j]
        u[i] = p
        for j in range(v.size):
            w[j] += p * _wide(W[i, j])
        i += 1


@_compiled
def _length(x):
    """Return ‖x‖, summed in float64: in float32 the square overflows before x does."""
    square = 0.0
    for j in range(x.size):
        square += np.float64(x[j]) * np.float64(x[j])
    return np.sqrt(square)


@_compiled
def _inverse(length):
    """Return 1/length: zero for zero, NaN where the length is not finite."""
    if length == 0.0:
        return 0.0
    return 1.0 / length if length < np.inf else np.nan


@_compiled
def _sum_parts(parts, n):
    """Add all parts of n elements to the first one."""
    w = parts[:n]
    for other in range(n, parts.size, n):
        for j in range(n):
            w[j] += parts[other + j]


@_compiled
def _normalize(w, v, start, window):
    """Store w as a unit vector in v, and in ``start`` in the order of memory; return its length σ.

    Neither changes where σ is zero or not finite.
    """
    sigma = _length(w)
    inverse = _inverse(sigma)
    if inverse > 0.0:
        for j in range(w.size):
            start[j] = w[j] * inverse
        if window == 1:
            v[:] = start
        else:
            channels = w.size // window
            for c in range(channels):
                for i in range(window):
                    v[c * window + i] = start[i * channels + c]
    return sigma


@_compiled
def _times_turned(W, v, u, lo, hi):
    """Compute the part ``u = W[lo:hi]ᵀ v[lo:hi]`` of Wᵀv."""
    for j in range(u.size):
        u[j] = 0
    i = lo
    while i + 4 <= hi:
        a, b, c, d = v[i], v[i + 1], v[i + 2], v[i + 3]
        W0, W1, W2, W3 = W[i], W[i + 1], W[i + 2], W[i + 3]
        for j in range(u.size):
            u[j] += a * _wide(W0[j]) + b * _wide(W1[j]) + c * _wide(W2[j]) + d * _wide(W3[j])
        i += 4
    while i < hi:
        for j in range(u.size):
            u[j] += v[i] * _wide(W[i, j])
        i += 1


@_compiled
def _adjoint_times_turned(W, u, w, lo, hi):
    """Compute ``w[lo:hi] = W[lo:hi] u``."""
    zero = u.dtype.type(0)
    i = lo
    while i + 4 <= hi:
        p = q = r = s = zero
        W0, W1, W2, W3 = W[i], W[i + 1], W[i + 2], W[i + 3]
        for j in range(u.size):
            x = u[j]
            p += _wide(W0[j]) * x
            q += _wide(W1[j]) * x
            r += _wide(W2[j]) * x
            s += _wide(W3[j]) * x
        w[i], w[i + 1], w[i + 2], w[i + 3] = p, q, r, s
        i += 4
    while i < hi:
        p = zero
        for j in range(u.size):
            p += _wide(W[i, j]) * u[j]
        w[i] = p
        i += 1


@_compiled
def _tile(t, x):
    """Fill t with repetitions of x: what is filled is copied, twice as much each time."""
    done = x.size
    for j in range(done):
        t[j] = x[j]
    while done < t.size:
        count = min(done, t.size - done)
        for j in range(count):
            t[done + j] = t[j]
        done += count


@_compiled
def _stretch(t, x, scale):
    """Fill t with the elements of x times ``scale``, each repeated as often as fits."""
    window = t.size // x.size
    for o in range(x.size):
        value = x.dtype.type(scale * x[o])
        for k in range(window):
            t[o * window + k] = value


@_compiled
def _piece(window, columns):
    """Return how many elements of a row in memory to work on at once: whole outputs.

    Loops over a few kernel positions would not be compiled to vectors. Loops over a piece are, and
    what it is multiplied with stays in the nearest cache.
    """
    outputs = columns // window
    return max(1, min(PIECE // window, -(-outputs // 4))) * window


@_compiled
def _add_four(total, W0, W1, W2, W3, t0, t1, t2, t3):
    """Add four pieces of rows to a total, each times its own numbers."""
    for j in range(total.size):
        total[j] += (
            _wide(W0[j]) * t0[j]
            + _wide(W1[j]) * t1[j]
            + _wide(W2[j]) * t2[j]
            + _wide(W3[j]) * t3[j]
        )


@_compiled
def _times_between(W, v, room, window, lo, hi):
    """Compute the part of u = Wv that rows lo to hi of the memory have, in the start of ``room``.

    In a transposed convolution, outputs are between inputs and kernel positions. A row of memory is
    that of one input: the part of v of that input is repeated along a piece of it. Four rows at a
    time add up to a few pieces of the sum, which stay in the nearest cache for all rows.
    """
    columns = W.shape[1]
    piece = _piece(window, columns)
    total, t = room[:columns], room[columns:]
    t0, t1 = t[:piece], t[piece : 2 * piece]
    t2, t3 = t[2 * piece : 3 * piece], t[3 * piece : 4 * piece]
    for j in range(columns):
        total[j] = 0
    for start in range(0, columns, 8 * piece):
        end, i = min(start + 8 * piece, columns), lo
        while i + 4 <= hi:
            W0, W1, W2, W3 = W[i], W[i + 1], W[i + 2], W[i + 3]
            _tile(t0, v[i * window : (i + 1) * window])
            _tile(t1, v[(i + 1) * window : (i + 2) * window])
            _tile(t2, v[(i + 2) * window : (i + 3) * window])
            _tile(t3, v[(i + 3) * window : (i + 4) * window])
            for first in range(start, end, piece):
                last = min(first + piece, end)
                four = W0[first:last], W1[first:last], W2[first:last], W3[first:last]
                _add_four(total[first:last], *four, t0, t1, t2, t3)
            i += 4
        while i < hi:
            row = W[i]
            _tile(t0, v[i * window : (i + 1) * window])
            for first in range(start, end, piece):
                for j in range(min(piece, end - first)):
                    total[first + j] += _wide(row[first + j]) * t0[j]
            i += 1
    for o in range(columns // window):
        value = total[o * window]
        for k in range(1, window):
            value += total[o * window + k]
        total[o] = value


@_compiled
def _adjoint_times_between(W, u, w, room, window, lo, hi):
    """Compute the elements of w = Wᵀu that belong to rows lo to hi of the memory.

    Four pieces of a row at a time are added up: then the sum over outputs is short.
    """
    columns = W.shape[1]
    piece = _piece(window, columns)
    s, total = room[:columns], room[columns : columns + piece]
    _stretch(s, u, 1.0)
    for i in range(lo, hi):
        row, first = W[i], 0
        for j in range(piece):
            total[j] = 0
        while first + 4 * piece <= columns:
            for j in range(piece):
                k, p = first + j, first + piece + j
                q, r = p + piece, p + 2 * piece
                total[j] += (
                    _wide(row[k]) * s[k]
                    + _wide(row[p]) * s[p]
                    + _wide(row[q]) * s[q]
                    + _wide(row[r]) * s[r]
                )
            first += 4 * piece
        while first < columns:
            for j in range(min(piece, columns - first)):
                total[j] += _wide(row[first + j]) * s[first + j]
            first += piece
        # The sum over the outputs of a piece, by halves.
        rest = piece // window
        while rest > 1:
            half = rest // 2
            rest -= half
            for j in range(half * window):
                total[j] += total[rest * window + j]
        w[i * window : (i + 1) * window] = total[:window]


@_compiled
def _add_between(G, u, v, weight, room, window, lo, hi):
    """Add ``weight * u vᵀ`` to rows lo to hi of the memory of a transposed convolution."""
    t, scaled = room[: G.shape[1]], room[G.shape[1] :]
    _stretch(scaled, u, weight)
    for i in range(lo, hi):
        row = G[i]
        _tile(t, v[i * window : (i + 1) * window])
        for j in range(t.size):
            _store(row, j, _wide(row[j]) + scaled[j] * t[j])


@_compiled
def _add(G, u, v, weight, lo, hi):
    """Add ``weight * u vᵀ`` to these rows of G."""
    for i in range(lo, hi):
        row, scaled = G[i], v.dtype.type(weight * u[i])
        if scaled == 0:
            continue
        for j in range(v.size):
            _store(row, j, _wide(row[j]) + scaled * v[j])


@_compiled
def _fraction(j):
    """Return an element of the core's `fresh_direction`, without its scale."""
    place = np.uint32(j + 1)
    return np.int32(np.uint32(np.uint32(place * place) * np.uint32(_GOLDEN)))


@_compiled
def _start(k, matrices, starts, fresh):
    """Store v in the order of memory, plus the core's `fresh_direction` if ``fresh`` is 1.0.

    A convolution may have the columns of its matrix in another order in memory: kernel positions
    first, as in channels-last and in Flax. To permute v costs nothing; to permute W would be a copy
    of it.
    """
    n, window = matrices[k, 1], matrices[k, 9]
    v = carray(_pointer(matrices[k, 4]), (n,), starts.dtype)
    start = starts[matrices[k, 8] : matrices[k, 8] + n]
    largest = FRESH if starts.itemsize == 4 else FRESH_64
    scale = starts.dtype.type(fresh * largest / 2**31)
    if window == 1:
        for j in range(n):
            start[j] = v[j] + starts.dtype.type(_fraction(j)) * scale
        return
    channels = n // window
    for i in range(window):
        for c in range(channels):
            j = c * window + i
            start[i * channels + c] = v[j] + starts.dtype.type(_fraction(j)) * scale


@_compiled
def _read_part(t, second, parts, chunks, matrices, like, scratch, starts):
    """Compute both products of the chunks of thread t.

    A turned matrix is Wᵀ in memory. Each row of it is a summand of u = Wv, and an element of Wᵀu.
    So its second product waits for the whole of the first, and is computed in the second turn.
    """
    for p in range(parts[t], parts[t + 1]):
        k, lo, hi, place = chunks[p, 0], chunks[p, 1], chunks[p, 2], chunks[p, 3]
        m, n = matrices[k, 0], matrices[k, 1]
        start = starts[matrices[k, 8] : matrices[k, 8] + n]
        u = carray(_pointer(matrices[k, 5]), (m,), scratch.dtype)
        window = matrices[k, 10] - 1
        if window > 0:
            W = carray(_pointer(matrices[k, 2]), (n // window, m * window), like.dtype)
            room = scratch[place : place + (2 * m + 3) * window]
            if second:
                _adjoint_times_between(W, u, start, room, window, lo, hi)
            else:
                _times_between(W, start, room, window, lo, hi)
        elif window == 0:
            W = carray(_pointer(matrices[k, 2]), (n, matrices[k, 11]), like.dtype)
            if second:
                _adjoint_times_turned(W, u, start, lo, hi)
            else:
                _times_turned(W, start, scratch[place : place + m], lo, hi)
        elif not second:
            W = carray(_pointer(matrices[k, 2]), (m, n), like.dtype)
            _read(W, start, u, scratch[place : place + n], lo, hi)


@_compiled
def _force(sigma, target, power):
    """Return the slope of the penalty at sigma; power 0 stands for the paper's, sigma itself."""
    if power == 0.0:
        return sigma
    if sigma <= target:
        return sigma * 0  # not 0.0: the result keeps its type
    if power == 1.0:
        return sigma * 0 + 1
    return sigma - target


@_compiled
def _scale(sigma, target, code):
    """Return the number that scales a weight to its bound: as `scale_to` of the core."""
    least = target * 0 if code == EXACTLY else target
    return target / sigma if least < sigma < np.inf else target * 0 + 1


@_compiled
def _multiply_columns(G, columns, factor, lo, hi):
    """Multiply the first columns of these rows of G."""
    for i in range(lo, hi):
        row = G[i]
        for j in range(columns):
            _store(row, j, _wide(row[j]) * factor)


@_compiled
def _multiply(G, factor, lo, hi):
    """Multiply these rows of G."""
    _multiply_columns(G, G.shape[1], factor, lo, hi)


@_compiled
def _change_part(t, parts, chunks, matrices, numbers, like, scratch, starts):
    """Add the terms to the gradients, or scale the weights, in the chunks of thread t."""
    for p in range(parts[t], parts[t + 1]):
        k, lo, hi = chunks[p, 0], chunks[p, 1], chunks[p, 2]
        if matrices[k, 3] == 0:
            continue
        m, n = matrices[k, 0], matrices[k, 1]
        left = carray(_pointer(matrices[k, 5]), (m,), scratch.dtype)
        right = starts[matrices[k, 8] : matrices[k, 8] + n]
        window = matrices[k, 10] - 1
        if window > 0:
            rows, columns = n // window, m * window
        elif window == 0:
            rows, columns, left, right = n, m, right, left
        else:
            rows, columns = m, n
        length = matrices[k, 11] if window == 0 else columns
        G = carray(_pointer(matrices[k, 3]), (rows, length), like.dtype)
        sigma = carray(_pointer(matrices[k, 6]), (1,), scratch.dtype)[0]
        if numbers[k, 2] >= AT_MOST:
            factor = _scale(sigma, scratch.dtype.type(numbers[k, 1]), numbers[k, 2])
            if factor != 1:  # a bound that does not act leaves the weight in peace
                _multiply_columns(G, columns, factor, lo, hi)
        else:
            force = _force(sigma, scratch.dtype.type(numbers[k, 1]), numbers[k, 2])
            weight = numbers[k, 0] * force
            if window > 0:
                place = chunks[p, 3]
                room = scratch[place : place + 2 * columns]
                _add_between(G, left, right, weight, room, window, lo, hi)
            else:
                _add(G, left, right, weight, lo, hi)


@_compiled
def _scale_sigmas(matrices, numbers, scratch):
    """Give each bounded weight the sigma that it has been scaled to, once no thread reads it."""
    for k in range(numbers.shape[0]):
        if numbers[k, 2] >= AT_MOST:
            sigma = carray(_pointer(matrices[k, 6]), (1,), scratch.dtype)
            sigma[0] *= _scale(sigma[0], scratch.dtype.type(numbers[k, 1]), numbers[k, 2])


@_compiled
def _finish(k, second, matrices, chunks, scratch, starts):
    """Normalize the vectors of one matrix, all of whose chunks are read in this turn."""
    turned = matrices[k, 10] > 0
    if second and not turned:
        return
    m, n, first, end = matrices[k, 0], matrices[k, 1], matrices[k, 7], matrices[k + 1, 7]
    u = carray(_pointer(matrices[k, 5]), (m,), scratch.dtype)
    v = carray(_pointer(matrices[k, 4]), (n,), scratch.dtype)
    sigma = carray(_pointer(matrices[k, 6]), (1,), scratch.dtype)
    start = starts[matrices[k, 8] : matrices[k, 8] + n]
    window = matrices[k, 10] - 1
    width = (2 * m + 3) * window if window > 0 else m if turned else n
    parts = scratch[chunks[first, 3] : chunks[first, 3] + (end - first) * width]
    if second:
        sigma[0] = _normalize(start, v, start, matrices[k, 9])
        if not _inverse(sigma[0]) > 0.0:
            _start(k, matrices, starts, 0.0)
        return
    _sum_parts(parts, width)
    if turned:
        u[:] = parts[:m]
    inverse = _inverse(_length(u))
    for i in range(m):
        u[i] *= inverse
    if not turned:
        for j in range(n):
            parts[j] *= inverse
        sigma[0] = _normalize(parts[:n], v, start, matrices[k, 9])


@_compiled
def _turns(matrices):
    """Return 2 if a matrix is turned, and otherwise 1."""
    for k in range(matrices.shape[0] - 1):
        if matrices[k, 10] > 0:
            return 2
    return 1


@_compiled
def _alone(matrices, chunks, parts, numbers, like, scratch, starts, n_iter):
    """Run `_together` in this thread alone, without starting others."""
    for k in range(numbers.shape[0]):
        _start(k, matrices, starts, 1.0 if n_iter > 0 else 0.0)
    turns = _turns(matrices)
    for turn in range(n_iter * turns):
        second = turn % turns == 1
        _read_part(0, second, parts, chunks, matrices, like, scratch, starts)
        for k in range(numbers.shape[0]):
            _finish(k, second, matrices, chunks, scratch, starts)
    _change_part(0, parts, chunks, matrices, numbers, like, scratch, starts)
    _scale_sigmas(matrices, numbers, scratch)


@_compiled(parallel=True)
def _together(matrices, chunks, parts, numbers, like, scratch, starts, n_iter):
    """Run lines 5–9 of Algorithm 1 for many matrices.

    Parameters
    ----------
    matrices : int64, (K + 1, 12)
        m, n; addresses of W, G, v, u, σ; the first of the matrix's chunks; its place in starts; the
        kernel positions where they come before the inputs in memory, and otherwise 1; 1 where Wᵀ is
        in memory; 1 plus the kernel positions where outputs are between inputs and kernel; and
        otherwise 0; where Wᵀ is in memory, elements from one of its rows to the next, which are
        more than m if groups come last. The last row ends the chunks of the row before.
    chunks : int64, (P, 4)
        Rows in memory of one matrix for one thread: matrix, first row, end, place in scratch.
    parts : int64, (T + 1,)
        The first chunk of each thread.
    numbers : float64, (K, 3)
        λ, target and code of each matrix: 0 is the paper's penalty, 1 and 2 the power of another,
        3 and 4 a bound.
    like : array
        An array with the dtype of W and G.
    scratch : array
        Room for a product of each chunk, in the dtype of the vectors.
    starts : array
        Room for the v of each matrix in the order of memory.
    n_iter : int
        Power iterations. The update follows them, where G has an address.
    """
    count, threads = numbers.shape[0], parts.size - 1
    for k in range(count):
        _start(k, matrices, starts, 1.0 if n_iter > 0 else 0.0)
    turns = _turns(matrices)
    for turn in range(n_iter * turns):
        second = turn % turns == 1
        for t in prange(threads):
            _read_part(t, second, parts, chunks, matrices, like, scratch, starts)
        if scratch.size < _WORTH_THREADS:
            for k in range(count):
                _finish(k, second, matrices, chunks, scratch, starts)
        else:
            for k in prange(count):
                _finish(k, second, matrices, chunks, scratch, starts)
    for t in prange(threads):
        _change_part(t, parts, chunks, matrices, numbers, like, scratch, starts)
    _scale_sigmas(matrices, numbers, scratch)


# Numba's simplest threading layer ends the process when two threads enter it at once.
_POOL = Lock()


def threads(most: int | None) -> int:
    """Return the number of threads to use, at most ``most`` if it is not None."""
    if most is None:
        return numba.get_num_threads()
    return max(1, min(most, numba.config.NUMBA_NUM_THREADS))


def run(count: int, *arguments: object) -> None:
    """Run the step in ``count`` threads."""
    call(count, (_alone, _together), *arguments)


def call(count: int, functions: tuple[Callable[..., None], ...], *arguments: object) -> None:
    """Call the first function in this thread, or the second one, which starts ``count`` threads."""
    alone, function = functions
    if count == 1:
        alone(*arguments)
        return
    with _POOL:
        before = numba.get_num_threads()
        if count != before:
            numba.set_num_threads(count)
        try:
            function(*arguments)
        finally:
            if count != before:
                numba.set_num_threads(before)
