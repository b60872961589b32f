"""Choose the weights in a JAX parameter tree, and their layouts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from spectral_core import Layout, NamesError
from spectral_core.engine import as_layout, by_name

Path: TypeAlias = tuple[Any, ...]

# In a tree without modules, leaves below the first names and leaves with the second names are not
# weights, whatever their number of axes.
_NO_WEIGHTS_IN = re.compile(r"embed|norm", re.IGNORECASE)
_NO_WEIGHT = re.compile(r"b|bias.*|scale|pos.*", re.IGNORECASE)


def named_leaves(tree: Any) -> tuple[list[tuple[str, Path, Any]], Any]:
    """Return the leaves as (name, path, leaf), and the structure to put them back into.

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
    """Return a path as a name such as ``"encoder/layers/0/kernel"``."""
    # Flax NNX ends each path with the attribute of its Variable.
    variable = len(path) > 1 and path[-1] == GetAttrKey("value") and isinstance(path[-2], DictKey)
    return jax.tree_util.keystr(path[:-1] if variable else path, simple=True, separator="/")


def choose(
    params: Any, layouts: Mapping[str, Layout | str] | None, masked: bool
) -> tuple[dict[str, Any], dict[str, Layout]]:
    """Return the weights by name, and their layouts.

    Parameters
    ----------
    params : pytree
    layouts : mapping of name or pattern to Layout or str, or None
        Leaves named here are weights.
    masked : bool
        True if a mask has chosen the leaves already: all of them are weights. Otherwise the
        weights are those of linear, convolution and recurrent layers.

    Raises
    ------
    spectral_core.NamesError
        If a pattern of ``layouts`` matches nothing, or there is no weight.
    """
    leaves, _ = named_leaves(params)
    own = by_name(layouts or {}, [name for name, _, _ in leaves], "layouts")
    weights, chosen = {}, {}
    for name, path, leaf in leaves:
        known = _known_layout(params, path, name, leaf)
        if masked or name in own or known is not None:
            weights[name] = jnp.asarray(leaf)
            default = known or _channels_last(jnp.ndim(leaf))
            chosen[name] = as_layout(own[name]) if name in own else default
    if not weights:
        raise NamesError(
            "there is nothing to regularize: no leaf has two axes and a weight's name among "
            f"{[name for name, _, _ in leaves]}; choose leaves by mask or layouts"
        )
    return weights, chosen


def _known_layout(params: Any, path: Path, name: str, leaf: Any) -> Layout | None:
    """Return the layout of a leaf that is a weight, or None."""
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
    """Return kernel, input, output: the order of Flax and Haiku."""
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
    """Return the module whose attribute the leaf is, or None in a tree without modules."""
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
