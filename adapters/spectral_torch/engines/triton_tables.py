"""Make the tables by which programs of the Triton kernels find their work.

They depend on the shapes of the matrices alone, but for the table of addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from spectral_core.engine import Plan

from . import triton_device
from .triton_device import ELEMENTS_A_THREAD, ITERATED, power_of_two

# Widths of tiles, as exponents of two. Fewer than there could be: each width that a model has is
# compiled, and a tile that is half empty costs no memory traffic, only arithmetic to spare.
_PRODUCT_WIDTHS = (5, 7, 9, 10, 11, 12, 13, 14)
_UPDATE_WIDTHS = (5, 7, 9)
_WIDE, _WIDE_HEIGHT = 15, 8  # triton_kernels.WIDE: of matrices that are wider
# Columns of a program of `columns`: the fewer where programs are few, so that more of them load.
_BLOCKS = (64, 32)
# Where a matrix has more sums than this, those of so many items are added beforehand, in a launch
# more. A program loads 256 sums of 32 columns in about 1 µs, less than a launch costs.
_MANY_SUMS, _SUMS_TOGETHER, SUMS_WIDTH = 256, 64, 128
UPDATE_WARPS = 4
# 16 warps of 128 registers fill a multiprocessor, however many warps a program has. With three
# stages, each waits for 128 bytes a thread while as many are being copied behind them: 64 to 128
# KiB a multiprocessor. HBM3 at 3.35 TB/s and 0.7 µs needs 18 KiB, and some more under load.
_WARPS_A_PROCESSOR = 16
# For narrower matrices: half as many programs, of twice as many rows, halve the sums. 64 KiB remain
# on their way to a multiprocessor.
_FEW_WARPS, _FEW_COLUMNS = 8, 4096
# The sum of each program is written and read again: below this many rows, more than 6 % of W.
_ROWS_WORTH_A_SUM = 32
# Tiles of G for each program, where there are many: v and sigma are looked up once for all.
_TILES_A_PROGRAM = 4


class Kind(NamedTuple):
    """Identify the jobs of one launch: their device, dtypes and number of vectors."""

    device: torch.device
    weight: torch.dtype
    grad: torch.dtype
    n_vectors: int
    transposed: bool = False


class Shape(NamedTuple):
    """Describe a weight to the tables: they depend on nothing else."""

    plan: Plan
    window: int  # as `triton_accepts.window_of`

    def __hash__(self) -> int:
        # Plans are cached, and a group keeps its own: one id stands for all their numbers.
        return hash((id(self.plan), self.window))


# The places of the jobs of a step among those of a group; None where they are all of them.
Slots: TypeAlias = tuple[int, ...] | None

# The addresses of `_addresses_of`, those of the gradients, and the places of the jobs in a group.
Addresses: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], Slots]


class Work(NamedTuple):
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


class Tables:
    """Divide the matrices of one kind among programs, and allocate their scratch memory."""

    def __init__(self, kind: Kind, jobs: Sequence[Shape]) -> None:
        self.device = kind.device
        self.plans = [job.plan for job in jobs]
        self.weight_dtype, self.grad_dtype = kind.weight, kind.grad
        self.dtype = ITERATED[kind.weight]
        self.n_vectors = kind.n_vectors
        self.sum_dtype = torch.promote_types(self.dtype, ITERATED[kind.grad])
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
        held = self.n <= triton_device.most_columns(kind.weight, self.device, self.n_vectors)
        widths = _width_of(self.n, _PRODUCT_WIDTHS)
        self.product_widths = np.where(held, widths, _WIDE)
        self.update_widths = _width_of(self.n, _UPDATE_WIDTHS)
        # Of a warp: the registers of a thread hold this for each vector.
        elements = 32 * ELEMENTS_A_THREAD[self.dtype] // power_of_two(self.n_vectors)
        widest = 1 << widths[held].max() if held.any() else 8 * elements
        self.n_warps = int(np.clip(widest // elements, 4, 16))
        self.product_tile = self.n_warps * elements
        self.update_tile = 32 * UPDATE_WARPS * ELEMENTS_A_THREAD[self.sum_dtype]
        few = _divided(self.n, _BLOCKS[0]).sum() < 2 * triton_device.processors(self.device)
        self.block = _BLOCKS[int(few)]
        self.work = self._make_work()

    def _make_work(self) -> Work:
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
            for col in range(-(-strides[matrix] * self.n_vectors // SUMS_WIDTH))
        ]
        blocks = [(matrix, i) for matrix in range(len(m)) for i in range(n_blocks[matrix])]

        def table(values: Any, dtype: torch.dtype) -> Tensor:
            host = torch.tensor(np.array(values), dtype=dtype)
            if self.device.type == "cuda":  # the device is not waited for
                host = host.pin_memory()
            return host.to(self.device, non_blocking=True)

        def scratch(size: int) -> Tensor:
            return torch.empty(int(size), dtype=self.dtype, device=self.device)

        return Work(
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
        at_once = triton_device.processors(self.device) * np.maximum(warps // self.n_warps, 1)
        wave = (self.m * self.n).sum() / at_once
        elements = np.maximum(np.minimum(_ROWS_WORTH_A_SUM * self.n, wave), wave / 4)
        return heights * np.maximum(_divided(elements / self.n, heights), 1)

    def _tiles(self) -> np.ndarray:
        """Return the programs of `update`: (matrix, first row, end, block of columns)."""
        widths = 1 << self.update_widths
        heights = self.update_tile // widths
        n_tiles = (_divided(self.m, heights) * _divided(self.n, widths)).sum()
        many = n_tiles > 4 * _TILES_A_PROGRAM * _WARPS_A_PROCESSOR * triton_device.processors(
            self.device
        )
        rows = heights * (_TILES_A_PROGRAM if many else 1)
        return np.array(
            [
                (matrix, row, min(row + rows[matrix], self.m[matrix]), col)
                for matrix in range(len(self.m))
                for row in range(0, self.m[matrix], rows[matrix])
                for col in range(-(-self.n[matrix] // widths[matrix]))
            ]
        )

    def _make_pointers(self, key: Addresses) -> tuple[np.ndarray, tuple[int, int]]:
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


def _width_of(n: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    """Return the smallest of these exponents whose power of two holds n, or the last one."""
    bounds = 1 << np.array(widths)
    return np.array(widths)[np.minimum(np.searchsorted(bounds, n), len(widths) - 1)]


def _divided(x: np.ndarray, by: Any) -> np.ndarray:
    """Divide and round up."""
    return np.ceil(x / by).astype(np.int64)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes
