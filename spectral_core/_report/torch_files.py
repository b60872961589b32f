"""Read what `torch.save` writes, without PyTorch: the zip format, and the one before 1.6.

Both hold a pickle that says how each tensor views a storage, and the bytes of the storages. In the
zip format the storages are uncompressed members, so they can be mapped where they stand.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .entry import Checkpoint, CheckpointError, Stored, TensorEntry, check_count, checked_shape
from .files import Mapped, readable, short, skipped
from .numbers import stored_dtype
from .pickles import Call, Global, Persistent, loads, walk
from .zips import Archive

_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class Storage(NamedTuple):
    """Where the bytes of a storage are."""

    file: Mapped
    offset: int
    n_bytes: int


Find = Callable[[str, int], Storage]  # (key, number of elements · size) -> Storage


def read_zip(archive: Archive) -> Checkpoint:
    """List the tensors of a zip file of `torch.save`."""
    pickled = [name for name in archive.names if name.rpartition("/")[2] == "data.pkl"]
    if len(pickled) != 1:
        raise CheckpointError("has more than one data.pkl")
    root = pickled[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in archive.names:
        raise CheckpointError("is a TorchScript module, which holds code: save its state_dict()")
    if f"{root}byteorder" in archive.names and archive.read(f"{root}byteorder") != b"little":
        raise CheckpointError("is in big-endian byte order, which is not read")

    def find(key: str, _: int) -> Storage:
        return Storage(archive.file, *archive.extent(f"{root}data/{key}"))

    return Checkpoint("torch", listed(loads(io.BytesIO(archive.read(pickled[0]))), find))


def read_legacy(path: Path) -> Checkpoint:
    """List the tensors of a file of PyTorch before 1.6.

    The storages come after the pickles, each with its number of elements before it. Their order is
    that of a list of keys; their sizes are those of the dtypes that the first pickle names.
    """
    file = Mapped(path)
    with path.open("rb") as source:
        if loads(source) != _MAGIC:
            raise CheckpointError("is a pickle, but not one of torch.save")
        loads(source)
        system = loads(source)
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise CheckpointError("is in big-endian byte order, which is not read")
        root, keys = loads(source), loads(source)
        position = source.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError("has no list of storages")
    widths = {str(value[2]): _width(value[1]) for value in _storages(root)}
    places = {}
    for key in keys:
        count = int.from_bytes(file.read(position, 8, "a storage"), "little", signed=True)
        size = count * widths.get(key, 0)
        if not 0 <= size <= file.size - position - 8:
            raise CheckpointError(f"storage {short(key)} ends past the end of the file")
        places[key] = Storage(file, position + 8, size)
        position += 8 + size

    def find(key: str, _: int) -> Storage:
        if key not in places:
            raise CheckpointError(f"storage {short(key)} is missing")
        return places[key]

    return Checkpoint("torch", listed(root, find))


def _storages(root: object) -> list[tuple[object, ...]]:
    """Return the references to storages in a pickle's data, wherever they are."""
    found, waiting, seen = [], [root], set()
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Persistent):
            if isinstance(x.value, tuple) and len(x.value) >= 5:
                found.append(x.value)
        elif isinstance(x, Call):
            waiting += [x.function, x.arguments, x.state]
        elif isinstance(x, dict):
            waiting += x.values()
        elif isinstance(x, list | tuple):
            waiting += x
    return found


def _width(kind: object) -> int:
    stored = stored_dtype(_STORAGES.get(kind.name, "uint8") if isinstance(kind, Global) else "")
    return stored.itemsize if stored else 0


def listed(root: object, find: Find) -> list[TensorEntry]:
    """Return the entries of the tensors in a pickle's data."""
    found = []
    views: dict[object, str] = {}
    for name, leaf in walk(root):
        leaf = _tensor_of(leaf)
        if leaf is None:
            continue
        entry, view = _entry(name, leaf, find)
        if view in views and not entry.skip:  # two names of one tensor
            entry = skipped(name, entry.shape, entry.dtype, f"the same tensor as {views[view]}")
        views.setdefault(view, name)
        found.append(entry)
        check_count(len(found))
    return found


def _tensor_of(leaf: object) -> Call | None:
    """Return the call that makes a tensor: of a parameter, that of its data."""
    for _ in range(4):
        if not isinstance(leaf, Call):
            return None
        if leaf.name in ("_rebuild_parameter", "_rebuild_parameter_with_state", "Parameter"):
            leaf = leaf.arguments[0] if leaf.arguments else None
        elif leaf.name == "_rebuild_from_type_v2" and len(leaf.arguments) > 2:
            function, _, arguments, *_ = leaf.arguments
            leaf = Call(function, arguments)
        else:
            break
    if not isinstance(leaf, Call):
        return None
    return leaf if leaf.name.startswith("_rebuild_") else None


def _entry(name: str, call: Call, find: Find) -> tuple[TensorEntry, object]:
    """Return the entry of a tensor, and what is equal for two names of one tensor."""
    what = f"tensor {short(name)}"
    if call.name not in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        reason = f"{call.name.removeprefix('_rebuild_')}: quantized, sparse or without values"
        return skipped(name, (), "", reason), id(call)
    match call.arguments:
        case (
            Persistent(("storage", Global() as kind, key, _, count, *_)),
            int(start),
            size,
            stride,
            *_,
        ):
            pass
        case _:
            raise CheckpointError(f"{what} has no storage")
    if not isinstance(key, str) or not isinstance(count, int):
        raise CheckpointError(f"{what} has no storage")
    shape = checked_shape(_plain(size), what)
    steps = checked_shape(_plain(stride), what)
    dtype = _STORAGES.get(kind.name, "")
    if kind.name == "UntypedStorage":
        dtype = _dtype_of(call)
    stored = stored_dtype(dtype)
    if stored is None:
        return skipped(name, shape, dtype or kind.name), id(call)
    storage = find(key, count)
    if len(steps) != len(shape):
        raise CheckpointError(f"{what} has {len(shape)} axes and {len(steps)} strides")
    last = start + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if 0 not in shape and not 0 <= start <= last < storage.n_bytes // stored.itemsize:
        raise CheckpointError(f"{what} ends past the end of its storage")

    def load() -> Stored:
        if 0 in shape:
            return np.empty(shape, stored)
        flat = storage.file.array(
            storage.offset + start * stored.itemsize, stored, (last - start + 1,)
        )
        strides = tuple(step * stored.itemsize for step in steps)
        return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)

    entry = readable(name, shape, dtype, load)
    return entry, (key, start, shape, steps)


def _dtype_of(call: Call) -> str:
    """Return the dtype that a tensor of an untyped storage names in its arguments."""
    names = [x.name for x in call.arguments if isinstance(x, Global) and x.module == "torch"]
    return names[0] if names else ""


def _plain(sizes: object) -> object:
    """Return the tuple in a torch.Size."""
    if isinstance(sizes, Call) and sizes.name == "Size" and sizes.arguments:
        return sizes.arguments[0]
    return sizes
