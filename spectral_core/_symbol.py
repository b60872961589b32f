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
- Cells of all frequencies are diamonds in the plane of the first two axes: Σ n_j·|d_j| is largest
  in their corners, and the same in all four of them.
- So a cell whose centre has less than that share of lower·(1 + tol) does not hold a maximum that is
  larger than lower·(1 + tol): it is dropped. Any other cell is split.
- The test of a centre is a Cholesky factorization, which needs no eigenvalue. For many channels it
  is tried in float32 first: see `is_proven_narrow`.
- The first cells are a sample: it says how small cells have to be. Cells of that size are tested,
  and those that are not dropped are halved.

Why the Gram matrix is a polynomial: K̂K̂ᴴ = Σ_d R_d·exp(−iω·d) with R_d = Σ_t K_{t+d}K_tᴴ. The R_d
are computed once. A frequency then costs c² operations for each d, not a product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import pi
from typing import NamedTuple

import numpy as np

from ._cells import WIDEST, Cells, Kind, first_cells
from ._certificate import (
    Host,
    Top,
    gamma,
    hidden_narrow,
    is_proven_below,
    is_proven_narrow,
    is_vague,
    pays_narrow,
)
from ._lanczos import top_ritz

_UNIT = 2.0**-53
_CHUNK = 2**21  # elements of the Gram matrices that are tested together
_SLICE = 2**13  # elements of each of them that are computed together: they fit a cache
_SAMPLE = 64  # cells at most that tell how small cells have to be
_HIGHER = 5e-4  # share by which a higher peak changes what limits are proven
_PEAKS = 4  # cells from which a maximum is searched
_CLIMB = 10  # steps of such a search at most
_CLOSE = 1e-3  # share of a limit by which an estimate may be too low, beside float32's rounding
_FRESH = 2  # rounds of an estimate without a parent's vector
_ROUNDS = 4  # of better vectors before a factorization
_KRYLOV = 8  # dimensions of the spaces that estimate an eigenvalue
_PRODUCTS = 200  # that make the vector of a peak better at most


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
        self.is_narrow = pays_narrow(self.rows)
        if self.is_narrow:
            kind = np.float32 if self.is_real else np.complex64
            self._narrow = self._even.astype(kind), self._odd.astype(kind)
            self._lengths = np.linalg.norm(self._even, axis=2), np.linalg.norm(self._odd, axis=2)
        # What rounding may change, in a symbol and in its Gram matrix, relative to sums of absolute
        # values: of the products, and of the angles ω·t.
        absolute = np.abs(self.taps).sum(axis=1)
        sums = absolute.sum(axis=2).max(axis=1) * absolute.sum(axis=1).max(axis=1)
        terms = len(self.places) * (kernel.shape[2] + 2) + 2 * len(self._differences) + 16
        # An angle of up to 2π a sample has six roundings at most: of π, of a frequency, of sums.
        angle = 16 * pi * sum(self.sizes) * _UNIT
        rate = gamma(terms, self.taps) + 4 * gamma(4, self.taps) + angle
        self.sums = sums
        self.rounding = rate * sums
        # A vector's product with the symbol is one of complex numbers.
        self.error = (rate + 4 * gamma(self.rows + 4, absolute)) * sums**0.5

    @property
    def terms(self) -> int:
        """The number of differences of two taps: terms of a Gram matrix."""
        return len(self._differences)

    @property
    def half_degrees(self) -> Host:
        """n_j = (k_j − 1)/2 of each axis."""
        return (np.array(self.sizes, float) - 1) / 2

    @property
    def kind(self) -> Kind:
        """What the cells have to know of the kernel."""
        return Kind(self.half_degrees, self.is_real, self.groups, self.rows)

    def gram(self, group: int, frequencies: Host, *, narrow: bool = False) -> Host:
        """Return K̂K̂ᴴ at frequencies (B, d), as (B, c, c), in float64 or in float32."""
        angles = frequencies @ self._differences.T
        evens, odds = self._narrow if narrow else (self._even, self._odd)
        kind = evens.real.dtype
        cosine, sine = np.cos(angles).astype(kind), np.sin(angles).astype(kind)
        found = np.empty((len(frequencies), self.rows**2), np.complex64 if narrow else complex)
        for start in range(0, self.rows**2, _SLICE):
            part = slice(start, start + _SLICE)
            even, odd = cosine @ evens[group, :, part], sine @ odds[group, :, part]
            if self.is_real:  # real products are a quarter of complex ones
                found.real[:, part], found.imag[:, part] = even, odd
            else:
                found[:, part] = even + 1j * odd
        return found.reshape(-1, self.rows, self.rows)

    def narrow_error(self, group: int, frequencies: Host) -> Host:
        """Return bounds (B,) of the norm by which a Gram matrix in float32 differs.

        An element is a sum of D products in float32, of rounded numbers. So its error is at most
        γ_{D+4}·Σ (|cos|·|R + Rᴴ| + |sin|·|Rᴴ − R|), also of one half of the matrix mirrored.
        """
        angles = frequencies @ self._differences.T
        even, odd = (lengths[group] for lengths in self._lengths)
        rate = gamma(len(self._differences) + 4, np.empty(0, np.float32))
        lengths = np.abs(np.cos(angles)) @ even + np.abs(np.sin(angles)) @ odd
        found: Host = 1.001 * rate * lengths + self.rounding[group]
        return found

    def products(self, group: int, vectors: Host) -> Host:
        """Return the products K_tᴴv of each tap with vectors (B, c), as (taps, columns, B)."""
        taps = self.taps[group].swapaxes(1, 2)
        return _products(taps if self.is_real else taps.conj(), vectors.T)

    def tops(self, group: int, frequencies: Host, vectors: Host) -> list[Top]:
        """Return how vectors (B, c) of about unit length lie to the Gram matrices at frequencies.

        ``error`` bounds the rounding of a product with K̂ᴴ. One with K̂ has at most twice as much:
        its sums are as long as those in ``error`` without the factor that a complex sum has there.
        """
        vectors = vectors.astype(complex)  # vectors of float32 have no float64 length
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        phases = np.exp(1j * (self.places @ frequencies.T))[:, None, :]
        images = (phases * self.products(group, vectors)).sum(axis=0)
        squares = np.linalg.norm(images, axis=0) ** 2
        back = sum(
            _products(tap, phase.conj() * images)
            for tap, phase in zip(self.taps[group], phases, strict=True)
        )
        rests = np.linalg.norm(back - squares * vectors.T, axis=0)
        # The vectors' length is 1 but for its rounding, and so are the norms.
        error, sums = float(self.error[group]), float(self.sums[group])
        rate = gamma(sum(self.taps.shape[-2:]) + 16, np.empty(0, complex))
        return [
            Top(
                float(square) * (1 - 2 * rate) - 2.01 * error * float(square) ** 0.5,
                (float(square) ** 0.5 * (1 + rate) + 1.01 * error) ** 2 * (1 + 2 * rate),
                float(rest) * (1 + 2 * rate) + 4 * error * sums**0.5 + 2 * rate * float(square),
                vector,
            )
            for square, rest, vector in zip(squares, rests, vectors, strict=True)
        ]

    def newton_step(self, frequency: Host, products: Host) -> Host:
        """Return Newton's step in ω towards the maximum of ‖K̂ᴴa‖², with a held fixed.

        ``products`` are the K_tᴴa, as (taps, columns).
        """
        places = self.places - self.places.mean(axis=0)
        terms = np.exp(1j * (places @ frequency))[:, None] * products
        sums = terms @ terms.sum(axis=0).conj()
        slope = -2 * sums.imag @ places
        first = terms.T @ places
        curve = 2 * ((first.conj().T @ first).real - (places.T * sums.real) @ places)
        values, axes = np.linalg.eigh((curve + curve.T) / 2)
        # Along an axis of the wrong curvature, or of none, a step uphill. Rounding is no curvature.
        least = max(1e-3 * float(np.abs(values).max()), 1e-12 * abs(float(sums.real.sum())), 1e-300)
        size = np.maximum(np.abs(values), least)
        step: Host = axes @ ((axes.T @ slope) / size)
        reach = 0.5 / max(self.sizes)
        return step * min(1.0, reach / max(float(np.linalg.norm(step)), 1e-300))

    def peak(self, group: int, frequency: Host, vector: Host, products: Host) -> Peak:
        """Return the lower bound that a vector proves, less what rounding may have added."""
        length = float(np.linalg.norm(vector))
        phases = np.exp(1j * (self.places @ frequency))
        product = float(np.linalg.norm(phases @ products))
        rate = gamma(sum(self.taps.shape[-2:]) + 8, np.empty(0, complex))
        lower = max(0.0, product * (1 - 2 * rate) - self.error[group] * length * 1.01)
        return Peak(lower / length * (1 - rate), group, frequency, vector / length)


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
    cells, best, evaluated = _sampled(symbol, grid, tol, max_evaluations)
    rounds = _FRESH
    while True:
        evaluated += len(cells)
        before = best
        best, estimates, kept = _tested_(symbol, cells, best, tol, rounds)
        rounds = 1
        if not kept.any():
            break
        cells, estimates = cells[kept], estimates[kept]
        parts = _parts(symbol, cells, estimates, best)
        if before is None or best.lower > before.lower * (1 + _HIGHER):
            # Some were kept only because the limit was a lower one.
            parts[estimates <= _limits(symbol, cells, best.lower * (1 + tol))] = 1
        new = cells.split(parts)
        # Points of a grid cannot be split. They are tested again if the peak is a higher one.
        stuck = len(new) == len(cells) and before is not None and best.lower == before.lower
        if stuck or evaluated > max_evaluations:
            tol = 4 * max(tol, _UNIT)
        else:
            cells = new
    return Supremum(best.lower, best.lower * (1 + tol) * (1 + 8 * _UNIT), best)


def _sampled(
    symbol: Symbol, grid: Sequence[int] | None, tol: float, max_evaluations: int
) -> tuple[Cells, Peak | None, int]:
    """Return the first cells, so small that most are dropped, and what a sample of them told.

    That is the highest peak around it, if there was a sample, and its number of frequencies.
    """
    cells = first_cells(symbol.kind, grid)
    if grid is not None:
        return cells, None, 0
    axes = max(1, sum(size > 1 for size in symbol.sizes))
    affordable = WIDEST * (4 * len(cells) / max_evaluations) ** (1 / axes)
    best: Peak | None = None
    evaluated = 0
    for narrowest in (WIDEST / 3, 0.0):  # the next cells may be a better sample
        sample = cells[:: -(-len(cells) // _SAMPLE)]
        evaluated += len(sample)
        best, estimates, _ = _tested_(symbol, sample, best, tol, _FRESH, proofs=False)
        widest = _widest(estimates, best.lower * (1 + tol), axes)
        widest = min(max(widest, affordable, narrowest), WIDEST)
        wanted = first_cells(symbol.kind, widest=widest)
        if len(wanted) <= 1.2 * len(cells):
            break
        cells = wanted
    return cells, best, evaluated


def _limits(symbol: Symbol, cells: Cells, limit: float) -> Host:
    """Return the squares of what the centres of cells have that hold a maximum of the limit."""
    whole = cells.of_units(symbol.half_degrees * cells.halves).sum(axis=1)
    found: Host = (_share(symbol, cells, whole) * (1 - 16 * _UNIT) * limit) ** 2
    return found


def _widest(estimates: Host, limit: float, axes: int) -> float:
    """Return the width of cells that is the least work if all centres are like these ones.

    A centre with the share cos ρ of the limit lets a cell of the width ρ be dropped. A wider cell
    is halved along each axis, and its parts have other centres. A factorization is twice the work
    of an estimate.
    """
    rho = np.arccos(np.minimum(np.maximum(estimates, 0) ** 0.5 / limit, 1.0))
    widths = WIDEST * 0.95 ** np.arange(48.0)
    work = np.full(len(widths), 3.0)
    for halvings in range(5, -1, -1):
        failed = (rho < widths[:, None] / 2.0**halvings).mean(axis=1)
        work = 1 + 2 * (1 - failed) + 2.0**axes * failed * work
    return float(widths[(work / widths**axes).argmin()])


def _tested_(
    symbol: Symbol, cells: Cells, best: Peak | None, tol: float, rounds: int, *, proofs: bool = True
) -> tuple[Peak, Host, Host]:
    """Return the highest peak, the cells' estimates, and whether their limits are not proven.

    Estimates are those of the largest eigenvalues, from below. The cells' vectors are improved.
    Gram matrices are made once, for the estimate and for the proof. So a cell's limit is that of
    the highest peak so far. A later peak is higher, and so is its limit: a proof stays a proof.
    """
    estimates, kept = np.zeros(len(cells)), np.ones(len(cells), bool)
    for group, places in _chunks(symbol, cells):
        some = cells[places]
        grams = symbol.gram(group, some.centres, narrow=symbol.is_narrow)
        estimates[places], some.vectors[:] = _ritz(grams, some.vectors, rounds)
        tops: dict[int, Top] = {}
        if symbol.is_narrow:
            tops = _close_tops(symbol, some, estimates[places], best, tol)
            estimates[places[[*tops]]] = [top.lower for top in tops.values()]
        best = _highest(symbol, some, estimates[places], best, tol)
        if proofs:
            limits = _limits(symbol, some, best.lower * (1 + tol))
            given = symbol, some, grams, estimates[places], limits
            kept[places] = _kept_narrow_(*given, tops) if symbol.is_narrow else _kept(*given)
        cells.vectors[places] = some.vectors
    assert best is not None
    return best, estimates, kept


def _close_tops(
    symbol: Symbol, cells: Cells, estimates: Host, best: Peak | None, tol: float
) -> dict[int, Top]:
    """Return the tops of vectors whose values float32 cannot tell from their limit or the peak.

    A peak that is a little higher than the best would never be climbed.
    """
    close = np.ones(len(cells), bool)
    if best is not None:
        limits = _limits(symbol, cells, best.lower * (1 + tol))
        vague = hidden_narrow(symbol.rows) + _CLOSE
        close = np.abs(estimates - limits) <= vague * limits
        close |= estimates > best.lower**2 * (1 - vague)
    places = np.flatnonzero(close)
    return _tops(symbol, cells, places.tolist())


def _tops(symbol: Symbol, cells: Cells, places: list[int]) -> dict[int, Top]:
    """Return how the vectors of some cells of a group lie to their Gram matrices."""
    if not places:
        return {}
    found = symbol.tops(int(cells.group[0]), cells.centres[places], cells.vectors[places])
    return dict(zip(places, found, strict=True))


def _kept(symbol: Symbol, cells: Cells, grams: Host, estimates: Host, limits: Host) -> Host:
    """Return whether the limits of a group's cells are not proven in float64."""
    # Where a lower bound is too large already, no factorization would run through.
    rounding = float(symbol.rounding[cells.group[0]])
    each = zip(grams, estimates, limits, strict=True)
    return np.array([e > limit or not is_proven_below(g, limit - rounding) for g, e, limit in each])


def _kept_narrow_(
    symbol: Symbol,
    cells: Cells,
    grams: Host,
    estimates: Host,
    limits: Host,
    tops: dict[int, Top],
) -> Host:
    """Return whether the limits of a group's cells are not proven, in float32 or in float64.

    A factorization that fails says that an eigenvalue is larger than the estimate, or that the
    limit is too close. Better vectors tell which, and let it be tried again without the first one.
    """
    errors = symbol.narrow_error(int(cells.group[0]), cells.centres)
    kept = estimates > limits

    def is_proven(i: int, top: Top | None = None) -> bool:
        return is_proven_narrow(grams[i], float(errors[i]), float(limits[i]), top)

    for i in np.flatnonzero(~kept).tolist():
        kept[i] = i in tops or not is_proven(i)
    doubtful = np.flatnonzero(kept & (estimates <= limits)).tolist()
    tops = tops | _tops(symbol, cells, [i for i in doubtful if i not in tops])
    vague = doubtful
    for _ in range(_ROUNDS):
        vague = [i for i in vague if is_vague(tops[i], limits[i])]
        if not vague:
            break
        cells.vectors[vague] = _ritz(grams[vague], cells.vectors[vague], 1)[1]
        tops |= _tops(symbol, cells, vague)
    left = [i for i in doubtful if tops[i].lower <= limits[i] and not is_proven(i, tops[i])]
    kept[doubtful] = [tops[i].lower > limits[i] for i in doubtful]
    if left:
        wide = symbol.gram(int(cells.group[0]), cells.centres[left])
        kept[left] = _kept(symbol, cells[left], wide, estimates[left], limits[left])
    return kept


def _share(symbol: Symbol, cells: Cells, whole: Host) -> Host:
    """Return the share of a maximum in each cell that the cell's centre has at least.

    ``whole`` (B,) is the largest Σ n_j·|d_j|. On a grid, points are their own centres: the share
    is 1.
    """
    missed = 0.0  # A
    if cells.step is not None:
        missed = float(np.linalg.norm(symbol.half_degrees * cells.step)) / 2 * (1 + 16 * _UNIT)
    # A cosine near π/2 has no digits: its error is absolute.
    least = np.cos(np.minimum(missed + whole, pi / 2)) - 16 * _UNIT
    found: Host = np.where(whole == 0, 1.0, np.maximum(least, 0.0) / np.cos(min(missed, pi / 2)))
    return found


def _parts(symbol: Symbol, cells: Cells, estimates: Host, best: Peak) -> Host:
    """Return the numbers of parts (B, units) in which each cell is to be split: one or two.

    The longest units are halved, until children with the estimate of their parent would be
    dropped. Most cells of a flat symbol miss that by little: one is enough for them.
    """
    reach = cells.of_units(symbol.half_degrees * cells.halves)
    parts = np.ones(reach.shape, int)
    for turn in range(reach.shape[1]):
        share = _share(symbol, cells, (reach / parts).sum(axis=1))
        hopeful = estimates <= (share * best.lower) ** 2
        longest = np.where(parts == 2, -1.0, reach / parts).argmax(axis=1)
        parts[np.arange(len(cells)), longest] += ~hopeful | (turn == 0)
    sizes = np.array([symbol.sizes[axes[0]] for axes in cells.units])
    return np.where(sizes > 1, parts, 1)


def _highest(symbol: Symbol, cells: Cells, estimates: Host, best: Peak | None, tol: float) -> Peak:
    """Return the highest peak that climbs from the best cells reach, or the one that is known."""
    centres, known = cells.centres, best
    for place in np.argsort(-estimates)[:_PEAKS]:
        if best is not None and estimates[place] <= best.lower**2:
            break
        group = int(cells.group[place])
        found = _climbed(symbol, cells, group, centres[place], cells.vectors[place], tol)
        best = found if best is None or found.lower > best.lower else best
    assert best is not None
    return best if best is known else _sharpened(symbol, best, tol)


def _sharpened(symbol: Symbol, peak: Peak, tol: float) -> Peak:
    """Return a peak with a vector that is good to the tolerance, where the climb's is not.

    Values that are close need more products, and float32 cannot tell them apart. While the lower
    bound is below the largest one by more than the tolerance, no cell around it can be dropped.
    """
    (gram,) = symbol.gram(peak.group, peak.frequency[None])
    vector, _ = top_ritz(lambda x: gram @ x, peak.vector, max(tol / 4, 1e-13), _PRODUCTS, np)
    products = symbol.products(peak.group, vector[None])[..., 0]
    found = symbol.peak(peak.group, peak.frequency, vector, products)
    return found if found.lower > peak.lower else peak


def _climbed(
    symbol: Symbol, cells: Cells, group: int, frequency: Host, vector: Host, tol: float
) -> Peak:
    """Return the peak of a climb: the top vector at ω, then Newton's step in ω, and again."""
    best: Peak | None = None
    for _ in range(_CLIMB):
        here = cells.nearest(frequency)
        gram = symbol.gram(group, here[None], narrow=symbol.is_narrow)
        vector = _ritz(gram, vector[None], 3)[1][0].astype(complex)
        products = symbol.products(group, vector[None])[..., 0]
        found = symbol.peak(group, here, vector, products)
        if best is not None and found.lower <= best.lower * (1 + max(1e-11, tol / 100)):
            return found if found.lower > best.lower else best
        best = found
        frequency = frequency + symbol.newton_step(frequency, products)
    assert best is not None
    return best


def _chunks(symbol: Symbol, cells: Cells) -> Iterator[tuple[int, Host]]:
    """Yield the places of cells of one group, as many as fit in memory.

    Each has a Gram matrix, and several numbers for each difference of two taps.
    """
    size = max(1, _CHUNK // max(symbol.rows**2, 8 * symbol.terms))
    for group in np.unique(cells.group):
        mine = np.flatnonzero(cells.group == group)
        for start in range(0, len(mine), size):
            yield int(group), mine[start : start + size]


def _ritz(grams: Host, x: Host, rounds: int) -> tuple[Host, Host]:
    """Return the largest Ritz values and unit vectors of small Krylov spaces that start at x.

    All matrices are handled together. A start from the parent's vector makes up for the few
    dimensions.
    """
    x = x.astype(grams.dtype)
    size = min(_KRYLOV, grams.shape[-1])
    basis = np.empty((len(x), size, x.shape[1]), x.dtype)
    inside = np.zeros((len(x), size, size), x.dtype)
    for _ in range(rounds):
        for k in range(size):
            basis[:, k] = x
            y = (grams @ x[..., None])[..., 0]
            used = basis[:, : k + 1]
            for turn in range(2):  # rounding leaves a component along the basis the first time
                along = (used @ y[..., None].conj()).conj()
                if turn == 0:
                    inside[:, : k + 1, k] = along[..., 0]
                if k + 1 < size:
                    y = y - (along.swapaxes(1, 2) @ used)[:, 0]
            if k + 1 == size:
                break
            length = np.linalg.norm(y, axis=1, keepdims=True)
            # Where the space is complete, only rounding is left. Zeros add an eigenvalue of zero.
            info = np.finfo(length.dtype)
            least = np.maximum(64 * info.eps * np.abs(inside[:, :1, 0]), 1e4 * info.tiny)
            x = np.where(length > least, y, 0) / np.maximum(length, least)
        values, vectors = np.linalg.eigh(inside, UPLO="U")
        x = (vectors[:, None, :, -1] @ basis)[:, 0]
        length = np.linalg.norm(x, axis=1, keepdims=True)
        x = np.where(length > 0.5, x, basis[:, 0]) / np.where(length > 0.5, length, 1)
    # Rounding must not make an estimate larger than the eigenvalue.
    return values[:, -1] * (1 - 4 * gamma(grams.shape[-1], x.real)), x


def _products(matrices: Host, X: Host) -> Host:
    """Return the products with complex columns; real matrices are not copied to complex ones."""
    if np.iscomplexobj(matrices):
        found: Host = matrices @ X
        return found
    parts = matrices @ np.concatenate([X.real, X.imag], axis=-1)
    count = X.shape[-1]
    return np.asarray(parts[..., :count] + 1j * parts[..., count:])


def _autocorrelation(taps: Host, places: Host) -> tuple[Host, Host]:
    """Return the differences d of places, and R_d of each group as (g, D, c, c), R₀ halved.

    Of d and −d only one is kept: R_{−d} is the adjoint of R_d.
    """
    groups, count, c, _ = taps.shape
    span = places.max(axis=0).astype(int) + 1
    offsets = np.array([*product(*(range(1 - n, n) for n in span))], int)
    offsets = offsets[len(offsets) // 2 :]  # in their order, −d comes before 0 where d comes after
    digits = np.array([(2 * span[axis + 1 :] - 1).prod() for axis in range(len(span))])
    ranks = (places @ digits).astype(int)  # of a difference: its place among the offsets
    found = np.zeros((groups, len(offsets), c, c), taps.dtype)
    for t in range(count):  # taps are in the order of their ranks: those from t on come later
        adjoint = taps[:, t, None].conj().swapaxes(-1, -2)
        found[:, ranks[t:] - ranks[t]] += taps[:, t:] @ adjoint
    found[:, 0] /= 2
    return offsets.astype(float), found


def _trimmed(kernel: Host) -> Host:
    """Return the kernel without the zeros around it, which would only widen the bound."""
    for axis in range(3, kernel.ndim):
        others = tuple(a for a in range(kernel.ndim) if a != axis)
        used = np.flatnonzero(np.any(kernel != 0, axis=others))
        if len(used):
            kernel = np.take(kernel, range(used[0], used[-1] + 1), axis)
    return kernel
