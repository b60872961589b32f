"""The quickstart on NumPy alone."""

import pytest

pytest.importorskip("sklearn")

import quickstart_numpy


def test_the_term_lowers_sigma():
    without, regularized = (quickstart_numpy.main(factor, steps=150) for factor in (0.0, 0.1))
    assert all(regularized[name] < 0.95 * without[name] for name in without)
