"""Which leaves of a JAX parameter tree are weights, and what their axes are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey, SequenceKey
from spectral_core.layout import as_layout
from spectral_core.patterns import by_name

from spectral_core import Layout, NamesError

Path: TypeAlias = tuple[Any, ...]

# In a tree without modules: what stands under these names, and leaves of these names, are no
# weights whatever their number of axes.
_NO_WEIGHTS_IN = re.compile(r"embed|norm", re.IGNORECASE)
_NO_WEIGHT = re.compile(r"b|bias.*|scale|pos.*", re.IGNORECASE)


def named_leaves(tree: Any) -> tuple[list[tuple[str, Path, Any]], Any]:
    """Leaves with their names and paths, and the structure to put them back into.

    Raises
    ------
    spectral_core.NamesError
        If a name stands for two leaves, as with ``{"a/b": x, "a": {"b": y}}``.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [(name_of(path), path, leaf) for path, leaf in flat]
    counts = Counter(name for name, _, _ in leaves)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise NamesError(f"several leaves have the path {twice}: rename one of each")
    return leaves, structure


def name_of(path: Path) -> str:
    """The path as a name: ``"encoder/layers/0/kernel"``."""
    # Flax NNX ends each path with the attribute of its Variable.
    variable = len(path) > 1 and path[-1] == GetAttrKey("value") and isinstance(path[-2], DictKey)
    return jax.tree_util.keystr(path[:-1] if variable else path, simple=True, separator="/")


def choose(
    params: Any, layouts: Mapping[str, Layout | str] | None, everything: bool
) -> tuple[dict[str, Any], dict[str, Layout]]:
    """The weights by name, and their layouts.

    With ``everything``, all leaves: a mask has chosen them. Else the weights of linear,
    convolution and recurrent layers, and what ``layouts`` names.

    Raises
    ------
    spectral_core.NamesError
        If a pattern of ``layouts`` matches nothing, or there is no weight.
    """
    leaves, _ = named_leaves(params)
    given = by_name(layouts or {}, [name for name, _, _ in leaves], "layouts")
    weights, chosen = {}, {}
    for name, path, leaf in leaves:
        known = _known_layout(params, path, name, leaf)
        if everything or name in given or known is not None:
            weights[name] = jnp.asarray(leaf)
            default = known or _channels_last(jnp.ndim(leaf))
            chosen[name] = as_layout(given[name]) if name in given else default
    if not weights:
        raise NamesError(
            "there is nothing to regularize: no leaf has two axes and a weight's name among "
            f"{[name for name, _, _ in leaves]}; say which by mask or layouts"
        )
    return weights, chosen


def _known_layout(params: Any, path: Path, name: str, leaf: Any) -> Layout | None:
    ndim = getattr(leaf, "ndim", 0)
    if ndim < 2 or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return None
    owner = _owner(params, path)
    if type(owner).__module__.startswith("equinox.nn"):
        return _equinox_layout(owner, name.rpartition("/")[2], ndim)
    *parents, last = name.split("/")
    parent = parents[-1] if parents else ""
    if last == "kernel" and ndim == 3 and parent in ("query", "key", "value"):
        return Layout("ioo")
    if last == "kernel" and ndim == 3 and parent == "out":
        return Layout("iio")
    if last == "w" and "transpose" in parent and ndim > 2:  # Haiku
        return Layout("k" * (ndim - 2) + "oi")
    if last in ("kernel", "w") or not (_NO_WEIGHTS_IN.search(name) or _NO_WEIGHT.fullmatch(last)):
        return _channels_last(ndim)
    return None


def _channels_last(ndim: int) -> Layout:
    """Kernel, input, output: JAX's order, in Flax and Haiku."""
    return Layout("k" * (ndim - 2) + "io")


def _equinox_layout(module: Any, attribute: str, ndim: int) -> Layout | None:
    kind = type(module).__name__
    if kind.startswith("Conv") and attribute == "weight":
        groups = module.groups
        return Layout(("(go)i" if groups > 1 else "oi") + "k" * (ndim - 2), groups)
    if kind in ("Linear", "GRUCell", "LSTMCell") and attribute.startswith("weight"):
        return Layout("oi")
    return None


def _owner(tree: Any, path: Path) -> Any:
    """The node whose attribute the leaf is, where the tree is made of modules."""
    if not path or not isinstance(path[-1], GetAttrKey):
        return None
    for key in path[:-1]:
        if isinstance(key, GetAttrKey):
            tree = getattr(tree, key.name, None)
        elif isinstance(key, (SequenceKey, DictKey)):
            try:
                tree = tree[key.idx if isinstance(key, SequenceKey) else key.key]
            except (KeyError, IndexError, TypeError):
                return None
        else:
            return None
    return tree
