"""Read folders of `torch.distributed.checkpoint`: an index of pieces, and files of pieces."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .entry import Checkpoint, CheckpointError, Stored, TensorEntry, check_count, checked_shape
from .files import Mapped, readable, short, skipped
from .numbers import stored_dtype
from .pickles import Call, Global, loads
from .torch_files import read_zip
from .zips import Archive

INDEX = ".metadata"


class _Piece(NamedTuple):
    """A block of a tensor: where it belongs, and the bytes of its zip file."""

    offsets: tuple[int, ...]
    file: str
    start: int
    n_bytes: int


def read(folder: Path) -> Checkpoint:
    """List the tensors of a folder of `torch.distributed.checkpoint`."""
    with Mapped(folder / INDEX).stream() as source:
        index = _state(loads(source), "Metadata")
    tensors, places = index.get("state_dict_metadata"), index.get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise CheckpointError(f"has a {INDEX} without tensors and places")
    check_count(len(tensors))
    pieces: dict[str, list[_Piece]] = {}
    for key, value in places.items():
        name, piece = _piece(key, value)
        pieces.setdefault(name, []).append(piece)
    entries = []
    for name, metadata in tensors.items():
        if isinstance(metadata, Call) and metadata.name == "TensorStorageMetadata":
            entries.append(_entry(str(name), metadata, pieces.get(str(name), []), folder))
    return Checkpoint("torch", entries)


def _state(found: object, name: str) -> dict[str, object]:
    """Return the attributes of an object of a class."""
    if isinstance(found, Call) and found.name == name and isinstance(found.state, dict):
        return found.state
    raise CheckpointError(f"has a {INDEX} without a {name}")


def _sizes(found: object, what: str) -> tuple[int, ...]:
    if isinstance(found, Call) and found.name == "Size" and found.arguments:
        found = found.arguments[0]
    return checked_shape(found, what)


def _piece(key: object, value: object) -> tuple[str, _Piece]:
    where, stored = _state(key, "MetadataIndex"), _state(value, "_StorageInfo")
    name = str(where.get("fqn"))
    offset = where.get("offset")
    what = f"a piece of {short(name)}"
    file, start, count = (stored.get(x) for x in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not isinstance(start, int) or not isinstance(count, int):
        raise CheckpointError(f"{what} has no place")
    if Path(file).name != file or file in ("", ".", ".."):
        raise CheckpointError(f"{what} is at {short(file)}, which is not a file of the folder")
    if stored.get("transform_descriptors"):
        raise CheckpointError(f"{what} is compressed or encrypted, which is not read")
    return name, _Piece(() if offset is None else _sizes(offset, what), file, start, count)


def _entry(name: str, metadata: Call, pieces: list[_Piece], folder: Path) -> TensorEntry:
    what = f"tensor {short(name)}"
    fields = _state(metadata, "TensorStorageMetadata")
    shape = _sizes(fields.get("size"), what)
    dtype = _dtype(fields.get("properties"))
    stored = stored_dtype(dtype)
    if stored is None:
        return skipped(name, shape, dtype)

    def load() -> Stored:
        found = [(piece.offsets, _stored(piece, folder, dtype, what)) for piece in pieces]
        if len(found) == 1 and found[0][1].shape == shape:
            return found[0][1]
        return _assembled(found, shape, stored, what)

    return readable(name, shape, dtype, load)


def _dtype(properties: object) -> str:
    """Return the dtype among the properties, whose state is a tuple or a dict by version."""
    state = properties.state if isinstance(properties, Call) else None
    values = (
        state.values() if isinstance(state, dict) else state if isinstance(state, tuple) else ()
    )
    names = [x.name for x in values if isinstance(x, Global) and x.module == "torch"]
    return names[0] if names else ""


def _stored(piece: _Piece, folder: Path, dtype: str, what: str) -> Stored:
    file = Mapped(folder / piece.file).part(piece.start, piece.n_bytes)
    found = read_zip(Archive(file)).entries
    if len(found) != 1 or found[0].dtype != dtype:
        raise CheckpointError(f"{what}: a piece does not hold one tensor of {dtype}")
    return found[0].load()


def _assembled(
    pieces: list[tuple[tuple[int, ...], Stored]], shape: tuple[int, ...], dtype: np.dtype, what: str
) -> Stored:
    """Return a tensor from its blocks, which must cover each element."""
    covered = sum(block.size for _, block in pieces)
    whole = int(np.prod([1, *shape], dtype=object))
    if covered != whole:
        raise CheckpointError(f"{what} has {whole:,} elements, but its pieces {covered:,}")
    found, filled = np.empty(shape, dtype), np.zeros(shape, bool)
    for offsets, block in pieces:
        place = tuple(slice(a, a + n) for a, n in zip(offsets, block.shape, strict=False))
        if found[place].shape != block.shape:
            raise CheckpointError(f"{what} has a piece outside of its shape")
        found[place], filled[place] = block, True
    if not filled.all():
        raise CheckpointError(f"{what} has pieces that overlap")
    return found
