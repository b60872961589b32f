"""Read headers and map tensors of a file, after a check of every number that the file claims."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from .entry import CheckpointError, Stored, TensorEntry
from .numbers import is_floating, stored_dtype

_MOST_VALUES = 8_000_000  # of JSON, each of some 40 bytes in memory
MOST_HEADER = 100 * 2**20  # bytes of a header: a million tensors of 100 bytes each
_MOST_COPIED = 2**26  # bytes of an array
_CUT = "a tensor ends past the end of the file, which was cut after its header was read"


class Mapped:
    """A regular file, or ``size`` bytes of one from ``start``, whose parts can be read or mapped.

    Each large array is a map of its own. It is unmapped with the array, so memory holds one tensor
    at a time. One map of the whole file would count as used memory until its end.
    """

    def __init__(self, path: Path, start: int = 0, size: int | None = None) -> None:
        if not path.is_file():
            raise CheckpointError("is not a regular file")
        whole = path.stat().st_size
        if not whole:
            raise CheckpointError("is empty")
        self.path, self.start = path, start
        self.size = whole - start if size is None else size
        if not 0 <= start <= start + self.size <= whole:
            raise CheckpointError("a part ends past the end of the file")

    def read(self, offset: int, count: int, what: str = "the header") -> bytes:
        """Return bytes that must be there."""
        if not 0 <= offset <= offset + count <= self.size:
            raise CheckpointError(f"{what} ends past the end of the file")
        if count > MOST_HEADER:
            raise CheckpointError(f"{what} has {count:,} bytes")
        with self.path.open("rb") as file:
            file.seek(self.start + offset)
            found = file.read(count)
        if len(found) < count:
            raise CheckpointError(f"{what} ends past the end of the file")
        return found

    def array(
        self, offset: int, dtype: np.dtype, shape: tuple[int, ...], order: Literal["C", "F"] = "C"
    ) -> Stored:
        """Return an array: a copy of a small one, a map of a large one.

        A map of a file that is cut later ends the process at the next look, which no handler can
        prevent. So only what is too large to copy is mapped.
        """
        count = prod(shape) * dtype.itemsize
        if not 0 <= offset <= offset + count <= self.size:
            raise CheckpointError("a tensor ends past the end of the file")
        if not count:
            return np.empty(shape, dtype)
        if count <= _MOST_COPIED:
            flat = np.empty(count, np.uint8)
            with self.path.open("rb") as file:
                file.seek(self.start + offset)
                if file.readinto(flat.data) < count:
                    raise CheckpointError(_CUT)
            return flat.view(dtype).reshape(shape, order=order)
        if self.path.stat().st_size < self.start + offset + count:
            raise CheckpointError(_CUT)
        return np.memmap(self.path, dtype, "r", self.start + offset, shape, order)

    def part(self, offset: int, size: int) -> Mapped:
        """Return a part of the file as a file of its own."""
        if not 0 <= offset <= offset + size <= self.size:
            raise CheckpointError("a part ends past the end of the file")
        return Mapped(self.path, self.start + offset, size)

    def stream(self) -> BinaryIO:
        """Return an open file of these bytes alone."""
        return io.BufferedReader(_Stream(self))

    def entry(
        self, name: str, shape: tuple[int, ...], dtype: str, offset: int, count: int | None = None
    ) -> TensorEntry:
        """Return the entry of a contiguous tensor, whose bytes must be inside of the file.

        ``count`` is the number of bytes that the file claims for it, where it claims one.
        """
        stored = stored_dtype(dtype)
        if stored is None:
            return skipped(name, shape, dtype)
        needed = prod(shape) * stored.itemsize
        if count is not None and needed != count:
            raise CheckpointError(
                f"tensor {short(name)} has {count:,} bytes, but its shape needs {needed:,}"
            )
        if not 0 <= offset <= offset + needed <= self.size:
            raise CheckpointError(f"tensor {short(name)} ends past the end of the file")
        return readable(name, shape, dtype, lambda: self.array(offset, stored, shape))


class _Stream(io.RawIOBase):
    """The bytes of a `Mapped` as a file that h5py and zipfile accept."""

    def __init__(self, mapped: Mapped) -> None:
        self._file = mapped.path.open("rb", buffering=0)
        self._start, self._size = mapped.start, mapped.size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._size)[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        wanted = min(len(buffer), max(0, self._size - self._position))
        found = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._position += found
        return found

    def close(self) -> None:
        self._file.close()
        super().close()


def readable(
    name: str, shape: tuple[int, ...], dtype: str, load: Callable[[], Stored]
) -> TensorEntry:
    """Return an entry, with the reason why it is skipped if its dtype is not floating-point."""
    reason = "" if is_floating(dtype) else f"{dtype}: not floating-point (indices, or quantized)"
    return TensorEntry(name, shape, dtype, load, reason)


def skipped(name: str, shape: tuple[int, ...], dtype: str, reason: str = "") -> TensorEntry:
    """Return the entry of a tensor that no reader can decode."""

    def load() -> Stored:
        raise CheckpointError(f"tensor {short(name)} cannot be read")

    return TensorEntry(name, shape, dtype, load, reason or f"{dtype}: not a dtype that is read")


def short(name: object) -> str:
    r"""Return a name for one line of a message: printable, and at most 80 characters.

    >>> short("a\nb")
    "'a\\nb'"
    """
    text = repr(str(name)[:81])
    return text if len(text) <= 80 else f"{text[:79]}…"


def parsed_json(text: bytes, what: str) -> dict[str, Any]:
    """Return a JSON object, or raise `CheckpointError`."""
    if sum(map(text.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise CheckpointError(f"{what} has more than {_MOST_VALUES:,} values")
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no JSON: {short(error)}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is no JSON object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found
