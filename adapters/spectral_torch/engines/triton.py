"""One step of Algorithm 1 on all weights of a model in three kernel launches an iteration.

`TritonStep` is a `spectral_core.step.Step` for the tasks that `takes` says yes to. It writes v, u
and σ into the tensors that it is given, so that a step captured in a CUDA graph goes on from
where it was at every replay. Nothing waits for the device, and nothing is read from it.

The kernels find the matrices by tables on the device (`triton_kernels`). What depends on shapes
alone is made once (`_Group`); the table of addresses and that of factors are uploaded when one of
them has changed (`_Table`).

On an H100 a step is bound by memory: it must read W once, and read and write G. A product of a
row tile is used for the second product while the tile is in registers, so W is not read twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spectral_core import PowerIteration
from spectral_core.step import Advance, Task, last_of

# Of columns, for a program holds a row of W, v and a sum of rows in registers: 16384 float32 are
# 32 of each in the 512 threads that 128 registers allow. float64 takes twice as many.
LIMITS = {torch.float32: 16384, torch.float64: 8192}

_ITERATED = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)  # a subclass may have no memory of its own

# Widths of tiles, in powers of two. Fewer than there are: each that a model has is compiled, and
# a tile that is half empty costs no memory traffic, only arithmetic that the kernel can spare.
_PRODUCT_WIDTHS = (5, 7, 9, 10, 11, 12, 13, 14)
_UPDATE_WIDTHS = (5, 7, 9)
_BLOCK = 64  # columns of a program that adds up sums: triton_kernels.BLOCK

# A thread holds 128 bytes of a tile at most: eight 16-byte loads of float32.
_ELEMENTS_A_THREAD = {torch.float32: 32, torch.float64: 16}
_UPDATE_WARPS = 4
_COLUMNS_HEIGHT = 32
# 16 warps of 128 registers fill a multiprocessor, whatever the warps of a program. With three
# stages, each waits for 128 bytes a thread and has as many on the way behind them: 64 to 128 KiB a
# multiprocessor. HBM3 at 3.35 TB/s and 0.7 µs needs 18 KiB, and some more under load.
_WARPS_A_PROCESSOR = 16
_PRODUCT_REGISTERS = 128
# A program's sums are written and read again: below so many rows, that is more than 6 % of W.
_ROWS_WORTH_A_SUM = 32
# Rows of tiles of G in a program that has many to choose from: v and σ are looked up once.
_TILES_A_PROGRAM = 4
_SPARE_TABLES = 4
_SETS = 64  # of tasks that have tables and scratch memory: optimizers take turns


@cache
def _kernels() -> Any:
    """The module of kernels, or None where there is no Triton."""
    if find_spec("triton") is None:
        return None
    try:
        from . import triton_kernels
    except Exception:  # an older one lacks a name, a broken one fails in its own way
        return None
    return triton_kernels


@cache
def interpreted() -> bool:
    """Whether Triton interprets kernels, on CPU tensors: a test without a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # before the import, which takes a second
        return False
    return _kernels() is not None and "Interpreted" in type(_kernels().products).__name__


@cache
def available() -> bool:
    """Whether `TritonStep` can run: there is Triton, and a GPU of NVIDIA that it compiles for."""
    if interpreted():
        return True
    if torch.version.cuda is None or not torch.cuda.is_available() or _kernels() is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def takes(task: Task) -> bool:
    """Whether `TritonStep` can do this task; every other one is for another step.

    Parameters
    ----------
    task : spectral_core.step.Task

    Returns
    -------
    bool
        True for a real, contiguous weight and gradient on a GPU whose matrix is the tensor
        reshaped, of at most `LIMITS` columns, with a contiguous v (and last u, v and σ) in the
        dtype of the iteration.
    """
    weight, grad, plan, last = task.weight, task.grad, task.plan, task.last
    dtype = _ITERATED.get(weight.dtype)
    # The device first: to ask what there is starts CUDA, and imports Triton.
    if dtype is None or weight.is_cuda == interpreted() or not available():
        return False
    shape, device = weight.shape, weight.get_device()
    return (
        type(weight) in _PLAIN_TENSORS
        and type(grad) in _PLAIN_TENSORS
        and grad.dtype in _ITERATED
        and plan.matrix[-1] <= LIMITS[dtype]
        and plan.reshapes
        and _fits(weight, shape, weight.dtype, device)
        and _fits(grad, shape, grad.dtype, device)
        and _fits(task.v, plan.right, dtype, device)
        and (last is None or last.v is task.v or _fits(last.v, plan.right, dtype, device))
        and (last is None or _fits(last.u, plan.matrix[:-1], dtype, device))
        and (last is None or _fits(last.sigma, plan.matrix[:-2], dtype, device))
        and (type(task.factor) is float or _fits_factor(task.factor, device))
    )


def _fits(x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: int) -> bool:
    return (
        x.dtype is dtype
        and x.get_device() == device
        and x.shape == shape
        and x.layout is torch.strided
        and x.is_contiguous()
    )


def _fits_factor(factor: Any, device: int) -> bool:
    if isinstance(factor, Tensor):
        dtype = factor.dtype
        return (
            type(factor) in _PLAIN_TENSORS
            and dtype in _ITERATED
            and _fits(factor, (), dtype, device)
        )
    return isinstance(factor, (float, int))


class TritonStep:
    """Lines 5–9 of Algorithm 1 for all tasks at once: `spectral_core.step.plain_step_` on a GPU.

    Each task must be one that `takes` says yes to. Results are written into ``task.v``,
    ``task.last.u`` and ``task.last.sigma``, and these same tensors are returned; where ``last`` is
    None, u and σ are new. Keep one object for each set of weights: it holds the tables and the
    scratch memory of theirs, and of all sets of shapes that it has met.

    In a CUDA graph: run one step with tensors of the same shapes and dtypes before the capture,
    and keep the object as long as the graph. Factors that are numbers are those of the capture at
    every replay; a tensor is read anew. Steps may go on beside replays, on the same stream or
    ordered after it.

    Examples
    --------
    >>> from spectral_torch.triton_step import TritonStep, takes
    >>> step = TritonStep()
    >>> step([], n_iter=1)
    Advance(grads=[], triples=[])
    """

    in_place = True

    def __init__(self) -> None:
        self._groups: dict[Hashable, list[_Group]] = {}

    def __reduce__(self) -> tuple[type[TritonStep], tuple[()]]:
        return TritonStep, ()  # a copy has none of the memory that this one's graphs write to

    def __call__(self, tasks: Sequence[Task], n_iter: int) -> Advance:
        """Advance all tasks.

        Parameters
        ----------
        tasks : sequence of Task
        n_iter : int
            Power iterations. With 0 the term is that of each task's ``last``.

        Returns
        -------
        Advance

        Raises
        ------
        spectral_core.ArgumentError
            If ``n_iter`` is 0 and a task has no ``last``.
        RuntimeError
            If a graph is captured, and no step was run before with such tasks.
        """
        triples = [_target(task) for task in tasks] if n_iter else [last_of(task) for task in tasks]
        for group in self._groups_of(tasks):
            group.run(tasks, triples, n_iter)
        return Advance([task.grad for task in tasks], triples)

    def _groups_of(self, tasks: Sequence[Task]) -> list[_Group]:
        """The tasks by device and dtypes. `_Group` keeps the plans, so that ids stay theirs."""
        key = tuple(
            [(id(t.plan), t.weight.dtype, t.grad.dtype, t.weight.get_device()) for t in tasks]
        )
        groups = self._groups.get(key)
        if groups is None:
            alike: dict[Hashable, list[int]] = {}
            for i, task in enumerate(tasks):
                kind = task.weight.device, task.weight.dtype, task.grad.dtype
                alike.setdefault(kind, []).append(i)
            groups = [_Group([tasks[i] for i in found], found) for found in alike.values()]
            self._forget()
            self._groups[key] = groups
        return groups

    def _forget(self) -> None:
        """Keep the number of sets in bounds; not without those that a graph may still run."""
        for key in list(self._groups)[: max(0, len(self._groups) + 1 - _SETS)]:
            if not any(group.captured for group in self._groups[key]):
                del self._groups[key]


def _target(task: Task) -> PowerIteration:
    """The tensors that the results go to."""
    last, v = task.last, task.v
    if last is None:
        *stack, m, _ = task.plan.matrix
        return PowerIteration(v.new_empty(stack), v.new_empty((*stack, m)), v)
    return last if last.v is v else PowerIteration(last.sigma, last.u, v)


class _Work(NamedTuple):
    """Which program does what: the tables that depend on shapes alone, and the scratch memory."""

    shapes: Tensor
    items: Tensor
    blocks: Tensor
    tiles: Tensor
    sums: Tensor
    ts: Tensor
    squares: Tensor
    zs: Tensor
    z_squares: Tensor
    inverses: Tensor


class _Group:
    """Tasks of one device and pair of dtypes: the matrices of a launch."""

    def __init__(self, tasks: Sequence[Task], indices: list[int]) -> None:
        weight, grad = tasks[0].weight, tasks[0].grad
        self.device, self.indices = weight.device, indices
        if _capturing(self.device):
            raise RuntimeError(
                "a step is captured in a CUDA graph before one was run with weights of these "
                "shapes: run one first, so that its kernels and tables are there"
            )
        self.plans = [task.plan for task in tasks]
        self.weight_dtype, self.grad_dtype = weight.dtype, grad.dtype
        self.dtype = _ITERATED[weight.dtype]
        self.sum_dtype = torch.promote_types(self.dtype, _ITERATED[grad.dtype])
        self.counts = np.array([prod(plan.matrix[:-2]) for plan in self.plans])
        self.m, self.n = (
            np.repeat([plan.matrix[axis] for plan in self.plans], self.counts) for axis in (-2, -1)
        )
        # The nth of its stack: tells where a matrix begins in each tensor.
        self.nth = np.concatenate([np.arange(count) for count in self.counts])
        self.product_widths = _width_of(self.n, _PRODUCT_WIDTHS)
        self.update_widths = _width_of(self.n, _UPDATE_WIDTHS)
        elements = 32 * _ELEMENTS_A_THREAD[self.dtype]  # of a warp
        self.n_warps = int(np.clip((1 << self.product_widths.max()) // elements, 4, 16))
        self.product_tile = self.n_warps * elements
        self.update_tile = 32 * _UPDATE_WARPS * _ELEMENTS_A_THREAD[self.sum_dtype]
        self.work = self._make_work()
        self.addresses = _Table((len(self.n), 7), torch.int64, self.device)
        self.factors = _Table((len(self.n), 2), torch.float64, self.device)

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph reads the tables."""
        return self.addresses.captured or self.factors.captured

    def run(self, tasks: Sequence[Task], triples: Sequence[PowerIteration], n_iter: int) -> None:
        """Launch all kernels of a step."""
        if len(self.indices) < len(tasks):
            tasks = [tasks[i] for i in self.indices]
            triples = [triples[i] for i in self.indices]
        pointers, classes = self._pointers(tasks, triples)
        factors, gathered = self._factors(tasks)
        with _on(self.device):
            for to_come in reversed(range(n_iter)):
                self._iterate(pointers, classes[0], keep=to_come > 0)
            self._update(pointers, classes[1], factors, gathered, iterated=n_iter > 0)

    def _iterate(self, pointers: Tensor, classes: int, *, keep: bool) -> None:
        k, work = _kernels(), self.work
        acc, tiny = _language(self.dtype), torch.finfo(self.dtype).tiny
        half = self.weight_dtype.itemsize == 2  # a stage has half the bytes: take one more
        k.products[(len(work.items),)](
            *(pointers, work.shapes, work.items, work.sums, work.ts, work.squares),
            DTYPE=_language(self.weight_dtype),
            ACC=acc,
            TILE=self.product_tile,
            VECTOR=16 // self.weight_dtype.itemsize,
            CLASSES=classes,
            STAGES=4 if half else 3,
            num_warps=self.n_warps,
            maxnreg=_PRODUCT_REGISTERS,
        )
        k.columns[(len(work.blocks),)](
            *(work.shapes, work.blocks, work.sums, work.squares),
            *(work.zs, work.z_squares, work.inverses),
            ACC=acc,
            TINY=tiny,
            HEIGHT=_COLUMNS_HEIGHT,
            STAGES=3,
            num_warps=4,
        )
        if keep:
            k.directions[(len(work.blocks),)](
                *(pointers, work.shapes, work.blocks, work.zs, work.z_squares),
                ACC=acc,
                TINY=tiny,
                num_warps=4,
            )

    def _update(
        self,
        pointers: Tensor,
        classes: int,
        factors: Tensor,
        gathered: Tensor | None,
        *,
        iterated: bool,
    ) -> None:
        work = self.work
        _kernels().update[(len(work.tiles),)](
            *(pointers, work.shapes, work.tiles, factors),
            factors if gathered is None else gathered,
            *(work.zs, work.z_squares, work.inverses, work.ts),
            DTYPE=_language(self.grad_dtype),
            ACC=_language(self.dtype),
            SUM=_language(self.sum_dtype),
            TINY=torch.finfo(self.dtype).tiny,
            TILE=self.update_tile,
            VECTOR=16 // self.grad_dtype.itemsize,
            CLASSES=classes,
            ITERATED=iterated,
            GATHERED=gathered is not None,
            num_warps=_UPDATE_WARPS,
        )

    def _pointers(
        self, tasks: Sequence[Task], triples: Sequence[PowerIteration]
    ) -> tuple[Tensor, tuple[int, int]]:
        """The table of addresses, and which bodies the two large kernels need for it."""
        key = (
            *[task.weight.data_ptr() for task in tasks],
            *[task.grad.data_ptr() for task in tasks],
            *[triple.v.data_ptr() for triple in triples],
            *[triple.u.data_ptr() for triple in triples],
            *[triple.sigma.data_ptr() for triple in triples],
        )
        table, classes = self.addresses.get(key, self._make_pointers)
        return table, classes

    def _make_pointers(self, key: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, int]]:
        bases = np.repeat(np.array(key, dtype=np.int64).reshape(5, -1).T, self.counts, axis=0)
        strides = np.stack(
            [
                self.m * self.n * self.weight_dtype.itemsize,
                self.m * self.n * self.grad_dtype.itemsize,
                *(size * self.dtype.itemsize for size in (self.n, self.m, np.ones_like(self.n))),
            ],
            axis=1,
        )
        addresses = bases + self.nth[:, None] * strides
        row_bytes, grad_row_bytes = (
            self.n * dtype.itemsize for dtype in (self.weight_dtype, self.grad_dtype)
        )
        wide = (addresses[:, 0] | addresses[:, 2] | row_bytes) % 16 == 0
        wide_grad = (addresses[:, 1] | grad_row_bytes) % 16 == 0
        classes = np.stack([2 * self.product_widths + wide, 2 * self.update_widths + wide_grad], 1)
        bits = np.bitwise_or.reduce(1 << classes, axis=0)
        return np.concatenate([addresses, classes], axis=1), (int(bits[0]), int(bits[1]))

    def _factors(self, tasks: Sequence[Task]) -> tuple[Tensor, Tensor | None]:
        """The table of (number, place among the tensors or -1), and the tensors gathered."""
        factors = [task.factor for task in tasks]
        if {float}.issuperset(map(type, factors)):
            return self.factors.get(tuple(factors), self._make_factors)[0], None
        tensors = {id(factor): factor for factor in factors if isinstance(factor, Tensor)}
        places = {key: place for place, key in enumerate(tensors)}
        key = [(1.0, places[id(x)]) if id(x) in places else (float(x), -1) for x in factors]
        table, _ = self.factors.get(tuple(key), self._make_factors)
        return table, _gathered(list(tensors.values())) if tensors else None

    def _make_factors(self, key: tuple[Any, ...]) -> tuple[np.ndarray, None]:
        rows = [row if isinstance(row, tuple) else (row, -1) for row in key]
        return np.repeat(np.array(rows, dtype=np.float64), self.counts, axis=0), None

    def _make_work(self) -> _Work:
        """Divide the matrices among programs, and give each part of the scratch memory."""
        m, n = self.m, self.n
        rows = self._rows_an_item()
        n_items, n_blocks = _divided(m, rows), _divided(n, _BLOCK)
        strides = _divided(n, 32) * 32  # 16-byte stores
        shapes = np.stack(
            [
                *(m, n, _starts(n_items), n_items, _starts(n_items * strides), strides),
                *(_starts(n_blocks), n_blocks, _starts(m), _starts(n)),
            ],
            axis=1,
        )
        items = [
            (matrix, row, min(row + rows[matrix], m[matrix]))
            for matrix in range(len(m))
            for row in range(0, m[matrix], rows[matrix])
        ]
        blocks = [(matrix, i) for matrix in range(len(m)) for i in range(n_blocks[matrix])]

        def scratch(size: int) -> Tensor:
            return torch.empty(int(size), dtype=self.dtype, device=self.device)

        return _Work(
            shapes=torch.tensor(shapes, dtype=torch.int64, device=self.device),
            items=torch.tensor(np.array(items), dtype=torch.int32, device=self.device),
            blocks=torch.tensor(np.array(blocks), dtype=torch.int32, device=self.device),
            tiles=torch.tensor(self._tiles(), dtype=torch.int32, device=self.device),
            sums=scratch((n_items * strides).sum()),
            ts=scratch(m.sum()),
            squares=scratch(n_items.sum()),
            zs=scratch(n.sum()),
            z_squares=scratch(n_blocks.sum()),
            inverses=scratch(len(m)),
        )

    def _rows_an_item(self) -> np.ndarray:
        """Rows of each matrix for a program of `products`: a multiple of its tiles' heights.

        One wave of programs, if each then has few rows; else four, so that the last one is short.
        """
        heights = self.product_tile >> self.product_widths
        at_once = _processors(self.device) * (_WARPS_A_PROCESSOR // self.n_warps)
        wave = (self.m * self.n).sum() / at_once
        elements = np.maximum(np.minimum(_ROWS_WORTH_A_SUM * self.n, wave), wave / 4)
        return heights * np.maximum(_divided(elements / self.n, heights), 1)

    def _tiles(self) -> np.ndarray:
        """The programs of `update`: (matrix, first row, row after the last, block of columns)."""
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


class _Filled(NamedTuple):
    """A table on the device, the pinned memory that it is copied from, and what belongs to it."""

    device: Tensor
    host: Tensor
    more: Any


class _Table:
    """A small table on the device that is filled from the host without waiting.

    A captured copy takes place at each replay. So what a capture has used is never written again:
    neither the pinned memory it copies from, nor the table, which later steps do not use.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._key: Hashable = None
        self._filled: _Filled | None = None
        self._frozen = False  # whether a capture reads the table that steps outside of it use
        self._captured: dict[Hashable, _Filled] = {}
        self._kept: list[_Filled] = []
        self._spare: list[tuple[Tensor, Tensor]] = []

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph reads one of the tables."""
        return self._frozen or bool(self._captured) or bool(self._kept)

    def get(
        self, key: Hashable, make: Callable[[Any], tuple[np.ndarray, Any]]
    ) -> tuple[Tensor, Any]:
        """The table of ``make(key)[0]``, and ``make(key)[1]``: filled if ``key`` is a new one."""
        capturing = _capturing(self._device)
        if self._filled is not None and key == self._key:
            self._frozen |= capturing
            return self._filled.device, self._filled.more
        filled = self._fill_captured(key, make) if capturing else self._fill(key, make)
        return filled.device, filled.more

    def _fill(self, key: Hashable, make: Callable[[Any], tuple[np.ndarray, Any]]) -> _Filled:
        values, more = make(key)
        host, pinned = torch.from_numpy(values), self._device.type == "cuda"
        while len(self._spare) < _SPARE_TABLES:
            self._spare.append((self._empty(), torch.empty_like(host, pin_memory=pinned)))
        if pinned:
            # New memory each time: PyTorch keeps it until the copy from it has been made.
            host = host.pin_memory()
        if self._filled is None or self._frozen:
            if self._filled is not None:
                self._kept.append(self._filled)
            self._filled = _Filled(self._empty(), host, more)
        self._filled.device.copy_(host, non_blocking=True)
        self._filled = _Filled(self._filled.device, host, more)
        self._key, self._frozen = key, False
        return self._filled

    def _fill_captured(
        self, key: Hashable, make: Callable[[Any], tuple[np.ndarray, Any]]
    ) -> _Filled:
        filled = self._captured.get(key)
        if filled is None:
            if not self._spare:
                raise RuntimeError(
                    f"{_SPARE_TABLES} steps with other tensors were captured in CUDA graphs since "
                    "the last step outside of one: run one between them"
                )
            values, more = make(key)
            device, host = self._spare.pop()
            host.copy_(torch.from_numpy(values))
            filled = self._captured[key] = _Filled(device, host, more)
        filled.device.copy_(filled.host, non_blocking=True)
        return filled

    def _empty(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _Nothing()
    return torch.cuda.device(device)


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with _on(device):  # of several, the current one is asked
        return torch.cuda.is_current_stream_capturing()


def _gathered(tensors: list[Tensor]) -> Tensor:
    """All of them in one: in one launch if they are of one dtype, in none if there is one."""
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
    """Of each, the power of two that holds it, or the last one there is."""
    bounds = 1 << np.array(widths)
    return np.array(widths)[np.minimum(np.searchsorted(bounds, n), len(widths) - 1)]


def _divided(x: np.ndarray, by: Any) -> np.ndarray:
    """Rounded up."""
    return np.ceil(x / by).astype(np.int64)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes
