"""The step of xla_kernels.py for k > 1 vectors, compiled when a compiled step first has several.

The arithmetic is that of block_kernels.py, and the tickets are those of xla_kernels.py. An
iteration has the stages of one vector:

1. Read each chunk. Rows of the matrix give Y and YW at once; columns give a part of Y.
2. Find the transformation that makes Y orthonormal.
3. Read columns of the matrix again, now for YW. Rows are read again only where rounding errors
   could grow.
4. Sort the rows of YW, and store u, σ and the rows from which the next iteration starts.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray

# What is kept on disk is compiled anew only where this file has changed: who changes one of these
# touches this file too.
from .block_kernels import (
    _finish,
    _orthonormalize,
    _read,
    _start_from,
)
from .block_kernels import _matrix as _rows_at
from .kernels import _compiled, _pointer, _sum_parts
from .turned_block_kernels import _permute, _times
from .xla_kernels import (
    _ACROSS,
    _CHANGES,
    _CHUNK,
    _COLUMNS,
    _PLACE,
    _ROWS,
    _VECTORS,
    _WINDOW,
    _change,
    _help,
    _inlined,
    _last,
    _leave,
    _matrix,
    _run,
    _symbol,
    _vector,
    handler,
)


@_compiled
def _shape(k, matrices):
    """Return m, n and k of a matrix, and the rows of its scratch: an even number."""
    m, n, rows = matrices[k, _ROWS], matrices[k, _COLUMNS], matrices[k, _VECTORS]
    if matrices[k, _ACROSS]:
        m, n = n, m
    return m, n, rows, rows + rows % 2


@_compiled
def _small_of(k, table, arrays):
    """Return room for three k × k matrices in float64, and for a number: 1 to read W again."""
    _, n, rows, pairs = _shape(k, table[0])
    room = arrays[1]
    address = room.ctypes.data + room.itemsize * (table[0][k, _PLACE] + pairs * n)
    small = carray(_pointer(address), (3 * rows * rows + 1,), np.float64)
    return small[:-1].reshape((3 * rows, rows)), small[-1:]


@_compiled
def _rows_of(k, table, arrays):
    """Return V, S, Y and Z of a matrix, in the order of memory: see block_kernels.py.

    The parts of Z, or of the Y of columns of the matrix, follow each other.
    """
    matrices, addresses, room = table[0], arrays[0], arrays[1]
    m, n, rows, pairs = _shape(k, matrices)
    place, first = matrices[k, _PLACE], matrices[k, _CHUNK]
    parts, count = table[1][first, 3], matrices[k + 1, _CHUNK] - first
    other = place + pairs * n + 2 * (3 * rows * rows + 1)
    S = _rows_at(room, place, pairs, n)
    if matrices[k, _ACROSS]:
        Y, Z = _rows_at(room, parts, pairs, m), _rows_at(room, other, pairs, n)
    else:
        Y, Z = _rows_at(room, other, pairs, m), _rows_at(room, parts, count * pairs, n)
    if matrices[k, _WINDOW] > 1:
        V = _rows_at(room, other + pairs * matrices[k, _ROWS], rows, n)
    else:
        V = carray(_pointer(addresses[k, 2]), (rows, n), room.dtype)
    return V, S, Y, Z


@_compiled
def _state_of(k, table, arrays):
    """Return the V of the state: its columns are in the matrix's order."""
    _, n, rows, _ = _shape(k, table[0])
    return carray(_pointer(arrays[0][k, 2]), (rows, n), arrays[1].dtype)


@_compiled
def _begin(k, table, arrays):
    """Store V in the order of memory, and V plus the core's `fresh_direction` in S."""
    window = table[0][k, _WINDOW]
    V, S, _, _ = _rows_of(k, table, arrays)
    if window > 1:
        _permute(_state_of(k, table, arrays), V.shape[0], window, V, False)
    _start_from(V, S, window)


@_compiled
def _read_chunk(p, again, table, arrays):
    """Compute both products of a chunk, or what its rows add to one product.

    Columns of the matrix, weighted by S, add up to Y as rows, weighted by Y, add up to Z. So one
    function does both.
    """
    chunks = table[1]
    k, lo, hi, place = chunks[p, 0], chunks[p, 1], chunks[p, 2], chunks[p, 3]
    across = table[0][k, _ACROSS] != 0
    _, S, Y, _ = _rows_of(k, table, arrays)
    part = _rows_at(arrays[1], place, S.shape[0], table[0][k, _COLUMNS])
    _read(_matrix(k, 0, table, arrays), S, S if across else Y, part, lo, hi, across or again)


@_compiled
def _between(k, table, arrays):
    """Find the transformation that makes Y orthonormal."""
    _, _, Y, _ = _rows_of(k, table, arrays)
    small, again = _small_of(k, table, arrays)
    if table[0][k, _ACROSS]:
        first = table[0][k, _CHUNK]
        place, count = table[1][first, 3], table[0][k + 1, _CHUNK] - first
        _sum_parts(arrays[1][place : place + count * Y.size], Y.size)
    known = _orthonormalize(Y, small, np.finfo(arrays[1].dtype).eps)
    again[0] = 0.0 if known else 1.0


@_compiled
def _second(p, table, arrays):
    """Compute the second product of a chunk where it is not known."""
    chunks = table[1]
    k = chunks[p, 0]
    if table[0][k, _ACROSS]:
        _, _, Y, Z = _rows_of(k, table, arrays)
        _times(_matrix(k, 0, table, arrays), Y, Z, chunks[p, 1], chunks[p, 2])
    elif _small_of(k, table, arrays)[1][0] > 0:
        _read_chunk(p, True, table, arrays)


@_compiled
def _end(k, table, arrays):
    """Store u, σ and the next V."""
    window = table[0][k, _WINDOW]
    V, S, Y, Z = _rows_of(k, table, arrays)
    u = _vector(arrays[0][k, 3], Y.shape[1], arrays[1])
    sigma = _vector(arrays[0][k, 4], 1, arrays[1])
    small, eps = _small_of(k, table, arrays)[0], np.finfo(arrays[1].dtype).eps
    sigma[0] = _finish(Z, Y, small, V, S, u, eps)
    if window > 1:
        _permute(V, V.shape[0], window, _state_of(k, table, arrays), True)


@_inlined
def _stage(stage, first, end, k, table, arrays):
    """Work on the chunks from ``first`` to ``end``, or on matrix k, which has several vectors."""
    if stage == 0:
        _begin(k, table, arrays)
    elif stage == 1:
        for p in range(first, end):
            _read_chunk(p, False, table, arrays)
    elif stage == 2:
        _between(k, table, arrays)
    elif stage == 3:
        for p in range(first, end):
            _second(p, table, arrays)
    elif stage == 4:
        _end(k, table, arrays)
    elif stage == 5:
        for p in range(first, end):
            if table[0][table[1][p, 0], _CHANGES]:
                _change(p, table, arrays)
    else:
        _last(k, table, arrays)


def _float32_task(control):
    vectors = carray(_pointer(control), (0,), np.float32)
    _help(_stage, control, vectors, vectors)
    _leave(control)


def _float64_task(control):
    vectors = carray(_pointer(control), (0,), np.float64)
    _help(_stage, control, vectors, vectors)
    _leave(control)


def _bfloat16_task(control):
    like = carray(_pointer(control), (0,), np.uint16)
    _help(_stage, control, like, carray(_pointer(control), (0,), np.float32))
    _leave(control)


def _float16_task(control):
    like = carray(_pointer(control), (0,), np.int16)
    _help(_stage, control, like, carray(_pointer(control), (0,), np.float32))
    _leave(control)


_TASK_NAME = "spectral_core_xla_block_task_"
_float32_address = _symbol(_TASK_NAME + "float32", "address")
_float64_address = _symbol(_TASK_NAME + "float64", "address")
_bfloat16_address = _symbol(_TASK_NAME + "bfloat16", "address")
_float16_address = _symbol(_TASK_NAME + "float16", "address")


def _float32_step(frame):
    return _run(frame, _float32_address(0))


def _float64_step(frame):
    return _run(frame, _float64_address(0))


def _bfloat16_step(frame):
    return _run(frame, _bfloat16_address(0))


def _float16_step(frame):
    return _run(frame, _float16_address(0))


_FUNCTIONS = {
    "float32": (_float32_task, _float32_step),
    "float64": (_float64_task, _float64_step),
    "bfloat16": (_bfloat16_task, _bfloat16_step),
    "float16": (_float16_task, _float16_step),
}


@lru_cache
def compiled(kind: str) -> Any:
    """Return the compiled step for weights of a dtype: its attribute ``address`` is for XLA."""
    return handler(_TASK_NAME + kind, *_FUNCTIONS[kind])
