"""The little of a fixed direction that a step adds to v, written a second time, in Python."""

import numpy as np


def start_of(v):
    """Return v, or rows of vectors, as a step starts from them."""
    largest = 2.0**-20 if v.dtype in ("float32", "complex64") else 2.0**-27
    places = range(1, v.shape[-1] + 1)
    wrapped = [(0x9E3779B1 * j * j + 2**31) % 2**32 - 2**31 for j in places]
    return v + (largest * np.asarray(wrapped) / 2**31).astype(v.dtype)
