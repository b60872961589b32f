"""Read .npy and .npz: headers by NumPy's own functions, data by mapping; never a pickle."""

from __future__ import annotations

import io
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .entry import Checkpoint, CheckpointError, Stored, TensorEntry, check_count, checked_shape
from .files import Mapped, readable, short, skipped
from .numbers import stored_dtype
from .zips import Archive

_MOST_HEADER = 1 << 16


def read_npy(path: Path) -> Checkpoint:
    """Return the one array of a .npy file."""
    file = Mapped(path)
    return Checkpoint("numpy", [_mapped(path.stem, file, 0, file.size)])


def read_npz(archive: Archive) -> Checkpoint:
    """List the arrays of a .npz file; uncompressed ones are mapped."""
    check_count(len(archive.names))
    entries = []
    for member in archive.names:
        name = member.removesuffix(".npy")
        if name == member:
            entries.append(skipped(name, (), "", "not an array"))
        elif archive.is_stored(member):
            entries.append(_mapped(name, archive.file, *archive.extent(member)))
        else:
            entries.append(_inflated(name, archive, member))
    return Checkpoint("numpy", entries)


def _mapped(name: str, file: Mapped, offset: int, count: int) -> TensorEntry:
    head = io.BytesIO(file.read(offset, min(count, _MOST_HEADER)))
    shape, fortran, dtype = _header(head, name)
    start = offset + head.tell()

    def load(stored: np.dtype) -> Stored:
        return file.array(start, stored, shape, "F" if fortran else "C")

    return _entry(name, shape, dtype, count - head.tell(), load)


def _inflated(name: str, archive: Archive, member: str) -> TensorEntry:
    # The header says what is needed, and the directory of the zip file what there is.
    head = io.BytesIO(archive.start(member, _MOST_HEADER))
    shape, fortran, dtype = _header(head, name)
    start, count = head.tell(), archive.members[member].file_size

    def load(stored: np.dtype) -> Stored:
        flat = np.frombuffer(archive.read(member, most=count), np.uint8)[start:]
        return flat.view(stored).reshape(shape, order="F" if fortran else "C")

    return _entry(name, shape, dtype, count - start, load)


def _header(head: BinaryIO, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return the shape, the order and the dtype that the header of an array declares."""
    what = f"array {short(name)}"
    try:
        version = np.lib.format.read_magic(head)
        reads = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in reads:
            raise CheckpointError(f"{what} has a header of version {version}")
        shape, fortran, dtype = reads[version](head)
    except CheckpointError:
        raise
    # NumPy evaluates the header as a literal, which raises errors of many types, TokenError among
    # them.
    except Exception as error:
        raise CheckpointError(f"{what} has a broken header: {short(error)}") from None
    return checked_shape(shape, what), fortran, dtype


def _entry(
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    count: int,
    load: Callable[[np.dtype], Stored],
) -> TensorEntry:
    if dtype.hasobject:
        return skipped(name, shape, "object", "objects: a pickle, which is never read")
    own = _name_of(dtype)
    if stored_dtype(own) is None:
        return skipped(name, shape, str(dtype)[:40])
    if prod(shape) * dtype.itemsize != count:
        raise CheckpointError(f"array {short(name)} has a shape that does not fit its bytes")
    stored = np.dtype("<u2") if own == "bfloat16" else dtype
    return readable(name, shape, own, lambda: load(stored))


def _name_of(dtype: np.dtype) -> str:
    """Return the name of a dtype. NumPy saves bfloat16 as two bytes without a meaning."""
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        return "bfloat16"
    return dtype.name[:40]
