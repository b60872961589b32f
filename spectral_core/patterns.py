"""Settings by name: exact names first, then shell patterns such as ``"encoder.*"``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from .errors import NamesError

T = TypeVar("T")


def by_name(settings: Mapping[str, T], names: Iterable[str], what: str) -> dict[str, T]:
    """The setting of each name that has one: its own entry, or the first pattern that matches.

    Raises
    ------
    NamesError
        If an entry matches none of the names, which is most often a slip of the pen.

    Examples
    --------
    >>> by_name({"a.*": 1, "a.out": 2}, ["a.in", "a.out", "b"], "factor")
    {'a.in': 1, 'a.out': 2}
    """
    names = list(names)
    for pattern in settings:
        if not any(matches(pattern, name) for name in names):
            raise NamesError(f"{what}: {pattern!r} matches none of the names {names}")
    found: dict[str, T] = {}
    for name in names:
        hits = [pattern for pattern in settings if matches(pattern, name)]
        if hits:
            found[name] = settings[name if name in settings else hits[0]]
    return found


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the name, or a shell pattern of it."""
    return pattern == name or fnmatchcase(name, pattern)
