"""Choose weights and their settings by name, pattern, class of layer, or predicate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import translate
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeAlias, TypeVar

from ._arrays import Array
from ._layout import Layout, as_layout, default_layout
from .errors import ArgumentError, NamesError, ShapeError, listed, shown

T = TypeVar("T")

Layouts: TypeAlias = "Mapping[str, Layout | str] | Layout | str"
Pattern: TypeAlias = "str | re.Pattern[str]"
Choice: TypeAlias = (
    "str | re.Pattern[str] | type | Callable[[str, Array], bool] | Iterable[str | re.Pattern[str]"
    " | type | Callable[[str, Array], bool]]"
)
"""Names, patterns, classes of layers and predicates ``choice(name, weight)``: one or several."""

_WILDCARD = re.compile(r"[*?\[]")
_NONE: Mapping[str, Any] = {}
_SETS = 64  # remembered sets of patterns and names


class Selection(NamedTuple):
    """The weights that were chosen, and what became of all the others.

    Attributes
    ----------
    layouts : dict of name to Layout
        The chosen weights, in the order of the candidates.
    guessed : tuple of str
        Those of them whose layout is the default, because their layer is unknown.
    left_out : dict of name to str
        The reason for every other candidate.
    """

    layouts: dict[str, Layout]
    guessed: tuple[str, ...]
    left_out: dict[str, str]


def matching(pattern: Pattern, names: Iterable[str]) -> list[str]:
    """Return the names that a pattern means.

    The first of these readings that finds a name counts: the exact name, a shell pattern, the name
    of a module that the weights belong to, the end of a name or of such a module's name. Names are
    divided at ``.`` and ``/``. A compiled pattern is searched for in each name.

    Examples
    --------
    >>> names = ["encoder.0.query.weight", "encoder.1.query.weight", "head.weight"]
    >>> matching("encoder.0", names)
    ['encoder.0.query.weight']
    >>> matching("query", names) == matching("*query*", names) == names[:2]
    True
    """
    if isinstance(pattern, re.Pattern):
        return [name for name in names if pattern.search(name)]
    if not isinstance(names, (dict, set, frozenset)):
        names = dict.fromkeys(names)
    if pattern in names:
        return [pattern]
    if _WILDCARD.search(pattern):
        fits = re.compile(translate(pattern)).match
        if found := [name for name in names if fits(name)]:
            return found
    part = _divided(pattern)
    return [name for name in names if _divided(name).startswith(part)] or [
        name for name in names if part in _divided(name)
    ]


def _divided(name: str) -> str:
    """Return a name with a dot at either end and between its parts."""
    return f".{name.replace('/', '.')}."


def by_name(settings: Mapping[Any, T], names: Iterable[str], what: str) -> dict[str, T]:
    """Return the setting of each name: its own entry, or the first pattern that matches.

    Names without a setting are left out.

    Raises
    ------
    NamesError
        If an entry matches none of the names, which is most often a typing error.

    Examples
    --------
    >>> by_name({"a.*": 1, "a.out": 2}, ["a.in", "a.out", "b"], "factor")
    {'a.in': 1, 'a.out': 2}
    """
    names = tuple(names)
    values = list(settings.values())
    places = first_matches(tuple(settings), names, what)
    return {name: values[at] for name, at in zip(names, places, strict=True) if at >= 0}


def numbered(names: Iterable[str]) -> list[str]:
    """Return the names, no two of which are equal: one that occurred before gets a number.

    >>> numbered(["a", "b", "a"])
    ['a', 'b', 'a (2)']
    """
    found: dict[str, None] = {}
    for name in names:
        unique, count = name, 1
        while unique in found:
            count += 1
            unique = f"{name} ({count})"
        found[unique] = None
    return list(found)


def first_matches(
    patterns: tuple[Pattern, ...], names: tuple[str, ...], what: str
) -> tuple[int, ...]:
    """Return the place of each name's pattern: of itself, or of the first that matches, or -1.

    The same patterns and names are looked up once.
    """
    return _first_matches(patterns, names, what)


@lru_cache(_SETS)
def _first_matches(
    patterns: tuple[Pattern, ...], names: tuple[str, ...], what: str
) -> tuple[int, ...]:
    found = _Names(names).first(patterns, what)
    return tuple(found.get(name, -1) for name in names)


def choose(
    candidates: Mapping[str, Array],
    known: Mapping[str, Layout | str],
    *,
    include: Choice | None,
    exclude: Choice | None,
    layouts: Mapping[Any, Layout | str] | None,
    default: Callable[[Array], Layout],
    owners: Mapping[str, object] = _NONE,
    aliases: Mapping[str, Sequence[str]] = _NONE,
    reasons: Mapping[str, str] = _NONE,
) -> Selection:
    """Return the chosen weights with their layouts, and why the others are left out.

    Parameters
    ----------
    candidates : mapping of name to array
        Every trainable array with two axes or more.
    known : mapping of name to Layout or str
        The layout of a weight, or the reason why an array is no weight by default. A candidate that
        is not here belongs to an unknown layer.
    include : choice, optional
        Candidates to choose instead of the default: names, patterns (see `matching`), classes of
        layers, predicates ``include(name, weight)``, or an iterable of these. A module's name or
        class means its weights, or all that it holds if none is a weight by default.
    exclude : choice, optional
        Candidates to skip, in the same forms.
    layouts : mapping of name, pattern or class to Layout or str, optional
        Layouts that replace the known ones. A name given here is chosen by default.
    default : callable
        The layout of a matrix that is neither known nor given one.
    owners : mapping of name to object, or tuple of objects
        The layer that holds a candidate, and then those around it, for choices by class.
    aliases : mapping of name to names
        Other names of a candidate. Each of them means the candidate.
    reasons : mapping of name to str
        Why a candidate is left out by default although its layout is known.

    Raises
    ------
    NamesError
        If a pattern matches no candidate, or a chosen array with three axes or more has no layout.
    """
    no_weights = frozenset(reasons).union(
        name for name, layout in known.items() if isinstance(layout, str)
    )
    names = _Names(candidates, owners, aliases, no_weights)
    own = _own_layouts(names, layouts)
    wanted = None if include is None else names.chosen(include, candidates, "include")
    unwanted = set() if exclude is None else names.chosen(exclude, candidates, "exclude")
    selection, unclear = Selection({}, (), {}), []
    guessed = []
    for name, weight in candidates.items():
        layout = own.get(name, known.get(name))
        if name in unwanted:
            selection.left_out[name] = "excluded"
        elif wanted is not None and name not in wanted:
            selection.left_out[name] = "not included"
        elif wanted is None and name in reasons and name not in own:
            selection.left_out[name] = reasons[name]
        elif isinstance(layout, Layout):
            selection.layouts[name] = layout
        elif wanted is None and layout is not None:
            selection.left_out[name] = layout
        elif len(weight.shape) > 2:
            unclear.append(name)
        else:
            selection.layouts[name] = default(weight)
            guessed += [name] if wanted is None else []
    if unclear:
        raise NamesError(_which_layout(unclear, candidates))
    return selection._replace(guessed=tuple(guessed))


def _own_layouts(names: _Names, layouts: Mapping[Any, Layout | str] | None) -> dict[str, Layout]:
    if not isinstance(layouts, Mapping | None):
        raise ArgumentError(
            "layouts must be a mapping of name, pattern or class of layer to a layout, not "
            f'{shown(layouts)}: write layouts={{"name of a weight": "oi"}}'
        )
    values = [as_layout(layout) for layout in (layouts or {}).values()]
    return {name: values[at] for name, at in names.first(layouts or {}, "layouts").items()}


def _which_layout(unclear: Sequence[str], candidates: Mapping[str, Array]) -> str:
    """Return the message about tensors that can be read as matrices in several ways."""
    shapes = listed(f"{name}: {tuple(candidates[name].shape)}" for name in unclear)
    name, ndim = unclear[0], len(candidates[unclear[0]].shape)
    example = "sio" if ndim == 3 else "oi" + "k" * (ndim - 2)
    return (
        f"no layout is known for {shapes}: a tensor with three axes or more can be a stack of "
        f'matrices or one matrix. Write layouts={{"{name}": "{example}"}} with a letter for each '
        f'axis (o output, i input, k kernel, s stack), or exclude=["{name}"]'
    )


class _Names:
    """The names of all candidates, and the names that a choice means."""

    def __init__(
        self,
        names: Iterable[str],
        owners: Mapping[str, object] = _NONE,
        aliases: Mapping[str, Sequence[str]] = _NONE,
        no_weights: frozenset[str] = frozenset(),
    ) -> None:
        self._owners = owners
        self._no_weights = no_weights
        self._arrays = names if isinstance(names, Mapping) else {}
        self._meant = {name: name for name in names}
        for name in list(self._meant):
            for alias in aliases.get(name, ()):
                self._meant.setdefault(alias, name)

    @cached_property
    def _held(self) -> dict[int, list[str]]:
        """The names of what each object of the model is or holds, by the object's id."""
        held: dict[int, list[str]] = {}
        for name, owner in self._owners.items():
            for one in _as_tuple(owner):
                held.setdefault(id(one), []).append(name)
        for name, array in self._arrays.items():
            held[id(array)] = [name]
        return held

    def first(self, patterns: Iterable[Any], what: str) -> dict[str, int]:
        """Return the place of the first pattern that means a name; exact names come first."""
        exact: dict[str, int] = {}
        found: dict[str, int] = {}
        for place, pattern in enumerate(patterns):
            if isinstance(pattern, str) and pattern in self._meant:
                exact.setdefault(self._meant[pattern], place)
                continue
            for name in self._found(pattern, what):
                found.setdefault(name, place)
        return found | exact

    def chosen(self, choice: Any, candidates: Mapping[str, Array], what: str) -> set[str]:
        """Return the names of the candidates that a choice means."""
        if isinstance(choice, (str, re.Pattern, type)):
            return set(self._found(choice, what))
        held = self._held.get(id(choice), [])  # a layer or an array of the model itself
        if held:
            return set(self._weights_of(held, what))
        if _is_array(choice):
            shape = tuple(choice.shape)
            if len(shape) < 2:  # a module's biases, among its parameters
                return set()
            raise NamesError(f"{what}: an array of shape {shape} is none of the weights")
        if callable(choice):
            return {name for name, weight in candidates.items() if choice(name, weight)}
        if isinstance(choice, Iterable) and not isinstance(choice, bytes):
            return {name for one in choice for name in self.chosen(one, candidates, what)}
        raise NamesError(_no_choice(choice, what))

    def _found(self, pattern: Any, what: str) -> Iterable[str]:
        if isinstance(pattern, type):
            found = self._held_by(pattern, what)
        elif not isinstance(pattern, (str, re.Pattern)):
            raise NamesError(_no_choice(pattern, what))
        else:
            found = [self._meant[name] for name in matching(pattern, self._meant)]
            if not found:
                raise NamesError(self._no_match(pattern, what))
            if isinstance(pattern, re.Pattern) or pattern in self._meant:
                return found
            if _WILDCARD.search(pattern):
                return found
        return self._weights_of(found, what)

    def _weights_of(self, found: list[str], what: str) -> list[str]:
        # A module is chosen for its weights, not for its biases, but an embedding for its table.
        if what == "exclude":
            return found
        return [name for name in found if name not in self._no_weights] or found

    def _held_by(self, kind: type, what: str) -> list[str]:
        found = [
            self._meant[name]
            for name, owner in self._owners.items()
            if name in self._meant and any(isinstance(one, kind) for one in _as_tuple(owner))
        ]
        if found or (self._owners and what == "exclude"):  # nothing of this class is there
            return found
        kinds = dict.fromkeys(
            type(one).__name__ for owner in self._owners.values() for one in _as_tuple(owner)[:1]
        )
        raise NamesError(f"{what}: no weight is held by a {kind.__name__}, but by {listed(kinds)}")

    def _no_match(self, pattern: Pattern, what: str) -> str:
        if isinstance(pattern, re.Pattern):
            return f"{what}: no name has {pattern.pattern!r} in {listed(self._meant)}"
        modules = {part for name in self._meant for part in _modules_of(name)}
        near = get_close_matches(pattern, [*self._meant, *sorted(modules)], n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        return f"{what}: {pattern!r} matches none of the names {listed(self._meant)}{hint}"


def _is_array(x: object) -> bool:
    return hasattr(x, "shape")


def _as_tuple(owner: object) -> tuple[object, ...]:
    return owner if isinstance(owner, tuple) else (owner,)


def _modules_of(name: str) -> Iterable[str]:
    """Yield the names of the modules that hold a weight, whole and each part."""
    parts = re.split(r"([./])", name)
    for end in range(1, len(parts), 2):
        yield "".join(parts[:end])
        yield parts[end - 1]


def _no_choice(choice: object, what: str) -> str:
    return (
        f"{what} must be names, patterns, classes of layers or predicates(name, weight), one or "
        f"several, not {type(choice).__name__} {choice!r:.60}"
    )


def choose_layouts(ndims: Mapping[str, int], layouts: Layouts | None) -> dict[str, Layout]:
    """Return the layout of each name: its own, that of a pattern, or the default.

    Raises
    ------
    ShapeError
        If a weight has fewer than two axes.
    NamesError
        If a pattern matches no name.
    """
    for name, ndim in ndims.items():
        if ndim < 2:
            raise ShapeError(
                f"weight {name!r} has {ndim} axes: only a matrix, or a tensor viewed as one, has a "
                "spectral norm — leave biases and scales out"
            )
    if layouts is None:
        own: Mapping[str, Layout | str] = {}
    elif isinstance(layouts, Mapping):
        own = by_name(layouts, ndims, "layouts")
    else:
        own = dict.fromkeys(ndims, layouts)
    return {
        name: as_layout(own[name]) if name in own else default_layout(ndim)
        for name, ndim in ndims.items()
    }
