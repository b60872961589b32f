"""Say for each PyTorch function how far its result moves when its arguments move.

A handler gets the walk, the result, and the arguments of the call. The first name in a decorator
without operators is that of ``torch``; names of methods and operators are the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from spectral_core.engine import (
    SLOPES,
    Value,
    in_parallel,
    in_series,
    largest_scale,
    log10_up,
    side_by_side,
)

from ._linear_maps import UNIT, by_axis, dense, exact
from ._walk import CONSTANT, Handler, Linear, NoBound, Padded, Walk

HANDLERS: dict[str, Handler] = {}
H = TypeVar("H", bound=Callable[..., Value])


def gain(names: str) -> Callable[[H], H]:
    """Register a handler for functions."""

    def register(handler: H) -> H:
        HANDLERS.update(dict.fromkeys(names.split(), handler))
        return handler

    return register


# What moves elements, or leaves some out


@gain("reshape view flatten unflatten squeeze unsqueeze contiguous clone detach view_as reshape_as")
@gain("alias requires_grad_ identity to float double half bfloat16 type type_as cpu cuda")
def same(w: Walk, out: Tensor, x: Tensor, *args: Any, **options: Any) -> Value:
    """Keep the elements in their order."""
    kinds = [y for y in (*args, *options.values()) if isinstance(y, torch.dtype)]
    if w._function == "view" and kinds and kinds[0] != x.dtype:
        raise NoBound("reads the bits of its numbers as those of another dtype")
    before = w.value(x)
    return Value(before.gain, *w.chained(x, out))


@gain("permute transpose swapaxes swapdims movedim moveaxis t T mT adjoint roll flip fliplr flipud")
@gain("rot90 pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle chunk split")
@gain("unbind tensor_split narrow select diagonal tril triu split_with_sizes hsplit vsplit dsplit")
# Of all orders, the sorted one brings two rows closest to each other.
@gain("sort msort topk kthvalue median")
def moved(w: Walk, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Value:
    """Move elements, none of which occurs twice."""
    return Value(w.value(x).gain)


@gain("__getitem__")
def item(w: Walk, out: Tensor, x: Tensor, index: Any) -> Value:
    """Read a part of a tensor, some elements perhaps several times."""
    parts = index if isinstance(index, tuple) else (index,)
    if all(part is None or isinstance(part, int | slice | type(...)) for part in parts):
        return Value(w.value(x).gain)
    return _read(w, x, lambda places: places[index], *parts)


@gain("index_select gather")
def picked(w: Walk, out: Tensor, x: Tensor, dim: Any, index: Tensor, **_: Any) -> Value:
    """Read elements at constant places."""
    return _read(w, x, lambda places: getattr(places, w._function)(dim, index), index)


def _read(w: Walk, x: Tensor, read: Callable[[Tensor], Tensor], *index: Any) -> Value:
    """Return the value of elements at constant places: one counts once for each time it is read."""
    if any(isinstance(part, Tensor) and w.depends(part) for part in index):
        raise NoBound("reads at places that depend on the input: it may jump")
    found = read(torch.arange(x.numel(), device=x.device).reshape(x.shape)).reshape(-1)
    count = int(torch.bincount(found, minlength=1).max())
    return Value(in_series([w.value(x).gain, _counted(w, "index", count)]))


def _counted(w: Walk, kind: str, count: float) -> float:
    """Return the gain of reading an element so often, written down as a layer if it is one."""
    size = count**0.5 * (1 + 4 * UNIT)
    return w.ledger.layer(w.name, kind, size * (1 - 8 * UNIT), size) if count > 1 else 0.0


@gain("expand expand_as broadcast_to repeat tile repeat_interleave")
def repeated(w: Walk, out: Tensor, x: Tensor, *args: Any, **options: Any) -> Value:
    """Repeat every element as often as any other."""
    counts = args[0] if args else options.get("repeats")
    if isinstance(counts, Tensor) and w._function == "repeat_interleave":
        raise NoBound("repeats elements by numbers in a tensor")
    return Value(
        in_series([w.value(x).gain, _counted(w, "repeat", out.numel() / max(x.numel(), 1))])
    )


def _repeats(x: Any, out: Tensor) -> float:
    """Return the gain of broadcasting a tensor to a result."""
    if not isinstance(x, Tensor) or x.numel() == out.numel():
        return 0.0
    return log10_up(out.numel() / max(x.numel(), 1)) / 2


@gain("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout")
def dropout(
    w: Walk, out: Tensor, x: Tensor, p: Any = 0.5, training: bool = True, inplace: bool = False
) -> Value:
    """Do nothing in evaluation."""
    if training:
        raise NoBound("drops elements at random: pass training=self.training")
    return same(w, out, x)


@gain("pad")
def pad(
    w: Walk, out: Tensor, x: Tensor, pad: Any, mode: str = "constant", value: Any = None
) -> Value:
    """Put samples around an image: constants, or some that it has."""
    if mode == "constant":
        form = lambda: dense(lambda y: functional.pad(y, tuple(pad)), x.shape[1:])  # noqa: E731
        safe = len(pad) <= 2 * (x.ndim - 1)
        return Value(w.value(x).gain, *(w.chained(x, out, dense=form) if safe else ()))
    n = len(pad) // 2
    widths = [(pad[2 * i], pad[2 * i + 1]) for i in reversed(range(n))]
    sizes = x.shape[x.ndim - n :]

    def padding(pair: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        return lambda y: functional.pad(y, pair, mode=mode)

    _, upper = by_axis([(padding(p), s) for p, s in zip(widths, sizes, strict=True)])
    before = w.value(x)
    total = in_series([before.gain, log10_up(upper)])
    if mode == "circular":
        return Padded(x, tuple(widths), tuple(sizes), total, (w.name, upper))
    w.ledger.layer(w.name, f"pad, {mode}", 0.0, upper)
    return Value(total)


# Sums, scales, selections


@gain("add radd iadd sub rsub isub subtract")
def add(w: Walk, out: Tensor, x: Any, other: Any, *, alpha: float = 1) -> Value:
    """Add two values, either of which may be a constant."""
    constant = isinstance(x, Tensor) and not w.depends(other) and w._function != "rsub"
    swapped = isinstance(other, Tensor) and not w.depends(x) and w._function in ("add", "radd")
    one = x if constant else other
    if (constant or (swapped and alpha == 1)) and one.shape == out.shape:
        before = w.raw(one)  # the linear map before still is one: its norm can wait
        return before if isinstance(before, Linear) else same(w, out, one)
    scales = [0.0, log10_up(abs(alpha))]
    if w._function == "rsub":
        scales.reverse()
    gains = [
        in_series([w.value(one).gain, _repeats(one, out), scale])
        for one, scale in zip((x, other), scales, strict=True)
    ]
    return Value(in_parallel(gains))


@gain("mul rmul imul multiply div truediv itruediv true_divide divide")
def scale(w: Walk, out: Tensor, x: Any, other: Any) -> Value:
    """Multiply by a constant, or divide by one."""
    divides = "div" in w._function
    if w.depends(x) and w.depends(other):
        raise NoBound("multiplies or divides two values that both depend on the input")
    value, constant = (x, other) if w.depends(x) else (other, x)
    if divides and value is other:
        raise NoBound("divides by a value that depends on the input")
    if isinstance(constant, complex):
        raise NoBound("scales by a complex number")
    # Not in the default dtype: rounding a number of Python's could make the bound smaller.
    wide = None if isinstance(constant, Tensor) else torch.float64
    factor = exact(torch.as_tensor(constant, dtype=wide))
    number = largest_scale((1 / factor if divides else factor).numpy())
    number *= 1 + 4 * UNIT * divides
    if not isfinite(number):
        raise NoBound("scales by a number that is not finite")
    upper = in_series([w.value(value).gain, _repeats(value, out), log10_up(number)])
    if number != 1:
        w.ledger.layer(w.name, "scale", 0.0, number)
    if factor.numel() == 1 and not divides:
        return Value(upper, *w.chained(value, out, slopes=(float(factor),) * 2))
    return Value(upper)


@gain("rtruediv rdiv reciprocal")
def quotient(w: Walk, out: Tensor, x: Tensor, *_: Any) -> Value:
    """Refuse a quotient."""
    raise NoBound("divides by a value that depends on the input")


@gain("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor")
def made_like(w: Walk, out: Tensor, x: Tensor, *values: Any, **__: Any) -> Value:
    """Make a constant of the same shape."""
    if any(isinstance(one, Tensor) and w.depends(one) for one in values):
        raise NoBound("fills a tensor with a value that depends on the input")
    return CONSTANT


@gain("cat concat concatenate stack hstack vstack")
def side(w: Walk, out: Tensor, tensors: Sequence[Tensor], dim: int = 0, axis: int = 0) -> Value:
    """Put values side by side."""
    return Value(side_by_side([w.value(x).gain for x in tensors]))


@gain("maximum minimum fmax fmin")
def larger(w: Walk, out: Tensor, x: Tensor, other: Tensor) -> Value:
    """Choose the larger or the smaller of two."""
    return Value(side_by_side([in_series([w.value(y).gain, _repeats(y, out)]) for y in (x, other)]))


@gain("max min amax amin")
def largest(
    w: Walk, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, other: Any = None
) -> Value:
    """Choose one element of each row, or the larger of two tensors."""
    other = dim if isinstance(dim, Tensor) else other
    return Value(w.value(x).gain) if other is None else larger(w, out, x, other)


@gain("where")
def where(w: Walk, out: Tensor, condition: Tensor, x: Any, other: Any) -> Value:
    """Choose by a constant mask."""
    if w.depends(condition):
        raise NoBound("chooses by a value that depends on the input: it may jump")
    return larger(w, out, x, other)


@gain("masked_fill")
def masked(w: Walk, out: Tensor, x: Tensor, mask: Tensor, value: Any) -> Value:
    """Replace elements by a constant, where a constant mask says so."""
    if w.depends(mask) or w.depends(value):
        raise NoBound("chooses by a value that depends on the input: it may jump")
    return Value(in_series([w.value(x).gain, _repeats(x, out)]))


@gain("sum mean")
def total(
    w: Walk, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    """Add or average the elements of each row."""
    count = x.numel() // max(out.numel(), 1)
    size = count**0.5 if w._function == "sum" else count**-0.5
    name, size = w._function, size * (1 + 4 * UNIT)
    given = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    axes = tuple(a % x.ndim for a in given)
    form = lambda: dense(lambda y: getattr(y, name)(axes, keepdim), x.shape[1:])  # noqa: E731
    safe = bool(axes) and 0 not in axes and out.ndim > 1
    return w.grown(x, out, size * (1 - 8 * UNIT), size, form if safe else None)


@gain("norm vector_norm logsumexp")
def length(w: Walk, out: Tensor, x: Tensor, *args: Any, **options: Any) -> Value:
    """Return a Euclidean norm, or a soft maximum: both move by no more than their argument."""
    order = options.get("p", options.get("ord", args[0] if args else 2))
    if w._function != "logsumexp" and order not in (2, 2.0, "fro", None):
        raise NoBound(f"the walk does not know the norm of order {order!r}")
    return Value(w.value(x).gain)


# Activations


def activation(w: Walk, out: Tensor, x: Tensor, low: float, high: float) -> Value:
    """Apply a function to each element, with slopes between two numbers."""
    steepest = max(abs(low), abs(high))
    before = w.value(x)
    if steepest != 1:
        w.ledger.layer(w.name, w.kind, steepest, steepest)
    upper = in_series([before.gain, log10_up(steepest), _repeats(x, out)])
    if x.numel() != out.numel():  # limits that broadcast
        return Value(upper)
    return Value(upper, *w.chained(x, out, slopes=(low, high)))


_PLAIN = (
    "abs absolute:abs atan arctan:atan celu cos erf hardsigmoid hardswish logsigmoid:log_sigmoid "
    "log_sigmoid mish neg negative:neg relu relu6 selu sigmoid silu sin softplus softshrink "
    "softsign tanh tanhshrink hardtanh clamp clip:clamp clamp_min:clamp clamp_max:clamp"
)


def _plain(name: str) -> Handler:
    """Return the handler of an activation whose slopes no option changes."""

    def handler(w: Walk, out: Tensor, x: Tensor, *args: Any, **options: Any) -> Value:
        if any(isinstance(y, Tensor) and w.depends(y) for y in (*args, *options.values())):
            raise NoBound("its limits depend on the input")
        number = args[0] if args else options.get("alpha", 1.0)
        if name == "celu" and not number > 0:
            raise NoBound("the walk knows celu with alpha above zero")
        limit = args[1] if len(args) > 1 else options.get("threshold", 20)
        if name == "softplus" and limit < 20:
            raise NoBound("jumps at its threshold")
        return activation(w, out, x, *SLOPES[name])

    return handler


for _pair in _PLAIN.split():
    _name, _, _slopes = _pair.partition(":")
    HANDLERS[_name] = _plain(_slopes or _name)


@gain("gelu")
def gelu(w: Walk, out: Tensor, x: Tensor, approximate: str = "none") -> Value:
    """Apply GELU in one of its two forms."""
    return activation(w, out, x, *SLOPES["gelu" if approximate == "none" else "gelu_tanh"])


@gain("leaky_relu")
def leaky(
    w: Walk, out: Tensor, x: Tensor, negative_slope: float = 0.01, inplace: bool = False
) -> Value:
    """Apply ReLU with another slope below zero."""
    return activation(w, out, x, min(negative_slope, 1.0), max(negative_slope, 1.0))


@gain("rrelu")
def random_leaky(
    w: Walk,
    out: Tensor,
    x: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Value:
    """Apply ReLU with the mean of two slopes below zero."""
    if training:
        raise NoBound("draws slopes at random")
    low, high = sorted((lower, upper))
    return activation(w, out, x, min(low, 1.0), max(high, 1.0))


@gain("elu")
def elu(
    w: Walk,
    out: Tensor,
    x: Tensor,
    alpha: float = 1.0,
    scale: float = 1.0,
    input_scale: float = 1.0,
    inplace: bool = False,
) -> Value:
    """Apply an exponential below zero: its slope at zero is alpha."""
    if (scale, input_scale) != (1.0, 1.0) or not alpha >= 0:
        raise NoBound("the walk knows elu with alpha alone")
    return activation(w, out, x, 0.0, max(1.0, alpha))


@gain("prelu")
def prelu(w: Walk, out: Tensor, x: Tensor, weight: Tensor) -> Value:
    """Apply ReLU with learned slopes below zero."""
    if w.depends(weight):
        raise NoBound("its slopes depend on the input")
    slopes = exact(weight)
    if not slopes.isfinite().all():
        raise NoBound("a slope below zero is not finite")
    return activation(w, out, x, min(1.0, float(slopes.min())), max(1.0, float(slopes.max())))


@gain("threshold")
def threshold(
    w: Walk, out: Tensor, x: Tensor, threshold: float, value: float, inplace: bool = False
) -> Value:
    """Replace what is below a threshold by a number."""
    if threshold != value:
        raise NoBound("jumps at its threshold")
    return activation(w, out, x, *SLOPES["relu"])


@gain("softmax softmin")
def softmax(w: Walk, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Value:
    """Apply softmax: no row of its Jacobian diag(s) − ssᵀ has a sum of sizes above 1/2.

    That of row i is s_i(1 − s_i) + s_i·Σ_{j≠i} s_j = 2s_i(1 − s_i), and the Jacobian is symmetric.
    """
    return w.grown(x, out, 0.0, 0.5)


@gain("log_softmax")
def log_softmax(w: Walk, out: Tensor, x: Tensor, dim: Any, *_: Any, **__: Any) -> Value:
    """Apply log-softmax: its Jacobian I − 1sᵀ is an oblique projection, of norm √n at most."""
    if dim is None:
        raise NoBound("pass dim to log_softmax")
    size = float(x.shape[dim]) ** 0.5 if x.ndim else 0.0
    return w.grown(x, out, 0.0, size * (1 + 4 * UNIT) if x.ndim and x.shape[dim] > 1 else 0.0)
