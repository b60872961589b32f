"""Run one step on all matrices of a model in a fixed number of kernel launches.

This file works out which block of ``kernels.cu`` works on what, and where the block finds it. It
does so without CuPy: a `Runtime` does the few things that need a device, and the tests have a
runtime of their own.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from spectral_core.engine import Job, Result, Triplet, last_of

Array: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]
Table: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

# As in kernels.cu: a test compares them.
THREADS = 512
WARP = 32
MAX_TILE = 256
FIRST, ITERATED, ADD = 1, 2, 4

# H100: two blocks for each of its 132 multiprocessors, and a tile that fits its L1 and L2 caches
# together with those of the other blocks. On another device these numbers are only less apt.
_BLOCKS = 264
_LEAST_WORK = 8192  # elements of a block: fewer are not worth a sum of their own
_LEAST_ROWS = 8  # of a block: its sums over the rows need 1/8 of the memory of its weights
_TILE_BYTES = 65536
_LARGEST = 1 << 30  # rows or columns, which the kernels count in 32 bits
_GROUPS = 64  # groups of jobs whose tables are kept: one for each stream and pair of dtypes

_CTYPES = {"float16": "__half", "float32": "float", "float64": "double"}


class Kernels(NamedTuple):
    """Identify a compilation of the kernels: the dtypes of weights and gradients."""

    weight: str
    grad: str

    @property
    def real(self) -> str:
        """Return the dtype of the iteration."""
        return "float64" if self.weight == "float64" else "float32"

    @property
    def options(self) -> tuple[str, ...]:
        """Return the definitions that ``kernels.cu`` needs, as options of a compiler."""
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
    """Do everything that the engine needs of a device."""

    def owns(self, x: Array) -> bool:
        """Return True if ``x`` is an array of this runtime."""

    def place(self, x: Array) -> Hashable:
        """Return where work on ``x`` goes: its device and that device's current stream."""

    def at(self, place: Any) -> AbstractContextManager[Any]:
        """Return a context in which the methods below work at this place."""

    def address(self, x: Array) -> int:
        """Return the address of the first element."""

    def upload(self, table: Table) -> Array:
        """Return a copy of ``table`` on the device, without waiting for it."""

    def empty(self, size: int, dtype: str) -> Array:
        """Return a new array of one axis."""

    def view(self, x: Array, start: int, shape: Shape) -> Array:
        """Return the elements of ``x`` from ``start`` on, in another shape, without a copy."""

    def launch(self, kernels: Kernels, name: str, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel of ``kernels.cu``."""


class Row(NamedTuple):
    """Describe a job to the kernels: the struct of this name in ``kernels.cu``."""

    weight: int
    grad: int
    factor_size: int
    factor: int
    target_size: int
    target: int
    code: int
    v: int
    u: int
    sigma: int


class Matrix(NamedTuple):
    """Describe a matrix to the kernels: the struct of this name in ``kernels.cu``."""

    job: int
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
    """Divide the rows of a matrix among blocks and threads."""

    block_rows: int
    tile_rows: int
    width: int


class Places(NamedTuple):
    """Hold the places where the results of a job begin."""

    sigma: int
    u: int
    v: int


@dataclass(frozen=True)
class Geometry:
    """Hold the tables that depend on nothing but the shapes of a group's matrices."""

    table: Table  # rows of `Matrix`, then the matrix of each block of `rows` and of `columns`
    matrices: int
    row_blocks: int
    column_blocks: int
    scratch: int
    results: int
    places: tuple[Places, ...]


def tiling(rows: int, columns: int, itemsize: int, work: int) -> Tiling:
    """Divide a matrix so that a block gets about ``work`` elements."""
    # Rounded up: one block more than the device runs at once would run alone at the end.
    block_rows = min(rows, max(_LEAST_ROWS, -(-work // columns)))
    fit = _TILE_BYTES // (columns * itemsize)
    tile_rows = min(block_rows, MAX_TILE, max(1, fit))
    # As many threads a row as keep all of them busy with a tile; at least a sector of memory.
    least, most = min(8, _power_of_two(columns)), min(THREADS, _power_of_two(columns))
    width = min(most, max(least, THREADS // _power_of_two(tile_rows)))
    return Tiling(block_rows, tile_rows, width)


def geometry(shapes: Sequence[Shape], itemsize: int) -> Geometry:
    """Return the tables of matrices, or stacks of them, of these shapes."""
    work = max(_LEAST_WORK, -(-sum(map(prod, shapes)) // _BLOCKS))
    matrices: list[Matrix] = []
    places: list[Places] = []
    row_blocks = column_blocks = scratch = results = 0
    for job, (*stack, m, n) in enumerate(shapes):
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
                    *(job, entry, m, n, *tiles, *blocks),
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
    """Identify the jobs of one launch."""

    place: Hashable
    kernels: Kernels


@dataclass
class _Tables:
    """Keep the tables of a group for the next step."""

    shapes: tuple[Shape, ...] = ()
    geometry: Geometry | None = None
    uploaded: dict[str, tuple[Table, Array]] = field(default_factory=dict)


class _Launch(NamedTuple):
    """Hold everything that the launches of a group need."""

    group: _Group
    jobs: list[int]  # their places among all jobs
    geometry: Geometry
    arguments: tuple[Any, ...]  # all but the work table and the flags
    out: Array


class CudaEngine:
    """Run jobs on an NVIDIA GPU by CuPy, all weights at once, and keep tables between steps.

    Pass one engine to every call of `add_gradient_` of a loop. If shapes, addresses and factors are
    those of the step before, nothing is allocated for tables or sent to the device. The engine may
    be used with other weights at any time, but not by two threads at once. It holds two tables of
    some bytes for each weight on the device.

    Contiguous float16, float32 and float64 weights and gradients in an order such as ``"oihw"`` or
    ``"(go)ihw"``, whose matrix is the tensor reshaped, run together: three launches for each
    iteration and pair of dtypes. The engine does not accept others, such as ``"hwio"``, complex
    ones, or several vectors for each matrix.

    Parameters
    ----------
    runtime : Runtime, optional
        Where the kernels run. The default is CuPy.

    Examples
    --------
    >>> import cupy as cp, spectral_cupy
    >>> weights, grads = {"w": cp.asarray([[3.0, 4.0]])}, {"w": cp.zeros((1, 2))}
    >>> state, engine = spectral_cupy.init(weights), spectral_cupy.CudaEngine()
    >>> for _ in range(2):
    ...     state = spectral_cupy.add_gradient_(weights, grads, state, factor=0.1, engine=engine)
    >>> cp.round(grads["w"], 4)
    array([[0.6, 0.8]])
    """

    in_place = True

    def __init__(self, runtime: Runtime | None = None) -> None:
        if runtime is None:
            from ._device import CuPyRuntime

            runtime = CuPyRuntime()
        self._runtime: Runtime = runtime
        self._tables: dict[_Group, _Tables] = {}

    def accepts(self, job: Job) -> bool:
        """Return True for a contiguous, real job with one vector, all on one device."""
        weight, plan = job.weight, job.plan
        if not (
            self._runtime.owns(weight)
            and weight.dtype.name in _CTYPES
            and plan.reshapes
            and max(plan.matrix[-2:]) < _LARGEST
            and weight.flags.c_contiguous
        ):
            return False
        grad = job.grad
        if grad is not None and not (grad.dtype.name in _CTYPES and grad.flags.c_contiguous):
            return False
        real, place = _kernels_of(job).real, self._runtime.place(weight)
        vectors = [(job.V, plan.rows(1))]
        if job.last is not None:
            sigma, u, V = job.last
            vectors += [(sigma, plan.stack), (u, plan.left), (V, plan.rows(1))]
        return all(
            x.dtype.name == real
            and tuple(x.shape) == shape
            and x.flags.c_contiguous
            and self._runtime.place(x) == place
            for x, shape in vectors
        ) and all(
            isinstance(x, float)
            or (x.dtype.name in ("float32", "float64") and self._runtime.place(x) == place)
            for x in (job.factor, 0.0 if job.slope is None else job.slope.target)
        )

    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, those of one stream and pair of dtypes in the same launches.

        V, u and sigma of the result are new arrays, which share one piece of memory.

        Parameters
        ----------
        jobs : sequence of Job
        n_iter : int
            Power iterations. With 0 the term is that of each job's ``last``.

        Returns
        -------
        Result

        Raises
        ------
        spectral_core.ArgumentError
            If ``n_iter`` is 0 and a job has no ``last``.
        """
        triplets: list[Any] = [last_of(job) for job in jobs] if n_iter == 0 else [None] * len(jobs)
        # First everything that can fail: an error leaves every gradient as it was.
        launches = [
            self._prepare(group, jobs, places, n_iter)
            for group, places in self._groups(jobs).items()
        ]
        for launch in launches:
            with self._runtime.at(launch.group.place):
                for i in range(n_iter):
                    first, add = FIRST * (i == 0), ADD * (i == n_iter - 1)
                    self._launch(launch, "spectral_rows", first)
                    self._launch(launch, "spectral_columns", first)
                    self._launch(launch, "spectral_apply", first | ITERATED | add)
                if n_iter == 0:
                    self._launch(launch, "spectral_apply", ADD)
                else:
                    self._collect(launch, jobs, triplets)
        return Result([job.grad for job in jobs], triplets)

    def _groups(self, jobs: Sequence[Job]) -> dict[_Group, list[int]]:
        groups: dict[_Group, list[int]] = {}
        for i, job in enumerate(jobs):
            group = _Group(self._runtime.place(job.weight), _kernels_of(job))
            groups.setdefault(group, []).append(i)
        return groups

    def _prepare(
        self, group: _Group, jobs: Sequence[Job], places: list[int], n_iter: int
    ) -> _Launch:
        kept = self._tables.setdefault(group, _Tables())
        if len(self._tables) > _GROUPS:  # a loop may use new streams for ever
            del self._tables[next(iter(self._tables))]
        mine = [jobs[i] for i in places]
        shapes = tuple(job.plan.matrix for job in mine)
        if kept.geometry is None or kept.shapes != shapes:
            kept.geometry = geometry(shapes, mine[0].weight.dtype.itemsize)
            kept.shapes = shapes
        found, runtime = kept.geometry, self._runtime
        # Addresses of vectors are relative to the first one. The vectors of the step before share
        # one array, so the table stays the same though that array is another one in each step.
        came = runtime.address(mine[0].V)
        with runtime.at(group.place):
            tables = self._on_device(kept, "geometry", found.table)
            addresses = self._on_device(kept, "jobs", self._table_of(mine, came, n_iter))
            out = runtime.empty(found.results if n_iter else 0, group.kernels.real)
            scratch = runtime.empty(found.scratch if n_iter else 0, group.kernels.real)
        return _Launch(group, places, found, (addresses, tables, came, out, scratch), out)

    def _table_of(self, jobs: list[Job], came: int, n_iter: int) -> Table:
        """Return a `Row` for each job."""
        address = self._runtime.address
        rows = []
        for job in jobs:
            grad = 0 if job.grad is None else address(job.grad)
            target, code = (0.0, 0) if job.slope is None else (job.slope.target, job.slope.code)
            numbers = (*self._number(job.factor), *self._number(target), code)
            vectors = (address(job.V) - came, 0, 0)
            if n_iter == 0:
                sigma, u, V = last_of(job)
                vectors = (address(V) - came, address(u) - came, address(sigma) - came)
            rows.append(Row(address(job.weight), grad, *numbers, *vectors))
        return np.asarray(rows, dtype=np.int64)

    def _number(self, x: Any) -> tuple[int, int]:
        """Return the size and address of a number on the device, or 0 and the bits of a float."""
        if isinstance(x, float):
            return 0, _BITS_OUT.unpack(_BITS_IN.pack(x))[0]
        return x.dtype.itemsize, self._runtime.address(x)

    def _on_device(self, kept: _Tables, name: str, table: Table) -> Array:
        """Return ``table`` on the device; send it only if it differs from the last one."""
        sent = kept.uploaded.get(name)
        if sent is None or not (sent[0] is table or np.array_equal(sent[0], table)):
            sent = kept.uploaded[name] = table, self._runtime.upload(table)
        return sent[1]

    def _launch(self, launch: _Launch, name: str, flags: int) -> None:
        found = launch.geometry
        work, blocks = len(Matrix._fields) * found.matrices, found.row_blocks
        if name == "spectral_columns":  # its work table is the second one
            work, blocks = work + blocks, found.column_blocks
        addresses, tables, *others = launch.arguments
        work_table = self._runtime.address(tables) + 8 * work
        arguments = (addresses, tables, work_table, *others, flags)
        self._runtime.launch(launch.group.kernels, name, blocks, arguments)

    def _collect(self, launch: _Launch, jobs: Sequence[Job], triplets: list[Any]) -> None:
        """Put the results of a launch into the list of all triplets."""
        view = self._runtime.view
        for i, at in zip(launch.jobs, launch.geometry.places, strict=True):
            plan = jobs[i].plan
            triplets[i] = Triplet(
                view(launch.out, at.sigma, plan.stack),
                view(launch.out, at.u, plan.left),
                view(launch.out, at.v, plan.rows(1)),
            )


def _kernels_of(job: Job) -> Kernels:
    """Return the dtypes of a job; where there is no gradient, that of the weight."""
    grad = job.weight if job.grad is None else job.grad
    return Kernels(job.weight.dtype.name, grad.dtype.name)


_BITS_IN, _BITS_OUT = struct.Struct("=d"), struct.Struct("=q")


def _power_of_two(least: int) -> int:
    """Return the smallest power of two that is not less."""
    return 1 << (least - 1).bit_length()
