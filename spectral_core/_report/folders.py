"""Find out what a path holds, by its first bytes, and read it: a file, or a folder of files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from . import gguf, hdf5, msgpack_files, numpy_files, orbax, safetensors, torch_files, torch_folders
from .entry import MOST_NAME, Checkpoint, CheckpointError, TensorEntry, check_count
from .files import Mapped, parsed_json, short
from .numbers import stored_dtype
from .zips import Archive

_INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
# In this order: a hub offers one model in several formats, and the first one suffices.
_PATTERNS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.weights.h5",
    "*.h5",
    "*.keras",
    "*.msgpack",
    "*.npz",
    "*.npy",
    "*.gguf",
)
_NO_WEIGHTS = {
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
}
_MOST_FILES = 10_000
_MOST_DEPTH = 3
# Declared bytes of all tensors to the bytes on the disk. Views may share a storage, but tensors
# that claim a file again and again would take forever.
_MOST_REUSE = 16


def opened(path: str | Path) -> Checkpoint:
    """List the tensors of a file or folder.

    Raises
    ------
    CheckpointError
        With one line that names the path, and says what is wrong.
    """
    path = Path(path)
    try:
        found = _folder(path, 0) if path.is_dir() else _file(path)
        _check_total(found.entries, _bytes_of(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{path}: cannot be read: {reason}") from None
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: is broken: {short(error)}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: is nested too deep") from None
    return found


def _file(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError("there is no such file or folder")
    file = Mapped(path)
    head = file.read(0, min(16, file.size))
    if head.startswith(b"PK\x03\x04"):
        return _zip(Archive(file))
    if head.startswith(b"\x93NUMPY"):
        return numpy_files.read_npy(path)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return hdf5.read(path)
    if head.startswith(b"GGUF"):
        return gguf.read(path)
    if path.suffix == ".msgpack":
        return msgpack_files.read(path)
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return safetensors.read(path)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return torch_files.read_legacy(path)
    raise CheckpointError("is in no format that is read")


def _zip(archive: Archive) -> Checkpoint:
    names = archive.names
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return torch_files.read_zip(archive)
    if "model.weights.h5" in names:
        return hdf5.read_keras(archive)
    if any(name.endswith(".npy") for name in names):
        return numpy_files.read_npz(archive)
    raise CheckpointError("is a zip file without weights that are known")


def _folder(folder: Path, depth: int) -> Checkpoint:
    if (folder / torch_folders.INDEX).is_file():
        return torch_folders.read(folder)
    if (folder / orbax.INDEX).is_file():
        return orbax.read(folder)
    for pattern in _INDEXES:
        for index in sorted(folder.glob(pattern)):
            return _joined([(file, "") for file in _shards(index)])
    for pattern in _PATTERNS:
        files = [x for x in sorted(folder.glob(pattern)) if x.name not in _NO_WEIGHTS]
        if files:
            _check_files(files)
            several = len(files) > 1 and not all("-of-" in x.name for x in files)
            return _joined([(x, f"{x.stem}/" if several else "") for x in files])
    return _subfolders(folder, depth)


def _subfolders(folder: Path, depth: int) -> Checkpoint:
    """Read the folders in a folder: parts of a pipeline, the items of Orbax, a hub's cache."""
    parts = []
    if depth < _MOST_DEPTH:
        inner = [x for x in sorted(folder.iterdir()) if x.is_dir() and not x.is_symlink()]
        _check_files(inner)
        for x in inner:
            try:
                parts.append((x.name, _folder(x, depth + 1)))
            except _NothingError:
                continue
    if not parts:
        raise _NothingError("is a folder without weights that are known")
    entries = [replace(e, name=f"{name}/{e.name}") for name, part in parts for e in part.entries]
    if len(parts) == 1:
        entries = parts[0][1].entries
    return Checkpoint(parts[0][1].kind, entries)


class _NothingError(CheckpointError):
    """A folder without weights."""


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names. Each must be a plain name beside the index."""
    file = Mapped(index)
    names = parsed_json(file.read(0, file.size, index.name), index.name).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index.name} has no weight_map")
    found = sorted({str(name) for name in names.values()})
    _check_files(found)
    for name in found:
        if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{index.name} names {short(name)}, which is no file beside it")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.name} names {short(name)}, which is missing")
    return [index.parent / name for name in found]


def _joined(files: list[tuple[Path, str]]) -> Checkpoint:
    found: list[TensorEntry] = []
    kind = ""
    for path, prefix in files:
        try:
            part = _file(path)
        except CheckpointError as error:
            raise CheckpointError(f"{path.name}: {error}") from None
        kind = kind or part.kind
        found += [replace(x, name=f"{prefix}{x.name}") if prefix else x for x in part.entries]
    check_count(len(found))
    return Checkpoint(kind, found)


def _check_files(files: list[Path] | list[str]) -> None:
    if len(files) > _MOST_FILES:
        raise CheckpointError(f"has more than {_MOST_FILES:,} files")


def _bytes_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    inner = islice(path.rglob("*"), _MOST_FILES)  # the folder may be one of many others
    return sum(x.stat().st_size for x in inner if x.is_file())


def _check_total(entries: Iterable[TensorEntry], held: int) -> None:
    """Raise if the tensors claim far more bytes than there are, as no saved model does."""
    claimed = 0
    for entry in entries:
        if len(entry.name) > MOST_NAME:
            raise CheckpointError(f"a tensor's name has {len(entry.name):,} characters")
        stored = stored_dtype(entry.dtype)
        claimed += entry.size * stored.itemsize if stored and not entry.skip else 0
    if claimed > 2**28 + _MOST_REUSE * held:
        raise CheckpointError(
            f"its tensors claim {claimed:,} bytes, but there are {held:,} on the disk"
        )
