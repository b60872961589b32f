"""Multiply float8 weights by the scales that a checkpoint keeps beside them, tile by tile.

`X.weight` has its scale in `X.weight_scale` or `X.weight_scale_inv`. In spite of the second name,
both multiply. A scale has a number for the whole weight, for each output, or for each block, such
as DeepSeek's of 128 × 128. The product of a float8 and a float32 is exact in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from .._layout import Layout, as_matrix
from .entry import CheckpointError, Stored, TensorEntry
from .files import short
from .numbers import Widening, widened
from .tiling import Decode

_SUFFIXES = ("_scale_inv", "_scale")
_BLOCK = 128  # of each axis, where the number of blocks fits it
_PLAIN = ("oi", "io", "soi", "sio")  # layouts whose matrices are slices, perhaps transposed
_MOST_WHOLE = 2**22  # elements that are multiplied at once where a layout reorders them


@dataclass(frozen=True)
class Scaled:
    """A matrix of stored numbers, or a stack of them, and the scales of its blocks.

    It has what `measure` needs of an array: a shape, a transpose, and parts of its rows.
    """

    stored: Stored
    scale: Stored  # with as many axes
    blocks: tuple[int, ...]  # elements of each axis that share a scale
    dtype: str
    start: tuple[int, int] = (0, 0)  # of the first element in the whole matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def size(self) -> int:
        return self.stored.size

    @property
    def T(self) -> Scaled:  # noqa: N802 as of an array
        return replace(
            self,
            stored=self.stored.swapaxes(-1, -2),
            scale=self.scale.swapaxes(-1, -2),
            blocks=(*self.blocks[:-2], self.blocks[-1], self.blocks[-2]),
            start=self.start[::-1],
        )

    def __getitem__(self, place: Any) -> Scaled:
        """Return rows, by a slice, or a matrix of the stack, by a tuple of its index."""
        if isinstance(place, slice):
            start, stop, _ = place.indices(self.shape[0])
            first = (self.start[0] + start, self.start[1])
            return replace(self, stored=self.stored[start:stop], start=first)
        along = tuple(i // block for i, block in zip(place, self.blocks, strict=False))
        return replace(
            self,
            stored=self.stored[place],
            scale=self.scale[along],
            blocks=self.blocks[len(place) :],
        )

    def numbers(self) -> Stored:
        """Return the products in float64."""
        rows, columns = (
            (start + np.arange(size)) // block
            for start, size, block in zip(self.start, self.shape, self.blocks, strict=True)
        )
        found = widened(self.stored, self.dtype)
        found *= self.scale[rows][:, columns]
        return found


def with_scales(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """Return the entries; a float8 one gets the entry of its scale."""
    entries = list(entries)
    named = {entry.name: entry for entry in entries}
    return [_completed(entry, named) for entry in entries]


def _completed(entry: TensorEntry, named: dict[str, TensorEntry]) -> TensorEntry:
    """Return a float8 weight with its scale, and a quantized one with the method's name."""
    if entry.dtype.startswith("float8") and not entry.skip:
        return replace(entry, scale=_scale_of(entry, named))
    if "int" in entry.dtype and entry.skip:
        method = _method(entry.name, named)
        return replace(entry, skip=f"{entry.dtype}: {method}") if method else entry
    return entry


def _method(name: str, named: dict[str, TensorEntry]) -> str:
    """Return what quantized a weight of integers, or ""."""
    stem, _, own = name.rpartition(".")
    if own in ("qweight", "qzeros"):
        return "packed by GPTQ or AWQ, not dequantized"
    if f"{name}.absmax" in named or f"{name}.quant_map" in named or f"{stem}.SCB" in named:
        return "quantized by bitsandbytes, not dequantized"
    if own == "weight_packed" or any(name + suffix in named for suffix in _SUFFIXES):
        return "integers with a scale, not dequantized"
    return ""


def _scale_of(entry: TensorEntry, named: dict[str, TensorEntry]) -> TensorEntry | None:
    stem, _, own = entry.name.rpartition(".")
    others = [f"{stem}.scale_weight"] if own == "weight" else []
    for name in [*(entry.name + suffix for suffix in _SUFFIXES), *others]:
        if name in named and name != entry.name:
            return named[name]
    return None


def matrices_of(entry: TensorEntry, layout: Layout) -> tuple[Any, Decode, str]:
    """Return the matrix or stack of a tensor, how its numbers are decoded, and a note."""
    stored = np.asarray(entry.load())
    plain = as_matrix(stored, layout, name=short(entry.name))
    decode = Widening(entry.dtype)
    if entry.scale is None:
        return plain, decode, ""
    scale, blocks, problem = _blocks_of(entry, entry.scale)
    if problem:
        return plain, decode, f"without its scale: {problem}"
    note = _note(entry, blocks)
    if all(block == size for block, size in zip(blocks, entry.shape, strict=True)):
        factor = float(scale.reshape(-1)[0])
        return plain, lambda x: decode(x) * factor, note
    if layout.axes in _PLAIN and layout.groups == 1:
        found = Scaled(stored, scale, blocks, entry.dtype)
        return found if layout.axes.endswith("oi") else found.T, Scaled.numbers, note
    if entry.size > _MOST_WHOLE:
        return plain, decode, "without its scale: this layout would need the whole weight in memory"
    for axis, block in enumerate(blocks):
        index = np.arange(entry.shape[axis]) // block
        scale = np.take(scale, index, axis)
    whole = decode(stored) * scale
    return as_matrix(whole, layout, name=short(entry.name)), np.asarray, note


def _blocks_of(entry: TensorEntry, scale: TensorEntry) -> tuple[Stored, tuple[int, ...], str]:
    """Return the scales, how many elements of each axis share one, and why that is not known."""
    nothing = np.ones(1)
    if scale.skip:
        return nothing, (), f"{short(scale.name)} cannot be used ({scale.skip})"
    shape = scale.shape
    if prod(shape) == 1:
        shape = (1,) * len(entry.shape)
    elif len(shape) == 1 and shape[0] == entry.shape[0]:
        shape += (1,) * (len(entry.shape) - 1)
    if len(shape) != len(entry.shape):
        return nothing, (), f"its shape {scale.shape} does not fit"
    blocks = [_block(size, count) for size, count in zip(entry.shape, shape, strict=True)]
    if 0 in blocks:
        return nothing, (), f"its shape {scale.shape} does not fit"
    values = widened(np.asarray(scale.load()), scale.dtype).reshape(shape)
    if values.dtype.kind == "c":
        raise CheckpointError(f"tensor {short(scale.name)} is a scale, but complex")
    return values, tuple(blocks), ""


def _block(size: int, count: int) -> int:
    """Return how many elements of an axis share a scale, or 0 if the count does not fit."""
    if count in (1, size):
        return size // count
    if count == -(-size // _BLOCK):
        return _BLOCK
    return size // count if count and size % count == 0 else 0


def _note(entry: TensorEntry, blocks: tuple[int, ...]) -> str:
    if blocks == entry.shape:
        return "times its scale"
    sizes = "×".join(map(str, blocks))
    return f"times its scales, each of {sizes} elements"
