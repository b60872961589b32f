"""Choose weights and their settings by name: exact names first, then shell patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeVar

from ._arrays import Array
from ._layout import Layout, as_layout, default_layout
from .errors import NamesError, ShapeError

T = TypeVar("T")

Layouts: TypeAlias = "Mapping[str, Layout | str] | Layout | str"
Choice: TypeAlias = "str | Iterable[str] | Callable[[str, Array], bool]"
"""Names or shell patterns of weights, or a predicate ``choice(name, weight)``."""


def by_name(settings: Mapping[str, T], names: Iterable[str], what: str) -> dict[str, T]:
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
    names = list(names)
    for pattern in settings:
        if not any(matches(pattern, name) for name in names):
            raise NamesError(f"{what}: {pattern!r} matches none of the names {names}")
    chosen: dict[str, T] = {}
    for name in names:
        hits = [pattern for pattern in settings if matches(pattern, name)]
        if hits:
            chosen[name] = settings[name if name in settings else hits[0]]
    return chosen


def matches(pattern: str, name: str) -> bool:
    """Return True if ``pattern`` is the name, or a shell pattern that matches it."""
    return pattern == name or fnmatchcase(name, pattern)


def choose(
    candidates: Mapping[str, Array],
    known: Mapping[str, Layout],
    *,
    include: Choice | None,
    exclude: Choice | None,
    layouts: Mapping[str, Layout | str] | None,
    default: Callable[[Array], Layout],
) -> dict[str, Layout]:
    """Return the layouts of the chosen weights, in the order of ``candidates``.

    Parameters
    ----------
    candidates : mapping of name to array
        Every array that could be a weight.
    known : mapping of name to Layout
        The candidates that are chosen by default, with their layouts.
    include : str, iterable of str, or callable, optional
        Names or patterns to choose instead of the default, or ``include(name, weight)``.
    exclude : str, iterable of str, or callable, optional
        Candidates to skip, in the same forms.
    layouts : mapping of name or pattern to Layout or str, optional
        Layouts that replace the known ones. A name given here is chosen by default.
    default : callable
        The layout of a candidate that is neither known nor given one.

    Raises
    ------
    NamesError
        If a pattern matches no candidate.
    """
    own = by_name(layouts or {}, candidates, "layouts")
    chosen = {*known, *own} if include is None else _matching(candidates, include, "include")
    if exclude is not None:
        chosen -= _matching(candidates, exclude, "exclude")
    return {
        name: as_layout(own[name]) if name in own else known.get(name) or default(weight)
        for name, weight in candidates.items()
        if name in chosen
    }


def _matching(candidates: Mapping[str, Array], choice: Choice, what: str) -> set[str]:
    if callable(choice):
        return {name for name, weight in candidates.items() if choice(name, weight)}
    patterns = [choice] if isinstance(choice, str) else choice
    return set(by_name(dict.fromkeys(patterns), candidates, what))


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
