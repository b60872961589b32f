"""The little of a fixed direction that a step adds to v, written a second time, in Python."""

from math import sqrt

import numpy as np

LENGTH = 2.0**-24


def start_of(v):
    """Return v, or rows of vectors, as a step starts from them."""
    n = v.shape[-1]
    wrapped = [(0x9E3779B1 * j * j + 2**31) % 2**32 - 2**31 for j in range(1, n + 1)]
    return v + np.asarray(wrapped) / 2**31 * sqrt(3 / n) * LENGTH
