"""Numbers as result files have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any


def rounded(value: Any, digits: int) -> Any:
    """Floats to so many significant digits; what is not finite is None, which JSON has a word for.

    More digits than a measurement is good for would be noise.
    """
    if isinstance(value, Mapping):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if isfinite(value) else None
    return value
