"""The campaign's exact test finds a bound that is wrong by its last digit."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
from benchmarks import certify


def stack_of(whole, exponent=0):
    whole = np.array(whole).astype(object)[None]
    return certify.Stack(whole, exponent, None)


@pytest.mark.parametrize("exponent", [0, -1074, 900])
@pytest.mark.parametrize(
    ("whole", "sigma"), [([[3, 0], [0, 5]], 5), ([[3, 4]], 5), ([[2, 2], [2, 2]], 4)]
)
def test_the_last_digit_decides(whole, sigma, exponent):
    stack = stack_of(whole, exponent)
    gram = certify.gram_of(stack)
    value = np.ldexp(float(sigma), exponent)
    just = certify.exact([value])
    above, below = (certify.exact([np.nextafter(value, end)]) for end in (np.inf, 0))
    assert certify.broken(just, just, stack, gram) == 0
    assert certify.broken(below, above, stack, gram) == 0
    assert certify.broken(just, below, stack, gram) == 1
    assert certify.broken(above, above, stack, gram) == 1


def test_complex_numbers_are_two_parts():
    whole = np.array([[[3, 0]], [[0, 4]]]).astype(object)[:, None]  # (3, 4i), of norm 5
    stack = certify.Stack(whole, 0, None)
    gram = certify.gram_of(stack)
    five, less = certify.exact([5.0]), certify.exact([np.nextafter(5, 0)])
    assert certify.broken(five, five, stack, gram) == 0
    assert certify.broken(less, less, stack, gram) == 1


def test_infinity_is_a_bound_and_nan_is_none():
    stack = stack_of([[1]])
    gram = certify.gram_of(stack)
    assert certify.broken(None, certify.exact([np.inf]), stack, gram) == 0
    assert certify.broken(None, certify.exact([np.nan]), stack, gram) == 1


def test_a_piece_of_the_campaign_holds():
    for rows in (certify.matrices("numpy", 500), certify.kernels(20), certify.layers(20)):
        assert rows
        assert all(row["cases"] and not row["broken"] for row in rows.values())
