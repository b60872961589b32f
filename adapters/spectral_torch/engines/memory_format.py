"""How the elements of a tensor follow each other in memory."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def window(x: Tensor) -> int:
    """Return the number of kernel positions of a channels-last convolution.

    Returns
    -------
    int
        1 for a contiguous tensor, and 0 for one that is neither.
    """
    if x.is_contiguous():
        return 1
    dim = x.dim()
    if dim in _CHANNELS_LAST and x.is_contiguous(memory_format=_CHANNELS_LAST[dim]):
        return prod(x.shape[2:])
    return 0
