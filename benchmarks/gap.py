"""The paper's generalization gap: the least among the epochs that test better than α."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil


def threshold(best: Iterable[float]) -> float:
    """α: the highest hundredth below every run's best test accuracy."""
    # 100 * 0.55 is a little above 55, and would make 0.55 its own threshold.
    return (ceil(round(100 * min(best), 6)) - 1) / 100


def gap_at(alpha: float, train: Sequence[float], test: Sequence[float]) -> float:
    """Train accuracy minus test accuracy, the least among epochs that test better than α."""
    return min(a - b for a, b in zip(train, test, strict=True) if b > alpha)
