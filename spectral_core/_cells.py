"""Cover the frequencies of a symbol by cells, which a search splits and drops: see `_symbol`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import pi
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ._certificate import Host

_UNIT = 2.0**-53
WIDEST = pi / 4  # of n_j·h_j in the first cells
_SLACK = 2.0**-44  # of half-widths, for the rounding of centres

_OF_EACH = ("group", "centre", "half", "vectors")  # the fields of `Cells` with an entry a cell


@dataclass
class Cells:
    """Sets of frequencies: boxes, or diamonds in the plane of two axes.

    A diamond is what the bound asks for: all displacements with Σ |d_j|/half_j ≤ 1. It has twice
    the area of the largest box in it, and diamonds of one size leave no gap.
    """

    group: Host  # (B,)
    centre: Host  # (B, d)
    half: Host  # (B, d): half-widths, or half-diagonals
    step: Host | None  # (d,): a grid's distance, the unit of centre and half; None for angles
    diamond: tuple[int, ...]  # its two axes, or none
    vectors: Host  # (B, c): estimates of the first left singular vectors, from the parent's centre

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, chosen: Any) -> Cells:
        return replace(self, **{name: getattr(self, name)[chosen] for name in _OF_EACH})

    @property
    def centres(self) -> Host:
        """The angles of the centres, (B, d)."""
        return self.centre if self.step is None else self.centre * self.step

    @property
    def halves(self) -> Host:
        """The half-widths in angles, (B, d), rounded up."""
        half = self.half if self.step is None else self.half * self.step
        return half * (1 + 8 * _UNIT)

    @property
    def units(self) -> list[list[int]]:
        """The axes, those of the diamond together: they are split together."""
        rest = [[axis] for axis in range(self.half.shape[1]) if axis not in self.diamond]
        return [[*self.diamond], *rest] if self.diamond else rest

    def of_units(self, reach: Host) -> Host:
        """Return the largest Σ n_j·|d_j| of each unit, of the n_j·half_j (B, d), as (B, units)."""
        return np.stack([reach[:, axes].max(axis=1) for axes in self.units], axis=1)

    def nearest(self, frequency: Host) -> Host:
        """Return the nearest frequency that counts."""
        if self.step is None:
            return frequency
        found: Host = np.round(frequency / self.step) * self.step
        return found

    def split(self, parts: Host) -> Cells:
        """Return each cell in so many parts along its units, (B, units) integers.

        A diamond in k parts becomes k² diamonds. An interval of a grid is halved at most.
        """
        cells, origin = self, np.arange(len(self))
        for unit, axes in enumerate(self.units):
            pieces, origins = [], []
            wanted = parts[origin, unit]
            for k in np.unique(wanted):
                chosen = np.flatnonzero(wanted == k)
                for which, piece in cells[chosen]._pieces(axes, int(k)):
                    pieces.append(piece)
                    origins.append(origin[chosen[which]])
            cells, origin = joined(pieces), np.concatenate(origins)
        return cells

    def _pieces(self, axes: list[int], k: int) -> Iterator[tuple[Any, Cells]]:
        """Yield the parts along one unit, each with the places of the cells that have it.

        A centre is rounded, by less than 2⁻⁴⁸ along an axis. The halves grow by what closes the
        gaps: |d_j| + 2⁻⁴⁸ ≤ half_j for a share 1 − 2⁻⁴⁸·k·Σ 1/half_j of a cell, and k is at most 8.
        """
        if k == 1:
            yield slice(None), self
        elif self.step is not None:
            low, high = self.centre - self.half, self.centre + self.half
            middle = np.floor(self.centre[:, axes])
            wide = np.flatnonzero(self.half[:, axes[0]] > 0)
            yield slice(None), self._between(axes, low[:, axes], middle)
            yield wide, self[wide]._between(axes, middle[wide] + 1, high[wide][:, axes])
        else:
            half = self.half.copy()
            half[:, axes] *= (1 + _SLACK / half[:, axes].min(axis=1, keepdims=True)) / k
            offsets = (2 * np.arange(k) + 1 - k) / k
            for offset in product(offsets, repeat=len(axes)):
                turned = np.array(offset)
                if len(axes) == 2:  # the sides of a diamond are its diagonals, turned
                    turned = np.array([offset[0] + offset[1], offset[0] - offset[1]]) / 2
                centre = self.centre.copy()
                centre[:, axes] += self.half[:, axes] * turned
                yield slice(None), replace(self[:], centre=centre, half=half)

    def _between(self, axes: list[int], low: Host, high: Host) -> Cells:
        """Return the cells with other ends along some axes."""
        found = replace(self, centre=self.centre.copy(), half=self.half.copy())
        found.centre[:, axes], found.half[:, axes] = (low + high) / 2, (high - low) / 2
        return found


def joined(parts: Sequence[Cells]) -> Cells:
    """Return all cells in one."""
    together: dict[str, Any] = {
        name: np.concatenate([getattr(one, name) for one in parts]) for name in _OF_EACH
    }
    return replace(parts[0], **together)


class Kind(NamedTuple):
    """What the cells of a kernel depend on."""

    degrees: Host  # (d,): n_j = (k_j − 1)/2
    is_real: bool  # K̂(−ω) is the conjugate of K̂(ω)
    groups: int
    rows: int


def first_cells(kind: Kind, grid: Sequence[int] | None = None, *, widest: float = WIDEST) -> Cells:
    """Return cells that cover all frequencies, or half of them for a real kernel.

    Parameters
    ----------
    kind : Kind
    grid : sequence of int, optional
        Number of frequencies of each axis. The default is all frequencies.
    widest : float
        Largest Σ n_j·|d_j| along an axis, or in a diamond.
    """
    degrees, half, groups, rows = kind
    long = [axis for axis, degree in enumerate(degrees) if degree > 0]
    diamond = tuple(long[:2]) if grid is None and len(long) > 1 else ()
    units = []
    if diamond:
        units.append(_diamonds(degrees[[*diamond]], half, widest))
        half = False
    for axis, degree in enumerate(degrees):
        if axis in diamond:
            continue
        units.append(_intervals(float(degree), half, None if grid is None else grid[axis], widest))
        half = half and degree == 0
    chosen = [*product(*units)]
    order = np.argsort([*diamond, *(a for a in range(len(degrees)) if a not in diamond)])
    centre, sides = (
        np.array([[x for unit in one for x in unit[i]] for one in chosen], float)[:, order]
        for i in (0, 1)
    )
    start = np.random.default_rng(0).standard_normal((2, rows))
    start = (start[0] + 1j * start[1]) / np.linalg.norm(start)
    return Cells(
        np.repeat(np.arange(groups), len(chosen)),
        np.tile(centre, (groups, 1)),
        np.tile(sides, (groups, 1)),
        None if grid is None else 2 * pi / np.array(grid, float),
        diamond,
        np.tile(start, (groups * len(chosen), 1)),
    )


_Unit: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # a centre and its halves


def _diamonds(degrees: Host, half: bool, widest: float) -> list[_Unit]:
    """Return diamonds that cover two axes: 2N_1·N_2 of half-diagonals π/N_j, in staggered rows.

    Of those that a change of sign exchanges, one is enough for a real kernel.
    """
    first, second = (int(np.ceil(pi * degree / widest)) for degree in degrees)
    sides = (pi / first, pi / second)
    slack = 1 + _SLACK / min(sides)  # as in `Cells._pieces`
    return [
        ((i * sides[0], j * sides[1]), (sides[0] * slack, sides[1] * slack))
        for j in range(second + 1 if half else 2 * second)
        for i in range(j % 2, first + 1 if half and j % second == 0 else 2 * first, 2)
    ]


def _intervals(degree: float, half: bool, points: int | None, widest: float) -> list[_Unit]:
    """Return intervals that cover an axis, or half of it, or a grid of points."""
    if degree == 0:
        return [((0.0,), (0.0,))]
    width = min(pi / 8, widest / degree)
    share = 0.5 if half else 1.0
    if points is None:
        edges = np.linspace(0, 2 * pi * share, int(np.ceil(pi * share / width)) + 1)
        ends = [*pairwise(edges.tolist())]
    else:
        count = int(points * share) + half
        each = max(1, int(width * points / pi))
        ends = [(float(low), min(low + each, count) - 1.0) for low in range(0, count, each)]
    slack = _SLACK if points is None else 0.0
    return [(((low + high) / 2,), ((high - low) / 2 + slack,)) for low, high in ends]
