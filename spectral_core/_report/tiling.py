"""Multiply by WᴴW, and sum over the matrix, tile by tile in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import frexp, inf, ldexp, nan
from typing import Any, Protocol

import numpy as np

from .._certificate import times_power_of_two
from .entry import Stored
from .numbers import Widening

# Elements of a tile, 1 MB in float64: both products and the decoding find it in the cache, and the
# allocator reuses its memory instead of mapping new pages.
_TILE = 1 << 17
_KEPT = 24 * 2**20  # elements that are kept decoded, 192 MB
# Threads share a product by parts of the rows. Their number is fixed, and their results are added
# in order, so that the last digits do not depend on the number of cores.
PARTS = 16
SERIAL = 2**20  # elements up to which threads cost more than they save
_EPS = 2.0**-52
_FAR = 200  # exponent of the largest element from which squares could leave float64


class Matrix(Protocol):
    """What is measured: an array, or what has its shape, its transpose and parts of its rows."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def size(self) -> int: ...

    @property
    def T(self) -> Any: ...  # noqa: N802

    def __getitem__(self, rows: Any, /) -> Any: ...


Decode = Callable[[Any], Stored]


@dataclass
class Sums:
    """Sums over a matrix with at least as many rows as columns."""

    largest: float
    frobenius: float
    product: float  # of the largest sum over a row and over a column
    zeros: int
    nonfinite: int
    dead: tuple[int, int]  # rows, columns that are zero


class Tiles:
    """A matrix as tiles of rows in float64, turned so that it has as many rows as columns or more.

    Each tile is multiplied by both products of WᴴW while it is in the cache.
    """

    def __init__(self, matrix: Matrix, decode: Decode) -> None:
        # σ of the transpose is the same, also without the conjugate.
        self._stored = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        self.shape = (int(self._stored.shape[0]), int(self._stored.shape[1]))
        self._decode = decode
        self._rows = max(1, _TILE // self.shape[1])
        self._kept: list[Stored] | None = None
        self.exponent = 0

    def __iter__(self) -> Iterator[Stored]:
        if self._kept is not None:
            return iter(self._kept)
        if self._stored.size > _KEPT:
            return self._decoded()
        self._kept = list(self._decoded())
        return iter(self._kept)

    def first(self) -> Stored:
        """Return the first tile."""
        return self._tile(0)

    def _decoded(self) -> Iterator[Stored]:
        return map(self._tile, range(0, self.shape[0], self._rows))

    def _tile(self, start: int, decode: Decode | None = None) -> Stored:
        tile = (decode or self._decode)(self._stored[start : start + self._rows])
        return times_power_of_two(tile, -self.exponent) if self.exponent else tile

    def _parts(self) -> list[range]:
        """Return the first rows of all tiles, in parts that threads can share."""
        starts = range(0, self.shape[0], self._rows)
        cuts = [len(starts) * i // PARTS for i in range(PARTS + 1)]
        return [starts[a:b] for a, b in pairwise(cuts)]

    def _part(self, starts: range, x: Stored) -> Stored:
        """Return what some tiles add to a product. Each tile replaces the one before."""
        if self._kept is not None:
            return self._gram((self._kept[start // self._rows] for start in starts), x)
        if not isinstance(self._decode, Widening):
            return self._gram(map(self._tile, starts), x)
        with self._decode.reused() as decode:
            return self._gram((self._tile(start, decode) for start in starts), x)

    def scale(self, largest: float) -> None:
        """Scale by a power of two where squares would leave the range of float64."""
        exponent = frexp(largest)[1] - 1
        if abs(exponent) > _FAR:
            self.exponent, self._kept = exponent, None

    def _scaled(self, value: float) -> float:
        return ldexp(value, -self.exponent) if self.exponent else value

    def _product(self, row: float, column: float) -> float:
        """Return the product of the largest sum over a row and over a column, or a little more."""
        return self._scaled(row) * self._scaled(column) * (1 + 8 * sum(self.shape) * _EPS)

    def whole(self) -> Stored:
        """Return the matrix in memory."""
        return np.concatenate(list(self), axis=0)

    def gram(self, x: Stored) -> Stored:
        """Return WᴴW·x, or that of each row of x. NumPy releases the lock of Python in it."""
        if self._stored.size <= SERIAL:
            return self._gram(iter(self), x)
        with ThreadPoolExecutor(cores()) as pool:
            found = list(pool.map(lambda starts: self._part(starts, x), self._parts()))
        return np.sum(found, axis=0)

    def _gram(self, tiles: Iterator[Stored], x: Stored) -> Stored:
        found = np.zeros(x.shape, x.dtype)
        for tile in tiles:
            y = (tile @ x.T).T
            found += (y.conj() @ tile).conj() if y.dtype.kind == "c" else y @ tile
        return found

    def sums(self) -> Sums:
        """Return sums of absolute values, and count what is zero and what is not finite."""
        columns = np.zeros(self.shape[1])
        longest = largest = 0.0
        lengths = []
        zeros = nonfinite = dead = 0
        for tile in self:
            size = np.abs(tile)
            rows = size.sum(axis=1)
            top = size.max()
            if not np.isfinite(rows).all():
                nonfinite += int(size.size - np.isfinite(tile).sum())
                top = np.fmax.reduce(size, axis=None)  # of the others than NaN
            zeros += int(size.size - np.count_nonzero(size))
            dead += int((rows == 0).sum())
            columns += size.sum(axis=0)
            longest, largest = max(longest, float(rows.max())), max(largest, float(top))
            lengths.append(_length(size))
        self.scale(largest)
        return Sums(
            largest,
            nan if nonfinite else _length(np.array(lengths)),
            self._product(longest, float(columns.max())),
            zeros,
            nonfinite,
            (dead, int((columns == 0).sum())),
        )


def cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return min(PARTS, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on every system
        return min(PARTS, os.cpu_count() or 1)


def squares_fit(largest: float) -> bool:
    """Return True if the squares of numbers up to the largest stay in the range of float64."""
    return 2.0**-_FAR < largest < 2.0**_FAR


def _length(size: Stored) -> float:
    """Return the root of the sum of squares, also where a square would overflow."""
    largest = float(size.max())
    if not 0 < largest < inf:
        return largest
    if squares_fit(largest):
        return _root_of_squares(size)
    return largest * _root_of_squares(size / largest)


def _root_of_squares(size: Stored) -> float:
    # np.linalg.norm starts threads of BLAS for each small tile, which costs more than the sum.
    flat = size.reshape(-1)
    return float(np.einsum("i,i->", flat, flat)) ** 0.5
