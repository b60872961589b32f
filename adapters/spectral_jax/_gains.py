"""Say for each primitive how far its result moves when its operands move.

A handler gets the walk, the equation's parameters, the shape of the result, and the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite, prod
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from spectral_core.engine import (
    SLOPES,
    Value,
    in_parallel,
    in_series,
    largest_scale,
    log10_up,
    side_by_side,
)

from ._linear_maps import UNIT, Convolution, Images, Matrix, overlaps, window_sums
from ._walk import Handler, Linear, NoBound, Operand, Walk, slope_gain

HANDLERS: dict[str, Handler] = {}
H = TypeVar("H", bound=Callable[..., Value])
Shape = tuple[int, ...]
Params = dict[str, Any]


def gain(names: str) -> Callable[[H], H]:
    """Register a handler for primitives."""

    def register(handler: H) -> H:
        HANDLERS.update(dict.fromkeys(names.split(), handler))
        return handler

    return register


@gain("reshape squeeze expand_dims copy copy_p convert_element_type reduce_precision device_put")
@gain("sharding_constraint stop_gradient name")
def same(w: Walk, params: Params, shape: Shape, x: Operand) -> Value:
    """Keep the elements in their order."""
    if params.get("dimensions") is not None and w.name == "reshape":
        return Value(w.gain(x))
    return Value(w.gain(x), *w.chained(x, shape))


@gain("transpose")
def turned(w: Walk, params: Params, shape: Shape, x: Operand) -> Value:
    """Exchange axes. The product of a matrix with columns of samples becomes one with rows."""
    before = x.value
    if isinstance(before, Linear) and before.turned[0] is not None:
        map = replace(before.map, channel=len(shape) - 1)
        found = Linear(before.source, map, before.name, before.turned)
        found.gain = before.gain
        return found
    return Value(w.gain(x))


@gain("rev slice split unstack")
def moved(w: Walk, params: Params, shape: Shape, x: Operand) -> Value:
    """Move elements, none of which occurs twice."""
    return Value(w.gain(x))


@gain("dynamic_slice")
def sliced(w: Walk, params: Params, shape: Shape, x: Operand, *starts: Operand) -> Value:
    """Read a part at a constant place."""
    _constant(*starts)
    return Value(w.gain(x))


@gain("dynamic_update_slice scatter")
def replaced(w: Walk, params: Params, shape: Shape, x: Operand, *others: Operand) -> Value:
    """Put a part into an array at a constant place, each of its elements once at most."""
    # dynamic_update_slice(x, part, *starts), scatter(x, indices, part)
    part, places = (others[1], others[:1]) if w.name == "scatter" else (others[0], others[1:])
    _constant(*places)
    return Value(side_by_side([w.gain(x), w.gain(part)]))


@gain("sort top_k")
def sorted_(w: Walk, params: Params, shape: Shape, x: Operand, *others: Operand) -> Value:
    """Sort: of all orders, the sorted one brings two rows closest to each other."""
    if others:
        raise NoBound("orders one array by another, which may jump")
    return Value(w.gain(x))


@gain("gather")
def gathered(w: Walk, params: Params, shape: Shape, x: Operand, indices: Operand) -> Value:
    """Read elements at constant places, some of them several times."""
    _constant(indices)
    places = jnp.arange(x.size).reshape(x.shape)
    params = {**params, "fill_value": -1}
    found = np.asarray(jax.lax.gather_p.bind(places, indices.array, **params)).reshape(-1)
    count = int(np.bincount(found[found >= 0], minlength=1).max())
    return Value(in_series([w.gain(x), _counted(w, count)]))


def _counted(w: Walk, count: float) -> float:
    """Return the gain of reading an element so often, written down as a layer if it is one."""
    size = count**0.5 * (1 + 4 * UNIT)
    if count <= 1:
        return 0.0
    return w.ledger.layer(w.label, w.name, size * (1 - 8 * UNIT), size)


@gain("broadcast_in_dim")
def repeated(w: Walk, params: Params, shape: Shape, x: Operand, *_: Operand) -> Value:
    """Repeat every element as often as any other."""
    if x.size == prod(shape):
        return Value(w.gain(x), *w.chained(x, shape))
    return Value(in_series([w.gain(x), _counted(w, prod(shape) / max(x.size, 1))]))


def _repeats(x: Operand, shape: Shape) -> float:
    size = prod(shape)
    return 0.0 if x.size == size else log10_up(size / max(x.size, 1)) / 2


def _constant(*operands: Operand) -> None:
    if any(x.value is not None for x in operands):
        raise NoBound("an operand that must be constant depends on the input")


@gain("pad")
def pad(w: Walk, params: Params, shape: Shape, x: Operand, value: Operand) -> Value:
    """Put constants around and between the elements."""
    _constant(value)
    return Value(w.gain(x))


@gain("concatenate")
def side(w: Walk, params: Params, shape: Shape, *operands: Operand) -> Value:
    """Put values side by side."""
    return Value(side_by_side([w.gain(x) for x in operands]))


@gain("add sub add_any")
def add(w: Walk, params: Params, shape: Shape, x: Operand, y: Operand) -> Value:
    """Add or subtract."""
    one, other = (x, y) if x.value is not None else (y, x)
    if other.value is None and one.shape == shape and (w.name != "sub" or one is x):
        assert one.value is not None  # a constant is added: the linear map before is still one
        if isinstance(one.value, Linear):
            return one.value
        return Value(w.gain(one), *w.chained(one, shape))
    return Value(in_parallel([in_series([w.gain(z), _repeats(z, shape)]) for z in (x, y)]))


@gain("mul div")
def scale(w: Walk, params: Params, shape: Shape, x: Operand, y: Operand) -> Value:
    """Multiply by a constant, or divide by one."""
    if x.value is not None and y.value is not None:
        raise NoBound("multiplies or divides two values that both depend on the input")
    value, factor = (x, y) if x.value is not None else (y, x)
    if w.name == "div" and value is y:
        raise NoBound("divides by a value that depends on the input")
    with np.errstate(divide="ignore"):
        number = 1 / factor.exact if w.name == "div" else factor.exact
    largest = largest_scale(number) * (1 + 2 * UNIT * (w.name == "div"))
    if not isfinite(largest):
        raise NoBound("scales by a number that is not finite")
    folded = _folded(w, value, number, shape)
    if folded is not None:
        return folded
    upper = in_series([w.gain(value), _repeats(value, shape), log10_up(largest)])
    if largest != 1:
        w.ledger.layer(w.label, w.name, 0.0, largest)
    one = float(number.flat[0]) if number.size else 0.0
    if (number == one).all() and value.shape == shape:
        # 1/c is rounded.
        ends = np.nextafter(one, (-np.inf, np.inf)).tolist() if w.name == "div" else (one, one)
        return Value(upper, *w.chained(value, shape, slopes=(ends[0], ends[1])))
    return Value(upper)


def _folded(w: Walk, x: Operand, factor: Any, shape: Shape) -> Value | None:
    """Return the linear map before a scale of its channels together with the scale."""
    before = x.value
    if not isinstance(before, Linear) or before.map.channel is None or x.shape != shape:
        return None
    axis = before.map.channel
    full = np.broadcast_to(factor, shape)
    first = full[tuple(slice(None) if a == axis else slice(1) for a in range(len(shape)))]
    if not (full == first).all():
        return None
    map = before.map.scaled(first.reshape(-1))
    # 1/c and the product are rounded.
    return w.with_map(before, map.scaled(np.ones(1)) if w.name == "div" else map)


@gain("max min")
def larger(w: Walk, params: Params, shape: Shape, x: Operand, y: Operand) -> Value:
    """Choose the larger or the smaller of two."""
    if x.value is None or y.value is None:
        value = y if x.value is None else x
        if value.shape == shape:
            return activation(w, shape, value, 0.0, 1.0)
    return Value(side_by_side([in_series([w.gain(z), _repeats(z, shape)]) for z in (x, y)]))


@gain("clamp")
def clamp(w: Walk, params: Params, shape: Shape, low: Operand, x: Operand, high: Operand) -> Value:
    """Clip between two constants."""
    _constant(low, high)
    return activation(w, shape, x, 0.0, 1.0)


@gain("select_n")
def select(w: Walk, params: Params, shape: Shape, which: Operand, *cases: Operand) -> Value:
    """Choose by a constant mask."""
    if which.value is not None:
        raise NoBound("chooses by a value that depends on the input: it may jump")
    return Value(side_by_side([w.gain(x) for x in cases]))


@gain("reduce_sum")
def total(w: Walk, params: Params, shape: Shape, x: Operand) -> Value:
    """Add the elements of each row."""
    size = (x.size // max(prod(shape), 1)) ** 0.5
    return w.grown(x, shape, (size * (1 - 4 * UNIT), size * (1 + 4 * UNIT)))


@gain("reduce_max reduce_min")
def largest(w: Walk, params: Params, shape: Shape, x: Operand) -> Value:
    """Choose one element of each row."""
    return Value(w.gain(x))


# Activations


def activation(w: Walk, shape: Shape, x: Operand, low: float, high: float) -> Value:
    """Apply a function to each element, with slopes between two numbers."""
    steepest = max(abs(low), abs(high))
    before = w.gain(x)
    if steepest != 1:
        w.ledger.layer(w.label, w.name, steepest, steepest)
    upper = in_series([before, slope_gain(low, high)])
    return Value(upper, *w.chained(x, shape, slopes=(low, high)))


def _plain(slopes: str) -> Handler:
    def handler(w: Walk, params: Params, shape: Shape, x: Operand) -> Value:
        return activation(w, shape, x, *SLOPES[slopes])

    return handler


for _name in ("tanh", "erf", "abs", "sin", "cos", "atan", "neg"):
    HANDLERS[_name] = _plain(_name)
HANDLERS["logistic"] = _plain("sigmoid")


def soft(w: Walk, shape: Shape, x: Operand) -> Value:
    """Apply softmax: no row of its Jacobian diag(s) − ssᵀ has a sum of sizes above 1/2.

    That of row i is s_i(1 − s_i) + s_i·Σ_{j≠i} s_j = 2s_i(1 − s_i), and the Jacobian is symmetric.
    """
    return w.grown(x, shape, (0.0, 0.5))


def log_softmax(w: Walk, shape: Shape, x: Operand, axis: int) -> Value:
    """Apply log-softmax: its Jacobian I − 1sᵀ is an oblique projection, of norm √n·‖s‖ ≤ √n."""
    n = x.shape[axis]
    return w.grown(x, shape, (0.0, n**0.5 * (1 + 4 * UNIT) if n > 1 else 0.0))


# Linear maps


@gain("dot_general")
def dot(w: Walk, params: Params, shape: Shape, x: Operand, y: Operand) -> Value:
    """Multiply by a constant matrix, or by one for each entry of a stack."""
    if x.value is not None and y.value is not None:
        raise NoBound("multiplies two values that both depend on the input")
    (cx, cy), (bx, by) = params["dimension_numbers"]
    left = x.value is not None
    value, other = (x, y) if left else (y, x)
    contracted, stacked = (cy, by) if left else (cx, bx)
    free = [a for a in range(len(other.shape)) if a not in (*contracted, *stacked)]
    W = other.exact.transpose([*stacked, *free, *contracted])
    sizes = [prod(other.shape[a] for a in axes) for axes in (stacked, free, contracted)]
    W = W.reshape(sizes)
    mine = cx if left else cy
    last = left and not len(stacked) and tuple(mine) == (len(value.shape) - 1,) and len(free) == 1
    rows = prod(value.shape[1:-1])
    map = Matrix(W, len(shape) - 1 if last else None, rows)
    stages = w.chained(value, shape, dense=map.dense) if last else (None, ())
    # W times columns, as under jax.vmap: a transposition behind it makes rows of them.
    columns = not left and len(value.shape) == len(shape) == 2 and tuple(mine) == (1,)
    other_way = w.chained(value, shape[::-1], dense=map.dense) if columns else (None, ())
    return Linear(w.settled(value), map, w.label, stages, other_way)


@gain("conv_general_dilated")
def convolve(w: Walk, params: Params, shape: Shape, x: Operand, kernel: Operand) -> Value:
    """Apply a convolution with a constant kernel."""
    _constant(kernel)
    if not params["window_strides"]:
        raise NoBound("has no axis to move a kernel along: write it as a product of matrices")
    numbers = params["dimension_numbers"]
    (n, *axes), (n_out, *output_axes) = numbers.lhs_spec, numbers.out_spec
    images = Images(
        tuple(x.shape[axis] for axis in axes[1:]),
        tuple(shape[axis] for axis in output_axes[1:]),
        tuple(params["padding"]),
        _order(axes),
        _order(output_axes),
    )
    map = Convolution(
        kernel.exact.transpose(numbers.rhs_spec),
        numbers.out_spec[1],
        tuple(params["window_strides"]),
        tuple(params["rhs_dilation"]),
        # A group of samples meets its own share of the outputs, as a group of features does.
        params["feature_group_count"] * params["batch_group_count"],
        tuple(params["lhs_dilation"]),
        images,
    )
    by_sample = n == n_out == 0 and params["batch_group_count"] == 1
    stages = w.chained(x, shape, dense=map.dense) if by_sample else (None, ())
    return Linear(w.settled(x), map, w.label, stages)


def _order(axes: Sequence[int]) -> tuple[int, ...]:
    """Return the places of some axes of an array in the order of the array."""
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


@gain("reduce_window_max reduce_window_min")
def pool_largest(w: Walk, params: Params, shape: Shape, x: Operand) -> Value:
    """Choose one sample of each window: it counts once for each window that it is in."""
    count = overlaps(*_window(params))
    return w.grown(x, shape, (0.0, count**0.5 * (1 + 4 * UNIT * (count > 1))))


@gain("reduce_window_sum")
def pool_sum(w: Walk, params: Params, shape: Shape, x: Operand) -> Value:
    """Add the samples of each window: a convolution of one channel with ones."""
    window, stride, dilation = _window(params)
    if not window:  # of a number
        return Value(w.gain(x))
    first, *padding = params["padding"]
    order = tuple(range(len(shape)))
    images = Images(x.shape[1:], tuple(shape[1:]), tuple(padding), order, order)
    ones, spread = np.ones((1, 1, *window[1:])), (1,) * len(padding)
    map = Convolution(ones, None, stride[1:], dilation[1:], 1, spread, images)
    by_sample = window[0] == stride[0] == 1 and tuple(first) == (0, 0)
    bounds = window_sums(window, stride, dilation)
    return w.grown(x, shape, bounds, map.dense if by_sample else None)


def _window(params: Params) -> tuple[Any, Any, Any]:
    if max(params["base_dilation"], default=1) != 1:
        raise NoBound("the walk does not know windows over dilated images")
    return params["window_dimensions"], params["window_strides"], params["window_dilation"]
