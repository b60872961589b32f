"""Read folders of Orbax: names and paths from its index, numbers by TensorStore."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .entry import Checkpoint, CheckpointError, Stored, TensorEntry, check_count, checked_shape
from .files import Mapped, parsed_json, readable, short, skipped
from .hdf5 import needed
from .numbers import stored_dtype

INDEX = "_METADATA"
_LIBRARY = (ValueError, OSError, RuntimeError, NotImplementedError, TypeError, KeyError)


def read(folder: Path) -> Checkpoint:
    """List the arrays of a folder that Orbax wrote."""
    file = Mapped(folder / INDEX)
    index = parsed_json(file.read(0, file.size, INDEX), INDEX)
    tree = index.get("tree_metadata")
    if not isinstance(tree, dict):
        raise CheckpointError(f"has a {INDEX} without a tree")
    check_count(len(tree))
    driver = "zarr3" if index.get("use_zarr3") else "zarr"
    entries = []
    for fields in tree.values():
        path = _path(fields)
        kind = fields.get("value_metadata", {})
        kind = kind.get("value_type", "") if isinstance(kind, dict) else ""
        if kind in ("jax.Array", "np.ndarray", ""):
            entries.append(_entry(path, _spec(folder, path, driver, bool(index.get("use_ocdbt")))))
        else:
            entries.append(skipped("/".join(path), (), "", f"{kind}: not an array"))
    return Checkpoint("flax", entries)


def _path(fields: Any) -> list[str]:
    """Return the keys on the way to a leaf. A key is a name, never a path of the file system."""
    keys = fields.get("key_metadata") if isinstance(fields, dict) else None
    names = (
        [str(x.get("key")) for x in keys if isinstance(x, dict)] if isinstance(keys, list) else []
    )
    if not names or any(not name or "/" in name or name in (".", "..") for name in names):
        raise CheckpointError(f"has a {INDEX} with a key that is no name")
    return names


def _spec(folder: Path, path: list[str], driver: str, is_database: bool) -> dict[str, Any]:
    name = ".".join(path)
    place = folder.resolve().as_uri()
    if is_database:
        return {"driver": driver, "kvstore": {"driver": "ocdbt", "base": place, "path": name + "/"}}
    return {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder.resolve()}/{name}/"}}


def _entry(path: list[str], spec: dict[str, Any]) -> TensorEntry:
    name = "/".join(path)
    try:
        array = needed("tensorstore", "report-orbax").open(spec, open=True, read=True).result()
    except _LIBRARY as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"array {short(name)} cannot be opened: {short(error)}") from None
    shape = checked_shape(list(array.shape), f"array {short(name)}")
    dtype = str(array.dtype.name)
    stored = stored_dtype(dtype)
    if stored is None:
        return skipped(name, shape, dtype)
    return readable(name, shape, dtype, _loader(array, stored, name))


def _loader(array: Any, stored: np.dtype, name: str) -> Callable[[], Stored]:
    def load() -> Stored:
        try:
            return np.asarray(array.read().result()).view(stored)
        except _LIBRARY as error:
            raise CheckpointError(f"array {short(name)} is broken: {short(error)}") from None

    return load
