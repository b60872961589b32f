"""The layout of a convolution whose norm is that of the map of images, not of its matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import pi, prod
from typing import Any, NamedTuple, TypeAlias
from warnings import warn

import numpy as np

from ._arrays import Array, array_namespace, is_complex
from ._layout import Layout, plan_of
from ._plan import Plan, Shape
from .errors import ArgumentError, DTypeError, SpectralWarning, check_int, listed, shown

FLATTENED, OPERATOR = "flattened", "operator"
"""The norms that ``norm`` can name: of a weight's matrix, and of a convolution as a map."""

WAVES = 14  # waves that are followed for each matrix

Host: TypeAlias = np.ndarray[Any, Any]

# The real roots of x^(d+1) = x + 1: multiples of their negative powers spread evenly over d axes.
_GOLDEN = {1: 1.618033988749895, 2: 1.324717957244746, 3: 1.2207440846057596}


@dataclass(frozen=True)
class Convolution(Layout):
    """The layout of a convolution whose norm is that of the map of images, not of the matrix.

    Parameters
    ----------
    axes, groups
        See `Layout`. For a transposed convolution exchange the letters o and i: its norm is that of
        the convolution that it transposes.
    stride, dilation : int or tuple of int
        Of the layer: one number, or one for each kernel axis.
    waves : int
        Number of waves to follow. More of them miss a peak less often, and cost more.

    Raises
    ------
    ArgumentError
        As `Layout`. Also if a number is less than 1, there are not one or as many numbers as kernel
        axes, or the layout does not have 1 to 3 kernel axes.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> weights = {"conv": np.array([[[1.0, -2.0, 1.0]]])}
    >>> state = sc.init(weights, layouts={"conv": sc.Convolution("oik")})
    >>> state = sc.iterate(weights, state, n_iter=20)
    >>> round(float(state.sigma["conv"]), 6)
    4.0
    """

    stride: Any = 1
    dilation: Any = 1
    waves: int = WAVES

    def __post_init__(self) -> None:
        super().__post_init__()
        count = sum(letter in "kdhw" for letter in self.axes)
        if not 1 <= count <= 3:
            raise ArgumentError(f"layout {self.axes!r} has {count} kernel axes, not 1 to 3")
        for name in ("stride", "dilation"):
            object.__setattr__(self, name, _each(getattr(self, name), count, name))
        object.__setattr__(self, "waves", check_int(self.waves, "waves"))


def _each(value: Any, count: int, name: str) -> tuple[int, ...]:
    """Return one number for each kernel axis."""
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    if len(numbers) != count:
        raise ArgumentError(f"{name} has {len(numbers)} numbers for {count} axes: {shown(value)}")
    return tuple(check_int(number, name) for number in numbers)


class Geometry(NamedTuple):
    """What a layer says of its convolution."""

    stride: Any = 1
    dilation: Any = 1
    transposed: bool = False


def check_norm(norm: str) -> str:
    """Return ``norm`` if it is a name of a norm, else raise `ArgumentError`."""
    if norm not in (FLATTENED, OPERATOR):
        raise ArgumentError(f"norm must be {FLATTENED!r} or {OPERATOR!r}, not {shown(norm)}")
    return norm


def with_operator_norm(
    layouts: Mapping[str, Layout], geometries: Mapping[str, Geometry]
) -> tuple[dict[str, Layout], list[str]]:
    """Return the layouts with a `Convolution` for each that has kernel axes.

    Also return the names of those whose stride nobody said: it is taken to be one. A layout that
    is a `Convolution` already stays as it is.
    """
    found, assumed = dict(layouts), []
    for name, layout in layouts.items():
        if isinstance(layout, Convolution) or not any(x in "kdhw" for x in layout.axes):
            continue
        geometry = geometries.get(name)
        if geometry is None:
            assumed.append(name)
            geometry = Geometry()
        axes = layout.axes
        if geometry.transposed:
            axes = axes.translate(str.maketrans("oi", "io"))
        found[name] = Convolution(axes, layout.groups, geometry.stride, geometry.dilation)
    return found, assumed


class Wave(NamedTuple):
    """What an iteration with waves must know of a kernel; hashable."""

    sizes: Shape  # of the kernel axes, in the order of `as_matrix`'s columns
    stride: Shape
    dilation: Shape
    waves: int

    def rows(self, plan: Plan) -> Shape:
        """Return the shape of the state's rows: amplitudes of each wave, then its frequency."""
        inputs = plan.matrix[-1] // prod(self.sizes)
        classes = len(host_taps(self).classes)
        return (*plan.stack, self.waves, 2 * classes * inputs + len(self.sizes))


def wave_of(layout: Layout, shape: Shape, name: str = "weight") -> Wave | None:
    """Return what waves need, or None where the norm is that of the flattened matrix.

    That is so for every other layout, and for a kernel that meets each sample once, such as 1 × 1.
    """
    if not isinstance(layout, Convolution):
        return None
    plan = plan_of(layout, shape, name)
    letters = "".join(letter for letter in layout.axes if letter not in "()")
    sizes = tuple(n for n, letter in zip(plan.split, letters, strict=True) if letter in "kdhw")
    wave = Wave(sizes, layout.stride, layout.dilation, layout.waves)
    return wave if len(host_taps(wave).steps) > 1 else None


class Taps(NamedTuple):
    """The places of T taps on d axes."""

    places: Any  # (T, d): p_t, in strides
    classes: Any  # (R, T): 1 where a tap is of a class
    steps: Any  # (D, d): the differences p_t' − p_t within classes
    pairs: Any  # (T·T, D): 1 for the pairs (t, t') of each difference
    leap: Any  # (d,): from a frequency that an explorer leaves to the next one


@lru_cache(maxsize=256)
def host_taps(wave: Wave) -> Taps:
    """Return the places of the taps in NumPy."""
    d = len(wave.sizes)
    taps = np.array([*product(*map(range, wave.sizes))]).reshape(-1, d)
    # Where the stride is one, dilation only renames the frequencies.
    taps = taps * np.where(np.array(wave.stride) > 1, wave.dilation, 1)
    places, residues = taps // wave.stride, taps % wave.stride
    kinds = np.unique(residues, axis=0)
    classes = (residues == kinds[:, None]).all(axis=-1)
    same = classes.T.astype(int) @ classes > 0
    differences = places[None] - places[:, None]
    steps = np.unique(differences[same], axis=0)
    pairs = (differences[:, :, None] == steps).all(axis=-1) & same[..., None]
    leap = 2 * pi * _GOLDEN[d] ** -np.arange(1.0, d + 1)
    return Taps(places, classes, steps, pairs.reshape(len(taps) ** 2, -1), leap)


def settled(layout: Layout, weight: Array, name: str) -> tuple[Layout, Wave | None]:
    """Return the layout that a state keeps, and what its waves need.

    A `Convolution` whose norm is that of its matrix becomes a plain layout.

    Raises
    ------
    DTypeError
        If a convolution is complex.
    """
    if not isinstance(layout, Convolution):
        return layout, None
    wave = wave_of(layout, tuple(weight.shape), name)
    if wave is None:
        return Layout(layout.axes, layout.groups), None
    if is_complex(weight, array_namespace(weight)):
        raise DTypeError(
            f"{name} is complex ({weight.dtype}): norm={OPERATOR!r} needs a real kernel"
        )
    return layout, wave


def tell_assumed(names: Sequence[str], layouts: Mapping[str, Layout], stacklevel: int = 3) -> None:
    """Warn of convolutions whose stride is taken to be one, with the line that settles it."""
    if names:
        first = names[0]
        warn(
            f"norm={OPERATOR!r} takes the stride of {listed(names)} to be 1. To say it: "
            f'layouts={{"{first}": Convolution("{layouts[first].axes}", stride=1)}}',
            SpectralWarning,
            stacklevel,
        )
