"""The seam between file formats and the measurement: a `Reader` lists tensors and loads none.

A reader is a function from a path to a `Checkpoint`. Each entry carries the name, shape and dtype
that the file declares, checked against the size of the file, and a function that maps the bytes.
So a file is read tensor by tensor, and listing it costs its header alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from .._layout import Layout
from ..errors import SpectralError

Stored: TypeAlias = np.ndarray[Any, Any]

MOST_TENSORS = 1_000_000
MOST_NAME = 1000  # characters
MOST_AXES = 32  # NumPy's limit before 2.0; no weight comes near it


class CheckpointError(SpectralError, ValueError):
    """A file that cannot be read as a checkpoint, or that must not be: one line says why."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Parameters
    ----------
    name : str
    shape : tuple of int
    dtype : str
        A name of `numbers`, such as "bfloat16", or the file's own name of another dtype.
    load : callable
        Return the stored numbers, undecoded: bfloat16 is an array of ``uint16``.
    skip : str
        Reason why the tensor cannot be read, or "".
    scale : TensorEntry, optional
        What the numbers are multiplied by, for a float8 weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Stored] = field(repr=False)
    skip: str = ""
    scale: TensorEntry | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """What a reader returns: the convention of the axes, and the tensors.

    ``kind`` is "torch", "flax", "keras", "gguf" or "numpy". It decides how the axes are read, but
    for tensors in ``layouts``, whose layers are known.
    """

    kind: str
    entries: list[TensorEntry]
    notes: tuple[str, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)


class Reader(Protocol):
    """A function that lists the tensors of a file or folder of one format."""

    def __call__(self, path: Path, /) -> Checkpoint:
        """Return the checkpoint, or raise `CheckpointError`."""
        ...


def checked_shape(shape: object, what: str) -> tuple[int, ...]:
    """Return a declared shape, or raise `CheckpointError` if it is none."""
    if not isinstance(shape, list | tuple) or len(shape) > MOST_AXES:
        raise CheckpointError(f"{what}: its shape is not a list of at most {MOST_AXES} sizes")
    sizes = [size for size in shape if isinstance(size, int) and not isinstance(size, bool)]
    if len(sizes) < len(shape) or any(not 0 <= size < 2**62 for size in sizes):
        raise CheckpointError(f"{what}: its shape has an entry that is no size")
    return tuple(sizes)


def check_count(count: int) -> None:
    """Raise `CheckpointError` if a file lists more tensors than any model has."""
    if count > MOST_TENSORS:
        raise CheckpointError(f"lists more than {MOST_TENSORS:,} tensors")
