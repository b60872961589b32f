"""Divide matrices among threads, and make the tables that the kernels read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

# Waking a thread costs a few microseconds: not worth it for fewer elements than this.
GRAIN = 65536

# As in turned_block_kernels.py.
_TURNED_AT_ONCE = 4

# As in lane_kernels.py: matrices of a stack that are worked on together.
LANES = 16
# Larger matrices fill the processor's vectors by themselves.
_SMALL = 32

VECTORS = {"float32": "float32", "float64": "float64", "uint16": "float32", "int16": "float32"}


class Form(NamedTuple):
    """The numbers that tell the kernels how a matrix is in memory."""

    window: int  # kernel positions that come before the inputs; otherwise 1
    # 0 if the rows of W follow each other; 1 if its columns do; 1 plus the number of kernel
    # positions if outputs are between inputs and kernel, as in a transposed convolution.
    turned: int
    apart: bool = False  # True if the groups of a turned matrix are between its columns


PLAIN = Form(1, 0)


class Division:
    """Divide the rows of some matrices among threads: an equal number of elements for each.

    Parameters
    ----------
    kind : str
        Dtype of the elements.
    shapes : sequence of tuple of int
        (*stack, m, n) of each job.
    threads : int
        Largest number of threads.
    rows : int
        Number of vectors of each matrix.
    forms : sequence of Form, optional
        The form of each job's matrix in memory. The default is rows that follow each other.
    """

    def __init__(
        self,
        kind: str,
        shapes: Sequence[tuple[int, ...]],
        threads: int,
        rows: int = 1,
        forms: Sequence[Form] = (),
    ) -> None:
        counts = [prod(shape[:-2]) for shape in shapes]
        self._job = np.repeat(np.arange(len(shapes)), counts)
        self._stacked = len(self._job) > len(shapes)
        m, n = np.asarray([shape[-2:] for shape in shapes])[self._job].T
        total = int((m * n).sum())
        threads = max(1, min(threads, total // GRAIN))
        windows, swap, apart = np.asarray(forms or [PLAIN] * len(shapes))[self._job].T
        window = np.maximum(swap - 1, 1)
        height, width = np.where(swap, n // window, m), np.where(swap, m * window, n)
        chunks = list(_chunks(height.tolist(), width.tolist(), -(-total // threads)))
        room = 1 if rows == 1 else rows + rows % 2  # the kernels take rows in pairs
        size = np.where(swap > 1, room * m + _TURNED_AT_ONCE * width, room * width)
        if rows == 1:
            size = np.where(swap > 1, 2 * width + 3 * window, width)
        columns = size[[chunk[1] for chunk in chunks]]
        place = np.cumsum(columns) - columns
        self.chunks = np.asarray([(*chunk[1:], p) for chunk, p in zip(chunks, place, strict=True)])
        thread = [chunk[0] for chunk in chunks]
        self.threads = threads
        self.parts = np.searchsorted(thread, np.arange(threads + 1))
        self.scratch = np.empty(int(columns.sum()), VECTORS[kind])
        self.starts = np.empty(room * int(n.sum()), VECTORS[kind])
        self.like = np.empty(0, kind)
        self._table = np.zeros((len(m) + 1, 12), np.int64)
        self._table[:-1, 0], self._table[:-1, 1] = m, n
        self._table[:-1, 8] = room * (np.cumsum(n) - n)
        self._table[:-1, 9], self._table[:-1, 10] = windows, swap
        count_of = np.asarray(counts)[self._job]
        self._table[:-1, 11] = np.where(apart, m * count_of, m)
        self._table[:, 7] = np.searchsorted(self.chunks[:, 0], np.arange(len(m) + 1))
        within = np.concatenate([np.arange(count) for count in counts])
        element, vector = self.like.itemsize, self.scratch.itemsize
        stride = element * np.where(apart, m, m * n)
        strides = [stride, stride, vector * rows * n, vector * m, vector + 0 * m]
        self._offsets = within[:, None] * np.stack(strides, axis=1)
        # More arguments of the kernels for several vectors.
        self.block: tuple[np.ndarray[Any, Any], ...] = ()
        self.in_order = True
        if rows > 1:
            lefts = np.empty(room * int(m.sum()), VECTORS[kind])
            small = np.empty((len(m), 3, rows, rows))
            self.block = room * (np.cumsum(m) - m), lefts, small
            self.in_order = bool((windows == 1).all() and not swap.any())
            if swap.any():
                self.block += (np.empty_like(self.starts),)

    def of_each(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the value of each job for each of its matrices."""
        return values[self._job] if self._stacked else values

    def matrices(self, addresses: Sequence[tuple[int, ...]]) -> np.ndarray[Any, Any]:
        """Return the kernel's table for jobs whose arrays are at these addresses."""
        start = self.of_each(np.asarray(addresses, np.int64))
        if self._stacked:
            start = np.where(start > 0, start + self._offsets, 0)
        table = self._table.copy()
        table[:-1, 2:7] = start
        return table

    def place_grads(self, matrices: np.ndarray[Any, Any], addresses: Sequence[int]) -> None:
        """Write the gradients' addresses into a table of matrices; 0 is no gradient."""
        if self._stacked:
            start = np.asarray(addresses, np.int64)[self._job]
            matrices[:-1, 3] = np.where(start > 0, start + self._offsets[:, 1], 0)
        else:
            matrices[:-1, 3] = addresses


class Stacks:
    """Hold what the kernels for stacks of small matrices need: see lane_kernels.py.

    The parameters are those of `Division`, but for the threads.
    """

    threads = 1
    block: tuple[np.ndarray[Any, Any], ...] = ()

    def __init__(self, kind: str, shapes: Sequence[tuple[int, ...]], forms: Sequence[Form]) -> None:
        self._table = np.zeros((len(shapes), 12), np.int64)
        rows = 0
        for row, (*stack, m, n), form in zip(self._table, shapes, forms, strict=True):
            count = prod(stack)
            steps = (
                (m, 1, m * count) if form.apart else (m * n, 1, m) if form.turned else (m * n, n, 1)
            )
            row[:] = count, m, n, 0, 0, 0, 0, 0, *steps, form.window
            rows = max(rows, m * n + 3 * n + m + 1)
        self.room = (
            np.empty(0, kind),
            np.empty((rows, LANES), VECTORS[kind]),
            np.empty((3, LANES)),
        )

    def of_each(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the value of each job: the kernels know stacks."""
        return values

    def matrices(self, addresses: Sequence[tuple[int, ...]]) -> np.ndarray[Any, Any]:
        """Return the kernel's table for jobs whose arrays are at these addresses."""
        table = self._table.copy()
        table[:, 3:8] = addresses
        return table

    def place_grads(self, matrices: np.ndarray[Any, Any], addresses: Sequence[int]) -> None:
        """Write the gradients' addresses into a table; 0 is no gradient."""
        matrices[:, 4] = addresses


def is_small_stack(matrix: tuple[int, ...], form: Form) -> bool:
    """Return True for a stack of many small matrices, which has kernels of its own."""
    *stack, m, n = matrix
    return prod(stack) >= LANES and m * n <= _SMALL and form.turned < 2


def _chunks(ms: list[int], ns: list[int], share: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (thread, matrix, first row, end) in order, about ``share`` elements for a thread."""
    thread, room = 0, share
    for k, (m, n) in enumerate(zip(ms, ns, strict=True)):
        row = 0
        while row < m:
            end = min(m, row + max(1, -(-room // n)))
            yield thread, k, row, end
            room -= (end - row) * n
            row = end
            if room <= 0:
                thread, room = thread + 1, share
