"""Bound the norms of JAX's linear maps whose other operand is a constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, gcd, prod
from typing import Any, NamedTuple

import numpy as np

import spectral_core as sc
from spectral_core.engine import Inexact, widened

UNIT = 2.0**-53

Host = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Matrix:
    """The product with a matrix for each entry of a stack, (stack, outputs, inputs)."""

    weight: Host
    channel: int | None  # axis of the result that the outputs are, if it is one
    rows: int = 1  # of a sample, each of which meets the matrix
    kind: str = "dot_general"
    roundings: int = 0

    def bounds(self, tol: float) -> tuple[float, float]:  # noqa: ARG002
        """Return a lower and an upper bound of the norm."""
        lower, upper, _ = sc.bounds(self.weight, layout="soi")
        largest = float(np.max(lower)), float(np.max(upper))
        return widened(*largest, self.weight, self.roundings)

    def scaled(self, factor: Host) -> Matrix:
        """Return the map with its outputs multiplied by factors."""
        return replace(self, weight=self.weight * factor[:, None], roundings=self.roundings + 1)

    def dense(self) -> Inexact:
        """Return the matrix for one sample, whose last axis is multiplied."""
        found = np.kron(np.eye(self.rows), self.weight[0])
        error = self.roundings * UNIT * 1.01 * float(np.linalg.norm(found))
        return Inexact(found, error)


class Images(NamedTuple):
    """What a convolution does to images of one size."""

    sizes: tuple[int, ...]
    outputs: tuple[int, ...]  # sizes
    padding: tuple[tuple[int, int], ...]
    axes: tuple[int, ...]  # of a sample: its channels and sizes, in the array's order
    output_axes: tuple[int, ...]


@dataclass(frozen=True)
class Convolution:
    """A convolution with a kernel (outputs, inputs of a group, taps…), or a transposed one."""

    weight: Host
    channel: int | None
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    spread: tuple[int, ...]  # zeros between the samples: of a transposed convolution
    images: Images
    kind: str = "conv_general_dilated"
    roundings: int = 0

    def bounds(self, tol: float) -> tuple[float, float]:
        """Return bounds of the norm for every size of image."""
        axes = "k" * (self.weight.ndim - 2)
        layout = sc.Layout(("(go)i" if self.groups > 1 else "oi") + axes, self.groups)
        stride = self.stride
        if max(self.spread) > 1 and max(stride) == 1:
            # The adjoint of a convolution with that stride; its taps in the other order have the
            # same norm.
            layout = sc.Layout(("(gi)o" if self.groups > 1 else "io") + axes, self.groups)
            stride = self.spread
        lower, upper, _ = sc.convolution_norm(
            self.weight, layout, stride=stride, dilation=self.dilation, tol=tol
        )
        if max(self.spread) > 1 and max(self.stride) > 1:
            lower = 0.0  # to put zeros between the samples only makes the norm smaller
        return widened(lower, upper, self.weight, self.roundings)

    def scaled(self, factor: Host) -> Convolution:
        """Return the map with its output channels multiplied by factors."""
        shape = (-1, *[1] * (self.weight.ndim - 1))
        return replace(
            self, weight=self.weight * factor.reshape(shape), roundings=self.roundings + 1
        )

    def dense(self) -> Inexact:
        """Return the matrix for one sample: each element is zero or one of the kernel's."""
        images, groups = self.images, self.groups
        outputs, inputs, *taps = self.weight.shape
        found = np.zeros((outputs, prod(images.outputs), inputs * groups, prod(images.sizes)))
        for place in product(*map(range, taps)):
            there, here = self._meetings(place)
            for rows, columns in zip(
                np.split(np.arange(outputs), groups),
                np.split(np.arange(inputs * groups), groups),
                strict=True,
            ):
                where: Any = rows, slice(None), *place
                block = self.weight[where]
                found[rows[:, None, None], there, columns[:, None], here] = block[..., None]
        sizes = (outputs, *images.outputs), (inputs * groups, *images.sizes)
        axes = *images.output_axes, *(len(sizes[0]) + axis for axis in images.axes)
        found = found.reshape(*sizes[0], *sizes[1]).transpose(axes)
        found = found.reshape(prod(sizes[0]), prod(sizes[1]))
        return Inexact(found, self.roundings * UNIT * 1.01 * float(np.linalg.norm(found)))

    def _meetings(self, tap: Sequence[int]) -> tuple[Host, Host]:
        """Return the outputs to which a tap brings a sample, and these samples, as flat indices."""
        images, each = self.images, []
        for axis, t in enumerate(tap):
            there = np.arange(images.outputs[axis])
            here = there * self.stride[axis] + t * self.dilation[axis] - images.padding[axis][0]
            sample, between = np.divmod(here, self.spread[axis])
            meets = (between == 0) & (sample >= 0) & (sample < images.sizes[axis])
            each.append((there[meets], sample[meets]))
        outputs, samples = (
            tuple(np.meshgrid(*some, indexing="ij")) for some in zip(*each, strict=True)
        )
        return (
            np.ravel_multi_index(outputs, images.outputs).reshape(-1),
            np.ravel_multi_index(samples, images.sizes).reshape(-1),
        )


Map = Matrix | Convolution


def overlaps(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> int:
    """Return in how many windows one sample can be."""
    each = zip(kernel, stride, dilation, strict=True)
    return prod(ceil(k / (s // gcd(s, d))) for k, s, d in each)


def window_sums(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[float, float]:
    """Return bounds of the norm of sums over windows, axis by axis."""
    upper = 1.0
    for k, s, d in zip(kernel, stride, dilation, strict=True):
        if k > 1:
            found = sc.convolution_norm(np.ones((1, 1, k)), "oik", stride=s, dilation=d, tol=1e-9)
            upper *= found.upper * (1 + 4 * UNIT)
    return 0.0, upper
