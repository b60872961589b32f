"""Say the same of linear maps, normalizations and pooling: see `_gains`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import spectral_core as sc
from spectral_core.engine import Stage, Value, largest_scale

from ._gains import HANDLERS, gain
from ._linear_maps import (
    UNIT,
    Convolution,
    Matrix,
    adaptive_overlaps,
    by_axis,
    dense,
    exact,
    overlaps,
    widened_matrix,
)
from ._walk import Linear, NoBound, Padded, Walk

__all__ = ["HANDLERS"]


# Linear maps


def _constant(w: Walk, *tensors: Tensor | None) -> None:
    if any(x is not None and w.depends(x) for x in tensors):
        raise NoBound("multiplies two values that both depend on the input")


def mapped(w: Walk, out: Tensor, x: Tensor, map: Matrix | Convolution) -> Value:
    """Return the value of a linear map whose norm is computed later."""
    before = w.value(x)
    stages = w.chained(x, out, dense=lambda: map.dense(x.shape[1:]))
    return Linear(before, map, w.name, x.shape[1:], stages)


@gain("linear")
def linear(w: Walk, out: Tensor, x: Tensor, weight: Tensor, bias: Any = None) -> Value:
    """Multiply the last axis by a matrix."""
    if weight.ndim != 2:
        raise NoBound("the walk knows linear maps with two axes")
    _constant(w, weight, bias)
    return mapped(w, out, x, widened_matrix(weight))


@gain("matmul mm rmatmul")
def matmul(w: Walk, out: Tensor, x: Tensor, other: Tensor) -> Value:
    """Multiply by a constant matrix from either side."""
    x, other = (other, x) if w._function == "rmatmul" else (x, other)
    if w.depends(x) and w.depends(other):
        raise NoBound("multiplies two values that both depend on the input")
    right = w.depends(x)
    value, weight = (x, other) if right else (other, x)
    if weight.ndim != 2 or not value.ndim:
        raise NoBound("the walk knows products with a matrix of two axes")
    if right:
        return mapped(w, out, value, widened_matrix(weight.T))
    lower, upper, _ = sc.bounds(exact(weight).numpy())
    return w.grown(value, out, float(lower), float(upper))


@gain("addmm")
def addmm(
    w: Walk, out: Tensor, bias: Tensor, x: Tensor, weight: Tensor, *, beta: Any = 1, alpha: Any = 1
) -> Value:
    """Multiply by a matrix and add a constant."""
    _constant(w, bias, weight)
    if alpha != 1:
        raise NoBound("the walk knows addmm with alpha = 1")
    return mapped(w, out, x, widened_matrix(weight.T))


def convolve(
    w: Walk,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """Apply a convolution."""
    _constant(w, weight, bias)
    n = weight.ndim - 2
    around = padding if isinstance(padding, str) else _each(padding, n)
    map = Convolution(
        exact(weight), _each(stride, n), around, _each(dilation, n), groups, kind=w.kind, tol=w.tol
    )
    before = w.raw(x)
    alone = around in ((0,) * n, "valid")
    if isinstance(before, Padded) and before.is_current and alone and len(before.sizes) == n:
        x = before.tensor
        fields = {"circular": before.widths, "sizes": before.sizes, "padding": (0,) * n}
        map = Convolution(**(vars(map) | fields))
    return _image(w, out, x, map, n)


def convolve_transposed(
    w: Walk,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    """Apply a transposed convolution."""
    _constant(w, weight, bias)
    n = weight.ndim - 2
    map = Convolution(
        exact(weight),
        _each(stride, n),
        _each(padding, n),
        _each(dilation, n),
        groups,
        transposed=True,
        output_padding=_each(output_padding, n),
        kind=w.kind,
        tol=w.tol,
    )
    return _image(w, out, x, map, n)


for _n in (1, 2, 3):
    HANDLERS[f"conv{_n}d"] = convolve
    HANDLERS[f"conv_transpose{_n}d"] = convolve_transposed


def _image(w: Walk, out: Tensor, x: Tensor, map: Convolution, n: int) -> Value:
    found = mapped(w, out, x, map)
    if x.ndim != n + 2:  # one image without an axis of samples
        found.parent, found.stages = None, ()
    return found


def _each(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) * n if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


# Normalization


@gain("batch_norm")
def batch_norm(
    w: Walk,
    out: Tensor,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *cudnn: Any,
) -> Value:
    """Scale each channel by a constant: as a part of the linear map before it, if there is one."""
    if cudnn:  # torch.batch_norm has another order than that of torch.nn.functional
        weight, bias, running_mean, running_var = running_mean, running_var, weight, bias
    if training or running_var is None:
        raise NoBound("normalizes by the statistics of the batch")
    _constant(w, running_mean, running_var, weight, bias)
    scale = (exact(running_var) + eps).rsqrt()
    scale = scale if weight is None else scale * exact(weight)
    before = w.raw(x)
    if isinstance(before, Linear) and x.ndim == before.map.weight.ndim:  # the channels are axis 1
        return _folded(before, scale)
    size = largest_scale(scale.numpy()) * (1 + 8 * UNIT)
    shape = x.shape[1:]

    def form(y: Tensor) -> Tensor:
        return y * scale.reshape(-1, *[1] * (len(shape) - 1))

    return w.grown(x, out, size * (1 - 16 * UNIT), size, lambda: dense(form, shape))


def _folded(before: Linear, scale: Tensor) -> Value:
    """Return the linear map before a batch norm together with it."""
    map = before.map.folded(scale)
    found = Linear(before.source, map, before.name, before.shape, (None, ()))
    if before.parent is not None:
        found.parent = before.parent
        sizes = before.stages[0].sizes
        found.stages = (Stage(sizes, dense=lambda: map.dense(before.shape)),)
    return found


@gain("layer_norm group_norm")
def normalized(
    w: Walk,
    out: Tensor,
    x: Tensor,
    groups: Any = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Value:
    """Normalize by the statistics of groups of elements.

    With the deviation s = √(variance + eps) and z = (x − mean)/s, the Jacobian is γ/s times the
    projection on what has no mean, less zzᵀ/n, whose norm is below 1. So no slope is above γ/√eps,
    and where all elements are equal it is attained.
    """
    _constant(w, weight, bias)
    if not eps > 0:
        raise NoBound("divides by the deviation of its own input, which may be zero: eps is 0")
    size = (1.0 if weight is None else largest_scale(exact(weight).numpy())) / eps**0.5
    if _NORMALIZED not in w.ledger.notes:
        w.ledger.notes.append(_NORMALIZED)
    return w.grown(x, out, 0.0, size * (1 + 8 * UNIT))


_NORMALIZED = (
    "A normalization by the statistics of a sample counts with max|γ|/√eps, its slope where the "
    "sample is constant. Name it in gains if you know that your samples stay away from that."
)


@gain("rms_norm")
def normalized_by_size(
    w: Walk,
    out: Tensor,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Value:
    """Normalize by the root of the mean square: the same without the mean."""
    if eps is None:  # that of the dtype it is computed in, for which float32 is the narrowest
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return normalized(w, out, x, normalized_shape, weight, None, eps)


@gain("instance_norm")
def normalized_by_image(
    w: Walk,
    out: Tensor,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *cudnn: Any,
) -> Value:
    """Normalize each channel of an image, or scale it by what was kept."""
    if cudnn:  # torch.instance_norm has another order than that of torch.nn.functional
        weight, bias, running_mean, running_var = running_mean, running_var, weight, bias
    if use_input_stats:
        return normalized(w, out, x, None, weight, bias, eps)
    return batch_norm(w, out, x, running_mean, running_var, weight, bias, eps=eps)


@gain("multi_head_attention_forward scaled_dot_product_attention")
def attention(w: Walk, out: Tensor, *_: Any, **__: Any) -> Value:
    """Refuse attention."""
    raise NoBound(
        "attention multiplies values that all depend on the input: on unbounded inputs its slope "
        f"has no limit; say gains={{{w.name!r}: …}} if you know a bound"
    )


@gain("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def recurrent(w: Walk, out: Tensor, *_: Any, **__: Any) -> Value:
    """Refuse a recurrent layer."""
    raise NoBound(
        f"the walk does not know recurrent layers ({w._function}), whose gates multiply values "
        f"that depend on the input; say gains={{{w.name!r}: …}} if you know a bound"
    )


# Pooling


def pool_largest(
    w: Walk,
    out: Tensor,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    """Choose the largest sample of each window: a sample counts once for each window it is in."""
    n = int(w._function[-2])
    kernel = _each(kernel_size, n)
    step = _each(kernel_size if stride is None or stride == [] else stride, n)
    count = overlaps(kernel, step, _each(dilation, n), out.shape[-n:])
    size = count**0.5 * (1 + 4 * UNIT * (count > 1))
    return w.grown(x, out, 0.0, size)


def pool_mean(
    w: Walk,
    out: Tensor,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    """Average each window, axis by axis."""
    n, name = int(w._function[-2]), w._function
    kernel = _each(kernel_size, n)
    step = _each(kernel_size if stride is None or stride == [] else stride, n)
    around = _each(padding, n)
    if divisor_override is not None:
        raise NoBound("the walk does not know divisor_override")

    def axis(a: int) -> Callable[[Tensor], Tensor]:
        options = (kernel[a], step[a], around[a], ceil_mode, count_include_pad)
        return lambda y: functional.avg_pool1d(y, *options)

    lower, upper = by_axis([(axis(a), x.shape[x.ndim - n + a]) for a in range(n)])
    pool = getattr(functional, name)
    options = (kernel, step, around, ceil_mode, count_include_pad)
    form = lambda: dense(lambda y: pool(y, *options), x.shape[1:])  # noqa: E731
    return w.grown(x, out, lower, upper, form if x.ndim == n + 2 else None)


def pool_mean_to(w: Walk, out: Tensor, x: Tensor, output_size: Any) -> Value:
    """Average windows that cover the image, axis by axis."""
    n, name = int(w._function[-2]), w._function
    sizes, targets = x.shape[-n:], tuple(out.shape[-n:])

    def axis(target: int) -> Callable[[Tensor], Tensor]:
        return lambda y: functional.adaptive_avg_pool1d(y, target)

    lower, upper = by_axis([(axis(m), s) for m, s in zip(targets, sizes, strict=True)])
    form = lambda: dense(lambda y: getattr(functional, name)(y, targets), x.shape[1:])  # noqa: E731
    return w.grown(x, out, lower, upper, form if x.ndim == n + 2 else None)


def pool_largest_to(
    w: Walk, out: Tensor, x: Tensor, output_size: Any, return_indices: bool = False
) -> Value:
    """Choose the largest sample of windows that cover the image."""
    n = int(w._function[-2])
    count = adaptive_overlaps(x.shape[-n:], out.shape[-n:])
    return w.grown(x, out, 0.0, count**0.5 * (1 + 4 * UNIT * (count > 1)))


for _n in (1, 2, 3):
    HANDLERS[f"max_pool{_n}d"] = pool_largest
    HANDLERS[f"avg_pool{_n}d"] = pool_mean
    HANDLERS[f"adaptive_avg_pool{_n}d"] = pool_mean_to
    HANDLERS[f"adaptive_max_pool{_n}d"] = pool_largest_to


@gain("interpolate upsample")
def interpolate(
    w: Walk,
    out: Tensor,
    x: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Value:
    """Change the size of an image, axis by axis."""
    modes = {"bilinear": "linear", "trilinear": "linear"}
    one = modes.get(mode, mode)
    if one not in ("nearest", "nearest-exact", "linear") or antialias:
        raise NoBound(f"the walk does not know interpolation by {mode!r}")
    n = x.ndim - 2
    scales = scale_factor if isinstance(scale_factor, Sequence) else (scale_factor,) * n

    def axis(a: int) -> Callable[[Tensor], Tensor]:
        target = {"size": out.shape[2 + a]} if size is not None else {"scale_factor": scales[a]}
        options = {"mode": one, "align_corners": align_corners, **target}
        options["recompute_scale_factor"] = recompute_scale_factor
        return lambda y: functional.interpolate(y, **options)

    lower, upper = by_axis([(axis(a), x.shape[2 + a]) for a in range(n)])
    return w.grown(x, out, lower, upper)
