"""Read what Flax writes by `flax.serialization`: nested maps of MessagePack, and arrays in them.

The parser is written here for two reasons. It returns where an array's bytes are, so that they can
be mapped; and it checks each length against the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .entry import Checkpoint, CheckpointError, Stored, TensorEntry, check_count, checked_shape
from .files import Mapped, short, skipped
from .numbers import stored_dtype
from .pickles import walk

_MOST_DEPTH = 64
_MOST_VALUES = 4_000_000  # an empty list has 64 bytes of memory for one in the file
_MOST_SHORT = 1 << 16  # bytes of a string that is read: names and dtypes
_ARRAY = 1  # Flax's extension type; the others are single numbers
_CHUNKED = "__msgpack_chunked_array__"


class Span(NamedTuple):
    """Bytes of the file that were not read."""

    offset: int
    n_bytes: int


class Extension(NamedTuple):
    """An extension type of MessagePack, and its bytes."""

    code: int
    span: Span


def read(path: Path) -> Checkpoint:
    """List the arrays of a file of Flax."""
    file = Mapped(path)
    parser = _Parser(file)
    root = parser.value()
    if not isinstance(root, dict) or parser.position != file.size:
        raise CheckpointError("is no MessagePack file of Flax: it is not one map")
    found: list[TensorEntry] = []
    for name, leaf in walk(_joined(root), "/"):
        if isinstance(leaf, _Chunks):
            found.append(leaf.entry(name, file))
        elif isinstance(leaf, Extension) and leaf.code == _ARRAY:
            shape, dtype, span = _array(leaf.span, file)
            found.append(file.entry(name, shape, dtype, *span))
    check_count(len(found))
    return Checkpoint("flax", found)


class _Parser:
    """A cursor over MessagePack values."""

    def __init__(self, file: Mapped, start: int = 0, stop: int | None = None) -> None:
        self.position = start
        self._stop = file.size if stop is None else stop
        with file.path.open("rb") as source:
            self._map = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        self._depth = self._values = 0

    def value(self) -> Any:
        """Return the next value; byte strings and extensions stay in the file as a `Span`."""
        self._values += 1
        if self._values > _MOST_VALUES:
            raise CheckpointError(f"has more than {_MOST_VALUES:,} values")
        code = self._unsigned(1)
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 0x100
        if code < 0x90:
            return self._dict(code & 0x0F)
        if code < 0xA0:
            return self._list(code & 0x0F)
        if code < 0xC0:
            return self._string(code & 0x1F)
        return self._by_code(code)

    def _by_code(self, code: int) -> Any:
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if code in (0xC4, 0xC5, 0xC6):
            return self._span(self._unsigned(1 << (code - 0xC4)))
        if code in (0xC7, 0xC8, 0xC9):
            count = self._unsigned(1 << (code - 0xC7))
            return Extension(self._unsigned(1), self._span(count))
        if code in (0xCA, 0xCB):
            return float(np.frombuffer(self._bytes(4 * (code - 0xC9)), f">f{4 * (code - 0xC9)}")[0])
        if 0xCC <= code <= 0xCF:
            return self._unsigned(1 << (code - 0xCC))
        if 0xD0 <= code <= 0xD3:
            return int.from_bytes(self._bytes(1 << (code - 0xD0)), "big", signed=True)
        if 0xD4 <= code <= 0xD8:
            return Extension(self._unsigned(1), self._span(1 << (code - 0xD4)))
        if code in (0xD9, 0xDA, 0xDB):
            return self._string(self._unsigned(1 << (code - 0xD9)))
        if code in (0xDC, 0xDD):
            return self._list(self._unsigned(2 << (code - 0xDC)))
        if code in (0xDE, 0xDF):
            return self._dict(self._unsigned(2 << (code - 0xDE)))
        raise CheckpointError(f"has a byte {code:#x} that begins no value")

    def _list(self, count: int) -> list[Any]:
        self._enter(count)
        found = [self.value() for _ in range(count)]
        self._depth -= 1
        return found

    def _dict(self, count: int) -> dict[str, Any]:
        self._enter(2 * count)
        found = {}
        for _ in range(count):
            key = self.value()
            if not isinstance(key, str | int):
                raise CheckpointError("has a key that is no name")
            found[str(key)] = self.value()
        self._depth -= 1
        return found

    def _enter(self, count: int) -> None:
        """Count the depth, and check that a byte is left for each value."""
        self._depth += 1
        if self._depth > _MOST_DEPTH or count > self._stop - self.position:
            raise CheckpointError("has a list that is too deep, or ends past the end of the file")

    def _span(self, count: int) -> Span:
        start = self.position
        if count > self._stop - start:
            raise CheckpointError("has a value that ends past the end of the file")
        self.position += count
        return Span(start, count)

    def _bytes(self, count: int) -> bytes:
        start = self._span(count).offset
        return self._map[start : start + count]

    def _unsigned(self, count: int) -> int:
        return int.from_bytes(self._bytes(count), "big")

    def _string(self, count: int) -> str:
        if count > _MOST_SHORT:
            raise CheckpointError(f"has a string of {count:,} bytes")
        return self._bytes(count).decode("utf-8", "replace")


def _array(span: Span, file: Mapped) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    """Return the shape, the dtype and the place of an array: a list of three packed values."""
    parser = _Parser(file, span.offset, span.offset + span.n_bytes)
    match parser.value():
        case [list() as shape, str() as dtype, Span(offset, count)]:
            return checked_shape(shape, "an array"), dtype[:40], (offset, count)
    raise CheckpointError("has an array without a shape, a dtype and bytes")


class _Chunks(NamedTuple):
    """An array of more than 2³⁰ bytes, which Flax writes in pieces."""

    shape: object
    pieces: list[object]

    def entry(self, name: str, file: Mapped) -> TensorEntry:
        shape = self.shape
        if isinstance(shape, dict):  # Flax turns tuples into maps of "0", "1", …
            shape = list(shape.values())
        sizes = checked_shape(shape, f"array {short(name)}")
        found = [_array(x.span, file) for x in self.pieces if isinstance(x, Extension)]
        stored = stored_dtype(found[0][1]) if found else None
        if stored is None or len({dtype for _, dtype, _ in found}) > 1:
            return skipped(name, sizes, found[0][1] if found else "")
        count = sum(count for *_, (_, count) in found)
        if count != int(np.prod([stored.itemsize, *sizes], dtype=object)):
            raise CheckpointError(f"array {short(name)} has pieces that do not fit its shape")

        def load() -> Stored:
            parts = [
                file.array(offset, stored, (count // stored.itemsize,))
                for *_, (offset, count) in found
            ]
            return np.concatenate(parts).reshape(sizes)

        return TensorEntry(name, sizes, found[0][1], load)


def _joined(tree: dict[str, Any]) -> Any:
    """Return the tree with each array that is in pieces as one leaf."""
    if _CHUNKED in tree:
        pieces = tree.get("chunks")
        return _Chunks(tree.get("shape"), list(pieces.values()) if isinstance(pieces, dict) else [])
    return {key: _joined(x) if isinstance(x, dict) else x for key, x in tree.items()}
