"""Bound the largest singular value of a convolution's symbol over all frequencies.

The symbol is K̂(ω) = Σ_t K_t·exp(−iω·t), a matrix for each frequency ω. Its largest singular value
over all ω is the norm of the convolution on an infinite grid; over the n-point grid of frequencies
it is the norm with circular padding at size n. Both are found by branch and bound over cells of
frequencies, and proven:

- A lower bound is ‖K̂(ω)ᴴa‖/‖a‖, for any ω and a.
- Let M be the largest |aᴴK̂(ω)b| for two vectors, and n_j = (k_j − 1)/2. If it is M·cos α at ω,
  then it is M·cos(α + Σ n_j·|d_j|) or more at ω + d (Duffin and Schaeffer 1938: along a line it has
  the exponential type of that sum). At the maximum, α is zero. So the centre c of the cell that
  holds it has σ₁(K̂(c)) ≥ cos(Σ n_j·h_j)·M, with the cell's half-widths h_j.
- A grid misses the maximum. But a grid of N_j points an axis has a point where |aᴴK̂(ω)b| is
  ∏cos(n_j·π/N_j)·M or more (Pfister and Bresler 2018). There α is at most A = √(Σ (n_j·π/N_j)²),
  and the centre of the best point's cell has the share cos(A + Σ n_j·h_j)/cos A of it or more.
- So a cell whose centre has less than that share of lower·(1 + tol) does not hold a maximum that is
  larger than lower·(1 + tol): it is dropped. Any other cell is split.
- The test of a centre is a Cholesky factorization, which needs no eigenvalue.

Why the Gram matrix is a polynomial: K̂K̂ᴴ = Σ_d R_d·exp(−iω·d) with R_d = Σ_t K_{t+d}K_tᴴ. The R_d
are computed once. A frequency then costs c² operations for each d, not a product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import pi
from typing import Any, NamedTuple

import numpy as np

from ._certificate import Host, gamma, is_proven_below, narrowed

_UNIT = 2.0**-53
_CHUNK = 2**21  # elements of the Gram matrices that are tested together
_SLICE = 2**13  # elements of each of them that are computed together: they fit a cache
_PEAKS = 4  # cells from which a maximum is searched
_CLIMB = 10  # steps of such a search at most
_CLOSE = 2e-3  # relative distance from the limit that is more than the rounding of float32
_KRYLOV = 6  # dimensions of the spaces that estimate an eigenvalue
_WIDEST = pi / 4  # of n_j·h_j in the first cells: the cosine of one axis is 0.7


class Peak(NamedTuple):
    """A frequency and a unit vector ``a``: the largest singular value is at least ``lower``."""

    lower: float
    group: int
    frequency: Host  # (d,)
    vector: Host  # (c,)


class Supremum(NamedTuple):
    """Proven bounds of the largest singular value over the frequencies."""

    lower: float
    upper: float
    peak: Peak


class Symbol:
    """The symbol of a convolution, one for each group.

    Parameters
    ----------
    kernel : array, shape (g, o, i, k_1, …, k_d)
        In float64 or complex128.
    """

    def __init__(self, kernel: Host) -> None:
        kernel = _trimmed(kernel)
        if kernel.shape[1] > kernel.shape[2]:  # the transposed matrix has the same singular values
            kernel = kernel.swapaxes(1, 2)
        self.sizes = kernel.shape[3:]
        self.places = np.array([*product(*map(range, self.sizes))], float).reshape(
            -1, kernel.ndim - 3
        )
        self.taps = np.ascontiguousarray(np.moveaxis(kernel.reshape(*kernel.shape[:3], -1), -1, 1))
        self.is_real = not np.iscomplexobj(kernel)
        self.groups, self.rows = kernel.shape[:2]
        self._differences, R = _autocorrelation(self.taps, self.places)
        # R·exp(−iθ) and its adjoint together are cos θ·(R + Rᴴ) + i·sin θ·(Rᴴ − R).
        adjoint = R.conj().swapaxes(-1, -2)
        self._even = (R + adjoint).reshape(*R.shape[:2], -1)
        self._odd = (adjoint - R).reshape(*R.shape[:2], -1)
        # What rounding may change, in a symbol and in its Gram matrix, relative to sums of absolute
        # values: of the products, and of the angles ω·t.
        absolute = np.abs(self.taps).sum(axis=1)
        sums = absolute.sum(axis=2).max(axis=1) * absolute.sum(axis=1).max(axis=1)
        terms = len(self.places) * (kernel.shape[2] + 2) + 2 * len(self._differences) + 16
        # An angle of up to 2π a sample has six roundings at most: of π, of a frequency, of sums.
        angle = 16 * pi * sum(self.sizes) * _UNIT
        rate = gamma(terms, self.taps) + 4 * gamma(4, self.taps) + angle
        self.rounding = rate * sums
        # A vector's product with the symbol is one of complex numbers.
        self.error = (rate + 4 * gamma(self.rows + 4, absolute)) * sums**0.5

    @property
    def half_degrees(self) -> Host:
        """n_j = (k_j − 1)/2 of each axis."""
        return (np.array(self.sizes, float) - 1) / 2

    def gram(self, group: int, frequencies: Host) -> Host:
        """Return K̂K̂ᴴ at frequencies (B, d), as (B, c, c)."""
        angles = frequencies @ self._differences.T
        cosine, sine = np.cos(angles), np.sin(angles)
        found = np.empty((len(frequencies), self.rows**2), complex)
        for start in range(0, self.rows**2, _SLICE):
            part = slice(start, start + _SLICE)
            even, odd = cosine @ self._even[group, :, part], sine @ self._odd[group, :, part]
            if self.is_real:  # real products are a quarter of complex ones
                found.real[:, part], found.imag[:, part] = even, odd
            else:
                found[:, part] = even + 1j * odd
        return found.reshape(-1, self.rows, self.rows)

    def at(self, group: int, frequency: Host) -> Host:
        """Return K̂ at one frequency."""
        phases = np.exp(-1j * (self.places @ frequency))
        found: Host = np.tensordot(phases, self.taps[group], 1)
        return found

    def newton_step(self, group: int, frequency: Host, vector: Host) -> Host:
        """Return Newton's step in ω towards the maximum of aᴴK̂K̂ᴴa, with a held fixed."""
        places, angles = self._differences, self._differences @ frequency
        shape = (-1, self.rows, self.rows)
        even, odd = (
            _products(R[group].reshape(shape), vector) @ vector.conj()
            for R in (self._even, self._odd)
        )
        cosine, sine = even.real, -odd.imag  # of aᴴG(ω)a = Σ cosine·cos(ω·d) + sine·sin(ω·d)
        slope = sine * np.cos(angles) - cosine * np.sin(angles)
        curve = -cosine * np.cos(angles) - sine * np.sin(angles)
        values, axes = np.linalg.eigh(np.einsum("t,ti,tj->ij", curve, places, places))
        # Along an axis of the wrong curvature, or of none, a step uphill.
        size = np.maximum(np.abs(values), 1e-3 * max(float(np.abs(values).max()), 1e-300))
        step: Host = axes @ ((axes.T @ (slope @ places)) / size)
        reach = 0.5 / max(self.sizes)
        return step * min(1.0, reach / max(float(np.linalg.norm(step)), 1e-300))

    def peak(self, group: int, frequency: Host, vector: Host) -> Peak:
        """Return the lower bound that a vector proves, less what rounding may have added."""
        length = float(np.linalg.norm(vector))
        product = float(np.linalg.norm(vector.conj() @ self.at(group, frequency)))
        rate = gamma(sum(self.taps.shape[-2:]) + 8, np.empty(0, complex))
        lower = max(0.0, product * (1 - 2 * rate) - self.error[group] * length * 1.01)
        return Peak(lower / length * (1 - rate), group, frequency, vector / length)


_OF_EACH = ("group", "low", "high", "vectors")  # the fields of `Cells` with an entry a cell


@dataclass
class Cells:
    """Boxes of frequencies. On a grid, ``low`` and ``high`` are its points, else angles."""

    group: Host  # (B,)
    low: Host  # (B, d)
    high: Host  # (B, d)
    step: Host | None  # (d,): the grid's distance, or None for all frequencies
    vectors: Host  # (B, c): estimates of the first left singular vectors, from the parent's centre

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, chosen: Any) -> Cells:
        return replace(self, **{name: getattr(self, name)[chosen] for name in _OF_EACH})

    @property
    def centres(self) -> Host:
        """The angles of the centres, (B, d)."""
        middle = (self.low + self.high) / 2
        return middle if self.step is None else middle * self.step

    @property
    def halves(self) -> Host:
        """Half of the widths in angles, (B, d), rounded up."""
        half = (self.high - self.low) / 2
        return (half if self.step is None else half * self.step) * (1 + 8 * _UNIT)

    def nearest(self, frequency: Host) -> Host:
        """Return the nearest frequency that counts."""
        if self.step is None:
            return frequency
        found: Host = np.round(frequency / self.step) * self.step
        return found

    def split(self, halved: Host) -> Cells:
        """Return the halves of each cell along its axes that ``halved`` (B, d) names.

        Points are not split.
        """
        cells = self
        for axis in range(halved.shape[1]):
            low, high = cells.low[:, axis], cells.high[:, axis]
            chosen = halved[:, axis] & (high > low)
            middle = (low + high) / 2 if self.step is None else np.floor((low + high) / 2)
            left, right = cells[:], cells[chosen]
            left.high, right.low = left.high.copy(), right.low.copy()
            left.high[chosen, axis] = middle[chosen]
            right.low[:, axis] = middle[chosen] + (0 if self.step is None else 1)
            cells, halved = joined([left, right]), np.concatenate([halved, halved[chosen]])
        return cells


def joined(parts: Sequence[Cells]) -> Cells:
    """Return all cells in one."""
    together = {name: np.concatenate([getattr(one, name) for one in parts]) for name in _OF_EACH}
    return replace(parts[0], **together)


def supremum(
    symbol: Symbol, *, grid: Sequence[int] | None = None, tol: float, max_evaluations: int
) -> Supremum:
    """Return proven bounds of the largest singular value over all frequencies, or over a grid.

    Parameters
    ----------
    symbol : Symbol
    grid : sequence of int, optional
        Number of frequencies of each axis, evenly spaced from 0. The default is all frequencies.
    tol : float
        Relative distance of the bounds.
    max_evaluations : int
        After so many frequencies, the distance grows fourfold, again and again until the rest of
        the cells is dropped.
    """
    cells = _first_cells(symbol, grid)
    best: Peak | None = None
    evaluated = 0
    while True:
        evaluated += len(cells)
        estimates, kept = _tested_(symbol, cells, best, tol)
        cells, estimates = cells[kept], estimates[kept]
        before, best = best, _highest(symbol, cells, estimates, best)
        if not len(cells):
            break
        risen = before is None or best.lower > before.lower * (1 + tol)
        new = cells.split(_halved(symbol, cells, estimates, best, risen))
        # Points of a grid cannot be split. They are tested again if the peak is a higher one.
        stuck = len(new) == len(cells) and before is not None and best.lower == before.lower
        if stuck or evaluated > max_evaluations:
            tol = 4 * max(tol, _UNIT)
        else:
            cells = new
    return Supremum(best.lower, best.lower * (1 + tol) * (1 + 8 * _UNIT), best)


def _tested_(symbol: Symbol, cells: Cells, best: Peak | None, tol: float) -> tuple[Host, Host]:
    """Return estimates of the largest eigenvalues, and whether a cell may hold a higher peak.

    The estimates are lower bounds. The cells' vectors are improved.
    """
    estimates, kept = np.zeros(len(cells)), np.ones(len(cells), bool)
    limits = (
        _share(symbol, cells, symbol.half_degrees * cells.halves)
        * (1 - 16 * _UNIT)
        * (0 if best is None else best.lower)
        * (1 + tol)
    ) ** 2
    for places, grams in _chunks(symbol, cells):
        narrow = narrowed(grams)
        estimates[places], cells.vectors[places] = _ritz(narrow, cells.vectors[places], 1)
        if narrow.dtype != grams.dtype:
            # An estimate in float32 says nothing of what is as close to the limit as its rounding.
            # A peak that is a little higher than the best would never be climbed.
            close = np.flatnonzero(estimates[places] > limits[places] * (1 - _CLOSE))
            found = _ritz(grams[close], cells.vectors[places[close]], 1)
            estimates[places[close]], cells.vectors[places[close]] = found
        for place, gram, small in zip(places, grams, narrow, strict=True):
            estimate = float(estimates[place])
            # Where a lower bound is too large already, no factorization would run through.
            if estimate <= limits[place]:
                limit = float(limits[place] - symbol.rounding[cells.group[place]])
                kept[place] = not is_proven_below(gram, small, limit, estimate)
    return estimates, kept


def _share(symbol: Symbol, cells: Cells, reach: Host) -> Host:
    """Return the share of a maximum in each cell that the cell's centre has at least.

    ``reach`` (B, d) are the n_j·h_j. On a grid, points are their own centres: the share is 1.
    """
    whole = reach.sum(axis=1)
    missed = 0.0  # A
    if cells.step is not None:
        missed = float(np.linalg.norm(symbol.half_degrees * cells.step)) / 2 * (1 + 16 * _UNIT)
    # A cosine near π/2 has no digits: its error is absolute.
    least = np.cos(np.minimum(missed + whole, pi / 2)) - 16 * _UNIT
    found: Host = np.where(whole == 0, 1.0, np.maximum(least, 0.0) / np.cos(min(missed, pi / 2)))
    return found


def _halved(symbol: Symbol, cells: Cells, estimates: Host, best: Peak, risen: bool) -> Host:
    """Return the axes (B, d) along which each cell is to be split.

    They are the longest ones, as many as it takes until children with the estimate of their parent
    would be dropped. Most cells of a flat symbol miss that by little: halves are enough for them.
    A cell is left whole only if the peak has risen since its test, which it may pass now.
    """
    reach = symbol.half_degrees * cells.halves
    halved = np.zeros(reach.shape, bool)
    for turn in range(reach.shape[1]):
        share = _share(symbol, cells, np.where(halved, reach / 2, reach))
        hopeful = estimates <= (share * best.lower) ** 2
        hopeful &= risen or turn > 0
        longest = np.where(halved, -1.0, reach).argmax(axis=1)
        halved[np.arange(len(cells)), longest] |= ~hopeful
    return halved & (np.array(symbol.sizes) > 1)


def _highest(symbol: Symbol, cells: Cells, estimates: Host, best: Peak | None) -> Peak:
    """Return the highest peak that climbs from the best cells reach, or the one that is known."""
    centres = cells.centres
    for place in np.argsort(-estimates)[:_PEAKS]:
        if best is not None and estimates[place] <= best.lower**2:
            break
        group = int(cells.group[place])
        found = _climbed(symbol, cells, group, centres[place], cells.vectors[place])
        best = found if best is None or found.lower > best.lower else best
    assert best is not None
    return best


def _climbed(symbol: Symbol, cells: Cells, group: int, frequency: Host, vector: Host) -> Peak:
    """Return the peak of a climb: the top vector at ω, then Newton's step in ω, and again."""
    best: Peak | None = None
    for _ in range(_CLIMB):
        here = cells.nearest(frequency)
        gram = symbol.gram(group, here[None])
        vector = _ritz(gram, vector[None], 3)[1][0]
        found = symbol.peak(group, here, vector)
        if best is not None and found.lower <= best.lower * (1 + 1e-11):
            break
        best = found
        frequency = frequency + symbol.newton_step(group, frequency, vector)
    assert best is not None
    return best


def _first_cells(symbol: Symbol, grid: Sequence[int] | None) -> Cells:
    """Return cells that cover all frequencies, or half of them for a real kernel."""
    ranges = []
    half = symbol.is_real
    for axis, degree in enumerate(symbol.half_degrees):
        if degree == 0:
            ranges.append([(0.0, 0.0)])
            continue
        widest = min(pi / 8, _WIDEST / degree)
        share = 0.5 if half else 1.0  # K̂(−ω) is the conjugate of K̂(ω)
        half = False
        if grid is None:
            edges = np.linspace(0, 2 * pi * share, int(np.ceil(pi * share / widest)) + 1)
            ranges.append([*pairwise(edges)])
        else:
            points = int(grid[axis] * share) + (share < 1)
            width = max(1, int(widest * grid[axis] / pi))
            firsts = np.arange(0, points, width, dtype=float)
            ranges.append([(low, min(low + width, points) - 1) for low in firsts])
    boxes = np.array([*product(*ranges)], float).reshape(-1, len(ranges), 2)
    count = len(boxes)
    start = np.random.default_rng(0).standard_normal((2, symbol.rows))
    start = (start[0] + 1j * start[1]) / np.linalg.norm(start)
    return Cells(
        np.repeat(np.arange(symbol.groups), count),
        np.tile(boxes[..., 0], (symbol.groups, 1)),
        np.tile(boxes[..., 1], (symbol.groups, 1)),
        None if grid is None else 2 * pi / np.array(grid, float),
        np.tile(start, (symbol.groups * count, 1)),
    )


def _chunks(symbol: Symbol, cells: Cells) -> Iterator[tuple[Host, Host]]:
    """Yield places of cells of one group, and the Gram matrices at their centres."""
    size = max(1, _CHUNK // symbol.rows**2)
    centres = cells.centres
    for group in np.unique(cells.group):
        mine = np.flatnonzero(cells.group == group)
        for start in range(0, len(mine), size):
            places = mine[start : start + size]
            yield places, symbol.gram(int(group), centres[places])


def _ritz(grams: Host, x: Host, rounds: int) -> tuple[Host, Host]:
    """Return the largest Ritz values and unit vectors of small Krylov spaces that start at x.

    All matrices are handled together. A start from the parent's vector makes up for the few
    dimensions.
    """
    x = x.astype(grams.dtype, copy=False)
    for _ in range(rounds):
        columns = [x[..., None]]
        for _ in range(min(_KRYLOV, grams.shape[-1]) - 1):
            y = grams @ columns[-1]
            length = np.linalg.norm(y, axis=-2, keepdims=True)
            columns.append(y / np.maximum(length, np.finfo(length.dtype).tiny))
        Q = np.linalg.qr(np.concatenate(columns, axis=-1))[0]
        values, vectors = np.linalg.eigh(Q.conj().swapaxes(-1, -2) @ (grams @ Q))
        x = (Q @ vectors[..., -1:])[..., 0]
    # Rounding must not make an estimate larger than the eigenvalue.
    return values[:, -1] * (1 - 4 * gamma(grams.shape[-1], x.real)), x


def _products(matrices: Host, x: Host) -> Host:
    """Return the products with a complex vector; real matrices are not copied to complex ones."""
    if np.iscomplexobj(matrices):
        return matrices @ x
    parts = matrices @ np.stack([x.real, x.imag], axis=-1)
    found: Host = parts[..., 0] + 1j * parts[..., 1]
    return found


def _autocorrelation(taps: Host, places: Host) -> tuple[Host, Host]:
    """Return the differences d of places, and R_d of each group as (g, D, c, c), R₀ halved.

    Of d and −d only one is kept: R_{−d} is the adjoint of R_d.
    """
    groups, count, c, _ = taps.shape
    span = tuple(int(size) + 1 for size in places.max(axis=0))
    offsets = np.array([*product(*(range(1 - n, n) for n in span))], int)
    offsets = offsets[[tuple(one) >= (0,) * len(span) for one in offsets]]
    index = {tuple(offset): i for i, offset in enumerate(offsets)}
    found = np.zeros((groups, len(offsets), c, c), taps.dtype)
    for t in range(count):
        steps = (places - places[t]).astype(int)
        later = [s for s in range(count) if tuple(steps[s]) in index]
        targets = [index[tuple(steps[s])] for s in later]
        found[:, targets] += taps[:, later] @ taps[:, t, None].conj().swapaxes(-1, -2)
    found[:, index[(0,) * len(span)]] /= 2
    return offsets.astype(float), found


def _trimmed(kernel: Host) -> Host:
    """Return the kernel without the zeros around it, which would only widen the bound."""
    for axis in range(3, kernel.ndim):
        others = tuple(a for a in range(kernel.ndim) if a != axis)
        used = np.flatnonzero(np.any(kernel != 0, axis=others))
        if len(used):
            kernel = np.take(kernel, range(used[0], used[-1] + 1), axis)
    return kernel
