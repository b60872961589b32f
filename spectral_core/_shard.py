"""View a block of a weight tensor as shards of its matrix: what one device holds of a weight.

A block is a range of each axis of the tensor. It is one shard, a matrix or a stack of matrices with
a `Plan` of its own. A block that cuts an axis of groups within a group has up to three shards: the
whole groups, and the rest at either end.
"""

from __future__ import annotations

from typing import NamedTuple

from ._layout import Layout, plan_of
from ._plan import Plan, Shape

Ranges = tuple[slice, ...]


class Shard(NamedTuple):
    """A part of a weight's matrix."""

    inside: Ranges  # its place in the block, along the tensor's own axes
    ranges: Ranges  # its place in the whole tensor, along the axes of the whole plan's `split`
    plan: Plan  # its own plan: the whole plan's axes, shorter


def shards_of(layout: Layout, shape: Shape, offset: Shape, block: Shape) -> tuple[Shard, ...]:
    """Return the shards of the block of shape ``block`` that begins at ``offset`` of a tensor.

    Parameters
    ----------
    layout : Layout
    shape : tuple of int
        Shape of the whole tensor, which must fit the layout.
    offset, block : tuple of int
        First index of the block along each axis, and the block's shape.

    Returns
    -------
    tuple of Shard
        Empty if the block is empty.

    Examples
    --------
    Rows 3 to 6 of a grouped convolution with groups of two rows:

    >>> shards = shards_of(Layout("(go)i", groups=4), (8, 5), (3, 0), (4, 5))
    >>> [shard.plan.matrix for shard in shards]
    [(1, 1, 5), (1, 2, 5), (1, 1, 5)]
    >>> shards[1].ranges[:2]
    (slice(2, 3, None), slice(0, 2, None))
    """
    if 0 in block:
        return ()
    held = [(start, start + size) for start, size in zip(offset, block, strict=True)]
    grouped = layout.grouped_axis
    if grouped is None:
        return (_shard(layout, held, offset, None, 1),)
    size = shape[grouped] // layout.groups
    shards = []
    for start, stop in _cut_at_groups(*held[grouped], size):
        here = [*held[:grouped], (start, stop), *held[grouped + 1 :]]
        shards.append(_shard(layout, here, offset, grouped, size))
    return tuple(shards)


def _cut_at_groups(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Cut a range of rows into ranges within one group or of whole groups."""
    first, last = -(-start // size) * size, stop // size * size
    if first > last:
        return [(start, stop)]
    return [(a, b) for a, b in ((start, first), (first, last), (last, stop)) if a < b]


def _shard(
    layout: Layout, held: list[tuple[int, int]], offset: Shape, grouped: int | None, size: int
) -> Shard:
    ranges, groups = [], 1
    for axis, (start, stop) in enumerate(held):
        if axis != grouped:
            ranges.append(slice(start, stop))
            continue
        group, row = divmod(start, size)
        groups = max(1, (stop - start) // size)
        ranges += [slice(group, group + groups), slice(row, row + (stop - start) // groups)]
    inside = tuple(slice(a - o, b - o) for (a, b), o in zip(held, offset, strict=True))
    shape = tuple(stop - start for start, stop in held)
    return Shard(inside, tuple(ranges), plan_of(Layout(layout.axes, groups), shape, "a shard"))


def clipped(ranges: Ranges, shape: Shape) -> Ranges:
    """Return the ranges for an array with the same axes, some of which have size one."""
    return tuple(
        slice(None) if size == 1 else here for here, size in zip(ranges, shape, strict=True)
    )


def ordered(ranges: Ranges, plan: Plan) -> Ranges:
    """Return the ranges in the order of ``plan.order``: stack, output, input and kernel axes."""
    return tuple(ranges[axis] for axis in plan.order)
