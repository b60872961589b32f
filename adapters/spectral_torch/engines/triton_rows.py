"""Launch the kernels of several vectors: `triton_row_kernels` says what they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton_row_kernels
from .triton_device import language, power_of_two
from .triton_group import Group
from .triton_tables import Kind, Shape

_SUMS_AT_ONCE = 2048  # elements of a tile of `row_columns`


class _Room(NamedTuple):
    """Hold the scratch memory that one vector does not need."""

    grams: Tensor  # inner products of the rows of Y, of each program
    z_grams: Tensor  # of the rows of Z, of each block of columns
    transforms: Tensor  # T of each matrix
    scales: Tensor
    again: Tensor  # 1 for a matrix that is read again
    sigmas: Tensor
    inverses: Tensor
    xs: Tensor  # the rows of the next V, before they are ready


class RowsGroup(Group):
    """Iterate several vectors of the matrices of one kind, in six launches an iteration."""

    def __init__(self, kind: Kind, jobs: Sequence[Shape]) -> None:
        super().__init__(kind, jobs)
        size, count = power_of_two(self.n_vectors), len(self.n)
        work = self.work

        def room(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        self.room = _Room(
            grams=room(len(work.items), size, size),
            z_grams=room(len(work.blocks), size, size),
            transforms=room(count, size, size),
            scales=room(count, dtype=self.dtype),
            again=room(count, dtype=torch.int32),
            sigmas=room(count, dtype=self.dtype),
            inverses=room(count),
            xs=torch.empty_like(work.zs),
        )

    @property
    def _memory(self) -> tuple[Tensor, ...]:
        return *self.work, *self.room

    @property
    def _kernels(self) -> Any:
        return triton_row_kernels

    @property
    def _numbers_of_update(self) -> Tensor:
        """What `update` needs of each matrix: sigma."""
        return self.room.sigmas

    def _iterate(self, pointers: Tensor, classes: int, *, first: bool, keep: bool) -> None:
        work, room, count = self.work, self.room, len(self.n)
        for again in (False, True):
            self._launch(
                *("row_products", (classes, first, again), len(work.items), self._rows_constants),
                *(pointers, work.shapes, work.items, work.sums, work.ts, room.grams, room.again),
            )
            if not again:
                self._launch(
                    *("orthonormalize", (), count, self._small_constants),
                    *(pointers, work.shapes, room.grams, work.ts),
                    *(room.transforms, room.scales, room.again),
                )
        self._add_sums(pointers)
        self._launch(
            *("row_columns", (), len(work.blocks), self._row_columns_constants),
            *(pointers, work.shapes, work.blocks, work.sums, room.scales, work.zs, room.z_grams),
        )
        self._launch(
            *("sort_rows", (), count, self._sort_constants),
            *(pointers, work.shapes, room.z_grams, room.transforms, room.sigmas, room.inverses),
        )
        self._launch(
            *("renew", (), count, self._renew_constants),
            *(pointers, work.shapes, work.zs, room.xs, room.transforms, room.inverses),
        )
        if not keep:
            self._launch(
                *("left_vectors", (), len(work.items), self._left_constants),
                *(pointers, work.shapes, work.items, work.ts, room.transforms, room.scales),
            )

    @property
    def _of_vectors(self) -> dict[str, Any]:
        return {"K": self.n_vectors, "KP": power_of_two(self.n_vectors)}

    def _rows_constants(
        self, classes: int, first: bool, again: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        constants, options = self._products_constants(classes, first and not again)
        return {**constants, **self._of_vectors, "AGAIN": again}, options

    def _numbers_of(self, *names: str) -> dict[str, Any]:
        limits = torch.finfo(self.dtype)
        numbers = {"ACC": language(self.dtype), "EPS": limits.eps, "TINY": limits.tiny}
        return {name: numbers[name] for name in names}

    def _small_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {**self._numbers_of("ACC", "EPS", "TINY"), **self._of_vectors}
        return constants, {"num_warps": 4}

    def _row_columns_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        height = _SUMS_AT_ONCE // (self.block * power_of_two(self.n_vectors))
        constants = {**self._numbers_of("ACC"), "HEIGHT": height, "BLOCK": self.block}
        constants.update(self._of_vectors)
        return constants, {"num_warps": 4}

    def _sort_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # One warp: its lanes exchange the numbers of a small matrix without waiting for others.
        return {**self._numbers_of("ACC"), "KP": power_of_two(self.n_vectors)}, {"num_warps": 1}

    def _renew_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = self._numbers_of("ACC", "EPS", "TINY")
        return {**constants, "PERMUTED": self.permuted, **self._of_vectors}, {"num_warps": 8}

    def _left_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {**self._numbers_of("ACC"), **self._of_vectors}, {"num_warps": 4}
