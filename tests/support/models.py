"""A small model of three weights, and comparisons of mappings of arrays."""

import numpy as np
import pytest

from backends import gaussian
from spectral_core import Layout

LAYOUTS = {"conv": "oihw", "dense": "io", "heads": Layout("(go)i", groups=2)}


SHAPES = {"conv": (4, 3, 2, 2), "dense": (5, 3), "heads": (4, 6)}


not_finite = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)


def model(dtype="float64", seed=0, shapes=SHAPES):
    """Weights and gradients, in NumPy."""
    rng = np.random.default_rng(seed)
    weights = {name: gaussian(rng, *shape, dtype=dtype) for name, shape in shapes.items()}
    grads = {name: gaussian(rng, *shape, dtype=dtype) for name, shape in shapes.items()}
    return weights, grads


def state_to_numpy(backend, state):
    return backend.tree_to_numpy(state.v), backend.tree_to_numpy(state.sigma)


def assert_equal(found, expected):
    """Mappings of arrays, bit for bit."""
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def assert_close(found, expected, rtol=1e-13):
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=rtol, err_msg=name)
