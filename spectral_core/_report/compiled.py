"""Multiply by WᴴW, and sum over the matrix, in loops that Numba compiles.

A number is read from the map of the file and widened in a register, where `Tiles` writes a decoded
copy for BLAS to read. Without Numba, `Tiles` does everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from math import inf, nan
from typing import Any, NamedTuple, TypeGuard, TypeVar
from warnings import warn

import numpy as np

from ..errors import SpectralWarning
from . import tiling
from .entry import Stored, TensorEntry
from .numbers import Widening
from .tiling import Decode, Matrix, Sums, Tiles

# Elements of a checkpoint from which compiled loops save more seconds than it takes to load them.
# The first time, when they are compiled, three times as many would be needed.
_WORTH = 2**25
_SMALL = 2**18  # elements of a matrix that stays with NumPy
# Columns of a panel: a vector of them stays in the cache. Of few rows they are more, so that a
# panel has as many elements as threads are worth.
_PANEL, _PANEL_SIZE = 2**14, 2**22
_FOUR = 4  # rows that the kernels read together

_DTYPES = ("bfloat16", "float16", "float32", "float64")
# NumPy's name of the stored dtype, and of the one that the kernels know the bytes by.
_LIKE = {"uint16": "uint16", "float16": "int16", "float32": "float32", "float64": "float64"}

T = TypeVar("T")


def is_worth(entries: Iterable[TensorEntry]) -> bool:
    """Return True if compiled loops save time for all these tensors together."""
    sizes = [x.size for x in entries if not x.skip and len(x.shape) > 1 and x.dtype in _DTYPES]
    return sum(size for size in sizes if size > _SMALL) >= _WORTH


def advice(entries: Iterable[TensorEntry]) -> str:
    """Return what would make a report of these tensors faster, or ""."""
    if _is_missing() and is_worth(entries):
        return "with Numba, this takes a fraction of the time: pip install spectral-core[numba]"
    return ""


def _is_missing() -> bool:
    return find_spec("numba") is None


@cache
def _kernels() -> Any:
    """Return the compiled loops, or None without Numba, or where it was told not to compile."""
    if _is_missing():
        return None
    try:
        from ..numba import gram

        return gram.kernels()
    except Exception as error:  # such as a Numba that does not know this version of NumPy
        warn(f"Numba does not work here, so a report is slower: {error}", SpectralWarning, 2)
        return None


def tiles_of(matrix: Matrix, decode: Decode, *, compiled: bool) -> Tiles:
    """Return what multiplies a matrix: compiled loops if they are wanted and know its memory."""
    if compiled and isinstance(decode, Widening) and _is_known(matrix, decode.name):
        kernels = _kernels()
        if kernels is not None:
            return CompiledTiles(matrix, decode, kernels)
    return Tiles(matrix, decode)


def _is_known(matrix: Matrix, name: str) -> TypeGuard[Stored]:
    """Return True for real numbers of a dtype that are contiguous along an axis."""
    if not isinstance(matrix, np.ndarray) or matrix.size <= _SMALL:
        return False
    dtype = matrix.dtype
    if dtype.name not in _LIKE or (dtype.kind == "u" and name != "bfloat16"):
        return False
    return dtype.isnative and matrix.flags.aligned and dtype.itemsize in matrix.strides


class CompiledTiles(Tiles):
    """A matrix whose products and sums are compiled. For all else, its tiles are decoded.

    Where a row of the matrix is contiguous, one look at four rows computes both products. Where a
    column is, the rows in memory are columns: each product needs its own look at a panel of them.

    Parameters
    ----------
    matrix : array, shape (m, n)
    decode : Widening
    kernels : module
        `spectral_core.numba.gram_kernels`.
    """

    def __init__(self, matrix: Stored, decode: Widening, kernels: Any) -> None:
        super().__init__(matrix, decode)
        stored: Stored = self._stored  # type: ignore[assignment]
        self._across = stored.strides[1] != stored.itemsize
        self._memory = _Rows(stored.T if self._across else stored, kernels)

    def gram(self, x: Stored) -> Stored:
        """Return WᵀW·x, or that of each row of x."""
        if self.exponent:
            return super().gram(x)
        X = np.array(x, np.float64, order="C", ndmin=2)
        count = len(X)
        if count > 1 and count % 2:  # two vectors share what is read
            X = np.concatenate([X, np.zeros_like(X[:1])])
        found = self._in_two_looks(X) if self._across else self._memory.both(X)
        return found[:count].reshape(x.shape)

    def _in_two_looks(self, X: Stored) -> Stored:
        """Return WᵀW·x, panel by panel.

        One look would do for WWᵀ. Its dimension m is the larger one, where the bound from Lanczos
        steps is wider. The second look decodes nothing more, it only reads from memory again.
        """
        found = np.zeros_like(X)
        for panel in self._panels():
            found += self._memory.times(self._memory.adjoint(X, panel), panel)
        return found

    def _panels(self) -> Iterator[range]:
        """Yield parts of the columns in memory: all at once where rows are rows of the matrix."""
        m, n = self._memory.shape
        step = max(_PANEL, _PANEL_SIZE // m) if self._across else n
        return (range(i, min(i + step, n)) for i in range(0, n, step))

    def sums(self) -> Sums:
        """Return sums of absolute values, and count what is zero and what is not finite."""
        rows = np.zeros(self._memory.shape[0])
        looks, longest, dead = [], 0.0, 0
        for panel in self._panels():
            columns, found = self._memory.look(panel, rows)
            looks += found
            longest = max(longest, float(columns.max()))
            dead += int((columns == 0).sum())
        largest = max(look.largest for look in looks)
        if not tiling.squares_fit(largest):
            return super().sums()
        nonfinite = sum(look.nonfinite for look in looks)
        both = int((rows == 0).sum()), dead
        return Sums(
            largest,
            nan if nonfinite else sum(look.square for look in looks) ** 0.5,
            self._product(float(rows.max()), longest),
            sum(look.zeros for look in looks),
            nonfinite,
            both[::-1] if self._across else both,
        )


class _Look(NamedTuple):
    """What the kernel finds in a part of the rows."""

    largest: float
    square: float
    zeros: int
    nonfinite: int


class _Rows:
    """A matrix W whose rows are contiguous in memory, as the kernels know it.

    Parameters
    ----------
    stored : array, shape (m, n)
    kernels : module
    """

    def __init__(self, stored: Stored, kernels: Any) -> None:
        self.shape = stored.shape
        self._stored, self._kernels = stored, kernels
        self._like = np.zeros(1, _LIKE[stored.dtype.name])
        self._wide = np.dtype("f8" if stored.itemsize == 8 else "f4")
        self._infinite = np.array([inf], self._wide).view(f"u{self._wide.itemsize}")

    def both(self, X: Stored) -> Stored:
        """Return WᵀW·x for each row of X, from one look at W."""
        Y = np.empty((len(X), self.shape[0]))
        every = range(self.shape[1])

        def part(rows: range) -> Stored:
            Z = np.zeros_like(X)
            self._multiply(rows, every, X, Y, Z, self._kernels.BOTH)
            return Z

        return np.sum(self._shared(part), axis=0)

    def adjoint(self, Y: Stored, panel: range) -> Stored:
        """Return the part of Wᵀy that belongs to some columns, for each row of Y."""

        def part(rows: range) -> Stored:
            Z = np.zeros((len(Y), len(panel)))
            self._multiply(rows, panel, Z, Y, Z, self._kernels.SECOND)
            return Z

        return np.sum(self._shared(part), axis=0)

    def times(self, X: Stored, panel: range) -> Stored:
        """Return the product of some columns with each row of X."""
        Y = np.empty((len(X), self.shape[0]))
        self._shared(lambda rows: self._multiply(rows, panel, X, Y, X, self._kernels.FIRST))
        return Y

    def look(self, panel: range, rows: Stored) -> tuple[Stored, list[_Look]]:
        """Return the sums of some columns, and add those of their rows to ``rows``."""

        def part(some: range) -> tuple[Stored, _Look]:
            columns = np.zeros(len(panel))
            place = self._place(some, panel)
            bits, *found = self._kernels.look(*place, rows, columns, self._like, self._infinite)
            largest = np.array([bits], self._infinite.dtype).view(self._wide)
            return columns, _Look(float(largest[0]), *found)

        parts = self._shared(part)
        return np.sum([columns for columns, _ in parts], axis=0), [look for _, look in parts]

    def _multiply(
        self, rows: range, panel: range, X: Stored, Y: Stored, Z: Stored, which: int
    ) -> None:
        kernels = self._kernels
        multiply = kernels.multiply if len(X) == 1 else kernels.multiply_pairs
        multiply(*self._place(rows, panel), X, Y, Z, self._like, which)

    def _place(self, rows: range, panel: range) -> tuple[int, int, int, int]:
        """Return the address of a panel, the bytes from row to row, and the ends of the rows."""
        address: int = self._stored.__array_interface__["data"][0]
        start = address + panel.start * self._stored.itemsize
        return start, self._stored.strides[0], rows.start, rows.stop

    def _parts(self) -> list[range]:
        """Return parts of the rows. Their number depends on the shape alone, as in `Tiles`."""
        m, count = self.shape[0], max(1, min(tiling.PARTS, self._stored.size // tiling.SERIAL))
        fours = -(-m // _FOUR)
        cuts = [min(m, _FOUR * (fours * i // count)) for i in range(count + 1)]
        return [range(a, b) for a, b in pairwise(cuts) if a < b]

    def _shared(self, action: Callable[[range], T]) -> list[T]:
        """Apply an action to parts of the rows, in threads, and return the results in order."""
        parts = self._parts()
        if len(parts) == 1:
            return [action(parts[0])]
        with ThreadPoolExecutor(tiling.cores()) as pool:
            return list(pool.map(action, parts))
