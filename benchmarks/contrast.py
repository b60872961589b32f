"""Global contrast normalization, which the paper applies to all its images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def contrast_normalized(images: NDArray[Any]) -> NDArray[Any]:
    """Give each image, a row, zero mean and unit deviation, as the paper does.

    A constant image becomes zeros.
    """
    centered = images - images.mean(axis=1, keepdims=True)
    # Not a deviation above 0: the mean is rounded, so a constant image may deviate from it.
    varied = images.max(axis=1, keepdims=True) > images.min(axis=1, keepdims=True)
    deviation = centered.std(axis=1, keepdims=True)
    result: NDArray[Any] = np.zeros_like(centered)
    np.divide(centered, deviation, out=result, where=varied)
    return result
