"""Decode stored numbers: bfloat16 and float8 by hand, everything else by NumPy.

A stored array has the dtype of its bytes (`stored_dtype`). That of a live model is floating-point,
for its framework decodes it. `widened` makes float64 of both, which holds each number exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from .entry import Stored

# exponent bits, mantissa bits, bias, and what the patterns of all ones mean
_FLOAT8 = {
    "float8_e4m3fn": (4, 3, 7, "fn"),
    "float8_e4m3fnuz": (4, 3, 8, "fnuz"),
    "float8_e5m2": (5, 2, 15, "ieee"),
    "float8_e5m2fnuz": (5, 2, 16, "fnuz"),
}
_STORED = {
    "bfloat16": "<u2",
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "complex64": "<c8",
    "complex128": "<c16",
    **dict.fromkeys(_FLOAT8, "u1"),
}
_EXACT_AS = {
    "bool": "?",
    **{f"int{8 * n}": f"<i{n}" for n in (1, 2, 4, 8)},
    **{f"uint{8 * n}": f"<u{n}" for n in (1, 2, 4, 8)},
}


def is_floating(name: str) -> bool:
    """Return True if `widened` knows the dtype."""
    return name in _STORED


def stored_dtype(name: str) -> np.dtype | None:
    """Return the dtype of the bytes of a tensor, or None for an unknown name.

    >>> stored_dtype("bfloat16")
    dtype('uint16')
    """
    code = _STORED.get(name) or _EXACT_AS.get(name)
    return None if code is None else np.dtype(code)


def widened(stored: Stored, name: str) -> Stored:
    """Return the numbers as float64 or complex128.

    >>> widened(np.array([0x3F80, 0xC000], np.uint16), "bfloat16")
    array([ 1., -2.])
    >>> widened(np.array([0x38, 0xB8, 0x7E], np.uint8), "float8_e4m3fn")
    array([  1.,  -1., 448.])
    """
    coded = stored.dtype.kind == "u"
    if coded and name == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        bits = stored.astype(np.uint32)
        bits <<= 16
        with np.errstate(invalid="ignore"):  # signaling NaN
            return bits.view(np.float32).astype(np.float64)
    if coded and name in _FLOAT8:
        return _table(name)[stored]
    with np.errstate(invalid="ignore"):
        return stored.astype(np.complex128 if stored.dtype.kind == "c" else np.float64)


class Widening:
    """Decode tiles of a dtype: each into new memory, or one after another into the same.

    A thread of its own gets its memory from a heap that the C library gives back after each tile.
    The system would clear new pages for the next one, which costs as much as the decoding.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._rooms: list[dict[str, Stored]] = []

    def __call__(self, stored: Stored) -> Stored:
        """Return the numbers of a tile in new memory."""
        return widened(stored, self.name)

    @contextmanager
    def reused(self) -> Iterator[Callable[[Stored], Stored]]:
        """Yield a function whose result is overwritten by its next call. Each thread needs one."""
        try:  # Each operation on the list is atomic; a look before the pop would be a second one.
            room = self._rooms.pop()
        except IndexError:
            room = {}
        yield lambda stored: self._into(stored, room)
        self._rooms.append(room)

    def _into(self, stored: Stored, room: dict[str, Stored]) -> Stored:
        if self.name not in ("bfloat16", "float32", "float16") or stored.ndim != 2:
            return self(stored)
        found = _place(room, "numbers", np.float64, stored)
        with np.errstate(invalid="ignore"):  # signaling NaN
            if stored.dtype.kind == "u":  # bfloat16
                bits = _place(room, "bits", np.uint32, stored)
                np.copyto(bits, stored)
                np.left_shift(bits, 16, out=bits)
                np.copyto(found, bits.view(np.float32))
            else:
                np.copyto(found, stored)
        return found


def _place(room: dict[str, Stored], key: str, dtype: type, like: Stored) -> Stored:
    """Return memory of the shape of a matrix, and with the order of its axes."""
    held = room.get(key)
    if held is None or held.size < like.size:
        held = room[key] = np.empty(like.size, dtype)
    part = held[: like.size]
    turned = abs(like.strides[0]) < abs(like.strides[1])
    return part.reshape(like.shape[::-1]).T if turned else part.reshape(like.shape)


@cache
def _table(name: str) -> Stored:
    """Return the 256 numbers of a float8 format."""
    exponent_bits, mantissa_bits, bias, special = _FLOAT8[name]
    code = np.arange(256)
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    normal = exponent > 0
    value = np.ldexp(fraction + normal, np.where(normal, exponent, 1) - bias)
    if special == "ieee":
        top = exponent == 2**exponent_bits - 1
        value = np.where(top, np.where(fraction == 0, np.inf, np.nan), value)
    if special == "fn":
        value = np.where((code & 0x7F) == 0x7F, np.nan, value)
    value = np.where(code >= 128, -value, value)
    if special == "fnuz":
        value = np.where(code == 0x80, np.nan, value)
    return value
