"""Choose the weights in a JAX parameter tree, and their layouts."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

import spectral_core as sc
from spectral_core import Layout
from spectral_core.engine import (
    FLATTENED,
    OPERATOR,
    Choice,
    check_norm,
    tell_assumed,
    with_operator_norm,
)
from spectral_core.engine import choose as choose_weights
from spectral_core.errors import listed

from ._layers import Reading, Shape, geometries, is_of, is_sparse, is_weightlike, read_leaf

Path: TypeAlias = tuple[Any, ...]
Layouts: TypeAlias = Mapping[Any, "Layout | str"]


class Leaf(NamedTuple):
    """A leaf of a tree, with its name and the objects that lead to it."""

    name: str
    owners: tuple[Any, ...]
    value: Any


class Chosen(NamedTuple):
    """The weights of a tree, their layouts, why others are left out, and all names."""

    weights: dict[str, Any]
    layouts: dict[str, Layout]
    left_out: dict[str, str]
    names: frozenset[str]


@dataclass(frozen=True)
class Selector:
    """The options that choose weights, as the transformations take them."""

    include: Choice | None = None
    exclude: Choice | None = None
    layouts: Layouts | None = None
    masked: bool = False
    norm: str = FLATTENED

    def __post_init__(self) -> None:
        check_norm(self.norm)
        if self.masked and (self.include is not None or self.exclude is not None):
            raise sc.ArgumentError(
                "mask already says which leaves are regularized: give mask, or include and exclude"
            )

    def __call__(self, params: Any, whole: Any = None, *, warn: bool = False) -> Chosen:
        """Return the weights.

        Parameters
        ----------
        params : pytree
            With a mask, the marked leaves: each of them is a weight.
        whole : pytree, optional
            All parameters, where ``params`` are some of them. They tell more about a weight.
        warn : bool
            If True, guesses are told once.

        Raises
        ------
        spectral_core.NamesError
            If a pattern matches nothing, a layout is needed, or there is no weight.
        spectral_core.ShapeError, spectral_core.DTypeError
            If a chosen leaf has fewer than two axes, is sparse or is no array.
        """
        leaves = named_leaves(params)[0]
        candidates = {leaf.name: leaf.value for leaf in leaves if is_weightlike(leaf.value)}
        readings, owners = _readings(leaves if whole is None else named_leaves(whole)[0])
        if self.masked:
            _check_marked(leaves)
        known = {
            name: meaning
            for name, (meaning, _) in readings.items()
            if name in candidates and meaning is not None
        }
        if not owners:
            _check_no_classes(include=self.include, exclude=self.exclude, layouts=self.layouts)
        layout = Layout("oi" if any(is_of(x, "equinox") for x in owners.values()) else "io")
        selection = choose_weights(
            candidates,
            known,
            include=_anything if self.masked else self.include,
            exclude=self.exclude,
            layouts=self.layouts,
            default=lambda _: layout,
            owners={name: owner for name, owner in owners.items() if name in candidates},
        )
        if not selection.layouts:
            raise sc.NamesError(_nothing(leaves, selection.left_out))
        _check_dense(selection.layouts, candidates)
        if warn and not self.masked:
            own = {name for name in selection.layouts if selection.layouts[name] != known.get(name)}
            guessed = [
                *selection.guessed,
                *(name for name in known if readings[name].guessed and name not in own),
            ]
            _warn(guessed, candidates, selection.layouts, selection.left_out, known)
        chosen = selection.layouts
        if self.norm == OPERATOR:
            chosen, assumed = with_operator_norm(chosen, geometries(owners))
            if warn:
                tell_assumed(assumed, chosen, 5)
        weights = {name: jnp.asarray(candidates[name]) for name in chosen}
        names = frozenset(leaf.name for leaf in leaves)
        return Chosen(weights, chosen, selection.left_out, names)


def meanings(params: Any) -> dict[str, Layout | str | None]:
    """Return the default meaning of every leaf with two axes or more (see `Reading`)."""
    readings, _ = _readings(named_leaves(params)[0])
    return {name: reading.meaning for name, reading in readings.items()}


def named_leaves(tree: Any, *, keep_none: bool = False) -> tuple[list[Leaf], Any]:
    """Return the leaves with their names, and the structure to put them back into.

    With ``keep_none``, None and optax's node for a masked leaf are leaves too.

    Raises
    ------
    spectral_core.NamesError
        If a name stands for two leaves, as with ``{"a/b": x, "a": {"b": y}}``.
    """

    def is_leaf(node: Any) -> bool:
        return is_sparse(node) or (keep_none and _is_none(node))

    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    leaves = []
    for path, value in flat:
        owners = _owners(tree, path)
        if owners and is_of(owners[-1], "flax.nnx.variablelib"):  # a Variable holds its value
            path, owners = path[:-1], owners[:-1]
        leaves.append(Leaf(name_of(path), owners, value))
    counts = Counter(leaf.name for leaf in leaves)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise sc.NamesError(f"several leaves have the path {listed(twice)}: rename one of each")
    return leaves, structure


def updates_of(updates: Any, chosen: Chosen) -> tuple[dict[str, Any], list[Leaf], Any]:
    """Return the updates of the weights by name, all leaves, and their structure.

    A weight whose update is None is left out.

    Raises
    ------
    spectral_core.NamesError
        If the paths of the updates are not those of the parameters.
    spectral_core.DTypeError
        If an update is sparse.
    """
    leaves, structure = named_leaves(updates, keep_none=True)
    given = {leaf.name: leaf.value for leaf in leaves}
    none = [name for name, value in given.items() if _is_none(value)]
    missing = [
        name
        for name in chosen.weights
        if name not in given and not any(not n or name.startswith(f"{n}/") for n in none)
    ]
    unexpected = [n for n, x in given.items() if is_weightlike(x) and n not in chosen.names]
    if missing or unexpected:
        raise sc.NamesError(
            f"the paths of updates are not those of params: missing {listed(missing)}, unexpected "
            f"{listed(unexpected)}; pass the gradients of these params, None for one without"
        )
    mine = {name: x for name, x in given.items() if name in chosen.weights and not _is_none(x)}
    for name, update in mine.items():
        if is_sparse(update):
            raise sc.DTypeError(f"the update of {name!r} is sparse: make it dense with .todense()")
    return {name: jnp.asarray(x) for name, x in mine.items()}, leaves, structure


def _is_none(node: Any) -> bool:
    return node is None or isinstance(node, optax.MaskedNode)


def name_of(path: Path) -> str:
    """Return a path as a name such as ``"encoder/layers/0/kernel"``."""
    # Flax NNX ends each path with the attribute of its Variable.
    variable = len(path) > 1 and path[-1] == GetAttrKey("value") and isinstance(path[-2], DictKey)
    return jax.tree_util.keystr(path[:-1] if variable else path, simple=True, separator="/")


def _owners(tree: Any, path: Path) -> tuple[Any, ...]:
    """Return the objects whose attributes lead to a leaf; none in a tree of dicts and lists."""
    owners = []
    for place, key in enumerate(path):
        try:
            if isinstance(key, GetAttrKey):
                owners.append(tree)
                if place + 1 < len(path):
                    tree = getattr(tree, key.name)
            elif isinstance(key, (SequenceKey, DictKey)):
                tree = tree[key.idx if isinstance(key, SequenceKey) else key.key]
            else:
                return ()
        except (AttributeError, KeyError, IndexError, TypeError):
            return ()
    return tuple(owners) if path and isinstance(path[-1], GetAttrKey) else ()


def _readings(leaves: Sequence[Leaf]) -> tuple[dict[str, Reading], dict[str, Any]]:
    """Return the meaning of each leaf that could be a weight, and the module that holds it."""
    places: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, _, value in leaves:
        place, _, last = name.rpartition("/")
        places[place][last] = tuple(getattr(value, "shape", ()))
    weightlike = [leaf for leaf in leaves if is_weightlike(leaf.value)]
    readings = {name: read_leaf(name, value, owners, places) for name, owners, value in weightlike}
    return readings, {name: owners[-1] for name, owners, _ in weightlike if owners}


def _check_no_classes(**choices: Any) -> None:
    """Raise an error if a class is to choose in a tree that holds no modules."""
    for what, choice in choices.items():
        several = isinstance(choice, Iterable) and not isinstance(choice, (str, type))
        for one in choice if several else [choice]:
            if isinstance(one, type):
                raise sc.NamesError(
                    f"{what}: {one.__name__} is a class, but params hold no modules, only names, "
                    "as Flax's and Haiku's do: choose by name, pattern or path"
                )


def _anything(name: str, weight: Any) -> bool:  # noqa: ARG001
    """Return True: every leaf that a mask has marked is a weight."""
    return True


def _check_marked(leaves: Sequence[Leaf]) -> None:
    """Raise an error if a mask marks a leaf that is no array with two axes or more."""
    for name, _, value in leaves:
        if not is_weightlike(value):
            if not hasattr(value, "dtype"):
                raise sc.DTypeError(
                    f"the mask marks {name!r}, which is a {type(value).__name__}, not an array: "
                    "mark arrays only"
                )
            raise sc.ShapeError(
                f"the mask marks {name!r}: weight {name!r} has {value.ndim} axes, and only a "
                "matrix, or a tensor viewed as one, has a spectral norm"
            )


def _check_dense(chosen: Mapping[str, Layout], candidates: Mapping[str, Any]) -> None:
    for name in chosen:
        if is_sparse(candidates[name]):
            raise sc.DTypeError(
                f"weight {name!r} of shape {tuple(candidates[name].shape)} is sparse "
                f"({type(candidates[name]).__name__}): make it dense with .todense(), or leave it "
                f'out with exclude=["{name}"]'
            )


def _nothing(leaves: Sequence[Leaf], left_out: Mapping[str, str]) -> str:
    if left_out:
        found = listed(f"{name}: {reason}" for name, reason in left_out.items())
    else:
        found = f"no leaf has two axes among {listed(leaf.name for leaf in leaves)}"
    return f"there is nothing to regularize: {found}; choose leaves by include, mask or layouts"


def _warn(
    guessed: Sequence[str],
    candidates: Mapping[str, Any],
    layouts: Mapping[str, Layout],
    left_out: Mapping[str, str],
    known: Mapping[str, Layout | str],
) -> None:
    """Tell which leaves were taken or left out by a guess, and the lines that settle it."""
    taken = [name for name in guessed if name in layouts]
    missed = [name for name in guessed if name in left_out and left_out[name] == known.get(name)]
    said = []
    if taken:
        shown = listed(
            f"{name} {tuple(candidates[name].shape)} as {layouts[name].axes}" for name in taken
        )
        said.append(
            f"taken: {shown}. Settle it with "
            f'layouts={{"{taken[0]}": "{layouts[taken[0]].axes}"}} or exclude=["{taken[0]}"]'
        )
    if missed:
        shown = listed(f"{name}: {left_out[name]}" for name in missed)
        axes = "s" * (candidates[missed[0]].ndim - 2) + "io"
        said.append(
            f'left out: {shown}. Take one with layouts={{"{missed[0]}": "{axes}"}}, or settle it '
            f'with exclude=["{missed[0]}"]'
        )
    if said:
        text = "; ".join(said)
        warnings.warn(f"no module says what these are. {text}", sc.SpectralWarning, stacklevel=5)
