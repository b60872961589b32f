"""Keep what was used last."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def keep_recent(kept: dict[K, T], key: K, value: T, most: int) -> None:
    """Store a value as the one that was used last, and drop the oldest ones beyond ``most``.

    >>> kept = {"a": 1, "b": 2}
    >>> keep_recent(kept, "a", 3, 2)
    >>> keep_recent(kept, "c", 4, 2)
    >>> kept
    {'a': 3, 'c': 4}
    """
    kept.pop(key, None)
    while len(kept) >= most:
        kept.pop(next(iter(kept)), None)  # another thread may have dropped it
    kept[key] = value
