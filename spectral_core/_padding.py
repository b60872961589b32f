"""Apply a convolution and its adjoint to an image of a given size, whatever its padding.

Padding is a linear map: each axis repeats some samples, and zeros are samples of none. Such a map
has the norm √(largest number of times that a sample is repeated), axis by axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from ._certificate import Host

MODES = ("zeros", "circular", "reflect", "replicate")


class Axis(NamedTuple):
    """One axis of a convolution: where each padded sample comes from, and how the kernel steps."""

    sources: Host  # (padded size,): the index of a sample, or −1 for a zero
    size: int
    stride: int
    dilation: int
    outputs: int


def sources(size: int, before: int, after: int, mode: str) -> Host:
    """Return the sample that each padded place repeats, or −1 for a zero."""
    places = np.arange(-before, size + after)
    inside = (places >= 0) & (places < size)
    if mode == "zeros":
        return np.where(inside, places, -1)
    if mode == "circular":
        return places % size
    if mode == "replicate":
        return np.clip(places, 0, size - 1)
    # A reflection leaves out the edge. Frameworks refuse more than one reflection.
    period = 2 * (size - 1)
    return np.where(inside, places, np.minimum(places % period, -places % period))


def repeats(axis: Axis) -> int:
    """Return how often the most repeated sample of an axis occurs."""
    found = axis.sources[axis.sources >= 0]
    return int(np.bincount(found).max()) if found.size else 1


class Operator:
    """A convolution on images of a given size, in float64 or complex128; both are flat vectors.

    Parameters
    ----------
    kernel : array, shape (g, o, i, k_1, …, k_d)
    axes : sequence of Axis
    """

    def __init__(self, kernel: Host, axes: Sequence[Axis]) -> None:
        self._taps = [*product(*map(range, kernel.shape[3:]))]
        flat = kernel.reshape(*kernel.shape[:3], -1)
        self._kernel = np.ascontiguousarray(np.moveaxis(flat, -1, 0))  # (taps, g, o, i)
        self._axes = axes
        groups, outputs, inputs = kernel.shape[:3]
        self.inputs = (groups, inputs, *(axis.size for axis in axes))
        self.outputs = (groups, outputs, *(axis.outputs for axis in axes))
        self._padded = (groups, inputs, *(len(axis.sources) for axis in axes))

    def times(self, x: Host) -> Host:
        """Return the convolution of an image."""
        padded = x.reshape(self.inputs)
        for place, axis in enumerate(self._axes, 2):
            padded = np.take(padded, axis.sources, place)
            np.moveaxis(padded, place, 0)[axis.sources < 0] = 0
        y = np.zeros((*self.outputs[:2], prod(self.outputs[2:])), self._kernel.dtype)
        for tap, matrix in zip(self._taps, self._kernel, strict=True):
            y += matrix @ padded[self._window(tap)].reshape(*self.inputs[:2], -1)
        return y.reshape(-1)

    def adjoint_times(self, y: Host) -> Host:
        """Return the image that the adjoint makes of ``y``."""
        rows = y.reshape(*self.outputs[:2], -1)
        padded = np.zeros(self._padded, self._kernel.dtype)
        for tap, matrix in zip(self._taps, self._kernel, strict=True):
            part = matrix.conj().swapaxes(-1, -2) @ rows
            padded[self._window(tap)] += part.reshape(*self.inputs[:2], *self.outputs[2:])
        for place, axis in enumerate(self._axes, 2):
            padded = _gathered(padded, axis, place)
        return padded.reshape(-1)

    def _window(self, tap: Sequence[int]) -> tuple[slice, ...]:
        """Return the padded samples that a tap of the kernel meets."""
        found = [slice(None), slice(None)]
        for t, axis in zip(tap, self._axes, strict=True):
            start = t * axis.dilation
            found.append(slice(start, start + axis.stride * (axis.outputs - 1) + 1, axis.stride))
        return tuple(found)


def _gathered(padded: Host, axis: Axis, place: int) -> Host:
    """Add each padded sample of an axis to the one that it repeats."""
    moved = np.moveaxis(padded, place, 0)
    found = np.zeros((axis.size, *moved.shape[1:]), padded.dtype)
    kept = axis.sources >= 0
    np.add.at(found, axis.sources[kept], moved[kept])
    return np.moveaxis(found, 0, place)
