"""Read HDF5 as Keras writes it, by h5py: .weights.h5, whole models in .h5, and .keras."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .entry import MOST_TENSORS, Checkpoint, CheckpointError, Stored, TensorEntry, checked_shape
from .files import Mapped, readable, short, skipped
from .numbers import stored_dtype
from .zips import MOST_RATIO, Archive

_WEIGHTS = "model.weights.h5"
_MOST_DEPTH = 64
_LIBRARY = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)


def needed(module: str, extra: str = "report") -> Any:
    """Return an optional module, or raise an error that says how to install it."""
    try:
        return import_module(module)
    except ImportError:
        raise CheckpointError(
            f"needs the package {module}: pip install 'spectral-core[{extra}]'"
        ) from None


def read_keras(archive: Archive) -> Checkpoint:
    """List the weights of a .keras file. Its configuration, which may hold code, is not read."""
    return _read(archive.file.part(*archive.extent(_WEIGHTS)))


def read(path: Path) -> Checkpoint:
    """List the datasets of an HDF5 file."""
    return _read(Mapped(path))


def _read(file: Mapped) -> Checkpoint:
    h5py = needed("h5py")
    try:
        root = h5py.File(file.stream(), "r")
    except _LIBRARY as error:
        raise CheckpointError(f"is no HDF5 file that can be read: {short(error)}") from None
    entries: list[TensorEntry] = []
    seen: set[object] = set()
    waiting: list[tuple[str, Any]] = [("", root)]
    try:
        while waiting:
            path, group = waiting.pop()
            place = h5py.h5o.get_info(group.id).addr
            if place in seen:
                continue  # a hard link that leads back to a group
            seen.add(place)
            if path.count("/") > _MOST_DEPTH or len(seen) > MOST_TENSORS:
                raise CheckpointError("has too many groups, or too deep ones")
            for key in group:
                name = f"{path}/{key}".lstrip("/")
                # Links to names and to other files are not followed: they may lead anywhere.
                if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                    entries.append(skipped(name, (), "", "a link to another place"))
                    continue
                item = group[key]
                if isinstance(item, h5py.Group):
                    waiting.append((name, item))
                elif isinstance(item, h5py.Dataset):
                    entries.append(_entry(name, item, file))
    except _LIBRARY as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"has broken HDF5 structures: {short(error)}") from None
    return Checkpoint("keras", sorted(entries, key=lambda entry: _order(entry.name)))


def _order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts "dense_10" after "dense_9"."""
    parts = name.replace("_", "/").split("/")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _entry(name: str, item: Any, file: Mapped) -> TensorEntry:
    if item.shape is None:
        return skipped(name, (), "", "empty")
    shape = checked_shape(item.shape, f"dataset {short(name)}")
    own = _name_of(item)
    stored = stored_dtype(own)
    if stored is None:
        return skipped(name, shape, own[:40])
    if item.external or item.is_virtual:
        return skipped(name, shape, own, "its numbers are in another file")
    needed_bytes = item.size * stored.itemsize
    held = item.id.get_storage_size()
    if needed_bytes > 2**16 + MOST_RATIO * held:
        raise CheckpointError(
            f"dataset {short(name)} claims {needed_bytes:,} bytes, but holds {held:,}"
        )
    offset = item.id.get_offset() if item.dtype.isnative else None
    if offset is not None and item.dtype.itemsize == stored.itemsize and held >= needed_bytes:
        return file.entry(name, shape, own, offset)

    def load() -> Stored:
        try:
            return np.asarray(item[()]).view(stored) if own == "bfloat16" else item[()]
        except _LIBRARY as error:
            raise CheckpointError(f"dataset {short(name)} is broken: {short(error)}") from None

    return readable(name, shape, own, load)


def _name_of(item: Any) -> str:
    """Return the name of a dtype. Keras says in an attribute which two bytes are bfloat16."""
    attribute = item.attrs.get("dtype")
    if item.dtype.itemsize == 2 and item.dtype.kind == "V" and attribute == "bfloat16":
        return "bfloat16"
    return str(item.dtype.name)
