"""A block of a weight tensor as parts of its matrix: what one device holds of a sharded weight.

A block is a range of each axis of the tensor. It is one part, a matrix or a stack of them with a
`Plan` of its own; but where it cuts an axis that holds groups within a group, the whole groups and
what is left at either end are parts by themselves, three at most.
"""

from __future__ import annotations

from typing import NamedTuple

from .layout import Layout, Plan, Shape, plan_of

Ranges = tuple[slice, ...]


class Part(NamedTuple):
    """A part of a weight's matrix. Ranges are of the axes of ``Plan.split`` of the whole tensor."""

    inside: Ranges  # where the part lies in the block, whose axes are the tensor's own
    ranges: Ranges
    plan: Plan  # of the part: it has the axes of the whole one's, shorter


def parts_of(layout: Layout, shape: Shape, offset: Shape, block: Shape) -> tuple[Part, ...]:
    """The parts of the block of shape ``block`` that begins at ``offset`` of a tensor.

    Parameters
    ----------
    layout : Layout
    shape : tuple of int
        Of the whole tensor, which has the axes and the groups of the layout.
    offset, block : tuple of int
        Where the block begins, and its shape.

    Returns
    -------
    tuple of Part
        None where the block is empty.

    Examples
    --------
    Rows 3 to 7 of a grouped convolution that has groups of two rows:

    >>> parts = parts_of(Layout("(go)i", groups=4), (8, 5), (3, 0), (4, 5))
    >>> [(part.ranges[:2], part.plan.matrix) for part in parts]  # doctest: +NORMALIZE_WHITESPACE
    [((slice(1, 2, None), slice(1, 2, None)), (1, 1, 5)),
     ((slice(2, 3, None), slice(0, 2, None)), (1, 2, 5)),
     ((slice(3, 4, None), slice(0, 1, None)), (1, 1, 5))]
    """
    if 0 in block:
        return ()
    held = [(start, start + size) for start, size in zip(offset, block, strict=True)]
    grouped = layout.grouped_axis
    if grouped is None:
        return (_part(layout, held, offset, None, 1),)
    size = shape[grouped] // layout.groups
    parts = []
    for start, stop in _cut_at_groups(*held[grouped], size):
        here = [*held[:grouped], (start, stop), *held[grouped + 1 :]]
        parts.append(_part(layout, here, offset, grouped, size))
    return tuple(parts)


def _cut_at_groups(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """A range of rows as ranges that are of one group, or of whole ones."""
    first, last = -(-start // size) * size, stop // size * size
    if first > last:
        return [(start, stop)]
    return [(a, b) for a, b in ((start, first), (first, last), (last, stop)) if a < b]


def _part(
    layout: Layout, held: list[tuple[int, int]], offset: Shape, grouped: int | None, size: int
) -> Part:
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
    return Part(inside, tuple(ranges), plan_of(Layout(layout.axes, groups), shape, "a part"))


def clipped(ranges: Ranges, shape: Shape) -> Ranges:
    """The ranges for an array that has the same axes, some of them of size one."""
    return tuple(
        slice(None) if size == 1 else here for here, size in zip(ranges, shape, strict=True)
    )


def ordered(ranges: Ranges, plan: Plan) -> Ranges:
    """The ranges in the order of ``plan.order``: stack, output, input and kernel axes."""
    return tuple(ranges[axis] for axis in plan.order)
