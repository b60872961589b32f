"""Iterate k > 1 vectors of all matrices at once: more kernels of `TritonEngine`.

An iteration is that of the core's `iterate_rows`: Y = VWᵀ, Q = orth(Y), Z = QW, and rotations that
sort the rows of Z. As Numba's `block_kernels` explain, orthonormalizing commutes with the second
product. So W is read once, for Y and for YW. Only a k × k matrix T is applied afterwards, to short
rows: Q = TY, and after the rotations u is the first row of TY.

One iteration is six launches, whatever the number of matrices and their shapes. `add_sums` is one
more where a matrix has many programs.

1. `row_products` reads W once. It stores a part of Y, and the sum of YW and the inner products of
   the rows of Y over the rows of a program.
2. `orthonormalize` finds T, one matrix a program.
3. `row_products` again, for the few matrices where T would amplify rounding errors. There the
   program of `orthonormalize` has orthonormalized Y itself. All other programs return at once.
4. `row_columns` adds the sums of all programs, a block of columns each: Z = YW/‖Y‖.
5. `sort_rows` rotates T so that the rows of TZ are orthogonal, the longest one first, and finds σ.
6. `renew` stores the next V, one matrix a program.

Then `left_vectors` stores u, and `update` adds the term.

Vectors of a thread are tuples of k tensors. Matrices of k × k numbers are tiles of the next power
of two, filled with zeros. They are in float64: inner products square the range of numbers and the
condition of a matrix.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .triton_kernels import (
    COLUMNS,
    FIRST_BLOCK,
    FIRST_ITEM,
    N_BLOCKS,
    N_ITEMS,
    N_POINTERS,
    PARTIAL,
    PRODUCTS_CLASS,
    ROWS,
    STEP,
    STRIDE,
    WIDE,
    T,
    U,
    V,
    W,
    Z,
    _in_v,
    _pointer,
    _shape,
    _size,
    _start,
    _tile,
    _wide_products,
    add_sums,
    update,
)

__all__ = [
    "add_sums",
    "left_vectors",
    "orthonormalize",
    "renew",
    "row_columns",
    "row_products",
    "sort_rows",
    "update",
]

# The rounding errors of Z = T(YW) are at most those of QW times this number. Otherwise Y is
# orthonormalized, and W is read again. As in Numba's kernels.
AMPLIFIED = tl.constexpr(16.0)
# Columns at once of the kernels that work on one matrix, rows of Y at once, and sums at once.
CHUNK, ROW_CHUNK, SUM_CHUNK = tl.constexpr(1024), tl.constexpr(64), tl.constexpr(8)


@triton.jit
def _kind(pointers, matrix):
    """Return the class of a matrix: -1 where it is absent in this step."""
    return tl.load(pointers + matrix * N_POINTERS + PRODUCTS_CLASS).to(tl.int32)


@triton.jit
def _inner_products(X):
    """Return the inner products of the rows of X, in float64."""
    X = X.to(tl.float64)
    return tl.sum(X[:, None, :] * X[None, :, :], axis=2)


@triton.jit
def _small(KP: tl.constexpr):
    """Return the places of the elements of a KP × KP matrix."""
    a = tl.arange(0, KP)
    return a[:, None] * KP + a[None, :]


@triton.jit
def _sum_of_small(ptr, count, KP: tl.constexpr):
    """Return the sum of ``count`` matrices of KP × KP numbers that follow each other."""
    lines = tl.arange(0, SUM_CHUNK)
    places = lines[:, None, None] * (KP * KP) + _small(KP)[None, :, :]
    total = tl.zeros((SUM_CHUNK, KP, KP), tl.float64)
    for start in range(0, count, SUM_CHUNK):
        there = (start + lines < count)[:, None, None]
        total += tl.load(ptr + start * (KP * KP) + places, mask=there, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _held_products(
    matrix_ptr, v_ptr, y_ptr, sum_ptr, stride, row, end, n, m, shapes, matrix,
    TILE: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
    STAGES: tl.constexpr, FIRST: tl.constexpr, PERMUTED: tl.constexpr, TRANSPOSED: tl.constexpr,
    K: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Store Y and the sums of YW of some rows, reading them once.

    All K vectors and all K sums are in registers. With ``AGAIN``, Y is known.
    """
    HEIGHT: tl.constexpr = TILE // WIDTH
    lines = tl.arange(0, HEIGHT)
    cols = tl.arange(0, WIDTH)
    starts = ()
    if not AGAIN:
        for a in tl.static_range(K):
            v = _start(v_ptr + a * n, cols, n, shapes, matrix, ACC, FIRST, PERMUTED)
            starts = starts + (v[None, :],)  # noqa: RUF005
    totals = (tl.zeros((HEIGHT, WIDTH), ACC),) * K
    for start in tl.range(row, end, HEIGHT, num_stages=STAGES):
        rows = start + lines
        tile = _tile(matrix_ptr, rows, cols, end, n, shapes, matrix, VECTOR, ACC, TRANSPOSED)
        more = ()
        for a in tl.static_range(K):
            places = y_ptr + a * m + rows
            if AGAIN:
                y = tl.load(places, mask=rows < end, other=0.0)
            else:
                y = tl.sum(tile * starts[a], axis=1)
                tl.store(places, y, mask=rows < end)
            more = more + (totals[a] + tile * y[:, None],)  # noqa: RUF005
        totals = more
    for a in tl.static_range(K):
        tl.store(sum_ptr + a * stride + cols, tl.sum(totals[a], axis=0), mask=cols < n)


@triton.jit
def _products_of_y(y_ptr, row, end, m, K: tl.constexpr, KP: tl.constexpr):
    """Return the inner products of the rows of Y over its columns ``row`` to ``end``."""
    a = tl.arange(0, KP)
    total = tl.zeros((KP, KP), tl.float64)
    for start in range(row, end, ROW_CHUNK):
        rows = start + tl.arange(0, ROW_CHUNK)
        there = (a < K)[:, None] & (rows < end)[None, :]
        total += _inner_products(tl.load(y_ptr + a[:, None] * m + rows, mask=there, other=0.0))
    return total


@triton.jit
def row_products(
    pointers, shapes, items, sums, ys, grams, again,
    DTYPE: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
    CLASSES: tl.constexpr, STAGES: tl.constexpr, FIRST: tl.constexpr, PERMUTED: tl.constexpr,
    TRANSPOSED: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Compute Y = VWᵀ, YW and YYᵀ of the rows of an item (matrix, first row, end).

    With ``AGAIN``, compute only YW, and only of matrices that `orthonormalize` has marked.
    """
    item = tl.program_id(0)
    matrix = tl.load(items + 3 * item)
    row = tl.load(items + 3 * item + 1)
    end = tl.load(items + 3 * item + 2)
    kind = _kind(pointers, matrix)
    if AGAIN:
        kind = tl.where(tl.load(again + matrix) > 0, kind, -1)
    matrix_ptr = _pointer(pointers, matrix, W, DTYPE)
    v_ptr = _pointer(pointers, matrix, V, ACC)
    n = _size(shapes, matrix, COLUMNS)
    m = _size(shapes, matrix, ROWS)
    stride = _shape(shapes, matrix, STRIDE)
    y_ptr = ys + _shape(shapes, matrix, T) * K
    nth = item - _size(shapes, matrix, FIRST_ITEM)
    sum_ptr = sums + (_shape(shapes, matrix, PARTIAL) + nth * stride) * K
    for c in tl.static_range(2 * WIDE):
        if (CLASSES >> c) & 1:  # noqa: SIM102 — Triton 3.3 has no `and` of both
            if kind == c:
                _held_products(
                    matrix_ptr, v_ptr, y_ptr, sum_ptr, stride, row, end, n, m, shapes, matrix,
                    TILE, 1 << (c // 2), VECTOR if c % 2 else 1, ACC, STAGES, FIRST, PERMUTED,
                    TRANSPOSED, K, AGAIN,
                )  # fmt: skip
    for c in tl.static_range(2 * WIDE, 2 * WIDE + 2):
        if (CLASSES >> c) & 1:  # noqa: SIM102 — Triton 3.3 has no `and` of both
            if kind == c:
                _wide_products(
                    matrix_ptr, v_ptr, y_ptr, sum_ptr, stride, row, end, n, m, shapes, matrix,
                    TILE, VECTOR if c % 2 else 1, ACC, STAGES, FIRST, PERMUTED,
                    TRANSPOSED, K, AGAIN,
                )  # fmt: skip
    if not AGAIN and kind >= 0:
        tl.debug_barrier()  # other threads read what these have stored
        gram = _products_of_y(y_ptr, row, end, m, K, KP)
        tl.store(grams + item.to(tl.int64) * (KP * KP) + _small(KP), gram)


@triton.jit
def _factorized(G, ACC: tl.constexpr, EPS: tl.constexpr, KP: tl.constexpr):
    """Return T with T·G·Tᵀ = 1, and whether it is accurate. The trace of G is 1.

    This is Gram–Schmidt on coefficients: a row of T is the unit vector of a row of Y, minus its
    parts along the rows before. A row that adds no direction becomes zero, relative to all rows
    together, as the core's `left_rows`.
    """
    a = tl.arange(0, KP)
    down, across = a[:, None], a[None, :]
    lengths = tl.sqrt(tl.sum(tl.where(down == across, G, 0.0), axis=0))
    T_ = tl.zeros((KP, KP), tl.float64)
    accurate = tl.full((), 1, tl.int1)
    for i in range(KP):
        g = tl.sum(tl.where(down == i, G, 0.0), axis=0)
        parts = tl.sum(T_ * g[None, :], axis=1)
        square = tl.sum(tl.where(a == i, g, 0.0), axis=0)
        left = square - tl.sum(parts * parts, axis=0)
        adds = left > tl.where(i == 0, 0.0, EPS * EPS)
        row = tl.where(a == i, 1.0, 0.0) - tl.sum(T_ * parts[:, None], axis=0)
        row = tl.where(adds, row / tl.sqrt(tl.where(adds, left, 1.0)), 0.0)
        T_ = tl.where(down == i, row[None, :], T_)
        # In float64 the difference says nothing about rows that are nearly dependent. For float32
        # it says enough: eps² is well above the rounding errors of float64.
        says_enough: tl.constexpr = tl.float64 != ACC
        far = left * (AMPLIFIED * AMPLIFIED) >= square
        if says_enough:
            far = far | (left <= tl.where(i == 0, 0.0, EPS * EPS))
        accurate &= far
        accurate &= tl.sum(tl.abs(row) * lengths, axis=0) <= AMPLIFIED
    return T_, accurate


@triton.jit
def _gram_schmidt(
    y_ptr, m, scale, ACC: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Orthonormalize the rows of Y times ``scale`` in place, as the core's `left_rows`.

    Warps may hold copies of a small tile. Before one of them stores a row, all have read it.
    """
    a = tl.arange(0, KP)
    lines = tl.arange(0, ROW_CHUNK)
    for start in range(0, m, ROW_CHUNK):
        places = y_ptr + a[:, None] * m + (start + lines)[None, :]
        there = (a < K)[:, None] & (start + lines < m)[None, :]
        tl.store(places, tl.load(places, mask=there, other=0.0) * scale, mask=there)
    for i in range(K):
        y_places = y_ptr + i * m + lines
        for _ in range(2):
            tl.debug_barrier()
            dots = tl.zeros((KP, ROW_CHUNK), ACC)
            for start in range(0, m, ROW_CHUNK):
                there = start + lines < m
                y = tl.load(y_places + start, mask=there, other=0.0)
                before = (a < i)[:, None] & there[None, :]
                Q = tl.load(y_ptr + a[:, None] * m + (start + lines), mask=before, other=0.0)
                dots += Q * y[None, :]
            parts = tl.sum(dots, axis=1)
            tl.debug_barrier()
            for start in range(0, m, ROW_CHUNK):
                there = start + lines < m
                y = tl.load(y_places + start, mask=there, other=0.0)
                before = (a < i)[:, None] & there[None, :]
                Q = tl.load(y_ptr + a[:, None] * m + (start + lines), mask=before, other=0.0)
                y -= tl.sum(Q * parts[:, None], axis=0)
                tl.store(y_places + start, y, mask=there)
        tl.debug_barrier()
        squares = tl.zeros((ROW_CHUNK,), ACC)
        for start in range(0, m, ROW_CHUNK):
            y = tl.load(y_places + start, mask=start + lines < m, other=0.0)
            squares += y * y
        square = tl.sum(squares, axis=0)
        length = tl.sqrt(square)
        inverse = tl.where((length > EPS) | (i == 0), length / (square + TINY), 0.0)
        tl.debug_barrier()
        for start in range(0, m, ROW_CHUNK):
            y = tl.load(y_places + start, mask=start + lines < m, other=0.0)
            tl.store(y_places + start, y * inverse, mask=start + lines < m)
    tl.debug_barrier()


@triton.jit
def orthonormalize(
    pointers, shapes, grams, ys, transforms, scales, again,
    ACC: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Find T of a matrix, with orthonormal rows T·Y·scale; or mark it to be read again.

    That is rare. It is for rows of Y that are nearly dependent, as where the rank of W is below K.
    """
    matrix = tl.program_id(0)
    n_items = tl.where(_kind(pointers, matrix) < 0, 0, _size(shapes, matrix, N_ITEMS))
    first = _shape(shapes, matrix, FIRST_ITEM)
    G = _sum_of_small(grams + first * (KP * KP), n_items, KP)
    a = tl.arange(0, KP)
    diagonal = a[:, None] == a[None, :]
    total = tl.sum(tl.sum(tl.where(diagonal, G, 0.0), axis=1), axis=0)
    valid = (total > 0.0) & (total < float("inf"))
    square = tl.where(valid, total, 1.0)
    # 0 for 0, and NaN where it is not finite: T is zero then, and what it is multiplied by counts.
    scale = tl.where(total == 0.0, 0.0, tl.where(valid, 1.0 / tl.sqrt(square), float("nan")))
    transform, accurate = _factorized(tl.where(valid, G / square, 0.0), ACC, EPS, KP)
    reread = valid & (accurate == 0)
    if reread:
        y_ptr = ys + _shape(shapes, matrix, T) * K
        _gram_schmidt(y_ptr, _size(shapes, matrix, ROWS), scale.to(ACC), ACC, EPS, TINY, K, KP)
    transform = tl.where(reread, tl.where(diagonal, 1.0, 0.0), transform)
    tl.store(transforms + matrix * (KP * KP) + _small(KP), transform)
    tl.store(scales + matrix, tl.where(reread, 1.0, scale).to(ACC))
    tl.store(again + matrix, reread.to(tl.int32))


@triton.jit
def row_columns(
    pointers, shapes, blocks, sums, scales, zs, grams,
    ACC: tl.constexpr, HEIGHT: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Compute Z = YW·scale of a block of columns (matrix, nth block), and its share of ZZᵀ."""
    block = tl.program_id(0)
    matrix = tl.load(blocks + 2 * block)
    n = _size(shapes, matrix, COLUMNS)
    n_items = tl.where(_kind(pointers, matrix) < 0, 0, _size(shapes, matrix, N_ITEMS))
    stride = _size(shapes, matrix, STRIDE)
    cols = tl.load(blocks + 2 * block + 1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.arange(0, KP)
    lines = tl.arange(0, HEIGHT)
    total = tl.zeros((KP, HEIGHT, BLOCK), ACC)
    sum_ptr = sums + _shape(shapes, matrix, PARTIAL) * K
    step = _size(shapes, matrix, STEP)
    for start in range(0, n_items, HEIGHT * step):
        items = start + lines * step
        rows = items[None, :] * K + a[:, None]
        there = (a < K)[:, None] & (items < n_items)[None, :]
        places = sum_ptr + (rows.to(tl.int64) * stride)[:, :, None] + cols[None, None, :]
        there = there[:, :, None] & (cols < n)[None, None, :]
        total += tl.load(places, mask=there, other=0.0)
    z = tl.sum(total, axis=1) * tl.load(scales + matrix)
    here = (a < K)[:, None] & (cols < n)[None, :]
    tl.store(zs + _shape(shapes, matrix, Z) * K + a[:, None] * n + cols[None, :], z, mask=here)
    gram = _inner_products(tl.where(here, z, 0.0))
    tl.store(grams + block.to(tl.int64) * (KP * KP) + _small(KP), gram)


@triton.jit
def _rotated(X, i, j, c, s, down):
    """Rotate rows i and j of X."""
    x = tl.sum(tl.where(down == i, X, 0.0), axis=0)[None, :]
    y = tl.sum(tl.where(down == j, X, 0.0), axis=0)[None, :]
    return tl.where(down == i, c * x + s * y, tl.where(down == j, c * y - s * x, X))


@triton.jit
def _rotation(p, q, b):
    """Return (c, s), which make two rows orthogonal, the longer one first.

    p and q are their squared lengths, b their inner product. See `_rotation` of the core.
    """
    size = p + q + 1e-300
    d = (p - q) / size
    b = 2.0 * b / size
    w = tl.sqrt(d * d + b * b) + tl.abs(d) + 1e-150
    inverse = 1.0 / tl.sqrt(w * w + b * b)
    first = d >= 0.0
    return tl.where(first, w, b) * inverse, tl.where(first, b, w) * inverse


@triton.jit
def sort_rows(
    pointers, shapes, grams, transforms, sigmas, inverses, ACC: tl.constexpr, KP: tl.constexpr
):  # fmt: skip
    """Rotate the rows of T, as one Jacobi sweep on TZ, and store σ and 1/σ of a matrix."""
    matrix = tl.program_id(0)
    n_blocks = tl.where(_kind(pointers, matrix) < 0, 0, _size(shapes, matrix, N_BLOCKS))
    first = _shape(shapes, matrix, FIRST_BLOCK)
    G = _sum_of_small(grams + first * (KP * KP), n_blocks, KP)
    places = transforms + matrix * (KP * KP) + _small(KP)
    X = tl.load(places)
    TG = tl.sum(X[:, :, None] * G[None, :, :], axis=1)
    H = tl.sum(TG[:, None, :] * X[None, :, :], axis=2)
    a = tl.arange(0, KP)
    down, across = a[:, None], a[None, :]
    for i in range(KP):
        for j in range(i + 1, KP):
            row = tl.sum(tl.where(down == i, H, 0.0), axis=0)
            p = tl.sum(tl.where(a == i, row, 0.0), axis=0)
            b = tl.sum(tl.where(a == j, row, 0.0), axis=0)
            q = tl.sum(tl.sum(tl.where((down == j) & (across == j), H, 0.0), axis=1), axis=0)
            c, s = _rotation(p, q, b)
            H = _rotated(tl.trans(_rotated(H, i, j, c, s, down)), i, j, c, s, down)
            X = _rotated(X, i, j, c, s, down)
    tl.store(places, X)
    square = tl.sum(tl.sum(tl.where((down == 0) & (across == 0), H, 0.0), axis=1), axis=0)
    usable = (square > 0.0) & (square < float("inf"))
    sigma = tl.sqrt(tl.where(square > 0.0, square, 0.0))
    sigma = tl.where(square == square, sigma, float("nan"))
    tl.store(sigmas + matrix, sigma.to(ACC))
    inverse = 1.0 / tl.sqrt(tl.where(usable, square, 1.0))
    tl.store(inverses + matrix, tl.where(usable, inverse, 0.0))


@triton.jit
def _combined(z_ptr, weights, scale, cols, n, ACC: tl.constexpr, K: tl.constexpr):
    """Return the sum of K rows, each times its weight times ``scale``."""
    total = tl.zeros((CHUNK,), ACC)
    for j in tl.static_range(K):
        weight = (tl.load(weights + j) * scale).to(ACC)
        total += weight * tl.load(z_ptr + j * n + cols, mask=cols < n, other=0.0)
    return total


@triton.jit
def _subtracted(
    x_ptr, n, FIRST: tl.constexpr, COUNT: tl.constexpr, BASE: tl.constexpr, dots, ACC: tl.constexpr,
):  # fmt: skip
    """Subtract from rows x their parts along the first ``BASE`` rows: see `_orthogonal_unit`.

    ``dots`` holds the inner products, for each of the ``COUNT`` rows from ``FIRST`` on. Return the
    new inner products, and the squares of the rows.
    """
    tl.debug_barrier()
    new = (tl.zeros((CHUNK,), ACC),) * (COUNT * BASE)
    squares = (tl.zeros((CHUNK,), ACC),) * COUNT
    for start in range(0, n, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        more = ()
        more_squares = ()
        for r in tl.static_range(COUNT):
            x = tl.load(x_ptr + (FIRST + r) * n + cols, mask=cols < n, other=0.0)
            left = x
            for b in tl.static_range(BASE):
                left -= dots[r * BASE + b] * tl.load(x_ptr + b * n + cols, mask=cols < n, other=0.0)
            for b in tl.static_range(BASE):
                base = tl.load(x_ptr + b * n + cols, mask=cols < n, other=0.0)
                more = more + (new[r * BASE + b] + left * base,)  # noqa: RUF005
            more_squares = more_squares + (squares[r] + left * left,)  # noqa: RUF005
            tl.store(x_ptr + (FIRST + r) * n + cols, left, mask=cols < n)
        new = more
        squares = more_squares
    return _sums(new, COUNT * BASE), _sums(squares, COUNT)


@triton.jit
def _sums(vectors, COUNT: tl.constexpr):
    total = ()
    for a in tl.static_range(COUNT):
        total = total + (tl.sum(vectors[a], axis=0),)  # noqa: RUF005
    return total


@triton.jit
def _unit_scales(before, after, TINY: tl.constexpr, COUNT: tl.constexpr):
    """Return the inverse length of rows: 0 where the second subtraction has left only rounding."""
    scales = ()
    for a in tl.static_range(COUNT):
        length = tl.sqrt(after[a])
        is_new = length > 0.5 * tl.sqrt(before[a])
        scales = scales + (tl.where(is_new, length / (after[a] + TINY), 0.0),)  # noqa: RUF005
    return scales


@triton.jit
def _candidates(
    x_ptr, z_ptr, v_ptr, weights, inverse, n, shapes, matrix,
    ACC: tl.constexpr, EPS: tl.constexpr, PERMUTED: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Store v and the next candidates relative to σ, with a little of the old rows: see `_next`.

    Return the inner products of the candidates with v.
    """
    dots = (tl.zeros((CHUNK,), ACC),) * (COUNT - 1)
    for start in range(0, n, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        v = _combined(z_ptr, weights, inverse, cols, n, ACC, K)
        tl.store(x_ptr + cols, v, mask=cols < n)
        places = _in_v(shapes, matrix, cols, PERMUTED)
        old = tl.load(v_ptr + places, mask=cols < n, other=0.0)
        more = ()
        for a in tl.static_range(1, COUNT):
            x = _combined(z_ptr, weights + a * KP, inverse, cols, n, ACC, K)
            spare = tl.load(v_ptr + a * n + places, mask=cols < n, other=0.0) + 0.5 * old
            x += EPS * spare
            tl.store(x_ptr + a * n + cols, x, mask=cols < n)
            more = more + (dots[a - 1] + x * v,)  # noqa: RUF005
        dots = more
    return _sums(dots, COUNT - 1)


@triton.jit
def _scaled_rows(x_ptr, n, scales, COUNT: tl.constexpr):
    """Scale the rows of x after the first one."""
    tl.debug_barrier()
    for start in range(0, n, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        for a in tl.static_range(COUNT):
            places = x_ptr + (a + 1) * n + cols
            tl.store(places, tl.load(places, mask=cols < n) * scales[a], mask=cols < n)
    tl.debug_barrier()


@triton.jit
def _old_row(
    x_ptr, v_ptr, n, shapes, matrix, ACC: tl.constexpr, PERMUTED: tl.constexpr, BASE: tl.constexpr
):  # fmt: skip
    """Store the old v as the row after the first ``BASE``, and return its products with these."""
    dots = (tl.zeros((CHUNK,), ACC),) * BASE
    for start in range(0, n, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        places = _in_v(shapes, matrix, cols, PERMUTED)
        old = tl.load(v_ptr + places, mask=cols < n, other=0.0)
        tl.store(x_ptr + BASE * n + cols, old, mask=cols < n)
        more = ()
        for b in tl.static_range(BASE):
            base = tl.load(x_ptr + b * n + cols, mask=cols < n, other=0.0)
            more = more + (dots[b] + old * base,)  # noqa: RUF005
        dots = more
    return _sums(dots, BASE)


@triton.jit
def renew(
    pointers, shapes, zs, xs, transforms, inverses,
    ACC: tl.constexpr, EPS: tl.constexpr, TINY: tl.constexpr, PERMUTED: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Store the next V of a matrix: see the core's `_next`. ``xs`` has room for its rows.

    V does not change where σ is zero or not finite.
    """
    matrix = tl.program_id(0)
    inverse = tl.load(inverses + matrix)
    COUNT: tl.constexpr = K - 1 if K > 2 else 2
    if inverse > 0.0:
        n = _size(shapes, matrix, COLUMNS)
        v_ptr = _pointer(pointers, matrix, V, ACC)
        z_ptr = zs + _shape(shapes, matrix, Z) * K
        x_ptr = xs + _shape(shapes, matrix, Z) * K
        dots = _candidates(
            x_ptr, z_ptr, v_ptr, transforms + matrix * (KP * KP), inverse, n, shapes, matrix,
            ACC, EPS, PERMUTED, K, KP, COUNT,
        )  # fmt: skip
        dots, before = _subtracted(x_ptr, n, 1, COUNT - 1, 1, dots, ACC)
        _, after = _subtracted(x_ptr, n, 1, COUNT - 1, 1, dots, ACC)
        _scaled_rows(x_ptr, n, _unit_scales(before, after, TINY, COUNT - 1), COUNT - 1)
        last = 1.0
        if K > 2:
            dots = _old_row(x_ptr, v_ptr, n, shapes, matrix, ACC, PERMUTED, COUNT)
            dots, before = _subtracted(x_ptr, n, COUNT, 1, COUNT, dots, ACC)
            _, after = _subtracted(x_ptr, n, COUNT, 1, COUNT, dots, ACC)
            last = _unit_scales(before, after, TINY, 1)[0]
            tl.debug_barrier()
        for start in range(0, n, CHUNK):
            cols = start + tl.arange(0, CHUNK)
            places = _in_v(shapes, matrix, cols, PERMUTED)
            for a in tl.static_range(K):
                x = tl.load(x_ptr + a * n + cols, mask=cols < n)
                if K > 2 and a == K - 1:
                    x *= last
                tl.store(v_ptr + a * n + places, x, mask=cols < n)


@triton.jit
def left_vectors(
    pointers, shapes, items, ys, transforms, scales,
    ACC: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Store u, the first row of T·Y·scale, at the rows of an item (matrix, first row, end)."""
    item = tl.program_id(0)
    matrix = tl.load(items + 3 * item)
    end = tl.load(items + 3 * item + 2)
    end = tl.where(_kind(pointers, matrix) < 0, 0, end)
    u_ptr = _pointer(pointers, matrix, U, ACC)
    y_ptr = ys + _shape(shapes, matrix, T) * K
    m = _size(shapes, matrix, ROWS)
    scale = tl.load(scales + matrix)
    for start in range(tl.load(items + 3 * item + 1), end, CHUNK):
        rows = start + tl.arange(0, CHUNK)
        u = tl.zeros((CHUNK,), ACC)
        for j in tl.static_range(K):
            weight = tl.load(transforms + matrix * (KP * KP) + j).to(ACC) * scale
            u += weight * tl.load(y_ptr + j * m + rows, mask=rows < end, other=0.0)
        tl.store(u_ptr + rows, u, mask=rows < end)
