"""A step compiled by Numba, for arrays in the memory of the CPU.

It reads a weight once where the plain step reads it twice, and takes all weights of a model in one
call. NumPy and PyTorch cannot be told to: their matrix–vector products fall short of the memory's
speed, and a small layer costs a dozen of their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from ._arrays import Array
from .power import PowerIteration
from .step import (
    Advance,
    Step,
    Task,
    divided_step,
    last_of,
    overlapping,
    plain_step_,
    sharing_memory,
)

# A thread is not worth waking (a few microseconds) for fewer elements than this.
_GRAIN = 65536

# Of sets of shapes: several optimizers take turns.
_DIVISIONS = 16

_VECTORS = {"float32": "float32", "float64": "float64", "uint16": "float32"}


class Memory(NamedTuple):
    """How to find the arrays of a library in memory."""

    address: Callable[[Array], int]
    plain: Callable[[Array], bool]  # elements one after another, as they are
    dtypes: Mapping[Any, str]  # NumPy's name of a dtype; uint16 stands for bfloat16
    threads: Callable[[], int | None]  # at most; None: as many as Numba is set to use


NUMPY = Memory(
    address=lambda x: x.__array_interface__["data"][0],
    plain=lambda x: x.flags.c_contiguous and x.flags.aligned,
    dtypes={np.dtype(name): name for name in ("float32", "float64")},
    threads=lambda: None,
)


class NumbaStep:
    """A step in place, of the tasks whose matrix is the tensor reshaped, as it lies in memory.

    Parameters
    ----------
    memory : Memory
        Of the library that the arrays come from.
    owned : bool
        Whether v, and the last σ and u of every task, are the caller's to be written into.
        Otherwise they stay as they are, and new ones are made.
    other : Step
        Takes the tasks that this does not.

    Raises
    ------
    ImportError
        If Numba is not installed.

    Notes
    -----
    It may be called from several threads, and is then one call after the other.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> from spectral_core.numba_step import NumbaStep
    >>> weights, grads = {"w": np.array([[3.0, 4.0]])}, {"w": np.zeros((1, 2))}
    >>> state = sc.add_gradient_(weights, grads, sc.init(weights), factor=0.1, step=NumbaStep())
    >>> np.round(grads["w"], 4)
    array([[0.3, 0.4]])
    """

    in_place = True

    def __init__(
        self, memory: Memory = NUMPY, *, owned: bool = False, other: Step = plain_step_
    ) -> None:
        try:
            from . import numba_kernels
        except ImportError as error:
            raise ImportError("NumbaStep needs Numba: pip install spectral-core[numba]") from error
        self._kernels = numba_kernels
        self._memory = memory
        self._owned = owned
        self._steps: dict[str | None, Step] = {None: other}
        self._steps.update({kind: partial(self._advance, kind) for kind in _VECTORS})
        self._division_of = lru_cache(_DIVISIONS)(Division)
        self._lock = Lock()  # of tables and scratch: the kernel lets other threads run

    def __call__(self, tasks: Sequence[Task], n_iter: int) -> Advance:
        """Advance all tasks: those that this does not take by ``other``."""
        shared = sharing_memory(tasks, self._memory.address)

        def step_of(task: Task) -> Step:
            return self._steps[None if task.name in shared else self._kind(task)]

        return divided_step(tasks, n_iter, step_of)

    def repeated(
        self, tasks: Sequence[Task], n_iter: int
    ) -> Callable[[Sequence[Array]], bool] | None:
        """The step for other gradients of these tasks, if it can be made in one call.

        Returns
        -------
        callable or None
            ``repeat(grads)`` makes the step without a check but that each gradient is plain; it
            returns False, and has done nothing, where one is not. Only for owned vectors, and
            while weights and vectors stay where they are.
        """
        kinds = {self._kind(task) for task in tasks}
        kind = kinds.pop() if len(kinds) == 1 and self._owned else None
        if (
            kind is None
            or not all(isinstance(task.factor, float) for task in tasks)
            or sharing_memory(tasks, self._memory.address)
        ):
            return None
        division, memory = self._division(kind, tasks), self._memory
        # Tables of its own: those of the division are filled anew by every other step.
        matrices = division.matrices(self._addresses(tasks)).copy()
        factors = division.of_each(np.asarray([task.factor for task in tasks]))
        sizes = [task.grad.nbytes for task in tasks]
        threads, known = memory.threads(), [memory.address(task.grad) for task in tasks]

        def repeat(grads: Sequence[Array]) -> bool:
            nonlocal known
            addresses = [memory.address(grad) for grad in grads]
            if memory.threads() != threads or not all(map(memory.plain, grads)):
                return False
            if addresses != known and overlapping(zip(addresses, sizes, strict=True)):
                return False
            known = addresses
            with self._lock:
                division.place_grads(matrices, addresses)
                self._call(division, matrices, factors, n_iter)
            return True

        return repeat

    def _call(
        self,
        division: Division,
        matrices: np.ndarray[Any, Any],
        factors: np.ndarray[Any, Any],
        n_iter: int,
    ) -> None:
        self._kernels.run(
            len(division.chunks) - 1,
            *(matrices, division.pieces, division.chunks, factors),
            *(division.like, division.scratch, n_iter),
        )

    def _kind(self, task: Task) -> str | None:
        """The name of the task's dtype, or None for a task that this does not take."""
        weight, grad, plan, memory = task.weight, task.grad, task.plan, self._memory
        kind = memory.dtypes.get(weight.dtype)
        if kind is None or task.v.ndim != len(plan.right) or not memory.plain(weight):
            return None
        if not (grad is None or (grad.dtype == weight.dtype and memory.plain(grad))):
            return None
        vectors = (task.v,) if task.last is None else (task.v, task.last.u, task.last.sigma)
        for x in vectors:
            if memory.dtypes.get(x.dtype) != _VECTORS[kind] or not memory.plain(x):
                return None
        return kind if plan.reshapes else None

    def _advance(self, kind: str, tasks: Sequence[Task], n_iter: int) -> Advance:
        if n_iter == 0:
            for task in tasks:
                last_of(task)  # or the error that says which has none
        if not self._owned:
            tasks = [_with_own_vectors(task) for task in tasks]
        with self._lock:
            division = self._division(kind, tasks)
            factors = division.of_each(np.asarray([float(task.factor) for task in tasks]))
            self._call(division, division.matrices(self._addresses(tasks)), factors, n_iter)
        return Advance([task.grad for task in tasks], [last_of(task) for task in tasks])

    def _addresses(self, tasks: Sequence[Task]) -> list[tuple[int, ...]]:
        address = self._memory.address
        return [
            (
                address(task.weight),
                0 if task.grad is None else address(task.grad),
                address(task.v),
                address(last_of(task).u),
                address(last_of(task).sigma),
            )
            for task in tasks
        ]

    def _division(self, kind: str, tasks: Sequence[Task]) -> Division:
        shapes = tuple(task.plan.matrix for task in tasks)
        # Numba's threads are not even counted for what one thread does: that would start them.
        few = sum(map(prod, shapes)) < 2 * _GRAIN
        threads = 1 if few else self._kernels.threads(self._memory.threads())
        return self._division_of(kind, shapes, threads)


class Division:
    """How the rows of some matrices are dealt to threads: an equal number of elements to each.

    Parameters
    ----------
    kind : str
        The elements' dtype.
    shapes : sequence of tuple of int
        (*stack, m, n) of each task.
    threads : int
        At most so many.
    """

    def __init__(self, kind: str, shapes: Sequence[tuple[int, ...]], threads: int) -> None:
        counts = [prod(shape[:-2]) for shape in shapes]
        self._task = np.repeat(np.arange(len(shapes)), counts)
        self._stacked = len(self._task) > len(shapes)
        m, n = np.asarray([shape[-2:] for shape in shapes])[self._task].T
        total = int(m @ n)
        threads = max(1, min(threads, total // _GRAIN))
        pieces = list(_pieces(m.tolist(), n.tolist(), -(-total // threads)))
        columns = n[[piece[1] for piece in pieces]]
        place = np.cumsum(columns) - columns
        self.pieces = np.asarray([(*piece[1:], p) for piece, p in zip(pieces, place, strict=True)])
        thread = [piece[0] for piece in pieces]
        self.chunks = np.searchsorted(thread, np.arange(threads + 1))
        self.scratch = np.empty(int(columns.sum()), _VECTORS[kind])
        self.like = np.empty(0, kind)
        self._table = np.zeros((len(m) + 1, 8), np.int64)
        self._table[:-1, 0], self._table[:-1, 1] = m, n
        self._table[:, 7] = np.searchsorted(self.pieces[:, 0], np.arange(len(m) + 1))
        within = np.concatenate([np.arange(count) for count in counts])
        element, vector = self.like.itemsize, self.scratch.itemsize
        strides = [element * m * n, element * m * n, vector * n, vector * m, vector + 0 * m]
        self._offsets = within[:, None] * np.stack(strides, axis=1)

    def of_each(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The value of each task for each of its matrices."""
        return values[self._task] if self._stacked else values

    def matrices(self, addresses: Sequence[tuple[int, ...]]) -> np.ndarray[Any, Any]:
        """The kernel's table of matrices, the arrays of each task lying at these addresses."""
        start = self.of_each(np.asarray(addresses, np.int64))
        if self._stacked:
            start = np.where(start > 0, start + self._offsets, 0)
        self._table[:-1, 2:7] = start
        return self._table

    def place_grads(self, matrices: np.ndarray[Any, Any], addresses: list[int]) -> None:
        """Write the gradients' addresses into a table of matrices."""
        if self._stacked:
            matrices[:-1, 3] = np.asarray(addresses)[self._task] + self._offsets[:, 1]
        else:
            matrices[:-1, 3] = addresses


def _pieces(ms: list[int], ns: list[int], share: int) -> Iterator[tuple[int, int, int, int]]:
    """(thread, matrix, first row, end): rows in order, about ``share`` elements to a thread."""
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


def _with_own_vectors(task: Task) -> Task:
    """The task with a v, σ and u of its own to be written into."""
    xp, plan = task.xp, task.plan
    v = xp.asarray(task.v, copy=True)
    if task.last is not None:
        u, sigma = (xp.asarray(x, copy=True) for x in (task.last.u, task.last.sigma))
    else:
        u, sigma = (xp.zeros(plan.matrix[:-k], dtype=v.dtype, device=v.device) for k in (1, 2))
    return task._replace(v=v, last=PowerIteration(sigma, u, v))
