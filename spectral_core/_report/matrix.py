"""Measure one matrix: its norms with an interval, part of its spectrum, and what is wrong in it.

A small matrix is decoded and its bounds are proven. A large one is decoded tile by tile in each
product, so memory does not grow with it; its upper bound holds with a probability. All arithmetic
is in float64, which holds every stored number exactly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import frexp, inf, ldexp, nan
from sys import float_info
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

from .._certificate import (
    close_bounds,
    from_norms,
    scaled_down,
    scaled_up,
    times_power_of_two,
)
from .._density import quadrature, smoothed
from .._interval import enclosure, ritz_values
from .._power import start_vector
from .entry import Stored
from .numbers import Widening

PROBABILITY = 1e-9  # that an upper bound of a large matrix is too small
STEPS = 32  # of Lanczos, each a product with W and one with Wᴴ
# Elements of a tile, 1 MB in float64: both products and the decoding find it in the cache, and the
# allocator reuses its memory instead of mapping new pages.
_TILE = 1 << 17
_KEPT = 24 * 2**20  # elements that are kept decoded, 192 MB
MOST_PROVEN = 2 * 10**8  # multiplications of a factorization
MOST_VALUES = 4 * 10**9  # multiplications up to which all singular values are computed
_MOST_DENSE = 2**23  # elements of it, of which the factorization has a few copies
_PROBES, _DENSITY_STEPS = 4, 64  # of the density of a larger matrix
# Threads share a product by parts of the rows. Their number is fixed, and their results are added
# in order, so that the last digits do not depend on the number of cores.
_PARTS = 16
_SERIAL = 2**20  # elements up to which threads cost more than they save
_EPS = 2.0**-52
_FAR = 200  # exponent of the largest element from which squares could leave float64


# All singular values in falling order, or "values" and the "density" there.
Spectrum: TypeAlias = tuple[float, ...] | dict[str, tuple[float, ...]]


class Numbers(NamedTuple):
    """What is measured of a matrix."""

    sigma: float
    lower: float
    upper: float
    method: str
    ratio: float
    frobenius: float
    largest: float
    zeros: float
    dead_rows: int
    dead_columns: int
    nonfinite: int
    spectrum: Spectrum | None = None

    @property
    def stable_rank(self) -> float:
        """‖W‖²/σ₁², or NaN for a zero matrix."""
        return (self.frobenius / self.sigma) ** 2 if self.sigma else nan


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


def measure(
    matrix: Matrix, decode: Decode, *, proven: bool = False, spectrum: bool = False
) -> Numbers:
    """Measure a matrix of stored numbers.

    Parameters
    ----------
    matrix : Matrix, shape (m, n)
        Stored numbers, often a map of a file.
    decode : callable
        Return a part of them as float64 or complex128.
    proven : bool
        True to prove the bounds of large matrices too, which needs m·n² multiplications and memory
        for the whole matrix in float64.
    spectrum : bool
        True for all singular values, or for the density of those of a large matrix.

    Returns
    -------
    Numbers
        ``ratio`` is σ₂/σ₁. For a large matrix, σ₁ and σ₂ are Ritz values: lower bounds, but for
        rounding.

    Examples
    --------
    >>> found = measure(np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), np.asarray)
    >>> round(found.sigma, 12), round(found.ratio, 12), found.frobenius, found.dead_rows
    (4.0, 0.75, 5.0, 1)
    """
    tiles = _Tiles(matrix, decode)
    sums = tiles.sums()
    wide = matrix.shape[0] < matrix.shape[1]
    dead_rows, dead_columns = sums.dead[::-1] if wide else sums.dead
    found = _interval(tiles, sums, proven=proven)
    zeros = sums.zeros / max(1, matrix.size)
    return Numbers(
        *found,
        sums.frobenius,
        sums.largest,
        zeros,
        dead_rows,
        dead_columns,
        sums.nonfinite,
        _spectrum(tiles, sums) if spectrum and not sums.nonfinite else None,
    )


@dataclass
class _Sums:
    """Sums over a matrix with at least as many rows as columns."""

    largest: float
    frobenius: float
    product: float  # of the largest sum over a row and over a column
    zeros: int
    nonfinite: int
    dead: tuple[int, int]  # rows, columns that are zero


class _Tiles:
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

    def _decoded(self) -> Iterator[Stored]:
        return map(self._tile, range(0, self.shape[0], self._rows))

    def _tile(self, start: int, decode: Decode | None = None) -> Stored:
        tile = (decode or self._decode)(self._stored[start : start + self._rows])
        return times_power_of_two(tile, -self.exponent) if self.exponent else tile

    def _parts(self) -> list[range]:
        """Return the first rows of all tiles, in parts that threads can share."""
        starts = range(0, self.shape[0], self._rows)
        cuts = [len(starts) * i // _PARTS for i in range(_PARTS + 1)]
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

    def whole(self) -> Stored:
        """Return the matrix in memory."""
        return np.concatenate(list(self), axis=0)

    def gram(self, x: Stored) -> Stored:
        """Return WᴴW·x, or that of each row of x. NumPy releases the lock of Python in it."""
        if self._stored.size <= _SERIAL:
            return self._gram(iter(self), x)
        with ThreadPoolExecutor(_cores()) as pool:
            found = list(pool.map(lambda starts: self._part(starts, x), self._parts()))
        return np.sum(found, axis=0)

    def _gram(self, tiles: Iterator[Stored], x: Stored) -> Stored:
        found = np.zeros(x.shape, x.dtype)
        for tile in tiles:
            y = (tile @ x.T).T
            found += (y.conj() @ tile).conj() if y.dtype.kind == "c" else y @ tile
        return found

    def sums(self) -> _Sums:
        """Return sums of absolute values, and count what is zero and what is not finite."""
        columns = np.zeros(self.shape[1])
        longest = largest = 0.0
        lengths = []
        zeros = nonfinite = dead = 0
        for tile in self:
            size = np.abs(tile)
            rows = size.sum(axis=1)
            if not np.isfinite(rows).all():
                nonfinite += int(size.size - np.isfinite(tile).sum())
            zeros += int(size.size - np.count_nonzero(size))
            dead += int((rows == 0).sum())
            columns += size.sum(axis=0)
            longest, largest = max(longest, float(rows.max())), max(largest, float(size.max()))
            lengths.append(_length(size))
        self.scale(largest)
        return _Sums(
            largest,
            nan if nonfinite else _length(np.array(lengths)),
            self._scaled(longest)
            * self._scaled(float(columns.max()))
            * (1 + 8 * sum(self.shape) * _EPS),
            zeros,
            nonfinite,
            (dead, int((columns == 0).sum())),
        )


def _cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return min(_PARTS, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on every system
        return min(_PARTS, os.cpu_count() or 1)


def _length(size: Stored) -> float:
    """Return the root of the sum of squares, also where a square would overflow."""
    largest = float(size.max())
    if not 0 < largest < inf:
        return largest
    if 2.0**-_FAR < largest < 2.0**_FAR:
        return _root_of_squares(size)
    return largest * _root_of_squares(size / largest)


def _root_of_squares(size: Stored) -> float:
    # np.linalg.norm starts threads of BLAS for each small tile, which costs more than the sum.
    flat = size.reshape(-1)
    return float(np.einsum("i,i->", flat, flat)) ** 0.5


def _interval(
    tiles: _Tiles, sums: _Sums, *, proven: bool
) -> tuple[float, float, float, str, float]:
    """Return σ₁, its bounds, how they are known, and σ₂/σ₁."""
    if sums.nonfinite:
        return nan, nan, nan, "", nan
    if sums.largest == 0:
        return 0.0, 0.0, 0.0, "proven", nan
    if sums.largest == inf:  # the absolute value of a complex number, and so σ₁, is beyond float64
        return inf, float_info.max, inf, "proven", nan
    m, n = tiles.shape
    small = m * n * n <= MOST_PROVEN
    return _proven(tiles) if small or proven else _probable(tiles, sums)


def _proven(tiles: _Tiles) -> tuple[float, float, float, str, float]:
    W = tiles.whole()
    exponent = frexp(float(np.abs(W).max()))[1] - 1
    W = times_power_of_two(W, -exponent)
    cheap, spectra = from_norms(W, 0.0, np), []

    def first_vector(gram: Stored) -> list[Stored]:
        values, vectors = np.linalg.eigh(gram)
        spectra.append(values)
        return [vectors[:, -1]]

    close = close_bounds(W, cheap.upper, first_vector)
    (values,) = spectra
    exponent += tiles.exponent
    lower = scaled_down(max(cheap.lower, close.lower), exponent)
    upper = scaled_up(min(cheap.upper, close.upper), exponent)
    sigma = min(max(scaled_up(max(float(values[-1]), 0.0) ** 0.5, exponent), lower), upper)
    return sigma, lower, upper, "proven", _ratio(values)


def _probable(tiles: _Tiles, sums: _Sums) -> tuple[float, float, float, str, float]:
    m, n = tiles.shape
    like = next(iter(tiles))
    steps = min(STEPS, n)
    start = start_vector((n,), like, seed=0)
    values = ritz_values(tiles.gram, start, steps, np)
    lower, upper = enclosure(
        float(values[-1]),
        steps,
        (m, n),
        sums.product,
        PROBABILITY,
        _EPS,
        is_complex=like.dtype.kind == "c",
    )
    exponent = tiles.exponent
    sigma = scaled_up(float(values[-1]) ** 0.5, exponent)
    bounded = scaled_down(lower, exponent), scaled_up(upper, exponent)
    return sigma, *bounded, f"p = {PROBABILITY:.0e}", _ratio(values)


def _ratio(values: Stored) -> float:
    """Return σ₂/σ₁ from eigenvalues in rising order, or NaN where there is no second one."""
    if len(values) < 2:
        return nan
    return float((max(float(values[-2]), 0.0) / float(values[-1])) ** 0.5)


def _spectrum(tiles: _Tiles, sums: _Sums) -> Spectrum | None:
    """Return all singular values, or the density of those of a large matrix.

    None where a value is beyond float64, as the norm is then.
    """
    m, n = tiles.shape
    if sums.largest == 0:
        return (0.0,) * n
    if sums.largest == inf:
        return None
    if m * n * n <= MOST_VALUES and m * n <= _MOST_DENSE:
        values: Stored = np.linalg.svd(tiles.whole(), compute_uv=False)
        found = tuple(scaled_up(float(value), tiles.exponent) for value in values)
        return found if found[0] < inf else None
    like = next(iter(tiles))
    starts = start_vector((_PROBES, n), like, seed=0, name="density")
    steps = min(_DENSITY_STEPS, n)
    grid, density = smoothed(*quadrature(tiles.gram, starts, steps, np), steps)
    places = tuple(scaled_up(float(x), tiles.exponent) for x in grid)
    shares = tuple(scaled_up(float(x), -tiles.exponent) for x in density)
    if max(*places, *shares) == inf:
        return None
    return {"values": places, "density": shares}
