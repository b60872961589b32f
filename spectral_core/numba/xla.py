"""The kernels as one function of C, for XLA's foreign function interface.

An adapter registers the function with XLA. A call of it runs the step of many weights, whose
shapes are in a table: the call gets addresses alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import cpu_count
from typing import Any, NamedTuple

import numpy as np

from .engine import _kernels

# Waking a thread costs a few microseconds: not worth it for fewer elements than this.
_GRAIN = 65536
# More chunks than threads, since some threads may be busy.
_CHUNKS_A_THREAD = 2


class ForeignMatrix(NamedTuple):
    """A matrix of a `foreign_table`.

    Attributes
    ----------
    rows, columns : int
        Shape in memory.
    across : bool
        True if the rows in memory are the columns of the matrix.
    window : int
        Number of kernel positions, if they come before the channels in memory but after them in v;
        otherwise 1.
    code : int
        0 for the paper's penalty, the power of a `Slope`, or the code of a `Bound`.
    changes : bool
        True if there is a gradient, or a weight to scale.
    vectors : int
        k.
    """

    rows: int
    columns: int
    across: bool
    window: int
    code: int
    changes: bool
    vectors: int = 1


def foreign_function(kind: str, *, several: bool = False) -> int:
    """Return the address of the step for weights of a dtype, compiled at the first call.

    The function has the type ``XLA_FFI_Handler`` of XLA. Its first result is room for
    `foreign_table`'s number of elements. Its first operand is λ and target of each matrix,
    (K, 2), in the dtype of the vectors. The other operands are the weight, v and, where it changes,
    the gradient of each matrix. The other results are v, u, σ and the gradient. The results v and
    gradient are the memory of the operands. With a `Bound` there is no gradient: the last result is
    the scaled weight, in the memory of the weight. The only attribute is the table.

    Parameters
    ----------
    kind : str
        float32, float64, bfloat16 or float16.
    several : bool
        True for the step of k > 1 vectors: all matrices of a call have one vector, or none has.

    Raises
    ------
    ImportError
        If Numba is not installed, or was told not to compile.
    """
    if _kernels() is None:
        raise ImportError("Numba was told not to compile")
    address: int = (_several if several else _single)(kind).address
    return address


def _single(kind: str) -> Any:
    from . import xla_kernels

    return xla_kernels.compiled(kind)


def _several(kind: str) -> Any:
    """Return the step for several vectors: whoever has one vector never compiles it."""
    from . import xla_block_kernels

    return xla_block_kernels.compiled(kind)


def foreign_table(
    matrices: Sequence[ForeignMatrix], n_iter: int
) -> tuple[np.ndarray[Any, Any], list[int], int]:
    """Return the table of a step, the order of its matrices, and the room that it needs.

    Parameters
    ----------
    matrices : sequence of ForeignMatrix
    n_iter : int
        Power iterations, at least 1.

    Returns
    -------
    table : array of int64
    order : list of int
        The places of the matrices among the operands of the call: large ones come first.
    room : int
        Number of elements, in the dtype of the vectors.

    Examples
    --------
    >>> table, order, room = foreign_table([ForeignMatrix(2, 3, True, 1, 0, True)], 1)
    >>> order, room
    ([0], 7)
    """
    total = sum(matrix.rows * matrix.columns for matrix in matrices)
    share = max(_GRAIN, -(-total // (_CHUNKS_A_THREAD * (cpu_count() or 1))))
    pieces = [_pieces(matrix, share) for matrix in matrices]
    order = sorted(range(len(matrices)), key=lambda place: pieces[place] == 1)
    rows: list[tuple[int, ...]] = []
    chunks: list[tuple[int, ...]] = []
    room = 0
    for k, place in enumerate(order):
        matrix, count = matrices[place], pieces[place]
        rows.append((*matrix[:4], len(chunks), room, *matrix[4:]))
        own, of_chunk = _room(matrix)
        room += own
        for piece in range(count):
            first, end = (matrix.rows * i // count for i in (piece, piece + 1))
            chunks.append((k, first, end, room))
            room += of_chunk
    rows.append((0, 0, 0, 0, len(chunks), 0, 0, 0, 0))
    shared = sum(count > 1 for count in pieces)
    helpers = min(total // (2 * _GRAIN), len(chunks) - 1)
    head = [len(rows) - 1, len(chunks), shared, sum(c for c in pieces if c > 1), n_iter, helpers]
    parts = [np.asarray(part, np.int64).ravel() for part in (head, rows, chunks)]
    return np.concatenate(parts), order, room


def _room(matrix: ForeignMatrix) -> tuple[int, int]:
    """Return the room that a matrix needs, and that each of its chunks needs.

    Several vectors need an even number of elements, so that numbers in float64 are aligned.
    """
    k, n = matrix.vectors, matrix.rows if matrix.across else matrix.columns
    if k == 1:
        return 2 * n, matrix.columns
    pairs = k + k % 2
    small = 2 * (3 * k * k + 1)
    in_memory_order = pairs * n * (matrix.window > 1)
    return pairs * (n + matrix.rows) + small + in_memory_order, pairs * matrix.columns


def _pieces(matrix: ForeignMatrix, share: int) -> int:
    """Return the number of chunks of a matrix of about ``share`` elements each."""
    return max(1, min(matrix.rows, round(matrix.rows * matrix.columns / share)))
