"""Bound the norms of PyTorch's linear maps, and form their matrices for small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, gcd, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import spectral_core as sc
from spectral_core.engine import Inexact, widened

UNIT = 2.0**-53

Fn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Matrix:
    """The map x ↦ xWᵀ on the last axis."""

    weight: Tensor  # float64 on the CPU
    kind: str = "Linear"
    roundings: int = 0

    def bounds(self) -> tuple[float, float]:
        """Return a lower and an upper bound of the norm."""
        W = self.weight.numpy()
        lower, upper, _ = sc.bounds(W)
        return widened(float(lower), float(upper), W, self.roundings)

    def folded(self, scale: Tensor) -> Matrix:
        """Return the map with its outputs multiplied by a scale."""
        return replace(
            self, weight=self.weight * scale[:, None], kind=f"{self.kind} + BatchNorm", roundings=8
        )

    def dense(self, shape: Sequence[int]) -> Inexact:
        """Return the matrix for samples of a shape."""
        exact = dense(lambda x: functional.linear(x, self.weight), shape).matrix
        return Inexact(exact, self.roundings * UNIT * 1.01 * float(np.linalg.norm(exact)))


@dataclass(frozen=True)
class Convolution:
    """A convolution or a transposed one, with zeros around the image or a circular image."""

    weight: Tensor  # float64 on the CPU
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    circular: tuple[tuple[int, int], ...] | None = None  # samples repeated at both ends
    sizes: tuple[int, ...] = ()  # of the image, where it is circular
    tol: float = 1e-6
    roundings: int = 0
    kind: str = "Conv"

    def bounds(self) -> tuple[float, float]:
        """Return bounds of the norm: for every size of image, unless that is circular."""
        axes = "k" * (self.weight.ndim - 2)
        if self.transposed:
            layout = sc.Layout(("(gi)o" if self.groups > 1 else "io") + axes, self.groups)
        else:
            layout = sc.Layout(("(go)i" if self.groups > 1 else "oi") + axes, self.groups)
        options: dict[str, Any] = {"stride": self.stride, "dilation": self.dilation}
        if self.transposed:
            options |= {"padding": 0, "transposed": True}
        if self.circular is not None:
            options |= {"padding": self.circular, "padding_mode": "circular", "size": self.sizes}
        W = self.weight.numpy()
        lower, upper, _ = sc.convolution_norm(W, layout, tol=self.tol, **options)
        return widened(lower, upper, W, self.roundings)

    def folded(self, scale: Tensor) -> Convolution:
        """Return the map with its output channels multiplied by a scale."""
        W, ones = self.weight, (1,) * (self.weight.ndim - 2)
        if self.transposed:
            split = W.reshape(self.groups, -1, *W.shape[1:])
            new = (split * scale.reshape(self.groups, 1, -1, *ones)).reshape(W.shape)
        else:
            new = W * scale.reshape(-1, 1, *ones)
        return replace(self, weight=new, kind=f"{self.kind} + BatchNorm", roundings=8)

    def dense(self, shape: Sequence[int]) -> Inexact:
        """Return the matrix for images of a shape (channels, sizes…)."""
        n = self.weight.ndim - 2
        name = f"conv_transpose{n}d" if self.transposed else f"conv{n}d"
        options = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        options["padding"] = self.padding
        if self.transposed:
            options["output_padding"] = self.output_padding
        widths = [w for pair in reversed(self.circular or ()) for w in pair]

        def apply(x: Tensor) -> Tensor:
            x = functional.pad(x, widths, mode="circular") if widths else x
            y: Tensor = getattr(functional, name)(x, self.weight, **options)
            return y

        found = dense(apply, shape).matrix
        # An element is a sum of a few weights where padding repeats samples.
        taps, places = prod(self.weight.shape[2:]), max(found.shape)
        size = float(np.linalg.norm(self.weight.numpy()))
        error = (taps + self.roundings + 2) * UNIT * 1.01 * (taps * places) ** 0.5 * size
        return Inexact(found, error)


def dense(apply: Fn, shape: Sequence[int]) -> Inexact:
    """Return the matrix of a linear map of samples, each element of which is rounded once."""
    n = prod(shape)
    # A batch of basis vectors; its adjoint is the matrix.
    found = apply(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).reshape(n, -1).T.numpy()
    return Inexact(np.ascontiguousarray(found), 8 * UNIT * float(np.linalg.norm(found)))


def by_axis(maps: Sequence[tuple[Fn, int]]) -> tuple[float, float]:
    """Return the bounds of a map that acts on each axis alone: (one axis' map, size) each.

    A map acts on images of one channel and one axis, (n, 1, size).
    """
    lower = upper = 1.0
    for apply, size in maps:
        found = dense(apply, (1, size))
        low, high, _ = sc.bounds(found.matrix)
        lower *= max(0.0, float(low) - found.error)
        upper *= (float(high) + found.error) * (1 + 4 * UNIT)
    return lower, upper


def overlaps(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], outputs: Sequence[int]
) -> int:
    """Return in how many windows of a pooling one sample can be."""
    each = zip(kernel, stride, dilation, outputs, strict=True)
    return prod(min(ceil(k / (s // gcd(s, d))), m) for k, s, d, m in each)


def adaptive_overlaps(sizes: Sequence[int], outputs: Sequence[int]) -> int:
    """Return the same for windows from ⌊i·n/m⌋ to ⌈(i + 1)·n/m⌉."""
    found = 1
    for n, m in zip(sizes, outputs, strict=True):
        count = np.zeros(n, int)
        for i in range(m):
            count[i * n // m : -(-(i + 1) * n // m)] += 1
        found *= int(count.max())
    return found


def widened_matrix(W: Tensor) -> Matrix:
    """Return a matrix as a map, in float64 on the CPU."""
    return Matrix(exact(W))


def exact(x: Tensor) -> Tensor:
    """Return a tensor in float64 on the CPU."""
    return x.detach().to("cpu", torch.float64)
