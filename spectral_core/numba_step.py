"""A step compiled by Numba, for arrays in the memory of the CPU.

It reads a weight once where the plain step reads it twice, and takes all weights of a model in one
call. NumPy and PyTorch cannot be told to: their matrix–vector products fall short of the memory's
speed, and a small layer costs a dozen of their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ._arrays import Array
from .power import PowerIteration
from .step import Advance, Step, Task, divided_step, last_of, overlapping, plain_step_

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
    threads: Callable[[], int | None]  # None: as many as Numba has


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
        Whether v, and the last σ and u of every task, are the caller's to be written into, and no
        two gradients share memory. Otherwise the vectors stay as they are, and new ones are made.
    other : Step
        Takes the tasks that this does not.

    Raises
    ------
    ImportError
        If Numba is not installed.

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
        self._divisions: dict[Any, Division] = {}

    def __call__(self, tasks: Sequence[Task], n_iter: int) -> Advance:
        """Advance all tasks: those that this does not take by ``other``."""
        shared = set() if self._owned else self._sharing_memory(tasks)

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
        if kind is None or not all(isinstance(task.factor, float) for task in tasks):
            return None
        division, memory = self._division(kind, tasks), self._memory
        # Tables of its own: those of the division are filled anew by every other step.
        matrices = division.matrices(self._addresses(tasks)).copy()
        factors = division.of_each(np.asarray([task.factor for task in tasks]))
        arguments = (division.pieces, division.chunks, factors, division.like, division.scratch)
        threads, n_threads = memory.threads(), len(division.chunks) - 1
        call, advance = self._kernels.with_threads, self._kernels.advance

        def repeat(grads: Sequence[Array]) -> bool:
            if memory.threads() != threads or not all(map(memory.plain, grads)):
                return False
            division.place_grads(matrices, list(map(memory.address, grads)))
            call(n_threads, advance, matrices, *arguments, n_iter)
            return True

        return repeat

    def _sharing_memory(self, tasks: Sequence[Task]) -> set[str]:
        there = [task for task in tasks if task.grad is not None]
        ranges = [(self._memory.address(task.grad), task.grad.nbytes) for task in there]
        return {there[i].name for i in overlapping(ranges)}

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
        return kind if plan.order == tuple(range(len(plan.order))) else None

    def _advance(self, kind: str, tasks: Sequence[Task], n_iter: int) -> Advance:
        if not self._owned:
            tasks = [_with_own_vectors(task) for task in tasks]
        division = self._division(kind, tasks)
        self._kernels.with_threads(
            len(division.chunks) - 1,
            self._kernels.advance,
            division.matrices(self._addresses(tasks)),
            division.pieces,
            division.chunks,
            division.of_each(np.asarray([float(task.factor) for task in tasks])),
            division.like,
            division.scratch,
            n_iter,
        )
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
        threads, shapes = self._memory.threads(), tuple(task.plan.matrix for task in tasks)
        key = kind, threads, shapes
        if key not in self._divisions:
            if len(self._divisions) == _DIVISIONS:
                self._divisions.pop(next(iter(self._divisions)))
            most = self._kernels.most_threads()
            self._divisions[key] = Division(kind, shapes, min(threads or most, most))
        return self._divisions[key]


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
