"""Run one step on all matrices of a model in a fixed number of kernel launches.

This file works out which block of ``kernels.cu`` works on what, and where the block finds it. It
does so without CuPy: a `Runtime` does the few things that need a device, and the tests have a
runtime of their own.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from spectral_core.engine import Job, Plan, Result, Triplet, last_of

Array: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]
Table: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

# As in kernels.cu: a test compares them.
THREADS = 512
WARP = 32
ROWS_BLOCKS, APPLY_BLOCKS = 1, 2  # on a multiprocessor at once
FIRST, ITERATED, ADD, AGAIN = 1, 2, 4, 8

_LEAST_WORK = 8192  # elements of a block: fewer are not worth a sum of their own
# Many blocks need no even division among multiprocessors: the last ones are a small part of all.
_MANY = 8
# The sums of each block are written and read again. Many blocks are used only where that is less
# than this share of the weights.
_SUMS = 1 / 16
_LARGEST = 1 << 30  # rows or columns, which the kernels count in 32 bits
_MOST_VECTORS = 8
_GROUPS = 64  # groups of jobs whose tables are kept: one for each stream and pair of dtypes

_CTYPES = {"float16": "__half", "float32": "float", "float64": "double"}


class Kernels(NamedTuple):
    """Identify a compilation of the kernels: dtypes of weights and gradients, rows of V."""

    weight: str
    grad: str
    vectors: int = 1

    @property
    def real(self) -> str:
        """Return the dtype of the iteration."""
        return "float64" if self.weight == "float64" else "float32"

    @property
    def options(self) -> tuple[str, ...]:
        """Return the definitions that ``kernels.cu`` needs, as options of a compiler."""
        wide = "float64" if "float64" in (self.weight, self.grad) else "float32"
        defined = {
            "WEIGHT": _CTYPES[self.weight],
            "GRAD": _CTYPES[self.grad],
            "REAL": _CTYPES[self.real],
            "SUM": _CTYPES[wide],
            "TINY": repr(float(np.finfo(self.real).smallest_normal)),
            "EPS": repr(float(np.finfo(self.real).eps)),
            "VECTORS": str(self.vectors),
        }
        half = ("-DSPECTRAL_HALF",) if "float16" in (self.weight, self.grad) else ()
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

    def multiprocessors(self, place: Any) -> int:
        """Return how many multiprocessors the device of this place has."""

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
    channels: int
    window: int
    block_rows: int
    span: int
    warps: int
    row_block: int
    row_blocks: int
    column_block: int
    column_blocks: int
    apply_block: int
    apply_rows: int
    x: int
    y: int
    start: int
    partial: int
    x_squares: int
    x_scales: int
    y_squares: int
    of_x: int
    out_u: int
    out_v: int
    out_sigma: int


class Span(NamedTuple):
    """Divide a row among the threads of some warps: the columns of each, or 0 for any number."""

    columns: int
    warps: int


class Places(NamedTuple):
    """Hold the places where the results of a job begin."""

    sigma: int
    u: int
    v: int


@dataclass(frozen=True)
class Geometry:
    """Hold the tables that depend on nothing but the shapes of a group's matrices."""

    # Rows of `Matrix`, then the matrix of each block: of rows, columns, apply, and one a matrix.
    table: Table
    matrices: int
    row_blocks: int
    column_blocks: int
    apply_blocks: int
    scratch: int
    results: int
    places: tuple[Places, ...]


def span(columns: int, kernels: Kernels) -> Span:
    """Divide a row of a matrix so that its running sums fit into the registers of its threads."""
    room = 128 // np.dtype(kernels.real).itemsize  # as in kernels.cu
    among = _power_of_two(kernels.vectors)
    most = room // among // (2 if kernels.vectors == 1 and kernels.real == "float64" else 1)
    each = min(room // among, room // 4)
    while each < most and columns > THREADS * each:
        each *= 2
    if columns > THREADS * each:
        return Span(0, THREADS // WARP)
    return Span(each, _power_of_two(-(-columns // (WARP * each))))


def even_rows(rows: int, columns: int, work: int) -> int:
    """Return the rows of each block, about ``work`` elements, so that all blocks are equal."""
    blocks = max(1, min(rows, round(rows * columns / work)))
    return -(-rows // blocks)


def work_of_a_block(matrices: Sequence[Shape], slots: int) -> int:
    """Return how many elements each block gets where ``slots`` blocks run at once.

    There is one block for each slot, or there are many small ones. In between, a last wave of a few
    blocks would have the device for itself.
    """
    elements = sum(m * n for m, n in matrices)
    many = -(-elements // (_MANY * slots))
    sums = sum(-(-m // even_rows(m, n, many)) * n for m, n in matrices)
    if many >= _LEAST_WORK and 2 * sums <= _SUMS * elements:
        return many
    least = max(_LEAST_WORK, -(-elements // slots))
    for sixteenths in range(16, 33):
        work = least * sixteenths // 16
        if sum(-(-m // even_rows(m, n, work)) for m, n in matrices) <= slots:
            return work
    return max(_LEAST_WORK, many)


def geometry(plans: Sequence[Plan], kernels: Kernels, multiprocessors: int) -> Geometry:
    """Return the tables of matrices, or stacks of them, with these plans."""
    k, shapes = kernels.vectors, [plan.matrix for plan in plans]
    every = [(m, n) for *stack, m, n in shapes for _ in range(prod(stack))]
    row_work = work_of_a_block(every, ROWS_BLOCKS * multiprocessors)
    apply_work = work_of_a_block(every, APPLY_BLOCKS * multiprocessors)
    matrices: list[Matrix] = []
    places: list[Places] = []
    blocks: list[tuple[int, int, int]] = []  # of each matrix, of each kind
    first = (0, 0, 0)
    scratch = results = 0
    for job, (*stack, m, n) in enumerate(shapes):
        count = prod(stack)
        at_u = results + _padded(count)
        at = Places(results, at_u, at_u + _padded(count * m))
        places.append(at)
        results = at.v + _padded(count * k * n)
        rows, apply_rows = even_rows(m, n, row_work), even_rows(m, n, apply_work)
        mine = (-(-m // rows), -(-n // WARP), -(-m // apply_rows))
        for entry in range(count):
            y = scratch + _padded(k * m)
            start = y + _padded(k * n)
            partial = start + (_padded(k * n) if k > 1 else 0)
            x_squares = partial + _padded(mine[0] * k * n)
            x_scales = x_squares + mine[0]
            y_squares = x_scales + mine[0]
            of_x = y_squares + mine[1]
            found = (at.u + entry * m, at.v + entry * k * n, at.sigma + entry)
            matrices.append(
                Matrix(
                    *(job, entry, m, n, *_order_of_columns(plans[job]), rows, *span(n, kernels)),
                    *(first[0], mine[0], first[1], mine[1], first[2], apply_rows),
                    *(scratch, y, start, partial, x_squares, x_scales, y_squares, of_x, *found),
                )
            )
            scratch = _padded(of_x + 1)
            blocks.append(mine)
            first = (first[0] + mine[0], first[1] + mine[1], first[2] + mine[2])
    numbers = np.arange(len(matrices), dtype=np.int64)
    table = np.concatenate(
        [
            np.asarray(matrices, dtype=np.int64).ravel(),
            *(np.repeat(numbers, [some[kind] for some in blocks]) for kind in range(3)),
            numbers,
        ]
    )
    return Geometry(table, len(matrices), *first, scratch, results, tuple(places))


def _order_of_columns(plan: Plan) -> tuple[int, int]:
    """Return the input channels and the kernel positions of a channels-last matrix, else n and 1.

    In memory, the column of channel i and position p is at ``p * channels + i``.
    """
    n, form = plan.matrix[-1], plan.contiguous
    window = form.window if form.kinds == "oki" else 1
    return n // window, window


def _padded(size: int) -> int:
    """Return the size rounded up, so that what follows is aligned for 16-byte loads."""
    return -(-size // 8) * 8


class _Group(NamedTuple):
    """Identify the jobs of one launch."""

    place: Hashable
    kernels: Kernels


@dataclass
class _Tables:
    """Keep the tables of a group for the next step."""

    plans: tuple[Plan, ...] = ()
    geometry: Geometry | None = None
    uploaded: dict[str, tuple[Table, Array]] = field(default_factory=dict)


class _Launch(NamedTuple):
    """Hold everything that the launches of a group need."""

    group: _Group
    jobs: list[int]  # their places among all jobs
    geometry: Geometry
    arguments: tuple[Any, ...]  # all but the work table and the flags
    out: Array
    lasts: list[Triplet]  # kept: the table has their addresses


class CudaEngine:
    """Run jobs on an NVIDIA GPU by CuPy, all weights at once, and keep tables between steps.

    Pass one engine to every call of `add_gradient_` of a loop. If shapes, addresses and factors are
    those of the step before, nothing is allocated for tables or sent to the device. The engine may
    be used with other weights at any time, but not by two threads at once. It holds two tables of
    some bytes for each weight on the device.

    Contiguous float16, float32 and float64 weights and gradients run together, if the rows of their
    matrix follow one another in memory: as in ``"oihw"``, ``"(go)ihw"`` or ``"ohwi"``. There are
    three launches for each iteration and pair of dtypes. Two to eight vectors for each matrix need
    six, and two more for the step. The engine does not accept other orders, such as ``"hwio"``, or
    complex weights.

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
        """Return True for a contiguous, real job with up to 8 vectors, all on one device."""
        weight, plan = job.weight, job.plan
        if not (
            job.wave is None
            and self._runtime.owns(weight)
            and weight.dtype.name in _CTYPES
            and plan.contiguous.kinds in ("oi", "oik", "oki")
            and max(plan.matrix[-2:]) < _LARGEST
            and weight.flags.c_contiguous
        ):
            return False
        grad = job.grad
        if grad is not None and not (grad.dtype.name in _CTYPES and grad.flags.c_contiguous):
            return False
        real, place = _kernels_of(job).real, self._runtime.place(weight)
        k = job.V.shape[-2]
        vectors = [(job.V, plan.rows(k))]
        if job.last is not None:
            sigma, u, V = job.last
            vectors += [(sigma, plan.stack), (u, plan.left), (V, plan.rows(k))]
        return (
            k <= _MOST_VECTORS
            and job.V.flags.c_contiguous
            and all(
                x.dtype.name == real and tuple(x.shape) == shape and self._runtime.place(x) == place
                for x, shape in vectors
            )
            and self._accepts_numbers(job, place)
        )

    def _accepts_numbers(self, job: Job, place: Hashable) -> bool:
        """Return True if the factor and the target are floats, or numbers on this device."""
        return all(
            isinstance(x, float)
            or (x.dtype.name in ("float32", "float64") and self._runtime.place(x) == place)
            for x in (job.factor, 0.0 if job.rule is None else job.rule.target)
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
                for name, flags in _sequence(n_iter, launch.group.kernels.vectors):
                    self._launch(launch, name, flags)
                if n_iter:
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
        plans, runtime = tuple(job.plan for job in mine), self._runtime
        if kept.geometry is None or kept.plans != plans:
            processors = runtime.multiprocessors(group.place)
            kept.geometry = geometry(plans, group.kernels, processors)
            kept.plans = plans
        found = kept.geometry
        # Addresses of vectors are relative to the first one. The vectors of the step before share
        # one array, so the table stays the same though that array is another one in each step.
        came = runtime.address(mine[0].V)
        lasts = [_contiguous(last_of(job)) for job in mine] if n_iter == 0 else []
        with runtime.at(group.place):
            tables = self._on_device(kept, "geometry", found.table)
            addresses = self._on_device(kept, "jobs", self._table_of(mine, came, lasts))
            out = runtime.empty(found.results if n_iter else 0, group.kernels.real)
            scratch = runtime.empty(found.scratch if n_iter else 0, group.kernels.real)
        return _Launch(group, places, found, (addresses, tables, came, out, scratch), out, lasts)

    def _table_of(self, jobs: list[Job], came: int, lasts: list[Triplet]) -> Table:
        """Return a `Row` for each job; ``lasts`` are the terms to add, or empty."""
        address = self._runtime.address
        rows = []
        for i, job in enumerate(jobs):
            grad = 0 if job.grad is None else address(job.grad)
            target, code = (0.0, 0) if job.rule is None else (job.rule.target, job.rule.code)
            numbers = (*self._number(job.factor), *self._number(target), code)
            vectors = (address(job.V) - came, 0, 0)
            if lasts:
                sigma, u, V = lasts[i]
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
        # The tables of work follow one another.
        numbers = (found.row_blocks, found.column_blocks, found.apply_blocks, found.matrices)
        kind = _KINDS[name]
        work, blocks = len(Matrix._fields) * found.matrices + sum(numbers[:kind]), numbers[kind]
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
                view(launch.out, at.v, plan.rows(launch.group.kernels.vectors)),
            )


def _contiguous(last: Triplet) -> Triplet:
    """Return the triplet in contiguous memory: u of the reference can be part of another array."""
    return Triplet(*(x if x.flags.c_contiguous else x.copy() for x in last))


# The table of work of each kernel.
_KINDS = {
    "spectral_rows": 0,
    "spectral_columns": 1,
    "spectral_start": 1,
    "spectral_apply": 2,
    "spectral_finish": 3,
}


def _sequence(n_iter: int, vectors: int) -> Iterator[tuple[str, int]]:
    """Return the launches of a step and their flags."""
    if n_iter == 0:
        yield "spectral_apply", ADD
        return
    if vectors > 1:
        yield "spectral_start", FIRST
    for i in range(n_iter):
        first, add = FIRST * (i == 0), ADD * (i == n_iter - 1)
        # Some matrices of several vectors must be read a second time. Only the device knows which:
        # blocks of others end at once.
        for again in (0, AGAIN) if vectors > 1 else (0,):
            yield "spectral_rows", first | again
            yield "spectral_columns", first | again
            if vectors > 1:
                yield "spectral_finish", first | again
        if vectors == 1 or add:
            yield "spectral_apply", first | ITERATED | add


def _kernels_of(job: Job) -> Kernels:
    """Return the dtypes and vectors of a job; without a gradient, its dtype is the weight's."""
    grad = job.weight if job.grad is None else job.grad
    return Kernels(job.weight.dtype.name, grad.dtype.name, int(job.V.shape[-2]))


_BITS_IN, _BITS_OUT = struct.Struct("=d"), struct.Struct("=q")


def _power_of_two(least: int) -> int:
    """Return the smallest power of two that is not less."""
    return 1 << (least - 1).bit_length()
