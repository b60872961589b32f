"""Run one step of Algorithm 1 on all weights of a model in three launches an iteration.

Nothing waits for the device, and nothing is read from it. Results are written into the existing
V, u, sigma and gradient tensors, because a captured CUDA graph refers to them by address
(`graph_tables` says what a graph may rely on).

The kernels (`triton_kernels`) find the matrices by tables on the device. The tables that depend on
shapes alone are made once (`_Group`). The table of addresses and the one of factors and targets are
uploaded when one of their entries has changed (`GraphTable`).

On an H100 a step is bound by memory: it must read W once, and read and write G. A tile of rows of W
is used for both products while it is in registers, so W is not read twice.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from spectral_core import ArgumentError
from spectral_core.engine import (
    Bound,
    Engine,
    Job,
    JobList,
    Plan,
    ReferenceEngine,
    Result,
    Triplet,
    dispatch,
    last_of,
)

from .foreach import write_into
from .graph_tables import GraphTable, capturing, current
from .memory_format import window

# Largest number of columns for which W is read once: a program holds a row of W, v and a sum of
# rows in registers. 16384 float32 are 32 of each in the 512 threads that 128 registers allow.
# float64 needs twice as many, and k vectors k times as many. A wider matrix is read twice.
LIMITS = {torch.float32: 16384, torch.float64: 8192}

_ITERATED = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)  # a subclass may have no memory of its own

# Widths of tiles, as exponents of two. Fewer than there could be: each width that a model has is
# compiled, and a tile that is half empty costs no memory traffic, only arithmetic to spare.
_PRODUCT_WIDTHS = (5, 7, 9, 10, 11, 12, 13, 14)
_UPDATE_WIDTHS = (5, 7, 9)
_WIDE, _WIDE_HEIGHT = 15, 8  # triton_kernels.WIDE: of matrices that are wider
# Columns of a program of `columns`: the fewer where programs are few, so that more of them load.
_BLOCKS = (64, 32)
# Where a matrix has more sums than this, those of so many items are added beforehand, in a launch
# more. A program loads 256 sums of 32 columns in about 1 µs, less than a launch costs.
_MANY_SUMS, _SUMS_TOGETHER, _SUMS_WIDTH = 256, 64, 128
MOST_VECTORS = 8

# A thread holds at most 128 bytes of a tile: eight 16-byte loads of float32.
_ELEMENTS_A_THREAD = {torch.float32: 32, torch.float64: 16}
_UPDATE_WARPS = 4
_COLUMNS_HEIGHT = 32
# 16 warps of 128 registers fill a multiprocessor, however many warps a program has. With three
# stages, each waits for 128 bytes a thread while as many are being copied behind them: 64 to 128
# KiB a multiprocessor. HBM3 at 3.35 TB/s and 0.7 µs needs 18 KiB, and some more under load.
_WARPS_A_PROCESSOR = 16
# For narrower matrices: half as many programs, of twice as many rows, halve the sums. 64 KiB remain
# on their way to a multiprocessor.
_FEW_WARPS, _FEW_COLUMNS = 8, 4096
_PRODUCT_REGISTERS = 128
# The sum of each program is written and read again: below this many rows, more than 6 % of W.
_ROWS_WORTH_A_SUM = 32
# Tiles of G for each program, where there are many: v and sigma are looked up once for all.
_TILES_A_PROGRAM = 4
# Triton 3.9 warns where this is left open, and a later version may choose otherwise: other bits.
_OPTIONS = {"enable_fp_fusion": True}
_SETS = 64  # sets of jobs whose tables and scratch memory are kept: optimizers take turns
# A step of a part of these jobs uses their tables, if it has more than one in so many of them. A
# program whose matrix is absent costs a few ns, but new tables cost allocations and uploads.
_WORTH_A_PART = 8

_REFERENCE = ReferenceEngine(in_place=True)


@cache
def _kernels() -> Any:
    """Return the module of kernels, or None if Triton is missing or too old."""
    if find_spec("triton") is None:
        return None
    try:
        from . import triton_kernels
    except Exception:  # an older one lacks a name, a broken one fails in its own way
        return None
    return triton_kernels


@cache
def _has_tuples() -> bool:
    """Return True if kernels can hold several vectors, or chunks of wide rows: from Triton 3.3."""
    return hasattr(_kernels().tl, "tuple")


@cache
def interpreted() -> bool:
    """Return True if Triton interprets kernels, on CPU tensors: a test without a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # before the import, which needs a second
        return False
    return _kernels() is not None and "Interpreted" in type(_kernels().products).__name__


@cache
def available() -> bool:
    """Return True if there is Triton, and an NVIDIA GPU that it compiles for."""
    if interpreted():
        return True
    if torch.version.cuda is None or not torch.cuda.is_available() or _kernels() is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


class _Kind(NamedTuple):
    """Identify the jobs of one launch: their device, dtypes and number of vectors."""

    device: torch.device
    weight: torch.dtype
    grad: torch.dtype
    n_vectors: int
    transposed: bool = False


class _Shape(NamedTuple):
    """Describe a weight to the tables: they depend on nothing else."""

    plan: Plan
    window: int  # as `_window`

    def __hash__(self) -> int:
        # Plans are cached, and a group keeps its own: one id stands for all their numbers.
        return hash((id(self.plan), self.window))


# The places of the jobs of a step among those of a group; None where they are all of them.
_Slots: TypeAlias = tuple[int, ...] | None


@dataclass(slots=True)
class _Share:
    """Hold the jobs of one kind, and everything that does not change from step to step."""

    kind: _Kind
    places: list[int]  # among all jobs
    addresses: tuple[int, ...]  # of weights, V, u and sigma
    group: _Group | None = None
    slots: _Slots = None

    def of_step(self, jobs: Sequence[Job]) -> tuple[Sequence[Job], tuple[int, ...]]:
        """Return the jobs of this share, and the addresses of their gradients: 0 is no gradient."""
        grads = jobs.addresses if isinstance(jobs, JobList) else None
        if len(self.places) < len(jobs):
            jobs = [jobs[i] for i in self.places]
            grads = None if grads is None else [grads[i] for i in self.places]
        if grads is None:
            grads = [0 if job.grad is None else job.grad.data_ptr() for job in jobs]
        return jobs, tuple(grads)


class _Prepared(NamedTuple):
    """Hold everything about a step that does not depend on gradients and factors."""

    triplets: list[Triplet]  # the tensors that the results are written into
    shares: list[_Share]


class TritonEngine:
    """Run jobs on an NVIDIA GPU, all matrices of a model at once.

    Results are written into each job's V, last u and last sigma, and these tensors are returned. If
    a job has no ``last``, its u and sigma are new. Keep one engine for each set of weights: it
    holds their tables and scratch memory, for all sets of shapes that it has met.

    Parameters
    ----------
    fallback : Engine, optional
        An engine that works in place. If the kernels fail before they have run once for a device
        and pair of dtypes (Triton may find no C compiler), the engine warns, and accepts no further
        jobs. The fallback runs those that have failed, and the reference those that the fallback
        does not accept. Without a fallback the error is raised.

    Raises
    ------
    spectral_core.ArgumentError
        If ``fallback`` does not work in place.

    Notes
    -----
    In a CUDA graph: run one step with tensors of the same shapes and dtypes before the capture, and
    keep the engine as long as the graph. Factors and targets that are numbers are those of the
    capture at every replay. Tensors are read anew. Steps may go on beside replays, on the same
    stream or ordered after it.

    Examples
    --------
    >>> from spectral_torch.engines.triton import TritonEngine
    >>> TritonEngine().run([], n_iter=1)
    Result(grads=[], triplets=[])
    """

    in_place = True

    def __init__(self, fallback: Engine | None = None) -> None:
        if fallback is not None and not fallback.in_place:
            raise ArgumentError("the fallback of TritonEngine must work in place")
        self._fallback = fallback
        self._failed = False
        self._has_run: set[_Kind] = set()
        self._groups: dict[tuple[_Kind, tuple[_Shape, ...]], _Group] = {}
        self._captured: set[_Group] = set()

    def __reduce__(self) -> tuple[type[TritonEngine], tuple[Engine | None]]:
        # A copy has none of the memory that graphs of this engine write to.
        return TritonEngine, (self._fallback,)

    def accepts(self, job: Job) -> bool:
        """Return True if the kernels can run this job.

        They need a real weight and gradient on a GPU, both contiguous or both in the channels-last
        format of convolutions, whose matrix is the tensor reshaped. A layer that has its inputs
        before its outputs, such as a transposed convolution, needs contiguous ones. V and the last
        triplet must be contiguous, in the dtype of the iteration, with at most `MOST_VECTORS` for
        each matrix.
        """
        weight, plan = job.weight, job.plan
        dtype = _ITERATED.get(weight.dtype)
        # The device first: `available` starts CUDA and imports Triton.
        if self._failed or dtype is None or weight.is_cuda == interpreted() or not available():
            return False
        device = weight.get_device()
        return (
            type(weight) in _PLAIN_TENSORS
            and (found := _window(job)) != 0
            and (positions := max(found, 1)) > 0
            and _fits(weight, weight.shape, weight.dtype, device, positions=positions)
            and _fits_grad(job.grad, weight.shape, device, positions)
            and (n_vectors := job.V.shape[-2]) <= MOST_VECTORS
            and (n_vectors == 1 or _has_tuples())
            and (plan.matrix[-1] <= _most_columns(weight.dtype, weight.device) or _has_tuples())
            and _fits(job.V, plan.rows(n_vectors), dtype, device)
            and (job.last is None or _fits_last(job, dtype, device))
            and _fits_number(job.factor, device)
            and (job.slope is None or _fits_number(job.slope.target, device))
        )

    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, those of one device and pair of dtypes in the same launches.

        Parameters
        ----------
        jobs : sequence of Job, or JobList
            For a `JobList`, the work that does not depend on gradients is done in its first step.
        n_iter : int
            Power iterations. With 0 the term is that of each job's ``last``.

        Returns
        -------
        Result

        Raises
        ------
        spectral_core.ArgumentError
            If ``n_iter`` is 0 and a job has no ``last``.
        RuntimeError
            If a graph is captured, and no step was run before with such jobs.
        """
        prepared = self._prepare(jobs, n_iter)
        for share in prepared.shares:
            mine, grads = share.of_step(jobs)
            if not self._failed:
                try:
                    if share.group is None:
                        share.group, share.slots = self._group_of(share.kind, mine)
                    share.group.run((share.addresses, grads, share.slots), mine, n_iter)
                    self._has_run.add(share.kind)
                    if share.group.captured:
                        # As long as the graph, which reads its tables at every replay.
                        self._captured.add(share.group)
                    continue
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    self._give_up(share.kind, error)
            self._fall_back(mine, [prepared.triplets[i] for i in share.places], n_iter)
        return Result([job.grad for job in jobs], prepared.triplets)

    def _prepare(self, jobs: Sequence[Job], n_iter: int) -> _Prepared:
        """Divide the jobs by kind: for a `JobList`, as in its first step."""
        if isinstance(jobs, JobList) and (known := jobs.memo.get(self)) is not None:
            return known
        triplets = [_target(job) for job in jobs] if n_iter else [last_of(job) for job in jobs]
        places: dict[_Kind, list[int]] = {}
        for place, job in enumerate(jobs):
            grad = job.weight if job.grad is None else job.grad
            dtypes = job.weight.dtype, grad.dtype
            kind = _Kind(job.weight.device, *dtypes, job.V.shape[-2], not job.plan.reshapes)
            places.setdefault(kind, []).append(place)
        shares = [
            _Share(kind, mine, _addresses_of(jobs, triplets, mine)) for kind, mine in places.items()
        ]
        prepared = _Prepared(triplets, shares)
        # Only where the results go to the same tensors in each step, with iterations or without.
        if isinstance(jobs, JobList) and all(
            job.last is not None and job.last.V is job.V for job in jobs
        ):
            jobs.memo[self] = prepared
        return prepared

    def _give_up(self, kind: _Kind, error: Exception) -> None:
        """Use the fallback from now on, or raise the error if that is not safe.

        Before the kernels of a kind have run once, no gradient of that kind has changed.
        """
        if self._fallback is None or kind in self._has_run or capturing(kind.device):
            raise error
        self._failed = True
        warnings.warn(
            "Triton's kernels cannot be used here. PyTorch's operations are used instead, which "
            f"are slower; kernels=False avoids this warning: {error!r}",
            RuntimeWarning,
            stacklevel=3,
        )

    def _fall_back(self, jobs: Sequence[Job], triplets: Sequence[Triplet], n_iter: int) -> None:
        """Run jobs by the fallback, and write what it finds into the tensors of ``triplets``."""
        assert self._fallback is not None
        # A list of its own: a `JobList` would remember a division that has this engine in it.
        found = dispatch(list(jobs), n_iter, (self._fallback, _REFERENCE)).triplets
        write_into(
            pair
            for triplet, result in zip(triplets, found, strict=True)
            for pair in zip(triplet, result, strict=True)
        )

    def _group_of(self, kind: _Kind, jobs: Sequence[Job]) -> tuple[_Group, _Slots]:
        """Return a group with tables for these jobs, and their places in it.

        Experts, LayerDrop and layers that are frozen by turns give other sets of jobs in each step.
        A part of a known set uses its tables. Sets that overlap are joined: after a few steps, all
        of them are parts of one.
        """
        shapes = tuple([_Shape(job.plan, _window(job)) for job in jobs])
        if (group := self._groups.get((kind, shapes))) is not None:
            return group, None
        worth = [
            (known, group)
            for (kind_, known), group in self._groups.items()
            if kind_ == kind and len(jobs) * _WORTH_A_PART >= len(known)
        ]
        for known, group in sorted(worth, key=lambda pair: len(pair[0])):
            if (slots := _places_in(known, shapes)) is not None:
                return group, slots
        old = max((known for known, _ in worth if {*known} & {*shapes}), key=len, default=())
        joined = *old, *(Counter(shapes) - Counter(old)).elements()
        group = _group_class(kind)(kind, joined)
        self._forget(*[(kind, old)] * bool(old))
        self._groups[kind, joined] = group
        return group, _places_in(joined, shapes) if old else None

    def _forget(self, *keys: tuple[_Kind, tuple[_Shape, ...]]) -> None:
        """Drop these groups and the oldest ones; `_captured` keeps those that a graph may read."""
        for key in [*keys, *list(self._groups)[: max(0, len(self._groups) + 1 - _SETS)]]:
            self._groups.pop(key, None)


def _places_in(known: tuple[_Shape, ...], shapes: tuple[_Shape, ...]) -> _Slots:
    """Return a place in ``known`` for each of ``shapes``, or None if there are too few."""
    free: dict[_Shape, list[int]] = {}
    for place in reversed(range(len(known))):
        free.setdefault(known[place], []).append(place)
    try:
        return tuple([free[shape].pop() for shape in shapes])
    except (KeyError, IndexError):
        return None


def _group_class(kind: _Kind) -> type[_Group]:
    """Return the class that iterates so many vectors."""
    if kind.n_vectors == 1:
        return _Group
    from .triton_rows import RowsGroup  # it needs this module

    return RowsGroup


@cache
def _most_columns(dtype: torch.dtype, device: torch.device, n_vectors: int = 1) -> int:
    """Return the largest number of columns of a matrix that is read once.

    Registers limit it, and the device's shared memory. All but one stage of a tile wait there: 128
    KiB at the limit. The large GPUs have more than that, but workstation cards have 99 KiB.
    """
    most = LIMITS[_ITERATED[dtype]] // power_of_two(n_vectors)
    if device.type != "cuda":
        return most
    properties = torch.cuda.get_device_properties(device)
    room = getattr(properties, "shared_memory_per_block_optin", 227 * 1024) - 1024  # for its sums
    while (_stages(dtype, n_vectors) - 1) * most * dtype.itemsize > room:
        most //= 2
    return most


def _stages(dtype: torch.dtype, n_vectors: int = 1) -> int:
    """Return the number of tiles in flight: more where a tile has fewer bytes."""
    if n_vectors == 1:
        return 4 if dtype.itemsize == 2 else 3
    # At least 64 bytes a thread, and at most five tiles.
    bytes_a_thread = _ELEMENTS_A_THREAD[_ITERATED[dtype]] // power_of_two(n_vectors)
    return 1 + min(5, max(2, 64 // (bytes_a_thread * dtype.itemsize)))


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _window(job: Job) -> int:
    """Return the `window` of a job's weight, or 0 where the kernels cannot find its rows.

    The number is negative for a layer with inputs before outputs: the length of a run of a row.
    """
    form = job.plan.form(window(job.weight))
    if form is None:
        return 0
    if job.plan.reshapes:
        return form.window if form.kinds == "oki" else 1
    return -form.window if form.kinds in ("io", "iok") else 0


def _fits(
    x: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: int,
    *,
    positions: int = 1,
) -> bool:
    return (
        x.dtype is dtype
        and x.get_device() == device
        and x.shape == shape
        and x.layout is torch.strided
        and window(x) == positions
        and not x.is_neg()
    )


def _fits_grad(grad: Tensor | None, shape: Sequence[int], device: int, positions: int) -> bool:
    return grad is None or (
        type(grad) in _PLAIN_TENSORS
        and grad.dtype in _ITERATED
        and not grad.requires_grad  # autograd must see what is written
        and _fits(grad, shape, grad.dtype, device, positions=positions)
    )


def _fits_last(job: Job, dtype: torch.dtype, device: int) -> bool:
    last, plan = last_of(job), job.plan
    return (
        (last.V is job.V or _fits(last.V, job.V.shape, dtype, device))
        and _fits(last.u, plan.left, dtype, device)
        and _fits(last.sigma, plan.stack, dtype, device)
    )


def _fits_number(x: Any, device: int) -> bool:
    """Return True for a number, or a real tensor of shape () on the device or on the CPU."""
    if not isinstance(x, Tensor):
        return isinstance(x, (float, int))
    if x.is_cpu:  # read in each step, without waiting for the device
        return x.shape == () and not x.is_complex()
    return type(x) in _PLAIN_TENSORS and x.dtype in _ITERATED and _fits(x, (), x.dtype, device)


def _target(job: Job) -> Triplet:
    """Return the tensors that the results are written into."""
    last, V = job.last, job.V
    if last is None:
        return Triplet(V.new_empty(job.plan.stack), V.new_empty(job.plan.left), V)
    return last if last.V is V else Triplet(last.sigma, last.u, V)


def _addresses_of(
    jobs: Sequence[Job], triplets: Sequence[Triplet], places: Sequence[int]
) -> tuple[int, ...]:
    """Return the addresses of all weights, then of all V, u and sigma."""
    return (
        *[jobs[i].weight.data_ptr() for i in places],
        *[triplets[i].V.data_ptr() for i in places],
        *[triplets[i].u.data_ptr() for i in places],
        *[triplets[i].sigma.data_ptr() for i in places],
    )


class _Work(NamedTuple):
    """Hold the tables that say which program does what, from shapes alone, and the scratch."""

    shapes: Tensor
    items: Tensor
    blocks: Tensor
    tiles: Tensor
    parts: Tensor  # programs of `add_sums`: often none
    sums: Tensor
    ts: Tensor
    squares: Tensor
    zs: Tensor
    z_squares: Tensor
    inverses: Tensor


# The addresses of `_addresses_of`, those of the gradients, and the places of the jobs in a group.
_Addresses: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], _Slots]

# The table of penalties, the tensors it refers to, and whether any is sloped, and any a bound.
_Penalties: TypeAlias = tuple[Tensor, Tensor | None, tuple[bool, bool]]


class _Group:
    """Launch the kernels on the matrices of one kind, with their tables and scratch memory."""

    def __init__(self, kind: _Kind, jobs: Sequence[_Shape]) -> None:
        self.device = kind.device
        if capturing(self.device):
            raise RuntimeError(
                "a step is captured in a CUDA graph before one was run with weights of these "
                "shapes: run one first, so that its kernels and tables are there"
            )
        self.plans = [job.plan for job in jobs]
        self.weight_dtype, self.grad_dtype = kind.weight, kind.grad
        self.dtype = _ITERATED[kind.weight]
        self.n_vectors = kind.n_vectors
        self.sum_dtype = torch.promote_types(self.dtype, _ITERATED[kind.grad])
        self.counts = np.array([prod(plan.stack) for plan in self.plans])
        self.m, self.n = (
            np.repeat([plan.matrix[axis] for plan in self.plans], self.counts) for axis in (-2, -1)
        )
        # Where a convolution is channels-last: the columns of each input channel.
        self.windows = np.repeat([job.window for job in jobs], self.counts)
        self.permuted = bool(self.windows.max() > 1)
        self.transposed = kind.transposed
        # The place of each matrix in its stack: it decides where the matrix begins in each tensor.
        self.nth = np.concatenate([np.arange(count) for count in self.counts])
        held = self.n <= _most_columns(kind.weight, self.device, self.n_vectors)
        widths = _width_of(self.n, _PRODUCT_WIDTHS)
        self.product_widths = np.where(held, widths, _WIDE)
        self.update_widths = _width_of(self.n, _UPDATE_WIDTHS)
        # Of a warp: the registers of a thread hold this for each vector.
        elements = 32 * _ELEMENTS_A_THREAD[self.dtype] // power_of_two(self.n_vectors)
        widest = 1 << widths[held].max() if held.any() else 8 * elements
        self.n_warps = int(np.clip(widest // elements, 4, 16))
        self.product_tile = self.n_warps * elements
        self.update_tile = 32 * _UPDATE_WARPS * _ELEMENTS_A_THREAD[self.sum_dtype]
        few = _divided(self.n, _BLOCKS[0]).sum() < 2 * _processors(self.device)
        self.block = _BLOCKS[int(few)]
        self.work = self._make_work()
        self._stream = torch.cuda.current_stream() if self.device.type == "cuda" else None
        self.addresses = GraphTable((len(self.n), 7), torch.int64, self.device)
        self.penalties = GraphTable((len(self.n), 5), torch.float64, self.device)
        # Compiled kernels on their grids, and their constants, by name and case.
        self._bound: dict[tuple[str, tuple[Any, ...]], tuple[Any, tuple[Any, ...]]] = {}
        self._numbers: tuple[Any, _Penalties] | None = None  # of a list whose numbers are the same

    @property
    def _memory(self) -> tuple[Tensor, ...]:
        """The tables of work, and the scratch memory."""
        return self.work

    @property
    def _kernels(self) -> Any:
        """The module of the kernels."""
        return _kernels()

    @property
    def _numbers_of_update(self) -> Tensor:
        """What `update` needs of each matrix: 1/‖t‖."""
        return self.work.inverses

    @property
    def captured(self) -> bool:
        """True if a CUDA graph reads the tables."""
        return self.addresses.captured or self.penalties.captured

    def run(self, addresses: _Addresses, jobs: Sequence[Job], n_iter: int) -> None:
        """Launch all kernels of a step.

        Parameters
        ----------
        addresses : tuple
            As `_addresses_of`, those of the gradients (0 is no gradient), and the places of the
            jobs in this group. A matrix without a job is left out.
        jobs : sequence of Job
            Their factors and slopes are those of this step.
        n_iter : int
        """
        pointers, classes = self.addresses.get(addresses, self._make_pointers)
        penalties, gathered, kinds = self._penalties(jobs, addresses[2])
        with current(self.device):
            self._use_on_this_stream()
            for i in range(n_iter):
                self._iterate(pointers, classes[0], first=i == 0, keep=i + 1 < n_iter)
            self._update(pointers, classes[1], penalties, gathered, (n_iter > 0, *kinds))

    def _use_on_this_stream(self) -> None:
        """Keep the memory of the tables until the work of another stream on them is complete.

        A capture needs no such note: the engine keeps what a graph reads.
        """
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream()
        if stream != self._stream and not capturing(self.device):
            for tensor in (*self._memory, *self.addresses.tensors, *self.penalties.tensors):
                tensor.record_stream(stream)
            self._stream = stream

    def _iterate(self, pointers: Tensor, classes: int, *, first: bool, keep: bool) -> None:
        work = self.work
        self._launch(
            *("products", (classes, first), len(work.items), self._products_constants),
            *(pointers, work.shapes, work.items, work.sums, work.ts, work.squares),
        )
        self._add_sums(pointers)
        self._launch(
            *("columns", (), len(work.blocks), self._columns_constants),
            *(pointers, work.shapes, work.blocks, work.sums, work.squares),
            *(work.zs, work.z_squares, work.inverses),
        )
        if keep:
            self._launch(
                *("directions", (), len(work.blocks), self._directions_constants),
                *(pointers, work.shapes, work.blocks, work.zs, work.z_squares),
            )

    def _add_sums(self, pointers: Tensor) -> None:
        work = self.work
        if len(work.parts):
            self._launch(
                *("add_sums", (), len(work.parts), self._add_sums_constants),
                *(pointers, work.shapes, work.parts, work.sums, work.squares),
            )

    def _update(
        self,
        pointers: Tensor,
        classes: int,
        penalties: Tensor,
        gathered: Tensor | None,
        kinds: tuple[bool, ...],
    ) -> None:
        work = self.work
        numbers = penalties if gathered is None else gathered
        self._launch(
            *("update", (classes, gathered is not None, numbers.dtype, *kinds), len(work.tiles)),
            self._update_constants,
            *(pointers, work.shapes, work.tiles, penalties, numbers),
            *(work.zs, work.z_squares, self._numbers_of_update, work.ts),
        )

    def _launch(
        self,
        name: str,
        case: tuple[Any, ...],
        programs: int,
        constants_of: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
        *tensors: Tensor,
    ) -> None:
        """Launch a kernel: the first time of a case by Triton, and then as it was compiled.

        Triton's own launch binds the arguments, looks the kernel up by the value of each constant
        and by the alignment of each tensor, and so needs 16 µs. The constants of a case are always
        the same. So are the dtype and the alignment of the tensors, which this group has allocated:
        the compiled kernel is launched with them at once. Only ``gathered`` comes from elsewhere;
        its dtype is part of the case, and Triton does not specialize on it.
        """
        bound = self._bound.get((name, case))
        if bound is not None:
            launch, constants = bound
            launch(*tensors, *constants)
            return
        arguments, options = constants_of(*case)
        kernel = getattr(self._kernels, name)
        compiled = kernel[(programs,)](*tensors, **arguments, **options, **_OPTIONS)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._bound[name, case] = compiled[(programs, 1, 1)], tuple(arguments.values())

    def _products_constants(
        self, classes: int, first: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {
            "DTYPE": _language(self.weight_dtype),
            "ACC": _language(self.dtype),
            "TILE": self.product_tile,
            "VECTOR": 16 // self.weight_dtype.itemsize,
            "CLASSES": classes,
            "STAGES": _stages(self.weight_dtype, self.n_vectors),
            "FIRST": first,
            "PERMUTED": self.permuted,
            "TRANSPOSED": self.transposed,
        }
        return constants, {"num_warps": self.n_warps, "maxnreg": _PRODUCT_REGISTERS}

    def _add_sums_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {
            "ACC": _language(self.dtype),
            "HEIGHT": 16,
            "WIDTH": _SUMS_WIDTH,
            "STAGES": 3,
            "K": self.n_vectors,
        }
        return constants, {"num_warps": 4}

    def _columns_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {
            "ACC": _language(self.dtype),
            "TINY": torch.finfo(self.dtype).tiny,
            "HEIGHT": _COLUMNS_HEIGHT,
            "STAGES": 3,
            "BLOCK": self.block,
        }
        return constants, {"num_warps": 4}

    def _directions_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {
            "ACC": _language(self.dtype),
            "TINY": torch.finfo(self.dtype).tiny,
            "PERMUTED": self.permuted,
            "BLOCK": self.block,
        }
        return constants, {"num_warps": 4}

    def _update_constants(
        self,
        classes: int,
        from_tensors: bool,
        _: torch.dtype,
        iterated: bool,
        sloped: bool,
        bounded: bool,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {
            "DTYPE": _language(self.grad_dtype),
            "ACC": _language(self.dtype),
            "SUM": _language(self.sum_dtype),
            "TINY": torch.finfo(self.dtype).tiny,
            "TILE": self.update_tile,
            "VECTOR": 16 // self.grad_dtype.itemsize,
            "CLASSES": classes,
            "ITERATED": iterated and self.n_vectors == 1,
            "GATHERED": from_tensors,
            "SLOPED": sloped,
            "BOUNDED": bounded,
            "PERMUTED": self.permuted,
            "TRANSPOSED": self.transposed,
            "SORTED": iterated and self.n_vectors > 1,
        }
        return constants, {"num_warps": _UPDATE_WARPS}

    def _make_pointers(self, key: _Addresses) -> tuple[np.ndarray, tuple[int, int]]:
        """Return the table of addresses, and which bodies the two large kernels need for it.

        A matrix that is absent has addresses 0 and class -1, which no body has.
        """
        given, grads, slots = key
        weights, *vectors = np.array(given, dtype=np.int64).reshape(4, -1)
        bases = np.zeros((len(self.counts), 5), np.int64)
        there: Any = slice(None) if slots is None else list(slots)
        bases[there] = np.stack([weights, np.array(grads, dtype=np.int64), *vectors], axis=1)
        bases = np.repeat(bases, self.counts, axis=0)
        strides = np.stack(
            [
                self.m * self.n * self.weight_dtype.itemsize,
                self.m * self.n * self.grad_dtype.itemsize,
                self.n * self.n_vectors * self.dtype.itemsize,
                self.m * self.dtype.itemsize,
                np.full_like(self.n, self.dtype.itemsize),
            ],
            axis=1,
        )
        addresses = np.where(bases == 0, 0, bases + self.nth[:, None] * strides)
        row_bytes, grad_row_bytes = (
            self.n * dtype.itemsize for dtype in (self.weight_dtype, self.grad_dtype)
        )
        wide = (addresses[:, 0] | addresses[:, 2] | row_bytes) % 16 == 0
        wide_grad = (addresses[:, 1] | grad_row_bytes) % 16 == 0
        if self.transposed:  # the elements that a thread loads do not follow each other
            wide, wide_grad = np.zeros_like(wide), np.zeros_like(wide)
        classes = np.stack([2 * self.product_widths + wide, 2 * self.update_widths + wide_grad], 1)
        present = addresses[:, 0] != 0
        bits = np.bitwise_or.reduce(1 << classes[present], axis=0)
        classes[~present] = -1
        return np.concatenate([addresses, classes], axis=1), (int(bits[0]), int(bits[1]))

    def _penalties(self, jobs: Sequence[Job], slots: _Slots) -> _Penalties:
        """Return the table of penalties, the tensors it refers to, and (SLOPED, BOUNDED).

        A row is (factor, slot, target, slot, code). A slot is a place among the tensors, or -1.
        Code 0 is the paper's penalty.
        """
        numbers = jobs.numbers if isinstance(jobs, JobList) else None
        if (
            self._numbers is not None
            and numbers is self._numbers[0]
            and not self.penalties.captured
        ):
            return self._numbers[1]
        self._numbers = None
        factors = [job.factor for job in jobs]
        slopes = [job.slope for job in jobs]
        sloped = slopes.count(None) < len(slopes)
        kinds = sloped, sloped and any(isinstance(slope, Bound) for slope in slopes)
        if not sloped and {float}.issuperset(map(type, factors)):
            table = self.penalties.get((slots, *factors), self._make_penalties)[0]
            found: _Penalties = table, None, kinds
        else:
            found = self._penalties_of(factors, slopes, kinds, slots)
        constant = {float, int}.issuperset(map(type, factors)) and all(
            slope is None or type(slope.target) in (float, int) for slope in slopes
        )
        if numbers is not None and constant:
            self._numbers = numbers, found
        return found

    def _is_on_device(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.device == self.device

    def _penalties_of(
        self, factors: list[Any], slopes: list[Any], kinds: tuple[bool, bool], slots: _Slots
    ) -> _Penalties:
        targets = [0.0 if slope is None else slope.target for slope in slopes]
        codes = [0 if slope is None else slope.code for slope in slopes]
        tensors = {id(x): x for x in (*factors, *targets) if self._is_on_device(x)}
        nth = {key: place for place, key in enumerate(tensors)}

        def entry(x: Any) -> tuple[float, int]:
            if id(x) in nth:
                return 1.0, nth[id(x)]
            if isinstance(x, Tensor) and capturing(self.device):
                raise ArgumentError(
                    "a factor, target or bound is a tensor on the CPU, which the replays of a CUDA "
                    "graph cannot read: move it to the device of the weights, or give a number"
                )
            return float(x), -1

        key = [
            (*entry(factor), *entry(target), code)
            for factor, target, code in zip(factors, targets, codes, strict=True)
        ]
        table, _ = self.penalties.get((slots, *key), self._make_penalties)
        return table, _gathered(list(tensors.values())) if tensors else None, kinds

    def _make_penalties(self, key: tuple[Any, ...]) -> tuple[np.ndarray, None]:
        slots, *numbers = key
        rows = [row if isinstance(row, tuple) else (row, -1, 0.0, -1, 0) for row in numbers]
        table = np.zeros((len(self.counts), 5))
        table[slice(None) if slots is None else list(slots)] = rows
        return np.repeat(table, self.counts, axis=0), None

    def _make_work(self) -> _Work:
        """Divide the matrices among programs, and allocate the scratch memory."""
        m, n = self.m, self.n
        rows = self._rows_an_item()
        n_items, n_blocks = _divided(m, rows), _divided(n, self.block)
        strides = _divided(n, 32) * 32  # 16-byte stores
        shapes = np.stack(
            [
                *(m, n, _starts(n_items), n_items, _starts(n_items * strides), strides),
                *(_starts(n_blocks), n_blocks, _starts(m), _starts(n)),
                *(np.where(self.windows > 1, n // self.windows, n), np.maximum(self.windows, 1)),
                np.where(n_items > _MANY_SUMS, _SUMS_TOGETHER, 1),
                np.where(self.windows < 0, -self.windows, n),
            ],
            axis=1,
        )
        items = [
            (matrix, row, min(row + rows[matrix], m[matrix]))
            for matrix in range(len(m))
            for row in range(0, m[matrix], rows[matrix])
        ]
        parts = [
            (matrix, first, min(first + _SUMS_TOGETHER, n_items[matrix]), col)
            for matrix in np.flatnonzero(n_items > _MANY_SUMS)
            for first in range(0, n_items[matrix], _SUMS_TOGETHER)
            for col in range(-(-strides[matrix] * self.n_vectors // _SUMS_WIDTH))
        ]
        blocks = [(matrix, i) for matrix in range(len(m)) for i in range(n_blocks[matrix])]

        def table(values: Any, dtype: torch.dtype) -> Tensor:
            host = torch.tensor(np.array(values), dtype=dtype)
            if self.device.type == "cuda":  # the device is not waited for
                host = host.pin_memory()
            return host.to(self.device, non_blocking=True)

        def scratch(size: int) -> Tensor:
            return torch.empty(int(size), dtype=self.dtype, device=self.device)

        return _Work(
            shapes=table(shapes, torch.int64),
            items=table(items, torch.int32),
            blocks=table(blocks, torch.int32),
            tiles=table(self._tiles(), torch.int32),
            parts=table(parts, torch.int32),
            sums=scratch((n_items * strides).sum() * self.n_vectors),
            ts=scratch(m.sum() * self.n_vectors),
            squares=scratch(n_items.sum()),
            zs=scratch(n.sum() * self.n_vectors),
            z_squares=scratch(n_blocks.sum()),
            inverses=scratch(len(m)),
        )

    def _rows_an_item(self) -> np.ndarray:
        """Return the rows of each matrix for a program of `products`, in whole tiles.

        One wave of programs if each has few rows then, else four: so that the last one is short.
        """
        wide = self.product_widths == _WIDE
        heights = np.where(wide, _WIDE_HEIGHT, self.product_tile >> self.product_widths)
        warps = np.where(self.n <= _FEW_COLUMNS, _FEW_WARPS, _WARPS_A_PROCESSOR)
        at_once = _processors(self.device) * np.maximum(warps // self.n_warps, 1)
        wave = (self.m * self.n).sum() / at_once
        elements = np.maximum(np.minimum(_ROWS_WORTH_A_SUM * self.n, wave), wave / 4)
        return heights * np.maximum(_divided(elements / self.n, heights), 1)

    def _tiles(self) -> np.ndarray:
        """Return the programs of `update`: (matrix, first row, end, block of columns)."""
        widths = 1 << self.update_widths
        heights = self.update_tile // widths
        n_tiles = (_divided(self.m, heights) * _divided(self.n, widths)).sum()
        many = n_tiles > 4 * _TILES_A_PROGRAM * _WARPS_A_PROCESSOR * _processors(self.device)
        rows = heights * (_TILES_A_PROGRAM if many else 1)
        return np.array(
            [
                (matrix, row, min(row + rows[matrix], self.m[matrix]), col)
                for matrix in range(len(self.m))
                for row in range(0, self.m[matrix], rows[matrix])
                for col in range(-(-self.n[matrix] // widths[matrix]))
            ]
        )


def _gathered(tensors: list[Tensor]) -> Tensor:
    """Return all of them in one tensor: without a launch if there is one, else in one or a few."""
    if len(tensors) == 1:
        return tensors[0]
    if len({x.dtype for x in tensors}) > 1:
        tensors = [x.to(torch.float64) for x in tensors]
    return torch.stack(tensors)


@cache
def _language(dtype: torch.dtype) -> Any:
    return getattr(_kernels().tl, str(dtype).removeprefix("torch."))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # interpreted: the fewer programs, the sooner they are done
    return torch.cuda.get_device_properties(device).multi_processor_count


def _width_of(n: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Return the smallest of these exponents whose power of two holds n, or the last one."""
    bounds = 1 << np.array(widths)
    return np.array(widths)[np.minimum(np.searchsorted(bounds, n), len(widths) - 1)]


def _divided(x: np.ndarray, by: Any) -> np.ndarray:
    """Divide and round up."""
    return np.ceil(x / by).astype(np.int64)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes
