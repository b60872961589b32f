"""List the tensors of what `report` and `compare` accept: a path, arrays, or a live model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays import as_numpy
from .entry import Checkpoint, CheckpointError, Stored, TensorEntry
from .files import readable, short
from .folders import opened


def listed(source: Any) -> Checkpoint:
    """Return the tensors of a path, of a mapping of arrays that may be nested, or of a model."""
    return opened(source) if isinstance(source, str | Path) else _live(source)


def name_of(source: Any) -> str:
    """Return a path, or the class of a live source."""
    return str(source) if isinstance(source, str | Path) else type(source).__name__


@contextmanager
def blamed(source: Any, entry: TensorEntry) -> Iterator[None]:
    """Name the source in errors of what is read there."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name_of(source)}: {error}") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{name_of(source)}: {short(entry.name)}: {reason}") from None


def _live(source: Any) -> Checkpoint:
    """Return the arrays of a mapping, a nested one, or of a model of PyTorch or Keras."""
    kind = "numpy"
    if callable(getattr(source, "state_dict", None)):
        source, kind = source.state_dict(), "torch"
    elif hasattr(source, "weights") and hasattr(source, "trainable_weights"):
        source, kind = {x.path: x.numpy() for x in source.weights}, "keras"
    if not isinstance(source, Mapping):
        raise CheckpointError(
            f"a report needs a path, a mapping of arrays or a model, not a {type(source).__name__}"
        )
    return Checkpoint(kind, list(_entries(source, "", 0)))


def _entries(source: Mapping[Any, Any], path: str, depth: int) -> Iterator[TensorEntry]:
    if depth > 100:
        raise CheckpointError("the mapping is nested too deep, or holds itself")
    for key, value in source.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            yield from _entries(value, f"{name}/", depth + 1)
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            yield _entry(name, value)


def _entry(name: str, value: Any) -> TensorEntry:
    """Return the entry of a live array. It is copied when it is measured, one after another."""
    dtype = str(value.dtype).rpartition(".")[2]
    narrow = "float" in dtype and dtype not in ("float16", "float32", "float64")

    def load() -> Stored:
        if narrow and hasattr(value, "float"):  # PyTorch
            return as_numpy(value.detach().float())
        if narrow:
            return np.asarray(value).astype(np.float32)
        return as_numpy(value.detach() if hasattr(value, "detach") else value, name)

    return readable(name, tuple(value.shape), "float32" if narrow else dtype, load)
