"""Compute the norm of a convolution as the linear map of images that it is.

The flattened kernel (outputs × inputs·taps) has another norm. The norm of the map is the largest
singular value of the symbol over all frequencies: see `_symbol` for how it is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, frexp, gcd, inf, prod
from typing import Any, NamedTuple

import numpy as np

from ._arrays import Array, array_namespace, as_numpy, cast, constant, is_complex, plain, traits
from ._certificate import Host, gamma, scaled_down, scaled_up, times_power_of_two
from ._lanczos import top_ritz
from ._layout import Layout, as_layout
from ._padding import MODES, Axis, Operator, repeats, sources
from ._plan import letters_of, make_plan
from ._symbol import Peak, Supremum, Symbol, supremum
from ._validate import check_number
from .errors import ArgumentError, DTypeError, ShapeError, check_int, shown

_EVALUATIONS = 20_000  # frequencies, before the tolerance grows
_ITERATIONS = 200  # through the layer at a size
_CANCELLED = 2.0**-45  # largest element of taps that cancel, beside one of 1 or more before

Size = int | Sequence[int]
Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]


class ConvolutionNorm(NamedTuple):
    """Result of `convolution_norm`."""

    lower: float
    upper: float
    frequency: tuple[float, ...]


class _Options(NamedTuple):
    """The geometry of a convolution, one entry an axis."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...] | str
    output_padding: tuple[int, ...]
    mode: str
    transposed: bool


def convolution_norm(
    kernel: Array,
    layout: Layout | str,
    *,
    size: Size | None = None,
    stride: Size = 1,
    padding: Padding = "same",
    padding_mode: str = "zeros",
    dilation: Size = 1,
    transposed: bool = False,
    output_padding: Size = 0,
    tol: float = 1e-6,
) -> ConvolutionNorm:
    r"""Bound the norm of a convolution as a linear map of images, from below and above.

    .. math:: \sup_{x ≠ 0} \frac{‖K * x‖}{‖x‖} ≤ \sup_ω σ_1\left(\sum_t K_t\,e^{-iω·t}\right)

    The right side is the norm on an infinite grid, S. It bounds the norm at every size with zero
    or circular padding that repeats no sample, and the norms of growing sizes tend to it.

    Parameters
    ----------
    kernel : array
        Kernel of a convolution of 1 to 3 dimensions, real or complex floating-point. The bounds
        are those of the stored numbers, also in half precision.
    layout : Layout or str
        The meaning of its axes: ``"oihw"`` in PyTorch, ``"hwio"`` in Flax and Keras, ``"iohw"``
        for PyTorch's transposed convolutions, ``Layout("(go)ihw", groups=4)`` with groups.
    size : int or sequence of int, optional
        Size of the image that the layer gets, without the channels. The default is every size.
    stride, dilation : int or sequence of int
    padding : int, sequence, "same" or "valid"
        Samples at both ends of each axis, or a pair (before, after) for each axis. "same" gives
        size/stride outputs, rounded up, as in TensorFlow and Flax. Without ``size``, zeros and
        circular padding do not depend on the number, as long as circular padding repeats nothing.
    padding_mode : str
        "zeros", "circular", "reflect" or "replicate".
    transposed : bool
        True for a transposed convolution, whose layout names its own outputs and inputs.
    output_padding : int or sequence of int
        Of a transposed convolution.
    tol : float
        Relative distance of the bounds to stop at, where they can meet.

    Returns
    -------
    ConvolutionNorm
        ``lower`` and ``upper``, floats. With circular padding of a whole number of strides they
        bound the norm at that size, and without ``size`` they bound S: ``upper`` is about
        ``lower * (1 + tol)``, unless S has so many equal maxima that this would need more than
        20,000 frequencies. For other paddings at a size, ``lower`` comes from an iteration through
        the layer, and ``upper`` is S times the norm of the padding. ``frequency`` is where the
        symbol is largest, in radians a sample of its grid.

    Raises
    ------
    ShapeError
        If the kernel does not fit its layout, has no kernel axis or an empty axis, or the image is
        too small.
    DTypeError
        If the kernel is not floating-point, or float64 has no place for it.
    ArgumentError
        If an option is out of its range.

    Notes
    -----
    The bounds are proven, rounding included, by factorizations in float64 on the host. The kernel
    is copied there, so the function does not run inside ``jax.jit``.

    With zero padding at a size n, the norm is below S by about 2 to 4·(S/n²).

    Reflections and replicated edges repeat samples, which can make the norm larger than S. The
    bound is then S times the root of how often one sample occurs, for each axis.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> laplacian = np.array([[[1.0, -2.0, 1.0]]])
    >>> lower, upper, _ = sc.convolution_norm(laplacian, "oik")
    >>> round(lower, 6), upper < 4.00001
    (4.0, True)
    >>> lower, upper, _ = sc.convolution_norm(laplacian, "oik", size=5, padding=1)
    >>> round(lower, 4)
    3.7321
    """
    host, exponent = _canonical(kernel, layout)
    n = host.ndim - 3
    options = _options(n, stride, padding, padding_mode, dilation, transposed, output_padding)
    tol = check_number(tol, "tol")
    if not np.isfinite(host).all():
        return ConvolutionNorm(np.nan, np.nan, (np.nan,) * n)
    if not host.any():
        return ConvolutionNorm(0.0, 0.0, (0.0,) * n)
    if transposed:  # the adjoint of a convolution from its outputs to its inputs
        host = host.swapaxes(1, 2)
    sizes = None if size is None else _sizes(size, n, host.shape[3:], options)
    found = _bounds(host, sizes, options, tol)
    frequency = tuple(float(angle) for angle in found.peak.frequency)
    lower, upper = scaled_down(found.lower, exponent), scaled_up(found.upper, exponent)
    return ConvolutionNorm(lower, upper, frequency)


def _bounds(kernel: Host, sizes: tuple[int, ...] | None, options: _Options, tol: float) -> Supremum:
    """Return the bounds for a kernel (g, o, i, …) of a convolution that is not transposed."""
    taps = kernel.shape[3:]
    stretched, free = _stretched(kernel, options)
    if sizes is None:
        found = supremum(
            Symbol(_space_to_depth(stretched, options.stride)),
            tol=tol,
            max_evaluations=_EVALUATIONS,
        )
        return found._replace(upper=found.upper * _most_repeats(taps, options) ** 0.5)
    axes = _axes(taps, sizes, options)
    grid = _grid(axes, sizes, options, free)
    if grid is not None:
        return _on_grid(_space_to_depth(stretched, options.stride), grid, tol)
    symbol = Symbol(_space_to_depth(stretched, options.stride))
    found = supremum(symbol, tol=tol, max_evaluations=_EVALUATIONS)
    upper = found.upper * prod(map(repeats, axes)) ** 0.5
    lower = _iterated(kernel, axes, found.peak, tol)
    return Supremum(lower, max(upper, lower), found.peak)


def _iterated(kernel: Host, axes: Sequence[Axis], peak: Peak, tol: float) -> float:
    """Return a proven lower bound of the norm at a size, by iterating through the layer."""
    operator = Operator(kernel, axes)
    start = _wave(operator.inputs, peak, np.iscomplexobj(kernel))

    def gram(x: Host) -> Host:
        return operator.adjoint_times(operator.times(x))

    x, _ = top_ritz(gram, start, min(tol, 1e-6), _ITERATIONS, np)
    # |fl(Kx) − Kx| ≤ γ·|K||x|, and `_size` bounds the norm of |K|.
    largest = _size(kernel) * prod(map(repeats, axes)) ** 0.5
    rate = gamma(kernel[0, 0].size + 4, kernel)
    length, product = float(np.linalg.norm(x)), float(np.linalg.norm(operator.times(x)))
    rounding = gamma(max(prod(operator.inputs), prod(operator.outputs)) + 8, kernel)
    return max(0.0, (product / length) * (1 - 2 * rounding) - rate * largest * 1.01)


def _wave(shape: tuple[int, ...], peak: Peak, is_complex: bool) -> Host:
    """Return an image of the peak's frequency under a sine arch that is zero just outside.

    A little noise keeps it from being orthogonal to what is searched. Only the group of the peak
    has more than that.
    """
    rng = np.random.default_rng(0)
    wave = (rng.standard_normal(shape[1]) + 1j * rng.standard_normal(shape[1]))[
        (...,) + (None,) * len(shape[2:])
    ]
    for axis, (n, angle) in enumerate(zip(shape[2:], peak.frequency, strict=True), 1):
        places = np.arange(n).reshape([-1 if a == axis else 1 for a in range(len(shape) - 1)])
        wave = wave * np.exp(1j * angle * places) * np.sin(np.pi * (places + 1) / (n + 1))
    x = 1e-3 * rng.standard_normal(shape) + 0j
    x[peak.group] += wave
    found: Host = (x if is_complex else x.real).reshape(-1)
    return found / np.linalg.norm(found)


def _canonical(kernel: Array, layout: Layout | str) -> tuple[Host, int]:
    """Return the kernel as (groups, outputs, inputs, taps…) in float64, divided by 2^exponent."""
    kernel = plain(kernel, "kernel")
    xp = array_namespace(kernel, name="kernel")
    kind, layout = traits(kernel, xp, "kernel"), as_layout(layout)
    if "s" in layout.axes:
        raise ShapeError(f"layout {layout.axes!r} is a stack: call the function for each kernel")
    plan = make_plan(layout.axes, layout.groups, tuple(kernel.shape))
    letters = letters_of(layout.axes)
    picked = ["".join(kinds) for kinds in ("g", "o", "i", "kdhw")]
    axes = [[a for a, letter in enumerate(letters) if letter in kinds] for kinds in picked]
    if not axes[3] or len(axes[1]) > 1 or len(axes[2]) > 1:
        raise ShapeError(
            f"layout {layout.axes!r} is no convolution's: it needs one output axis, one input "
            "axis, and one letter for each axis of the image, such as 'oihw'"
        )
    wide = np.complex128 if is_complex(kernel, xp) else np.float64
    stored = as_numpy(cast(constant(kernel), kind.iteration_dtype, xp), "kernel")
    with np.errstate(over="ignore"):
        host = stored.astype(wide)
    if stored.any() != host.any() or np.isfinite(stored).all() != np.isfinite(host).all():
        raise DTypeError("kernel has elements beyond the range of float64: scale it first")
    host = host.reshape(plan.split).transpose([axis for some in axes for axis in some])
    host = host if axes[0] else host[None]
    # The absolute value of a finite complex number may overflow.
    largest = float(max(np.abs(host.real).max(), np.abs(host.imag).max()))
    # A power of two, so that nothing overflows in the squares, and scaling is exact.
    exponent = frexp(largest)[1] - 1 if 0 < largest < inf else 0
    return times_power_of_two(host, -exponent), exponent


def _options(
    n: int,
    stride: Size,
    padding: Padding,
    mode: str,
    dilation: Size,
    transposed: bool,
    output_padding: Size,
) -> _Options:
    """Return the options, one entry an axis, checked."""
    if mode not in MODES:
        raise ArgumentError(f"padding_mode must be one of {', '.join(MODES)}, not {shown(mode)}")
    if transposed and (mode != "zeros" or padding == "same"):
        raise ArgumentError(
            "a transposed convolution has zeros around it: give padding as numbers or 'valid'"
        )
    return _Options(
        _each(stride, n, "stride", 1),
        _each(dilation, n, "dilation", 1),
        _pairs(padding, n),
        _each(output_padding, n, "output_padding", 0),
        mode,
        transposed,
    )


def _each(value: Size, n: int, name: str, least: int) -> tuple[int, ...]:
    """Return one integer for each axis."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (check_int(value, name, least),) * n
    if len(value) != n:
        raise ArgumentError(f"{name} has {len(value)} numbers for {n} axes: {shown(value)}")
    return tuple(check_int(one, name, least) for one in value)


def _pairs(padding: Padding, n: int) -> tuple[tuple[int, int], ...] | str:
    """Return the padding before and after each axis, or "same"."""
    if padding == "same":
        return "same"
    if padding == "valid":
        return ((0, 0),) * n
    if isinstance(padding, str):
        raise ArgumentError(f"padding must be numbers, 'same' or 'valid', not {shown(padding)}")
    if isinstance(padding, Sequence) and any(isinstance(one, Sequence) for one in padding):
        pairs: Any = padding
        if len(pairs) != n or any(len(_as_sequence(one)) != 2 for one in pairs):
            raise ArgumentError(
                f"padding must be a pair for each of {n} axes, not {shown(padding)}"
            )
        return tuple((check_int(a, "padding", 0), check_int(b, "padding", 0)) for a, b in pairs)
    numbers: Any = padding
    return tuple((one, one) for one in _each(numbers, n, "padding", 0))


def _as_sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) else ()


def _sizes(size: Size, n: int, taps: Sequence[int], options: _Options) -> tuple[int, ...]:
    """Return the size of the image that the convolution gets, or a transposed one gives."""
    sizes = _each(size, n, "size", 1)
    if not options.transposed:
        return sizes
    assert not isinstance(options.padding, str)
    each = zip(
        sizes,
        taps,
        options.stride,
        options.dilation,
        options.padding,
        options.output_padding,
        strict=True,
    )
    found = tuple(
        (m - 1) * s - sum(pad) + d * (k - 1) + 1 + extra for m, k, s, d, pad, extra in each
    )
    if min(found) < 1:
        raise ShapeError(f"an image of size {sizes} has no outputs with this padding")
    return found


def _axes(taps: Sequence[int], sizes: Sequence[int], options: _Options) -> list[Axis]:
    """Return the geometry of each axis at a size."""
    found = []
    for axis, (k, size) in enumerate(zip(taps, sizes, strict=True)):
        s, d = options.stride[axis], options.dilation[axis]
        reach = d * (k - 1)
        if isinstance(options.padding, str):
            total = max((ceil(size / s) - 1) * s + reach + 1 - size, 0)
            before, after = total // 2, total - total // 2
        else:
            before, after = options.padding[axis]
        if options.mode == "reflect" and max(before, after) >= size:
            raise ShapeError(
                f"an axis of size {size} cannot be reflected into {max(before, after)} samples"
            )
        outputs = (size + before + after - reach - 1) // s + 1
        if size + before + after < reach + 1:
            raise ShapeError(f"a kernel of {k} taps does not fit an axis of size {size}")
        found.append(Axis(sources(size, before, after, options.mode), size, s, d, outputs))
    return found


def _stretched(kernel: Host, options: _Options) -> tuple[Host, tuple[bool, ...]]:
    """Return the kernel with zeros between its taps where dilation and stride meet.

    Where the stride is one, dilation only renames the frequencies, and changes no maximum.
    """
    free = tuple(s == 1 for s in options.stride)
    for axis, (d, is_free) in enumerate(zip(options.dilation, free, strict=True), 3):
        if d > 1 and not is_free:
            shape = [*kernel.shape]
            shape[axis] = d * (shape[axis] - 1) + 1
            wide = np.zeros(shape, kernel.dtype)
            wide[(slice(None),) * axis + (slice(None, None, d),)] = kernel
            kernel = wide
    return kernel, free


def _space_to_depth(kernel: Host, stride: Sequence[int]) -> Host:
    """Return the kernel of the same map with stride 1: samples between strides become channels."""
    for axis, s in enumerate(stride, 3):
        if s == 1:
            continue
        size = -(-kernel.shape[axis] // s)
        widths = [
            (0, s * size - kernel.shape[axis] if a == axis else 0) for a in range(kernel.ndim)
        ]
        shape = kernel.shape
        kernel = np.pad(kernel, widths).reshape(*shape[:axis], size, s, *shape[axis + 1 :])
        kernel = np.moveaxis(kernel, axis + 1, 3)
        kernel = kernel.reshape(*shape[:2], shape[2] * s, *kernel.shape[4:])
    return kernel


def _grid(
    axes: Sequence[Axis],
    sizes: Sequence[int],
    options: _Options,
    free: Sequence[bool],
) -> tuple[int, ...] | None:
    """Return the grid of frequencies of a circular convolution, or None for another map.

    Each axis must give size/stride outputs: as many as there are shifts by a stride. The order of
    the outputs does not matter to the norm.
    """
    if options.mode != "circular":
        return None
    if any(axis.size % axis.stride or axis.outputs != axis.size // axis.stride for axis in axes):
        return None
    return tuple(
        n // gcd(n, d) if is_free else n // s
        for n, s, d, is_free in zip(sizes, options.stride, options.dilation, free, strict=True)
    )


def _on_grid(kernel: Host, grid: Sequence[int], tol: float) -> Supremum:
    """Return the bounds over a grid of frequencies, where taps that meet may cancel."""
    folded = _folded(kernel, grid)
    count = prod(-(-k // n) for k, n in zip(kernel.shape[3:], grid, strict=True))
    hidden = gamma(count, kernel) * _size(kernel) if count > 1 else 0.0
    if np.abs(folded).max() < _CANCELLED:  # rounding is most of it: no search would end
        nowhere = Peak(0.0, 0, np.zeros(len(grid)), np.zeros(1))
        return Supremum(0.0, _size(folded) + hidden, nowhere)
    found = supremum(Symbol(folded), grid=grid, tol=tol, max_evaluations=_EVALUATIONS)
    return found._replace(lower=max(0.0, found.lower - hidden), upper=found.upper + hidden)


def _size(kernel: Host) -> float:
    """Return a bound of the norms of K and |K|: the root of the row sums · the column sums."""
    size = np.abs(kernel).sum(axis=tuple(range(3, kernel.ndim)))
    sums = size.sum(axis=1).max(axis=1) * size.sum(axis=2).max(axis=1)
    return float(sums.max()) ** 0.5 * (1 + 8 * gamma(kernel.size, size))


def _folded(kernel: Host, grid: Sequence[int]) -> Host:
    """Return the kernel whose taps beyond the grid are added to those that they meet."""
    for axis, n in enumerate(grid, 3):
        k = kernel.shape[axis]
        if k > n:
            widths = [(0, -k % n if a == axis else 0) for a in range(kernel.ndim)]
            shape = kernel.shape
            parts = np.pad(kernel, widths).reshape(*shape[:axis], -1, n, *shape[axis + 1 :])
            kernel = parts.sum(axis=axis)
    return kernel


def _most_repeats(taps: Sequence[int], options: _Options) -> int:
    """Return the squared norm of the padding at any size."""
    if options.mode in ("zeros", "circular"):
        return 1
    found = 1
    for axis, k in enumerate(taps):
        if isinstance(options.padding, str):
            before = after = ceil(options.dilation[axis] * (k - 1) / 2)
        else:
            before, after = options.padding[axis]
        if options.mode == "replicate":
            found *= 1 + before + after  # one sample is both ends
        else:
            found *= 1 + (before > 0) + (after > 0)
    return found
