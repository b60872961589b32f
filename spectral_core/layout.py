"""Weight tensor ↔ matrix: which axes are output, input, kernel, groups and stack.

The paper views a convolution kernel (b out, a in, kh, kw) as a b × (a·kh·kw) matrix. Frameworks
order these axes each in its own way; a `Layout` spells the order, one letter an axis:

====== ==========================================================================================
letter the axis is
====== ==========================================================================================
``o``  output: rows of the matrix
``i``  input: columns
``k``  kernel: columns, after the inputs (``d``, ``h`` and ``w`` are the same and read better)
``s``  stack: one matrix an entry (scanned layers, attention heads, experts)
``(go)`` an axis that holds ``groups`` groups of outputs, one after another: one matrix a group
``(gi)`` the same for inputs (PyTorch's grouped transposed convolutions)
====== ==========================================================================================

A letter may repeat, its axes then are joined. What the usual layers need:

============================================ ===================================
layer                                        layout
============================================ ===================================
PyTorch ``Linear``, Equinox ``Linear``       ``"oi"``
Flax, Haiku dense layers                     ``"io"``
PyTorch, Equinox convolutions                ``"oik"``, ``"oihw"``, ``"oidhw"``
Flax, Haiku convolutions                     ``"kio"``, ``"hwio"``, ``"dhwio"``
PyTorch transposed convolutions              ``"iohw"``
grouped convolution, PyTorch                 ``Layout("(go)ihw", groups=4)``
grouped convolution, Flax                    ``Layout("hwi(go)", groups=4)``
grouped transposed convolution, PyTorch      ``Layout("(gi)ohw", groups=4)``
scanned Flax dense layers                    ``"sio"``
Flax attention query/key/value, and output   ``"ioo"``, ``"iio"``
the same, one matrix a head                  ``"iso"``, ``"sio"``
LSTM gates as four matrices                  ``Layout("(go)i", groups=4)``
============================================ ===================================

Rows and columns come out in one order whatever the layout: outputs; and inputs, then kernel axes.
The same weights in two layouts are therefore the same matrix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from ._arrays import Array, Namespace, array_namespace
from .errors import ArgumentError, ShapeError, checked_int

Shape = tuple[int, ...]

_TOKEN = re.compile(r"\(g[oi]\)|[oiskdhw]")


@dataclass(frozen=True)
class Layout:
    """The meaning of a weight tensor's axes.

    Parameters
    ----------
    axes : str
        One letter an axis, as in the table of `spectral_core.layout`.
    groups : int
        The number of groups in the axis written ``(go)`` or ``(gi)``.

    Raises
    ------
    ArgumentError
        If ``axes`` cannot be read, names no output or no input axis, or does not fit ``groups``.

    Examples
    --------
    >>> from spectral_core import Layout
    >>> Layout("hwio")
    Layout(axes='hwio', groups=1)
    >>> Layout("(go)ihw", groups=4)
    Layout(axes='(go)ihw', groups=4)
    """

    axes: str
    groups: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.axes, str):
            raise ArgumentError(f"a layout is a string of axes such as 'oihw', not {self.axes!r}")
        letters = "".join(_tokens(self.axes))
        for needed, meaning in (("o", "output"), ("i", "input")):
            if needed not in letters:
                raise ArgumentError(f"layout {self.axes!r} has no {meaning} axis {needed!r}")
        object.__setattr__(self, "groups", checked_int(self.groups, "groups"))
        holders = letters.count("g")
        if holders > 1 or (self.groups > 1 and holders == 0):
            raise ArgumentError(
                f"layout {self.axes!r} with groups={self.groups}: write the one axis that holds "
                "the groups as '(go)' or '(gi)', as in Layout('(go)ihw', groups=4)"
            )

    @property
    def ndim(self) -> int:
        """The number of axes of a tensor of this layout."""
        return len(_tokens(self.axes))

    @property
    def grouped_axis(self) -> int | None:
        """Which axis holds the groups, if one does."""
        return next((i for i, token in enumerate(_tokens(self.axes)) if token[0] == "("), None)


def as_layout(layout: Layout | str) -> Layout:
    """``layout`` itself, or the `Layout` that the string spells."""
    return layout if isinstance(layout, Layout) else Layout(layout)


def default_layout(ndim: int) -> Layout:
    """Output, input, kernel: the paper's order, and PyTorch's.

    >>> default_layout(4)
    Layout(axes='oikk', groups=1)
    """
    return Layout("oi" + "k" * (ndim - 2))


def as_matrix(weight: Array, layout: Layout | str, *, name: str = "weight") -> Array:
    """View a weight tensor as a matrix, or as a stack of matrices (paper, section 3.2).

    Parameters
    ----------
    weight : array
        The tensor, of any dtype.
    layout : Layout or str
        What its axes are.
    name : str
        What to call the array in an error.

    Returns
    -------
    array, shape (*stack, n_out, n_in · kernel size)
        A view where the backend and the order of the axes allow.

    Raises
    ------
    ShapeError
        If ``weight`` does not have the layout's axes, one of them is empty, or the groups do not
        divide theirs.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> sc.as_matrix(np.zeros((8, 3, 5, 5)), "oihw").shape
    (8, 75)
    >>> sc.as_matrix(np.zeros((5, 5, 3, 8)), "hwio").shape
    (8, 75)
    >>> sc.as_matrix(np.zeros((8, 3, 5, 5)), sc.Layout("(go)ihw", groups=4)).shape
    (4, 2, 75)
    """
    plan = plan_of(layout, weight.shape, name)
    return _rearrange(weight, plan.split, plan.order, plan.matrix, array_namespace(weight))


def from_matrix(matrix: Array, layout: Layout | str, shape: Shape) -> Array:
    """Undo `as_matrix`: the tensor of the given shape whose matrix this is.

    Parameters
    ----------
    matrix : array, shape (*stack, n_out, n_in · kernel size)
    layout : Layout or str
        What the tensor's axes are.
    shape : tuple of int
        The tensor's shape.

    Raises
    ------
    ShapeError
        If a tensor of that shape does not have a matrix of this one.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> kernel = np.arange(24.0).reshape(2, 3, 4, 1)
    >>> matrix = sc.as_matrix(kernel, "hwio")
    >>> bool(np.all(sc.from_matrix(matrix, "hwio", kernel.shape) == kernel))
    True
    """
    plan = plan_of(layout, shape, "the tensor")
    if tuple(matrix.shape) != plan.matrix:
        raise ShapeError(
            f"matrix has shape {tuple(matrix.shape)}, but a tensor of shape {tuple(shape)} in "
            f"layout {as_layout(layout).axes!r} has a matrix of shape {plan.matrix}"
        )
    ordered = tuple(plan.split[axis] for axis in plan.order)
    return _rearrange(matrix, ordered, inverse(plan.order), tuple(shape), array_namespace(matrix))


# What follows serves the regularizer: the products must not copy a weight only because its kernel
# axes come first, so it lets the weight lie as it does and reorders the (short) vector instead.


class Plan(NamedTuple):
    """How a tensor of one shape and layout becomes a matrix and back. Axes are those of `split`."""

    layout: Layout
    split: Shape  # the tensor's shape, its grouped axis split in two
    order: Shape  # stack, output, input and kernel axes
    lying: Shape  # the same, the columns as they lie in the tensor
    back: Shape  # undoes `order`
    matrix: Shape  # shape of the matrix
    right: Shape  # shape of v
    left_spread: Shape  # shape of u in `order`, one where only v varies
    right_spread: Shape  # shape of v in `order`, one where only u varies
    columns: Shape  # sizes of v's axes
    column_order: Shape  # a permutation of `columns`, stack first: as they lie
    reshapes: bool  # whether the matrix is the tensor reshaped, and no axis moves


def plan_of(layout: Layout | str, shape: Shape, name: str) -> Plan:
    """The plan of ``layout`` for a tensor of this shape, which errors call ``name``."""
    try:
        return _plan(as_layout(layout), tuple(shape))
    except ShapeError as error:
        raise ShapeError(f"{name} of shape {tuple(shape)}: {error}") from None


def lying_matrix(weight: Array, plan: Plan, xp: Namespace) -> Array:
    """The matrix of ``weight``, its columns in the order in which they lie: seldom a copy."""
    return _rearrange(weight, plan.split, plan.lying, plan.matrix, xp)


def lay(v: Array, plan: Plan, xp: Namespace) -> Array:
    """Reorder ``v`` (*stack, n), or several (*stack, k, n), to the columns of `lying_matrix`."""
    if plan.order == plan.lying:
        return v
    sizes, order = _axes_of(v, plan)
    return _rearrange(v, sizes, order, tuple(v.shape), xp)


def unlay(v: Array, plan: Plan, xp: Namespace) -> Array:
    """Undo `lay`."""
    if plan.order == plan.lying:
        return v
    sizes, order = _axes_of(v, plan)
    lying = tuple(sizes[axis] for axis in order)
    return _rearrange(v, lying, inverse(order), tuple(v.shape), xp)


def _axes_of(v: Array, plan: Plan) -> tuple[Shape, Shape]:
    """The sizes of v's axes, its columns split, and the order in which they lie."""
    if v.ndim == len(plan.right):
        return plan.columns, plan.column_order
    k_axis = v.ndim - 2
    sizes = (*plan.columns[:k_axis], v.shape[k_axis], *plan.columns[k_axis:])
    columns = (axis + 1 for axis in plan.column_order[k_axis:])
    return sizes, (*plan.column_order[:k_axis], k_axis, *columns)


def first_of(v: Array, plan: Plan) -> Array:
    """The first of several vectors a matrix (*stack, k, n), or the only one (*stack, n)."""
    return v if v.ndim == len(plan.right) else v[..., 0, :]


def spread(u: Array, v: Array, plan: Plan, xp: Namespace) -> tuple[Array, Array]:
    """Reshape both vectors so that ``u * v`` is their outer product in the tensor's own axes.

    The product broadcasts to ``plan.split``: the gradient needs no other order, and no copy.
    """
    return (
        _rearrange(u, plan.left_spread, plan.back, None, xp),
        _rearrange(v, plan.right_spread, plan.back, None, xp),
    )


def spread_stack(x: Array, plan: Plan, xp: Namespace) -> Array:
    """Reshape a number of each matrix (*stack,) to broadcast to ``plan.split``."""
    ones = (1,) * (len(plan.split) - x.ndim)
    return _rearrange(x, (*x.shape, *ones), plan.back, None, xp) if x.ndim else x


def _tokens(axes: str) -> list[str]:
    tokens = _TOKEN.findall(axes)
    if "".join(tokens) != axes:
        raise ArgumentError(
            f"cannot read layout {axes!r}: use one letter an axis — o output, i input, "
            "k, d, h or w kernel, s stack, and (go) or (gi) for an axis that holds groups"
        )
    return tokens


@lru_cache(maxsize=4096)
def _plan(layout: Layout, shape: Shape) -> Plan:
    tokens = _tokens(layout.axes)
    if len(tokens) != len(shape):
        raise ShapeError(
            f"layout {layout.axes!r} needs {len(tokens)} axes, not {len(shape)}"
            + (" (write one 's' for each stack axis)" if len(shape) > len(tokens) else "")
        )
    if 0 in shape:
        raise ShapeError("an axis is empty, and so there is no singular value: leave it out")
    split: list[int] = []
    for token, size in zip(tokens, shape, strict=True):
        if token.startswith("("):
            if size % layout.groups:
                raise ShapeError(f"groups={layout.groups} does not divide the axis of {size}")
            split += [layout.groups, size // layout.groups]
        else:
            split.append(size)
    letters = "".join(tokens).replace("(", "").replace(")", "")

    def pick(kinds: str) -> Shape:
        return tuple(axis for axis, letter in enumerate(letters) if letter in kinds)

    def sizes(axes: Shape) -> Shape:
        return tuple(split[axis] for axis in axes)

    stack, rows, columns = pick("sg"), pick("o"), pick("i") + pick("kdhw")
    order, n_stack = stack + rows + columns, sizes(stack)
    m, n = prod(sizes(rows)), prod(sizes(columns))
    stack_and_columns = stack + columns
    return Plan(
        layout=layout,
        split=tuple(split),
        order=order,
        lying=stack + rows + pick("ikdhw"),
        back=inverse(order),
        matrix=(*n_stack, m, n),
        right=(*n_stack, n),
        left_spread=(*n_stack, *sizes(rows), *(1 for _ in columns)),
        right_spread=(*n_stack, *(1 for _ in rows), *sizes(columns)),
        columns=sizes(stack_and_columns),
        column_order=tuple(stack_and_columns.index(axis) for axis in stack + pick("ikdhw")),
        reshapes=order == tuple(range(len(order))),
    )


def inverse(order: Shape) -> Shape:
    """The permutation that undoes ``order``."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def reshaped(x: Array, shape: Shape, xp: Namespace) -> Array:
    """``x`` in another shape, itself if it has it already."""
    return x if tuple(x.shape) == tuple(shape) else xp.reshape(x, shape)


def _rearrange(x: Array, split: Shape, order: Shape, joined: Shape | None, xp: Namespace) -> Array:
    """Reshape, permute, reshape: without a call for the parts that change nothing."""
    x = reshaped(x, split, xp)
    if order != tuple(range(len(order))):
        x = xp.permute_dims(x, order)
    return x if joined is None else reshaped(x, joined, xp)
