"""List the tensors of what `report` and `compare` accept: a path, arrays, or a live model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .._arrays import as_numpy, check_dense, to_host
from .._layout import Layout
from ..errors import DTypeError
from .entry import Checkpoint, CheckpointError, Stored, TensorEntry
from .files import readable, short, skipped
from .folders import opened
from .numbers import is_floating


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


# The module of a base class, and the adapter that knows the layers of its framework. A model can
# exist only where its framework is imported, so nothing is imported for the others.
_MODELS = {
    "torch.nn.": "spectral_torch",
    "keras.": "spectral_keras",
    "equinox.": "spectral_jax",
    "flax.nnx.": "spectral_jax",
}

# NumPy's long double, by the names that it has on different machines.
_TOO_WIDE = ("float96", "float128")


def _live(source: Any) -> Checkpoint:
    """Return the arrays of a mapping, a nested one, or of a model."""
    # First, for JAX must not see what holds itself: its recursion has no end.
    entries = list(_entries(source, "", 0)) if isinstance(source, Mapping) else None
    adapter = _adapter_of(source)
    if adapter:
        try:
            return _known(source, adapter)
        except ImportError as error:  # the adapter needs more than the framework: optax beside JAX
            if entries is None:
                raise CheckpointError(str(error)) from None
    if entries is None:
        kind = type(source)
        if kind.__module__.startswith("flax.linen") or _is_linen(source):
            raise CheckpointError(
                f"{kind.__name__} is a module of flax.linen, which holds no weights: pass the "
                "variables that init() returned"
            )
        raise CheckpointError(
            f"a report needs a path, a mapping of arrays or a model, not a {kind.__name__}"
        )
    return Checkpoint("numpy", entries)


def _is_linen(source: Any) -> bool:
    return any(x.__module__.startswith("flax.linen") for x in type(source).__mro__)


def _adapter_of(source: Any) -> str:
    """Return the name of the adapter for a model, or for a mapping that holds arrays of JAX."""
    adapter = _model_adapter(source)
    if not adapter and isinstance(source, Mapping) and _holds_jax(source):
        return "spectral_jax"
    return adapter


def _model_adapter(source: Any) -> str:
    """Return the name of the adapter for a model, or ""."""
    for kind in type(source).__mro__:
        for prefix, adapter in _MODELS.items():
            if f"{kind.__module__}.".startswith(prefix):
                return adapter
    return ""


def _holds_jax(source: Mapping[Any, Any]) -> bool:
    """Return True for a tree of JAX that has arrays of it."""
    jax = sys.modules.get("jax")
    if jax is None:
        return False
    try:
        leaves = jax.tree_util.tree_leaves(source)
    except ValueError:  # of keys that cannot be sorted
        return False
    return any(isinstance(leaf, jax.Array) for leaf in leaves)


def _known(source: Any, adapter: str) -> Checkpoint:
    """Return the arrays of a model with the layouts of its layers, which its adapter reads."""
    kind, tensors, meanings = import_module(f"{adapter}._live").live_tensors(source)
    entries = []
    layouts: dict[str, Layout] = {}
    for name, value in tensors.items():
        meaning = meanings.get(name)
        entry = _entry(name, value)
        if isinstance(meaning, Layout):
            layouts[name] = meaning
        elif meaning:
            entry = replace(entry, skip=meaning)
        entries.append(entry)
    return Checkpoint(kind, entries, layouts=layouts)


def _entries(
    source: Mapping[Any, Any] | Sequence[Any], path: str, depth: int
) -> Iterator[TensorEntry]:
    """Yield the arrays in nested mappings, lists and tuples. A model within is named as skipped."""
    if depth > 100:
        raise CheckpointError("the mapping is nested too deep, or holds itself")
    for key, value in source.items() if isinstance(source, Mapping) else enumerate(source):
        name = f"{path}{key}"
        if isinstance(value, Mapping | list | tuple):
            yield from _entries(value, f"{name}/", depth + 1)
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            yield _entry(name, value)
        elif _model_adapter(value):
            yield skipped(name, (), "", "a model within a mapping: pass it alone")


def _entry(name: str, value: Any) -> TensorEntry:
    """Return the entry of a live array. It is copied when it is measured, one after another."""
    # NumPy's name does not depend on the order of bytes.
    dtype = getattr(value.dtype, "name", None) or str(value.dtype).rpartition(".")[2]
    shape = tuple(value.shape)
    try:
        check_dense(value, name)
    except DTypeError:
        return skipped(name, shape, dtype, "sparse or masked: make a dense array of it first")
    if getattr(value, "is_meta", False):
        return skipped(name, shape, dtype, "on the device 'meta', where it has no values")
    if dtype in _TOO_WIDE or ("complex" in dtype and not is_floating(dtype)):
        return skipped(name, shape, dtype)
    narrow = "float" in dtype and dtype not in ("float16", "float32", "float64")

    def load() -> Stored:
        if narrow and hasattr(value, "float"):  # PyTorch
            return as_numpy(value.detach().float())
        if narrow:
            return np.asarray(value).astype(np.float32)
        if not is_floating(dtype):
            return to_host(value)  # such as the alpha of an adapter
        return as_numpy(value.detach() if hasattr(value, "detach") else value, name)

    if narrow and not is_floating(dtype):
        dtype = "float32"  # it holds the numbers of dtypes that no file has
    return readable(name, shape, dtype, load)
