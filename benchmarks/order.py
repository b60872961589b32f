"""The order in which training images are seen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def batches(count: int, size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """The indices of one epoch's batches, in an order that seed and epoch alone decide.

    A short last batch is dropped.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return (order[start : start + size] for start in range(0, count - size + 1, size))
