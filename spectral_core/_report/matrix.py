"""Measure one matrix: its norms with an interval, part of its spectrum, and what is wrong in it.

A small matrix is decoded and its bounds are proven. A large one is decoded tile by tile in each
product, so memory does not grow with it; its upper bound holds with a probability. All arithmetic
is in float64, which holds every stored number exactly.
"""

from __future__ import annotations

from math import frexp, inf, nan
from sys import float_info
from typing import NamedTuple, TypeAlias

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
from .compiled import tiles_of
from .entry import Stored
from .tiling import Decode, Matrix, Sums, Tiles

PROBABILITY = 1e-9  # that an upper bound of a large matrix is too small
STEPS = 32  # of Lanczos, each a product with W and one with Wᴴ
MOST_PROVEN = 2 * 10**8  # multiplications of a factorization
MOST_VALUES = 4 * 10**9  # multiplications up to which all singular values are computed
_MOST_DENSE = 2**23  # elements of it, of which the factorization has a few copies
_PROBES, _DENSITY_STEPS = 4, 64  # of the density of a larger matrix
_EPS = 2.0**-52


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


def measure(
    matrix: Matrix,
    decode: Decode,
    *,
    proven: bool = False,
    spectrum: bool = False,
    compiled: bool = False,
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
    compiled : bool
        True to use Numba where it is installed and knows the stored numbers. The last digits may
        differ.

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
    tiles = tiles_of(matrix, decode, compiled=compiled)
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


def _interval(tiles: Tiles, sums: Sums, *, proven: bool) -> tuple[float, float, float, str, float]:
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


def _proven(tiles: Tiles) -> tuple[float, float, float, str, float]:
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


def _probable(tiles: Tiles, sums: Sums) -> tuple[float, float, float, str, float]:
    m, n = tiles.shape
    like = tiles.first()
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


def _spectrum(tiles: Tiles, sums: Sums) -> Spectrum | None:
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
    like = tiles.first()
    starts = start_vector((_PROBES, n), like, seed=0, name="density")
    steps = min(_DENSITY_STEPS, n)
    grid, density = smoothed(*quadrature(tiles.gram, starts, steps, np), steps)
    places = tuple(scaled_up(float(x), tiles.exponent) for x in grid)
    shares = tuple(scaled_up(float(x), -tiles.exponent) for x in density)
    if max(*places, *shares) == inf:
        return None
    return {"values": places, "density": shares}
