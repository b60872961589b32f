"""Measure one matrix: its norms with an interval, part of its spectrum, and what is wrong in it.

A small matrix is decoded and its bounds are proven. A large one is decoded tile by tile in each
product, so memory does not grow with it; its upper bound holds with a probability. All arithmetic
is in float64, which holds every stored number exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import frexp, inf, ldexp, nan
from typing import NamedTuple

import numpy as np

from .._certificate import (
    close_bounds,
    from_norms,
    scaled_down,
    scaled_up,
    times_power_of_two,
)
from .._interval import enclosure, ritz_values
from .._power import start_vector
from .entry import Stored

PROBABILITY = 1e-9  # that an upper bound of a large matrix is too small
STEPS = 32  # of Lanczos, each a product with W and one with Wᴴ
# Elements of a tile, 1 MB in float64: both products and the decoding find it in the cache, and the
# allocator reuses its memory instead of mapping new pages.
_TILE = 1 << 17
_KEPT = 24 * 2**20  # elements that are kept decoded, 192 MB
MOST_PROVEN = 2 * 10**8  # multiplications of a factorization
_EPS = 2.0**-52
_FAR = 200  # exponent of the largest element from which squares could leave float64


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


def measure(matrix: Stored, decode: Callable[[Stored], Stored], *, proven: bool = False) -> Numbers:
    """Measure a matrix of stored numbers.

    Parameters
    ----------
    matrix : array, shape (m, n)
        Stored numbers, often a map of a file.
    decode : callable
        Return a part of them as float64 or complex128.
    proven : bool
        True to prove the bounds of large matrices too, which needs m·n² multiplications and memory
        for the whole matrix in float64.

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
    found = (nan, nan, nan, "", nan)
    if not sums.nonfinite:
        found = (0.0, 0.0, 0.0, "proven", nan)
        if sums.largest > 0:
            m, n = tiles.shape
            small = m * n * n <= MOST_PROVEN
            found = _proven(tiles) if small or proven else _probable(tiles, sums)
    zeros = sums.zeros / max(1, matrix.size)
    return Numbers(
        *found, sums.frobenius, sums.largest, zeros, dead_rows, dead_columns, sums.nonfinite
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

    def __init__(self, matrix: Stored, decode: Callable[[Stored], Stored]) -> None:
        # σ of the transpose is the same, also without the conjugate.
        self._stored = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        self.shape = self._stored.shape
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
        for start in range(0, self.shape[0], self._rows):
            tile = self._decode(self._stored[start : start + self._rows])
            yield times_power_of_two(tile, -self.exponent) if self.exponent else tile

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
        """Return WᴴW·x."""
        found = np.zeros(self.shape[1], x.dtype)
        for tile in self:
            y = tile @ x
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
