"""Read GGUF: a list of tensors with their types, of which the quantized ones are named alone."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from .entry import Checkpoint, CheckpointError, check_count, checked_shape
from .files import Mapped, short, skipped

_TYPES = {0: "float32", 1: "float16", 28: "float64", 30: "bfloat16"}
_TYPES |= {24: "int8", 25: "int16", 26: "int32", 27: "int64"}
_QUANTIZED = {
    **{2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS"},
    **{18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}
_VALUES = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q"}
_VALUES[12] = "<d"
_STRING, _ARRAY = 8, 9
_MOST_HEADER = 64 * 2**20


class _Cursor:
    """A position in the header."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise CheckpointError("has a header that ends past the end of the file, or is huge")
        found = self._data[self.position : end]
        self.position = end
        return found

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return a value of the metadata; an array is passed over."""
        if kind in _VALUES:
            return self.number(_VALUES[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 4:
            raise CheckpointError(f"has metadata of the unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _VALUES:
            self.take(count * struct.calcsize(_VALUES[inner]))
        else:  # each string or array has eight bytes at least: the header bounds the loop
            for _ in range(count):
                self.value(inner, depth + 1)
        return None


def read(path: Path) -> Checkpoint:
    """List the tensors of a GGUF file."""
    file = Mapped(path)
    cursor = _Cursor(file.read(0, min(file.size, _MOST_HEADER)))
    cursor.take(4)
    version, count, n_values = cursor.number("<I"), cursor.number("<Q"), cursor.number("<Q")
    if version not in (2, 3):
        raise CheckpointError(f"is GGUF of version {version}; 2 and 3 are read")
    check_count(count)
    alignment = 32
    for _ in range(n_values):
        key, kind = cursor.string(), cursor.number("<I")
        value = cursor.value(kind)
        if key == "general.alignment" and isinstance(value, int):
            alignment = value
    tensors = [_tensor(cursor) for _ in range(count)]
    if alignment < 1:
        raise CheckpointError("has an alignment of zero")
    start = -(-cursor.position // alignment) * alignment
    entries = []
    for name, shape, kind, offset in tensors:
        if kind in _TYPES:
            entries.append(file.entry(name, shape, _TYPES[kind], start + offset))
        else:
            own = _QUANTIZED.get(kind, f"type {kind}")
            entries.append(skipped(name, shape, own, f"{own}: quantized in blocks"))
    return Checkpoint("gguf", entries)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, n_axes = cursor.string(), cursor.number("<I")
    if n_axes > 8:
        raise CheckpointError(f"tensor {short(name)} has {n_axes} axes")
    sizes = [cursor.number("<Q") for _ in range(n_axes)]
    # GGUF lists the axis that changes fastest first.
    shape = checked_shape(sizes[::-1], f"tensor {short(name)}")
    return name, shape, cursor.number("<I"), cursor.number("<Q")
