"""Compute Algorithm 1 on all matrices of a model at once: the kernels of `TritonEngine`.

One iteration is three launches, whatever the number of matrices and their shapes:

1. `products` reads W once. A program works on some rows of one matrix. It holds all of v and a sum
   over its rows in registers: ``t = Wv`` of a tile of rows, then at once ``y += tᵀW`` of the same
   tile. The program's sum goes to scratch.
2. `columns` adds the sums of all programs, a block of columns each: ``z = Wᵀt/‖t‖``. Where a
   matrix has many programs, `add_sums` adds the sums of some of them before: few programs that add
   many sums would wait for memory.
3. `update` computes σ = ‖z‖ and v = z/σ on the way, and adds the term to G. If another iteration
   follows, `directions` stores v alone.

There are no atomics, and every sum has one order: the same input gives the same bits.

Each kernel finds its work in tables: ``pointers`` and ``shapes`` have one row a matrix, and a table
of work has one row a program. A Triton tile is a power of two, but matrices have rows and columns
of many sizes. So the body of a kernel is compiled once for each width that the model has (the bits
of ``CLASSES``), and a program branches to the one it needs. A matrix that is absent in this step
has the class -1, which is no width: its programs do nothing.

Range: everything that is added is of the order of σ² or σ, never σ⁴, because t is divided by its
length before z is squared. This is the range of the reference.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from spectral_core.engine import FRESH, FRESH_64

# The columns of the tables `pointers`, `shapes` and `penalties`.
N_POINTERS = tl.constexpr(7)
W, G, V, U, SIGMA, PRODUCTS_CLASS, UPDATE_CLASS = (tl.constexpr(i) for i in range(7))
N_SHAPES = tl.constexpr(14)
ROWS, COLUMNS, FIRST_ITEM, N_ITEMS, PARTIAL, STRIDE, FIRST_BLOCK, N_BLOCKS, T, Z = (
    tl.constexpr(i) for i in range(10)
)
CHANNELS, WINDOW = tl.constexpr(10), tl.constexpr(11)  # n and 1 where memory has v's order
RUN = tl.constexpr(13)  # columns of a row that follow each other in memory
STEP = tl.constexpr(12)  # sums of so many items are added beforehand, and are in the first's place

N_PENALTIES = tl.constexpr(5)
FACTOR, FACTOR_SLOT, TARGET, TARGET_SLOT, CODE = (tl.constexpr(i) for i in range(5))

# Codes of a bound, as in the core's `Bound`. Below them are 0, the paper's penalty, and the powers.
AT_MOST, EXACTLY = tl.constexpr(3), tl.constexpr(4)

# As in the core's `fresh_direction`: its largest element over 2³¹, and the golden ratio, signed.
FRESH_SCALE, FRESH_SCALE_64 = tl.constexpr(FRESH / 2**31), tl.constexpr(FRESH_64 / 2**31)
GOLDEN = tl.constexpr(0x9E3779B1 - 2**32)

# Classes from this one on are of rows that do not fit into registers: read twice, in chunks.
WIDE = tl.constexpr(15)
WIDE_HEIGHT = tl.constexpr(8)  # rows of such a tile

SOME_BLOCKS = tl.constexpr(256)  # blocks of a matrix that are loaded at once


@triton.jit
def _pointer(pointers, matrix, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    address = tl.load(pointers + matrix * N_POINTERS + FIELD)
    return address.to(tl.pointer_type(DTYPE), bitcast=True)


@triton.jit
def _shape(shapes, matrix, FIELD: tl.constexpr):
    return tl.load(shapes + matrix * N_SHAPES + FIELD)


@triton.jit
def _size(shapes, matrix, FIELD: tl.constexpr):
    return _shape(shapes, matrix, FIELD).to(tl.int32)


@triton.jit
def _in_v(shapes, matrix, cols, PERMUTED: tl.constexpr):
    """Return the places in v of columns in memory.

    A channels-last convolution has the columns of its matrix in another order in memory: kernel
    positions first. To permute v costs nothing; to permute W would be a copy of it.
    """
    if PERMUTED:
        channels = _size(shapes, matrix, CHANNELS)
        cols = (cols % channels) * _size(shapes, matrix, WINDOW) + cols // channels
    return cols


@triton.jit
def _length_and_inverse(square, TINY: tl.constexpr):
    """Return √square and its inverse: 0 for 0, and NaN where it is not finite, as the core."""
    if square.dtype == tl.float64:
        length = tl.sqrt(square)
        inverse = length / (square + TINY)
    else:  # the plain ones are approximate, and flush subnormal numbers
        length = tl.sqrt_rn(square)
        inverse = tl.div_rn(length, square + TINY)
    return length, inverse


@triton.jit
def _fresh_direction(cols, ACC: tl.constexpr):
    """Return these elements of the core's `fresh_direction`: computed, so that nothing is read."""
    places = (cols + 1).to(tl.int32)
    is_double: tl.constexpr = ACC == tl.float64  # noqa: SIM300
    scale: tl.constexpr = FRESH_SCALE_64 if is_double else FRESH_SCALE
    return (places * places * GOLDEN).to(ACC) * scale


@triton.jit
def _places(ptr, rows, cols, n, shapes, matrix, TRANSPOSED: tl.constexpr):
    """Return the addresses of a tile.

    A transposed convolution has its inputs before its outputs in memory. So a row of its matrix is
    one run of kernel positions for each input, and the runs of all rows lie between.
    """
    if TRANSPOSED:
        run = _size(shapes, matrix, RUN)
        stride = _shape(shapes, matrix, ROWS) * run
        across = (cols // run) * stride + cols % run
        return (ptr + rows.to(tl.int64) * run)[:, None] + across[None, :]
    else:  # noqa: RET505 — Triton compiles both branches otherwise
        return (ptr + rows.to(tl.int64) * n)[:, None] + cols[None, :]


@triton.jit
def _tile(
    matrix_ptr, rows, cols, end, n, shapes, matrix,
    VECTOR: tl.constexpr, ACC: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Return a tile of W in the dtype of the iteration, with zeros past the end."""
    if VECTOR > 1:  # the launcher has checked it: the compiler may load 16 bytes at once
        n = n // VECTOR * VECTOR
    there = (rows < end)[:, None] & (cols < n)[None, :]
    places = _places(matrix_ptr, rows, cols, n, shapes, matrix, TRANSPOSED)
    if VECTOR > 1:
        places = tl.multiple_of(places, [1, 16])
    return tl.load(places, mask=there, other=0.0).to(ACC)


@triton.jit
def _start(
    v_ptr, cols, n, shapes, matrix, ACC: tl.constexpr, FIRST: tl.constexpr, PERMUTED: tl.constexpr
):  # fmt: skip
    """Return v at these columns in memory. The first iteration adds a little of a direction."""
    places = _in_v(shapes, matrix, cols, PERMUTED)
    v = tl.load(v_ptr + places, mask=cols < n, other=0.0)
    if FIRST:
        v += _fresh_direction(places, ACC)  # past the n columns it meets the zeros of a tile
    return v


@triton.jit
def _wide_products(
    matrix_ptr, v_ptr, y_ptr, sum_ptr, stride, row, end, n, m, shapes, matrix,
    TILE: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
    FIRST: tl.constexpr, PERMUTED: tl.constexpr, TRANSPOSED: tl.constexpr,
    K: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Store y = Wv and the sum of yᵀW of some rows, in chunks of columns, for each of K vectors.

    Rows that do not fit into registers are read twice. With ``AGAIN``, y is known.
    """
    WIDTH: tl.constexpr = TILE // WIDE_HEIGHT
    lines = tl.arange(0, WIDE_HEIGHT)
    width = tl.arange(0, WIDTH)
    if not AGAIN:
        for start in range(row, end, WIDE_HEIGHT):
            rows = start + lines
            dots = (tl.zeros((WIDE_HEIGHT, WIDTH), ACC),) * K
            for col in tl.range(0, n, WIDTH, num_stages=STAGES):
                cols = col + width
                tile = _tile(
                    matrix_ptr, rows, cols, end, n, shapes, matrix, VECTOR, ACC, TRANSPOSED
                )
                more = ()
                for a in tl.static_range(K):
                    v = _start(v_ptr + a * n, cols, n, shapes, matrix, ACC, FIRST, PERMUTED)
                    more = more + (dots[a] + tile * v[None, :],)  # noqa: RUF005
                dots = more
            for a in tl.static_range(K):
                tl.store(y_ptr + a * m + rows, tl.sum(dots[a], axis=1), mask=rows < end)
        tl.debug_barrier()  # other threads read what these have stored
    for col in range(0, n, WIDTH):
        cols = col + width
        totals = (tl.zeros((WIDE_HEIGHT, WIDTH), ACC),) * K
        for start in tl.range(row, end, WIDE_HEIGHT, num_stages=STAGES):
            rows = start + lines
            tile = _tile(matrix_ptr, rows, cols, end, n, shapes, matrix, VECTOR, ACC, TRANSPOSED)
            more = ()
            for a in tl.static_range(K):
                y = tl.load(y_ptr + a * m + rows, mask=rows < end, other=0.0)
                more = more + (totals[a] + tile * y[:, None],)  # noqa: RUF005
            totals = more
        for a in tl.static_range(K):
            tl.store(sum_ptr + a * stride + cols, tl.sum(totals[a], axis=0), mask=cols < n)


@triton.jit
def _rows_of_products(
    matrix_ptr, v_ptr, t_ptr, sum_ptr, row, end, n, shapes, matrix,
    TILE: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr,
    STAGES: tl.constexpr, FIRST: tl.constexpr, PERMUTED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Store t and the sum of tᵀW of the rows ``row`` to ``end``, and return ‖t‖².

    In the first iteration of a step, v has a little of a fresh direction.
    """
    HEIGHT: tl.constexpr = TILE // WIDTH
    if VECTOR > 1:  # the launcher has checked it: the compiler may load 16 bytes at once
        n = n // VECTOR * VECTOR
    lines = tl.arange(0, HEIGHT)
    cols = tl.arange(0, WIDTH)
    inside = (cols < n)[None, :]
    in_v = _in_v(shapes, matrix, cols, PERMUTED)
    v_places, sum_places = v_ptr + in_v, sum_ptr + cols
    if VECTOR > 1:
        sum_places = tl.multiple_of(sum_places, 16)
        if not PERMUTED:
            v_places = tl.multiple_of(v_places, 16)
    v = tl.load(v_places, mask=cols < n, other=0.0)
    if FIRST:
        v += _fresh_direction(in_v, ACC)  # past the n columns it meets the zeros of a tile
    v = v[None, :]
    total = tl.zeros((HEIGHT, WIDTH), ACC)
    square = tl.zeros((HEIGHT,), ACC)
    # STAGES - 1 tiles are being copied to shared memory while one is worked on.
    for start in tl.range(row, end, HEIGHT, num_stages=STAGES):
        rows = start + lines
        there = (rows < end)[:, None] & inside
        places = _places(matrix_ptr, rows, cols, n, shapes, matrix, TRANSPOSED)
        if VECTOR > 1:
            places = tl.multiple_of(places, [1, 16])
        tile = tl.load(places, mask=there, other=0.0).to(ACC)
        t = tl.sum(tile * v, axis=1)
        tl.store(t_ptr + rows, t, mask=rows < end)
        square += t * t
        total += tile * t[:, None]
    tl.store(sum_places, tl.sum(total, axis=0), mask=cols < n)
    return tl.sum(square, axis=0)


@triton.jit
def _square(t_ptr, row, end, ACC: tl.constexpr):
    """Return ‖t‖² over the rows ``row`` to ``end``."""
    lines = tl.arange(0, 64)
    total = tl.zeros((64,), ACC)
    for start in range(row, end, 64):
        t = tl.load(t_ptr + start + lines, mask=start + lines < end, other=0.0)
        total += t * t
    return tl.sum(total, axis=0)


@triton.jit
def products(
    pointers, shapes, items, sums, ts, squares,
    DTYPE: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
    CLASSES: tl.constexpr, STAGES: tl.constexpr, FIRST: tl.constexpr, PERMUTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Compute ``t = Wv`` and ``Wᵀt`` of the rows of an item (matrix, first row, end).

    Class 2c + a has width 2ᶜ. With a = 1 its rows are aligned for 16-byte loads.
    """
    item = tl.program_id(0)
    matrix = tl.load(items + 3 * item)
    row = tl.load(items + 3 * item + 1)
    end = tl.load(items + 3 * item + 2)
    kind = tl.load(pointers + matrix * N_POINTERS + PRODUCTS_CLASS).to(tl.int32)
    matrix_ptr = _pointer(pointers, matrix, W, DTYPE)
    v_ptr = _pointer(pointers, matrix, V, ACC)
    n = _size(shapes, matrix, COLUMNS)
    t_ptr = ts + _shape(shapes, matrix, T)
    nth = item - _size(shapes, matrix, FIRST_ITEM)
    sum_ptr = sums + _shape(shapes, matrix, PARTIAL) + nth * _shape(shapes, matrix, STRIDE)
    for c in tl.static_range(2 * WIDE):
        if (CLASSES >> c) & 1:  # noqa: SIM102 — Triton 3.3 has no `and` of both
            if kind == c:
                square = _rows_of_products(
                    matrix_ptr, v_ptr, t_ptr, sum_ptr, row, end, n, shapes, matrix,
                    TILE, 1 << (c // 2), VECTOR if c % 2 else 1, ACC, STAGES, FIRST, PERMUTED,
                    TRANSPOSED,
                )  # fmt: skip
                tl.store(squares + item, square)
    for c in tl.static_range(2 * WIDE, 2 * WIDE + 2):
        if (CLASSES >> c) & 1:  # noqa: SIM102 — Triton 3.3 has no `and` of both
            if kind == c:
                _wide_products(
                    matrix_ptr, v_ptr, t_ptr, sum_ptr, 0, row, end, n, 0, shapes, matrix,
                    TILE // 2, VECTOR if c % 2 else 1, ACC, STAGES, FIRST, PERMUTED,
                    TRANSPOSED, 1, False,
                )  # fmt: skip
                tl.store(squares + item, _square(t_ptr, row, end, ACC))


@triton.jit
def add_sums(
    pointers, shapes, parts, sums, squares,
    ACC: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Add the sums of some items of a part (matrix, first item, end, nth block of WIDTH).

    The total takes the place of the first sum, which no other program reads. Sums of K vectors
    follow each other.
    """
    part = tl.program_id(0)
    matrix = tl.load(parts + 4 * part)
    first = tl.load(parts + 4 * part + 1)
    end = tl.load(parts + 4 * part + 2)
    nth = tl.load(parts + 4 * part + 3)
    kind = tl.load(pointers + matrix * N_POINTERS + PRODUCTS_CLASS).to(tl.int32)
    end = tl.where(kind < 0, first, end)
    lines = tl.arange(0, HEIGHT)
    width = _size(shapes, matrix, STRIDE) // 32 * 32 * K
    cols = nth * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((HEIGHT, WIDTH), ACC)
    some_squares = tl.zeros((HEIGHT,), ACC)
    square_ptr = squares + _size(shapes, matrix, FIRST_ITEM)
    sum_ptr = sums + _shape(shapes, matrix, PARTIAL) * K
    for start in tl.range(first, end, HEIGHT, num_stages=STAGES):
        rows = start + lines
        some_squares += tl.load(square_ptr + rows, mask=rows < end, other=0.0)
        there = (rows < end)[:, None] & (cols < width)[None, :]
        places = (sum_ptr + rows.to(tl.int64) * width)[:, None] + cols[None, :]
        places = tl.multiple_of(places, [1, 16])
        total += tl.load(places, mask=there, other=0.0)
    square = tl.sum(some_squares, axis=0)
    whole = tl.sum(total, axis=0)
    tl.debug_barrier()  # all of them have been read
    place = sum_ptr + first.to(tl.int64) * width
    tl.store(place + cols, whole, mask=cols < tl.where(first < end, width, 0))
    if K == 1:
        tl.store(square_ptr + first, square, mask=(nth == 0) & (first < end))


@triton.jit
def columns(
    pointers, shapes, blocks, sums, squares, zs, z_squares, inverses,
    ACC: tl.constexpr, TINY: tl.constexpr, HEIGHT: tl.constexpr, STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ``z = Wᵀt/‖t‖`` of a block of columns (matrix, nth block), and its share of ‖z‖²."""
    block = tl.program_id(0)
    matrix = tl.load(blocks + 2 * block)
    nth = tl.load(blocks + 2 * block + 1)
    n = _size(shapes, matrix, COLUMNS)
    n_items = _size(shapes, matrix, N_ITEMS)
    kind = tl.load(pointers + matrix * N_POINTERS + PRODUCTS_CLASS).to(tl.int32)
    n_items = tl.where(kind < 0, 0, n_items)  # of a matrix that is absent, the result is zero
    # Scratch rows are padded: elements past the n columns are loaded, in whole vectors, and unused.
    stride = _size(shapes, matrix, STRIDE) // 32 * 32
    cols = nth * BLOCK + tl.arange(0, BLOCK)
    lines = tl.arange(0, HEIGHT)
    some_squares = tl.zeros((HEIGHT,), ACC)
    square_ptr = squares + _size(shapes, matrix, FIRST_ITEM)
    total = tl.zeros((HEIGHT, BLOCK), ACC)
    sum_ptr = sums + _shape(shapes, matrix, PARTIAL)
    step = _size(shapes, matrix, STEP)
    for start in tl.range(0, n_items, HEIGHT * step, num_stages=STAGES):
        rows = start + lines * step
        some_squares += tl.load(square_ptr + rows, mask=rows < n_items, other=0.0)
        there = (rows < n_items)[:, None] & (cols < stride)[None, :]
        places = (sum_ptr + rows.to(tl.int64) * stride)[:, None] + cols[None, :]
        places = tl.multiple_of(places, [1, 16])
        total += tl.load(places, mask=there, other=0.0)
    _, inverse = _length_and_inverse(tl.sum(some_squares, axis=0), TINY)
    z = tl.sum(total, axis=0) * inverse
    tl.store(zs + _shape(shapes, matrix, Z) + cols, z, mask=cols < n)
    tl.store(z_squares + block, tl.sum(tl.where(cols < n, z * z, 0.0), axis=0))
    if nth == 0:
        tl.store(inverses + matrix, inverse)


@triton.jit
def _sigma_and_inverse(shapes, z_squares, matrix, TINY: tl.constexpr):
    n_blocks = _size(shapes, matrix, N_BLOCKS)
    first = z_squares + _size(shapes, matrix, FIRST_BLOCK)
    nth = tl.arange(0, SOME_BLOCKS)
    squares = tl.load(first + nth, mask=nth < n_blocks, other=0.0)
    for start in range(SOME_BLOCKS, n_blocks, SOME_BLOCKS):
        squares += tl.load(first + start + nth, mask=start + nth < n_blocks, other=0.0)
    return _length_and_inverse(tl.sum(squares, axis=0), TINY)


@triton.jit
def directions(
    pointers, shapes, blocks, zs, z_squares,
    ACC: tl.constexpr, TINY: tl.constexpr, PERMUTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store ``v = z/‖z‖`` of a block of columns, for the next iteration."""
    block = tl.program_id(0)
    matrix = tl.load(blocks + 2 * block)
    cols = tl.load(blocks + 2 * block + 1) * BLOCK + tl.arange(0, BLOCK)
    _, inverse = _sigma_and_inverse(shapes, z_squares, matrix, TINY)
    n_usable = tl.where(inverse > 0, _size(shapes, matrix, COLUMNS), 0)
    z = tl.load(zs + _shape(shapes, matrix, Z) + cols, mask=cols < n_usable, other=0.0)
    places = _pointer(pointers, matrix, V, ACC) + _in_v(shapes, matrix, cols, PERMUTED)
    tl.store(places, z * inverse, mask=cols < n_usable)


@triton.jit
def _rows_of_update(
    grad_ptr, u_ptr, t_ptr, inverse, scale, weight, v, col, row, end, n, shapes, matrix,
    TILE: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr,
    SUM: tl.constexpr, ITERATED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Store ``scale·G + weight·u·vᵀ`` in the rows ``row`` to ``end`` of a block of n columns."""
    HEIGHT: tl.constexpr = TILE // WIDTH
    if VECTOR > 1:
        n = n // VECTOR * VECTOR
    cols = col * WIDTH + tl.arange(0, WIDTH)
    v = v.to(SUM)[None, :]
    for start in range(row, end, HEIGHT):
        rows = start + tl.arange(0, HEIGHT)
        there = (rows < end)[:, None] & (cols < n)[None, :]
        places = _places(grad_ptr, rows, cols, n, shapes, matrix, TRANSPOSED)
        if VECTOR > 1:
            places = tl.multiple_of(places, [1, 16])
        grad = tl.load(places, mask=there, other=0.0).to(SUM)
        if ITERATED:
            u = tl.load(t_ptr + rows, mask=rows < end, other=0.0) * inverse
            tl.store(u_ptr + rows, u, mask=rows < tl.where(col == 0, end, 0))
        else:
            u = tl.load(u_ptr + rows, mask=rows < end, other=0.0)
        total = grad * scale + (u * weight).to(SUM)[:, None] * v
        tl.store(places, total.to(grad_ptr.dtype.element_ty), mask=there)


@triton.jit
def _v_of_update(
    v_ptr, z_ptr, inverse, col, row, n, shapes, matrix,
    WIDTH: tl.constexpr, ITERATED: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    """Return a block of v; the program of the first rows also stores it."""
    cols = col * WIDTH + tl.arange(0, WIDTH)
    v_places = v_ptr + _in_v(shapes, matrix, cols, PERMUTED)
    if ITERATED:
        # A usable new v is stored, and otherwise the old one is read: no program waits for another.
        n_usable = tl.where(inverse > 0, n, 0)
        unit = tl.load(z_ptr + cols, mask=cols < n, other=0.0) * inverse
        tl.store(v_places, unit, mask=cols < tl.where(row == 0, n_usable, 0))
        old = tl.load(v_places, mask=cols < n - n_usable, other=0.0)
        v = tl.where(cols < n_usable, unit, old)
    else:
        v = tl.load(v_places, mask=cols < n, other=0.0)
    return v


@triton.jit
def _number(
    penalties, gathered, matrix,
    FIELD: tl.constexpr, SLOT: tl.constexpr, GATHERED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return a number of the table, times the element of ``gathered`` at its slot, if it has one.

    The table's number is 1 where a tensor holds the factor or target.
    """
    number = tl.load(penalties + matrix * N_PENALTIES + FIELD).to(ACC)
    if GATHERED:
        slot = tl.load(penalties + matrix * N_PENALTIES + SLOT).to(tl.int32)
        number *= tl.load(gathered + slot, mask=slot >= 0, other=1.0).to(ACC)
    return number


@triton.jit
def _slope(
    penalties, gathered, matrix, sigma,
    SLOPED: tl.constexpr, GATHERED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return the derivative of the penalty by σ, as `spectral_core.slope`.

    Power 0 stands for the paper's penalty, whose slope is σ. A comparison with NaN is false, so a
    NaN stays NaN.
    """
    slope = sigma
    if SLOPED:
        code = tl.load(penalties + matrix * N_PENALTIES + CODE)
        target = _number(penalties, gathered, matrix, TARGET, TARGET_SLOT, GATHERED, ACC)
        over = tl.where(code == 1, 1.0, sigma - target)
        slope = tl.where(code == 0, sigma, tl.where(sigma <= target, 0.0, over))
    return slope


@triton.jit
def _scale_to_bound(
    penalties, gathered, matrix, sigma, GATHERED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Return the scale of a weight, as `scale_to` of the core, and whether there is a bound."""
    code = tl.load(penalties + matrix * N_PENALTIES + CODE)
    target = _number(penalties, gathered, matrix, TARGET, TARGET_SLOT, GATHERED, ACC)
    acts = (sigma > tl.where(code == EXACTLY, 0.0, target)) & (sigma < float("inf"))
    acts = acts & (code >= AT_MOST)
    divisor = tl.where(acts, sigma, 1.0)
    quotient = target / divisor if tl.float64 == ACC else tl.div_rn(target, divisor)
    return tl.where(acts, quotient, 1.0), code >= AT_MOST


@triton.jit(do_not_specialize=["gathered"])
def update(
    pointers, shapes, tiles, penalties, gathered, zs, z_squares, inverses, ts,
    DTYPE: tl.constexpr, ACC: tl.constexpr, SUM: tl.constexpr, TINY: tl.constexpr,
    TILE: tl.constexpr, VECTOR: tl.constexpr, CLASSES: tl.constexpr,
    ITERATED: tl.constexpr, GATHERED: tl.constexpr, SLOPED: tl.constexpr, BOUNDED: tl.constexpr,
    PERMUTED: tl.constexpr, TRANSPOSED: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Add ``factor·slope(σ)·u·vᵀ`` to G in a tile (matrix, first row, end, nth block).

    After an iteration (``ITERATED``), also store v, u and σ. A matrix whose G has the address 0
    has no gradient. Where a matrix has a bound, G is the weight itself, and is scaled. A bound that
    does not act reads and writes nothing. After iterations of several vectors (``SORTED``), v and
    u are stored already, and ``inverses`` holds σ.
    """
    tile = tl.program_id(0)
    matrix = tl.load(tiles + 4 * tile)
    row = tl.load(tiles + 4 * tile + 1)
    end = tl.load(tiles + 4 * tile + 2)
    col = tl.load(tiles + 4 * tile + 3)
    n = _size(shapes, matrix, COLUMNS)
    kind = tl.load(pointers + matrix * N_POINTERS + UPDATE_CLASS).to(tl.int32)
    grad_ptr = _pointer(pointers, matrix, G, DTYPE)
    v_ptr = _pointer(pointers, matrix, V, ACC)
    u_ptr = _pointer(pointers, matrix, U, ACC)
    sigma_ptr = _pointer(pointers, matrix, SIGMA, ACC)
    if ITERATED:
        sigma, inverse_z = _sigma_and_inverse(shapes, z_squares, matrix, TINY)
        inverse_t = tl.load(inverses + matrix)
    else:
        if SORTED:
            sigma = tl.load(inverses + matrix)
        else:
            sigma = tl.load(sigma_ptr, mask=kind >= 0, other=0.0)
        inverse_z = sigma
        inverse_t = sigma
    slope = _slope(penalties, gathered, matrix, sigma, SLOPED, GATHERED, ACC)
    weight = _number(penalties, gathered, matrix, FACTOR, FACTOR_SLOT, GATHERED, ACC) * slope
    n_grad = tl.where(tl.load(pointers + matrix * N_POINTERS + G) == 0, 0, n)
    scale = 1.0
    if BOUNDED:
        scale, has_bound = _scale_to_bound(penalties, gathered, matrix, sigma, GATHERED, ACC)
        weight = tl.where(has_bound, 0.0, weight)
        n_grad = tl.where(has_bound & (scale == 1.0), 0, n_grad)
        sigma *= scale
    if ITERATED or SORTED:
        tl.store(sigma_ptr, sigma, mask=(row == 0) & (col == 0) & (kind >= 0))
    z_ptr = zs + _shape(shapes, matrix, Z)
    t_ptr = ts + _shape(shapes, matrix, T)
    for c in tl.static_range(32):
        if (CLASSES >> c) & 1:  # noqa: SIM102 — Triton 3.3 has no `and` of both
            if kind == c:
                v = _v_of_update(
                    v_ptr, z_ptr, inverse_z, col, row, n, shapes, matrix,
                    1 << (c // 2), ITERATED, PERMUTED,
                )  # fmt: skip
                _rows_of_update(
                    grad_ptr, u_ptr, t_ptr, inverse_t, scale, weight, v, col, row, end, n_grad,
                    shapes, matrix,
                    TILE if c % 2 else TILE // 2, 1 << (c // 2), VECTOR if c % 2 else 1,
                    SUM, ITERATED, TRANSPOSED,
                )  # fmt: skip
