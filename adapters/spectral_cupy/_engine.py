"""The step of all matrices of a model in a fixed number of kernel launches.

What the blocks of ``kernels.cu`` take, and where they find it, is worked out here, apart from
CuPy: a `Runtime` holds the few things that need a device. The tests bring one of their own.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from spectral_core.power import PowerIteration
from spectral_core.step import Advance, Step, Task, overlapping

Array: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]
Table: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

# As in kernels.cu, where a test reads them.
THREADS = 512
WARP = 32
MAX_TILE = 256
FIRST, FRESH, ADD = 1, 2, 4

# H100: two blocks for each of its 132 multiprocessors, and a tile that with those of the other
# blocks fits its L1 and L2 caches. On another device they are not wrong, only less apt.
_BLOCKS = 264
_LEAST_WORK = 8192  # elements of a block: less is not worth a sum of its own
_LEAST_ROWS = 8  # of a block: its sums over the rows take 1/8 of the memory of its weights
_TILE_BYTES = 65536
_LARGEST = 1 << 30  # rows or columns, which the kernels count in 32 bits

_CTYPES = {"float16": "__half", "float32": "float", "float64": "double"}


class Kernels(NamedTuple):
    """The dtypes of weights and gradients that one compilation of the kernels is for."""

    weight: str
    grad: str

    @property
    def real(self) -> str:
        """The dtype of the iteration."""
        return "float64" if self.weight == "float64" else "float32"

    @property
    def options(self) -> tuple[str, ...]:
        """The definitions that ``kernels.cu`` asks for, as options of a compiler."""
        wide = "float64" if "float64" in self else "float32"
        defined = {
            "WEIGHT": _CTYPES[self.weight],
            "GRAD": _CTYPES[self.grad],
            "REAL": _CTYPES[self.real],
            "SUM": _CTYPES[wide],
            "TINY": repr(float(np.finfo(self.real).smallest_normal)),
        }
        half = ("-DSPECTRAL_HALF",) if "float16" in self else ()
        return (*(f"-DSPECTRAL_{name}={value}" for name, value in defined.items()), *half)


class Runtime(Protocol):
    """What the step needs of a device."""

    def owns(self, x: Array) -> bool:
        """Whether ``x`` is an array of this runtime."""

    def place(self, x: Array) -> Hashable:
        """Where work on ``x`` goes: its device and that device's current stream."""

    def at(self, place: Any) -> AbstractContextManager[Any]:
        """A context in which the methods below work there."""

    def address(self, x: Array) -> int:
        """The address of the first element."""

    def upload(self, table: Table) -> Array:
        """A copy of ``table`` on the device; nothing waits for it."""

    def empty(self, size: int, dtype: str) -> Array:
        """A new array of one axis."""

    def view(self, x: Array, start: int, shape: Shape) -> Array:
        """The elements of ``x`` from ``start`` on, in another shape, without a copy."""

    def launch(self, kernels: Kernels, name: str, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel of ``kernels.cu``."""


class Matrix(NamedTuple):
    """A row of the table of matrices: the struct of this name in ``kernels.cu``."""

    task: int
    entry: int
    rows: int
    columns: int
    block_rows: int
    tile_rows: int
    width: int
    row_block: int
    row_blocks: int
    column_block: int
    column_blocks: int
    x: int
    y: int
    partial: int
    x_squares: int
    x_scales: int
    y_squares: int
    out_u: int
    out_v: int
    out_sigma: int


class Tiling(NamedTuple):
    """How the rows of a matrix are shared among blocks and threads."""

    block_rows: int
    tile_rows: int
    width: int


class Places(NamedTuple):
    """Where the results of a task begin."""

    sigma: int
    u: int
    v: int


@dataclass(frozen=True)
class Geometry:
    """The tables that follow from the shapes of a group's matrices, and from nothing else."""

    table: Table  # rows of `Matrix`, then the matrix of each block of `rows` and of `columns`
    matrices: int
    row_blocks: int
    column_blocks: int
    scratch: int
    results: int
    places: tuple[Places, ...]


def tiling(rows: int, columns: int, itemsize: int, work: int) -> Tiling:
    """Divide a matrix so that a block gets about ``work`` elements."""
    block_rows = min(rows, max(_LEAST_ROWS, work // columns))
    fit = _TILE_BYTES // (columns * itemsize)
    tile_rows = min(block_rows, MAX_TILE, max(1, fit))
    # As many threads a row as make all of them busy with a tile; at least a sector of memory.
    least, most = min(8, _power_of_two(columns)), min(THREADS, _power_of_two(columns))
    width = min(most, max(least, THREADS // _power_of_two(tile_rows)))
    return Tiling(block_rows, tile_rows, width)


def geometry(shapes: Sequence[Shape], itemsize: int) -> Geometry:
    """The tables of matrices, or stacks of them, of these shapes."""
    work = max(_LEAST_WORK, -(-sum(map(prod, shapes)) // _BLOCKS))
    matrices: list[Matrix] = []
    places: list[Places] = []
    row_blocks = column_blocks = scratch = results = 0
    for task, (*stack, m, n) in enumerate(shapes):
        count = prod(stack)
        at = Places(results, results + count, results + count + count * m)
        places.append(at)
        results = at.v + count * n
        tiles = tiling(m, n, itemsize, work)
        by_rows, by_columns = -(-m // tiles.block_rows), -(-n // WARP)
        for entry in range(count):
            x, y, partial = scratch, scratch + m, scratch + m + n
            x_squares = partial + by_rows * n
            x_scales = x_squares + by_rows
            y_squares = x_scales + by_rows
            scratch = y_squares + by_columns
            blocks = (row_blocks, by_rows, column_blocks, by_columns)
            found = (at.u + entry * m, at.v + entry * n, at.sigma + entry)
            matrices.append(
                Matrix(
                    *(task, entry, m, n, *tiles, *blocks),
                    *(x, y, partial, x_squares, x_scales, y_squares, *found),
                )
            )
            row_blocks += by_rows
            column_blocks += by_columns
    numbers = np.arange(len(matrices), dtype=np.int64)
    table = np.concatenate(
        [
            np.asarray(matrices, dtype=np.int64).ravel(),
            np.repeat(numbers, [matrix.row_blocks for matrix in matrices]),
            np.repeat(numbers, [matrix.column_blocks for matrix in matrices]),
        ]
    )
    return Geometry(
        table, len(matrices), row_blocks, column_blocks, scratch, results, tuple(places)
    )


class _Group(NamedTuple):
    """What goes into one launch."""

    place: Hashable
    kernels: Kernels


@dataclass
class _Kept:
    """What a group had the last time, and has again if nothing changed."""

    shapes: tuple[Shape, ...] = ()
    geometry: Geometry | None = None
    uploaded: dict[str, tuple[Table, Array]] = field(default_factory=dict)


class _Job(NamedTuple):
    """A group's launches, ready to go."""

    group: _Group
    geometry: Geometry
    arguments: tuple[Any, ...]  # all but the work table and the flags
    out: Array


class FusedStep:
    """A `Step` that takes all matrices at once, and hands on to another what it cannot take.

    It takes contiguous real weights and gradients whose matrix is the tensor reshaped. One object
    keeps its tables from step to step, and sends them to the device again where they changed.

    Parameters
    ----------
    runtime : Runtime
    plain : Step
        For all other tasks; it writes into the gradients.
    """

    in_place = True

    def __init__(self, runtime: Runtime, plain: Step) -> None:
        self._runtime = runtime
        self._plain = plain
        self._kept: dict[_Group, _Kept] = {}

    def __call__(self, tasks: Sequence[Task], n_iter: int) -> Advance:
        """Lines 5–9 of Algorithm 1 (`spectral_core.step`)."""
        groups, rest = self._divided(tasks, n_iter)
        triples: dict[int, PowerIteration] = {}
        # First all that can go wrong, so that a gradient is not left with half of a step.
        jobs = [
            (indices, self._prepared(group, [tasks[i] for i in indices], n_iter))
            for group, indices in groups.items()
        ]
        if rest:
            found = self._plain([tasks[i] for i in rest], n_iter).triples
            triples.update(zip(rest, found, strict=True))
        for indices, job in jobs:
            chosen = [tasks[i] for i in indices]
            self._run(job, n_iter)
            found = self._triples(job, chosen, n_iter)
            triples.update(zip(indices, found, strict=True))
        return Advance([task.grad for task in tasks], [triples[i] for i in range(len(tasks))])

    def _divided(
        self, tasks: Sequence[Task], n_iter: int
    ) -> tuple[dict[_Group, list[int]], list[int]]:
        """The indices of the tasks that can go together, and of the others."""
        groups: dict[_Group, list[int]] = {}
        rest = []
        fits = [self._fits(task, n_iter) for task in tasks]
        fitting = [i for i, fit in enumerate(fits) if fit]
        grads = [tasks[i].grad for i in fitting]
        for k in overlapping((self._runtime.address(grad), grad.nbytes) for grad in grads):
            fits[fitting[k]] = False
        for i, task in enumerate(tasks):
            if fits[i]:
                kernels = Kernels(task.weight.dtype.name, task.grad.dtype.name)
                group = _Group(self._runtime.place(task.weight), kernels)
                groups.setdefault(group, []).append(i)
            else:
                rest.append(i)
        return groups, rest

    def _fits(self, task: Task, n_iter: int) -> bool:
        weight, grad, plan = task.weight, task.grad, task.plan
        if not (
            self._runtime.owns(weight)
            and grad is not None
            and {weight.dtype.name, grad.dtype.name} <= _CTYPES.keys()
            and plan.reshapes
            and max(plan.matrix[-2:]) < _LARGEST
            and weight.flags.c_contiguous
            and grad.flags.c_contiguous
        ):
            return False
        real = Kernels(weight.dtype.name, grad.dtype.name).real
        needed = [(task.v, plan.right)]
        if n_iter == 0:
            if task.last is None:
                return False
            sigma, u, v = task.last
            needed = [(sigma, plan.matrix[:-2]), (u, plan.matrix[:-1]), (v, plan.right)]
        place = self._runtime.place
        return all(
            x.dtype.name == real
            and tuple(x.shape) == shape
            and x.flags.c_contiguous
            and place(x) == place(weight)
            for x, shape in needed
        ) and (
            isinstance(task.factor, float)
            or (
                task.factor.dtype.name in ("float32", "float64")
                and place(task.factor) == place(weight)
            )
        )

    def _prepared(self, group: _Group, tasks: list[Task], n_iter: int) -> _Job:
        kept = self._kept.setdefault(group, _Kept())
        shapes = tuple(task.plan.matrix for task in tasks)
        if kept.geometry is None or kept.shapes != shapes:
            kept.geometry = geometry(shapes, tasks[0].weight.dtype.itemsize)
            kept.shapes = shapes
        found, runtime = kept.geometry, self._runtime
        # Vectors are addressed from the first one. Those of the step before lie in one array, so
        # the table stays as it is though the array is another one in each step.
        came = runtime.address(tasks[0].v)
        with runtime.at(group.place):
            tables = self._on_device(kept, "geometry", found.table)
            addresses = self._on_device(kept, "tasks", self._task_table(tasks, came, n_iter))
            out = runtime.empty(found.results if n_iter else 0, group.kernels.real)
            scratch = runtime.empty(found.scratch if n_iter else 0, group.kernels.real)
        return _Job(group, found, (addresses, tables, came, out, scratch), out)

    def _task_table(self, tasks: list[Task], came: int, n_iter: int) -> Table:
        """A row for each task: the struct ``Task`` of ``kernels.cu``."""
        address = self._runtime.address
        rows = []
        for task in tasks:
            if isinstance(task.factor, float):
                factor = (0, _BITS_OUT.unpack(_BITS_IN.pack(task.factor))[0])
            else:
                factor = (task.factor.dtype.itemsize, address(task.factor))
            if n_iter:
                vectors = (address(task.v) - came, 0, 0)
            else:
                assert task.last is not None  # `_fits` saw to it
                sigma, u, v = task.last
                vectors = (address(v) - came, address(u) - came, address(sigma) - came)
            rows.append((address(task.weight), address(task.grad), *factor, *vectors))
        return np.asarray(rows, dtype=np.int64)

    def _on_device(self, kept: _Kept, name: str, table: Table) -> Array:
        """``table`` on the device, sent there only if the last one was another."""
        sent = kept.uploaded.get(name)
        if sent is None or not (sent[0] is table or np.array_equal(sent[0], table)):
            sent = kept.uploaded[name] = table, self._runtime.upload(table)
        return sent[1]

    def _run(self, job: _Job, n_iter: int) -> None:
        found = job.geometry
        by_rows = len(Matrix._fields) * found.matrices  # where the work tables begin
        by_columns = by_rows + found.row_blocks
        with self._runtime.at(job.group.place):
            for i in range(n_iter):
                first = FIRST if i == 0 else 0
                self._launch(job, "spectral_rows", found.row_blocks, by_rows, first)
                self._launch(job, "spectral_columns", found.column_blocks, by_columns, first)
                add = ADD if i == n_iter - 1 else 0
                flags = first | FRESH | add
                self._launch(job, "spectral_apply", found.row_blocks, by_rows, flags)
            if n_iter == 0:
                self._launch(job, "spectral_apply", found.row_blocks, by_rows, ADD)

    def _launch(self, job: _Job, name: str, blocks: int, work: int, flags: int) -> None:
        addresses, tables, *others = job.arguments
        work_table = self._runtime.address(tables) + 8 * work
        self._runtime.launch(
            job.group.kernels, name, blocks, (addresses, tables, work_table, *others, flags)
        )

    def _triples(self, job: _Job, tasks: list[Task], n_iter: int) -> list[PowerIteration]:
        if n_iter == 0:
            return [task.last for task in tasks if task.last is not None]
        view = self._runtime.view
        return [
            PowerIteration(
                view(job.out, at.sigma, task.plan.matrix[:-2]),
                view(job.out, at.u, task.plan.matrix[:-1]),
                view(job.out, at.v, task.plan.right),
            )
            for task, at in zip(tasks, job.geometry.places, strict=True)
        ]


_BITS_IN, _BITS_OUT = struct.Struct("=d"), struct.Struct("=q")


def _power_of_two(least: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (least - 1).bit_length()
