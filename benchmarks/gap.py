"""The paper's generalization gap: the least among the epochs that test better than α."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil


def threshold(best: Iterable[float]) -> float:
    """α: the highest hundredth below every run's best test accuracy."""
    return (ceil(100 * min(best)) - 1) / 100


def gap_at(alpha: float, train: Sequence[float], test: Sequence[float]) -> float:
    """Train accuracy minus test accuracy, the least among epochs that test better than α."""
    return min(a - b for a, b in zip(train, test, strict=True) if b > alpha)
