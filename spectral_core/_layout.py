"""View a weight tensor as a matrix: which axes are output, input, kernel, groups and stack.

The paper views a convolution kernel (b out, a in, kh, kw) as a b × (a·kh·kw) matrix. Each framework
orders these axes in its own way. A `Layout` spells the order, one letter for each axis:

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

A letter may repeat: its axes are then joined. The usual layers need:

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

Rows are always outputs. Columns are always inputs, then kernel axes. The same weights in two
layouts therefore give the same matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._arrays import Array, array_namespace, plain
from ._plan import Plan, Shape, inverse, make_plan, rearrange, tokens_of
from .errors import ArgumentError, ShapeError, check_int


@dataclass(frozen=True)
class Layout:
    """The meaning of a weight tensor's axes.

    Parameters
    ----------
    axes : str
        One letter for each axis: o output, i input, k, d, h, w kernel, s stack, (go) or (gi) for
        an axis that holds groups. The page on layouts has the table.
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
        letters = "".join(tokens_of(self.axes))
        for needed, meaning in (("o", "output"), ("i", "input")):
            if needed not in letters:
                raise ArgumentError(f"layout {self.axes!r} has no {meaning} axis {needed!r}")
        object.__setattr__(self, "groups", check_int(self.groups, "groups"))
        holders = letters.count("g")
        if holders > 1 or (self.groups > 1 and holders == 0):
            raise ArgumentError(
                f"layout {self.axes!r} with groups={self.groups}: write the one axis that holds "
                "the groups as '(go)' or '(gi)', as in Layout('(go)ihw', groups=4)"
            )

    @property
    def ndim(self) -> int:
        """Number of axes of a tensor with this layout."""
        return len(tokens_of(self.axes))

    @property
    def grouped_axis(self) -> int | None:
        """Index of the axis that holds the groups, or None."""
        return next((i for i, token in enumerate(tokens_of(self.axes)) if token[0] == "("), None)


def as_layout(layout: Layout | str) -> Layout:
    """Return ``layout`` as a `Layout`: a string is read as its axes."""
    return layout if isinstance(layout, Layout) else Layout(layout)


def default_layout(ndim: int) -> Layout:
    """Return output, input, kernel: the order of the paper and of PyTorch.

    >>> default_layout(4)
    Layout(axes='oikk', groups=1)
    """
    return Layout("oi" + "k" * (ndim - 2))


def stack_layout(ndim: int) -> Layout:
    """Return the layout of a stack of matrices: its last two axes are rows and columns.

    >>> stack_layout(4)
    Layout(axes='ssoi', groups=1)
    """
    return Layout("s" * (ndim - 2) + "oi")


def as_matrix(weight: Array, layout: Layout | str, *, name: str = "weight") -> Array:
    """View a weight tensor as a matrix, or as a stack of matrices (paper, section 3.2).

    Parameters
    ----------
    weight : array
        The tensor, of any dtype.
    layout : Layout or str
        The meaning of its axes.
    name : str
        The array's name in an error.

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
    weight = plain(weight, name)
    xp = array_namespace(weight, name=name)
    plan = plan_of(layout, weight.shape, name)
    return rearrange(weight, plan.split, plan.order, plan.matrix, xp)


def from_matrix(matrix: Array, layout: Layout | str, shape: Shape) -> Array:
    """Invert `as_matrix`: return the tensor of the given shape whose matrix this is.

    Parameters
    ----------
    matrix : array, shape (*stack, n_out, n_in · kernel size)
    layout : Layout or str
        The meaning of the tensor's axes.
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
    matrix = plain(matrix, "matrix")
    xp = array_namespace(matrix, name="matrix")
    plan = plan_of(layout, shape, "the tensor")
    if tuple(matrix.shape) != plan.matrix:
        raise ShapeError(
            f"matrix has shape {tuple(matrix.shape)}, but a tensor of shape {tuple(shape)} in "
            f"layout {as_layout(layout).axes!r} has a matrix of shape {plan.matrix}"
        )
    ordered = tuple(plan.split[axis] for axis in plan.order)
    return rearrange(matrix, ordered, inverse(plan.order), tuple(shape), xp)


def plan_of(layout: Layout | str, shape: Shape, name: str) -> Plan:
    """Return the plan of ``layout`` for a tensor of this shape; errors call the tensor ``name``."""
    layout = as_layout(layout)
    try:
        return make_plan(layout.axes, layout.groups, tuple(shape))
    except ShapeError as error:
        raise ShapeError(f"{name} of shape {tuple(shape)}: {error}") from None
