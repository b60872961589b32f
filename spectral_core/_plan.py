"""Make a matrix of a weight tensor and back without a copy: the private half of layouts.

A product must not copy a weight only because its kernel axes come first. The weight therefore
stays in its memory order, and the vector, which is short, is reordered instead.
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import prod
from typing import NamedTuple, TypeAlias

from ._arrays import Array, Namespace, cast, traits
from .errors import ArgumentError, ShapeError

Shape: TypeAlias = tuple[int, ...]

_TOKEN = re.compile(r"\(g[oi]\)|[oiskdhw]")


class MemoryForm(NamedTuple):
    """How the elements of a matrix follow each other in memory.

    Each engine knows some forms by ``kinds`` alone. The axes of a stack that come first are left
    out: its matrices then follow each other, and each of them has this form.
    """

    # Kinds of the axes, the fastest last: o outputs, i inputs, k kernel, s stack or groups. Axes of
    # one kind that follow each other are one letter. "oik" has the rows of the matrix one after
    # another, "oki" too but channels-last, "kio" is the transpose.
    kinds: str
    window: int  # kernel positions: the elements of a row of one input


class Plan(NamedTuple):
    """Shapes and permutations for one layout and one shape. Axes count in ``split``."""

    axes: str  # the layout's letters
    groups: int
    split: Shape  # the tensor's shape, with the grouped axis split in two
    order: Shape  # stack, output, input and kernel axes
    memory_order: Shape  # the same, but the columns in the order of the tensor's memory
    back: Shape  # inverts `order`
    matrix: Shape  # shape of the matrix, (*stack, m, n)
    left_broadcast: Shape  # shape of u in `order`, with ones for the axes of v
    right_broadcast: Shape  # shape of v in `order`, with ones for the axes of u
    columns: Shape  # sizes of the stack and column axes
    column_order: Shape  # permutes `columns` into memory order, stack axes first
    reshapes: bool  # True if the matrix is the tensor reshaped: no axis moves
    contiguous: MemoryForm  # of a contiguous tensor
    rows_on_first_axis: bool  # True if the first axis alone counts the rows of all matrices

    @property
    def stack(self) -> Shape:
        """Shape of sigma, (*stack,)."""
        return self.matrix[:-2]

    @property
    def left(self) -> Shape:
        """Shape of u, (*stack, m)."""
        return self.matrix[:-1]

    @property
    def right(self) -> Shape:
        """Shape of one v, (*stack, n)."""
        return (*self.matrix[:-2], self.matrix[-1])

    def rows(self, k: int) -> Shape:
        """Shape of V with k vectors, (*stack, k, n)."""
        return (*self.matrix[:-2], k, self.matrix[-1])

    def divides_rows(self, axis: int) -> bool:
        """Return True if who holds a part of this axis of the tensor holds a part of each row."""
        return not {*letters_of(tokens_of(self.axes)[axis])}.isdisjoint("ikdhw")

    def form(self, window: int) -> MemoryForm | None:
        """Return the form of a tensor, or None where it has none.

        ``window`` is 1 for a contiguous tensor. It is the number of kernel positions of a tensor
        with its second axis last in memory, and 0 for any other.
        """
        if window == 1:
            return self.contiguous
        channels_last = window > 1 and self.reshapes and self.rows_on_first_axis
        return MemoryForm("oki", window) if channels_last else None


def tokens_of(axes: str) -> list[str]:
    """Split the letters of a layout into one token for each axis.

    Raises
    ------
    ArgumentError
        If a letter is unknown.
    """
    tokens = _TOKEN.findall(axes)
    if "".join(tokens) != axes:
        raise ArgumentError(
            f"cannot read layout {axes!r}: use one letter an axis — o output, i input, "
            "k, d, h or w kernel, s stack, and (go) or (gi) for an axis that holds groups"
        )
    return tokens


def letters_of(axes: str) -> str:
    """Return the letters of a layout. An axis that holds groups has two.

    >>> letters_of("(go)ihw")
    'goihw'
    """
    return axes.replace("(", "").replace(")", "")


def matrix_in_memory_order(weight: Array, plan: Plan, xp: Namespace) -> Array:
    """Return the matrix of ``weight`` with its columns in memory order, seldom as a copy."""
    return rearrange(weight, plan.split, plan.memory_order, plan.matrix, xp)


def to_memory_order(V: Array, plan: Plan, xp: Namespace) -> Array:
    """Reorder V (*stack, k, n) to the columns of `matrix_in_memory_order`."""
    if plan.order == plan.memory_order:
        return V
    sizes, order = _axes_of_rows(V, plan)
    return rearrange(V, sizes, order, tuple(V.shape), xp)


def from_memory_order(V: Array, plan: Plan, xp: Namespace) -> Array:
    """Invert `to_memory_order`."""
    if plan.order == plan.memory_order:
        return V
    sizes, order = _axes_of_rows(V, plan)
    permuted = tuple(sizes[axis] for axis in order)
    return rearrange(V, permuted, inverse(order), tuple(V.shape), xp)


def broadcast_outer(u: Array, v: Array, plan: Plan, xp: Namespace) -> tuple[Array, Array]:
    """Reshape u (*stack, m) and v (*stack, n) so that ``u * v`` is their outer product.

    The product broadcasts to ``plan.split``. The gradient keeps its own order of axes, and so
    needs no copy.
    """
    return (
        rearrange(u, plan.left_broadcast, plan.back, None, xp),
        rearrange(v, plan.right_broadcast, plan.back, None, xp),
    )


def broadcast_stack(x: Array, plan: Plan, xp: Namespace) -> Array:
    """Reshape one number for each matrix, (*stack,), to broadcast to ``plan.split``."""
    ones = (1,) * (len(plan.split) - x.ndim)
    return rearrange(x, (*x.shape, *ones), plan.back, None, xp) if x.ndim else x


@lru_cache(maxsize=4096)
def make_plan(axes: str, groups: int, shape: Shape) -> Plan:
    """Return the plan of a layout for a tensor of this shape.

    Raises
    ------
    ShapeError
        If the number of axes or of groups does not fit, or an axis is empty.
    """
    tokens = tokens_of(axes)
    if len(tokens) != len(shape):
        raise ShapeError(
            f"layout {axes!r} needs {len(tokens)} axes, not {len(shape)}"
            + (" (write one 's' for each stack axis)" if len(shape) > len(tokens) else "")
        )
    if 0 in shape:
        raise ShapeError("an axis is empty, and so there is no singular value: leave it out")
    split: list[int] = []
    for token, size in zip(tokens, shape, strict=True):
        if token.startswith("("):
            if size % groups:
                raise ShapeError(f"groups={groups} does not divide the axis of {size}")
            split += [groups, size // groups]
        else:
            split.append(size)
    letters = letters_of(axes)

    def pick(kinds: str) -> Shape:
        return tuple(axis for axis, letter in enumerate(letters) if letter in kinds)

    def sizes(axes: Shape) -> Shape:
        return tuple(split[axis] for axis in axes)

    stack, rows, kernel = pick("sg"), pick("o"), pick("kdhw")
    columns = pick("i") + kernel
    order, n_stack = stack + rows + columns, sizes(stack)
    stack_and_columns = stack + columns
    matrix = (*n_stack, prod(sizes(rows)), prod(sizes(columns)))
    return Plan(
        axes=axes,
        groups=groups,
        split=tuple(split),
        order=order,
        memory_order=stack + rows + pick("ikdhw"),
        back=inverse(order),
        matrix=matrix,
        left_broadcast=(*n_stack, *sizes(rows), *(1 for _ in columns)),
        right_broadcast=(*n_stack, *(1 for _ in rows), *sizes(columns)),
        columns=sizes(stack_and_columns),
        column_order=tuple(stack_and_columns.index(axis) for axis in stack + pick("ikdhw")),
        reshapes=order == tuple(range(len(order))),
        contiguous=MemoryForm(_kinds(letters), prod(sizes(kernel))),
        rows_on_first_axis=prod(matrix[:-1]) == shape[0],
    )


def _kinds(letters: str) -> str:
    """Return the kinds of the axes with these letters, as in a `MemoryForm`."""
    kinds = re.sub(r"(.)\1+", r"\1", re.sub("[dhw]", "k", letters.replace("g", "s")))
    return kinds[1:] if kinds.rfind("s") == 0 else kinds


def inverse(order: Shape) -> Shape:
    """Return the permutation that inverts ``order``."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def reshaped(x: Array, shape: Shape, xp: Namespace) -> Array:
    """Return ``x`` in another shape, or ``x`` itself if it has that shape already."""
    return x if tuple(x.shape) == tuple(shape) else xp.reshape(x, shape)


def rearrange(x: Array, split: Shape, order: Shape, joined: Shape | None, xp: Namespace) -> Array:
    """Reshape, permute, reshape, and skip each of the three where it changes nothing."""
    x = reshaped(x, split, xp)
    if order != tuple(range(len(order))):
        x = xp.permute_dims(x, order)
    return x if joined is None else reshaped(x, joined, xp)


def scaled(weight: Array, scale: Array, plan: Plan, xp: Namespace) -> Array:
    """Return ``weight · scale`` in the dtype of the weight, rounded once.

    ``scale`` broadcasts to ``plan.split``.
    """
    wide = traits(weight, xp, "weight").iteration_dtype
    product = cast(reshaped(weight, plan.split, xp), wide, xp) * scale
    return reshaped(cast(product, weight.dtype, xp), weight.shape, xp)


def scale_(weight: Array, scale: Array, plan: Plan, xp: Namespace) -> Array:
    """Multiply ``weight`` by ``scale`` in place, as `scaled` does, and return it."""
    if traits(weight, xp, "weight").iteration_dtype != weight.dtype:
        weight[...] = scaled(weight, scale, plan, xp)
        return weight
    here = reshaped(weight, plan.split, xp)  # splitting an axis in two never copies
    here *= scale
    return weight


def _axes_of_rows(V: Array, plan: Plan) -> tuple[Shape, Shape]:
    """Return the sizes of V's axes with its columns split, and their memory order."""
    k_axis = V.ndim - 2
    sizes = (*plan.columns[:k_axis], V.shape[k_axis], *plan.columns[k_axis:])
    columns = (axis + 1 for axis in plan.column_order[k_axis:])
    return sizes, (*plan.column_order[:k_axis], k_axis, *columns)
