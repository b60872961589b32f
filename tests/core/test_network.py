"""Gains combine upward, slopes are those of the activations, and results are readable."""

from decimal import Decimal, localcontext
from math import erf, erfc, inf, pi, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_core as sc
from spectral_core.engine import (
    SLOPES,
    Inexact,
    Ledger,
    Stage,
    Value,
    in_parallel,
    in_series,
    side_by_side,
    widened,
)

X = np.concatenate([[-1000.0, -999.0], np.linspace(-9, 9, 60_001), [99.0, 100.0]])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _selu(x):
    return 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x))


FORMULAS = {
    "identity": lambda x: x,
    "abs": np.abs,
    "atan": np.arctan,
    "celu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "clamp": lambda x: np.clip(x, -1, 2),
    "cos": np.cos,
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "erf": np.vectorize(erf),
    "gelu": lambda x: x * np.vectorize(erfc)(-x / 2**0.5) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh((2 / pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "hardtanh": lambda x: np.clip(x, -1, 1),
    "log_sigmoid": lambda x: -np.logaddexp(0, -x),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "neg": lambda x: -x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": _selu,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "sin": np.sin,
    "softplus": lambda x: np.logaddexp(0, x),
    "softshrink": lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "tanh": np.tanh,
    "tanhshrink": lambda x: x - np.tanh(x),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_are_those_of_the_activation(name):
    """No difference quotient leaves the interval, and both ends are attained."""
    low, high = SLOPES[name]
    with np.errstate(over="ignore", invalid="ignore"):
        quotients = np.diff(FORMULAS[name](X)) / np.diff(X)
    assert low - 1e-9 <= quotients.min() <= low + 2e-3
    assert high - 2e-3 <= quotients.max() <= high + 1e-9


GAINS = st.lists(st.floats(-300, 300) | st.sampled_from([-inf, 0.0]), min_size=1, max_size=5)


@given(GAINS)
@settings(max_examples=200, deadline=None)
def test_gains_combine_upward(gains):
    with localcontext(prec=60):
        exact = [Decimal(10) ** Decimal(gain) if gain > -inf else Decimal(0) for gain in gains]
        cases = {
            in_series(gains): prod(exact),
            in_parallel(gains): sum(exact),
            side_by_side(gains): sum(x * x for x in exact).sqrt(),
        }
        for found, number in cases.items():
            if number == 0:
                assert found == -inf
            else:
                logarithm = number.log10()
                assert logarithm - Decimal("1e-50") <= Decimal(found)
                assert Decimal(found) <= logarithm + Decimal("1e-10")


def test_unbounded_gains():
    assert in_series([inf, 0.0]) == inf
    assert in_series([inf, -inf]) == -inf  # a constant stays one
    assert in_parallel([inf, -inf]) == inf


def chain(*stages):
    value = Value(0.0, is_input=True)
    for stage in stages:
        value = Value(1.0, value, (stage,))
    return value


def test_ledger_chooses_the_better_bound():
    W = np.diag([2.0, 1.0])
    stages = [Stage((2, 2), dense=lambda: Inexact(W, 0.0)), Stage((2, 2), slopes=(0.0, 1.0))]
    found = Ledger().result([chain(*stages, stages[0])], lower=None)
    assert found.eclipse == pytest.approx(4.0)
    assert found.upper == pytest.approx(4.0)  # the walk's own gain is 10
    assert not found.notes


def test_activations_at_the_ends_and_in_a_row_count():
    W = np.array([[3.0]])
    half, cut = Stage((1, 1), slopes=(0.0, 0.5)), Stage((1, 1), slopes=(-1.0, 1.0))
    stages = [half, Stage((1, 1), dense=lambda: Inexact(W, 0.0)), cut, half]
    assert Ledger().result([chain(*stages)], lower=None).eclipse == pytest.approx(0.75)


def test_large_layers_and_other_graphs_leave_the_chain_out():
    wide = Stage((4096, 2), dense=lambda: pytest.fail("the matrix is too large"))
    found = Ledger().result([chain(wide)], lower=None)
    assert found.eclipse is None
    assert "4096" in found.notes[0]
    found = Ledger().result([Value(1.0)], lower=None)
    assert found.eclipse is None
    assert "no chain" in found.notes[0]


def test_result_is_a_table():
    ledger = Ledger()
    ledger.layer("conv", "Conv2d", 1.5, 1.6)
    ledger.layer("conv", "Conv2d", 2.5, 2.6)
    found = ledger.result([Value(0.3)], lower=1.25)
    text = str(found)
    assert [row.name for row in found.layers] == ["conv", "conv (2)"]
    assert found.log10_product == pytest.approx(np.log10(1.6 * 2.6))
    for part in ("layer", "conv (2)", "Conv2d", "2.6", "10^0.3000", "1.25"):
        assert part in text
    ledger.refuse("block", "attention has no bound")
    found = ledger.result([Value(0.3)], lower=None)
    assert found.upper == inf
    assert found.log10_product == inf
    assert dict(found.unbounded) == {"block": "attention has no bound"}
    assert "block: attention has no bound" in str(found)
    assert "upper bound      none" in str(found)
    assert "product of norms" not in str(found)


def test_norm_that_is_not_finite_is_named():
    ledger = Ledger()
    assert ledger.layer("w", "Linear", np.nan, np.nan) == inf
    assert "w" in ledger.unbounded


def test_result_above_the_largest_float_is_infinite():
    found = sc.NetworkBound(400.0, 400.0, None, None, (), {})
    assert found.upper == inf
    assert "10^400.0000" in str(found)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_roundings_of_a_kernel_are_covered(seed):
    """A kernel times a scale in float64 against the same in longdouble."""
    rng = np.random.default_rng(seed)
    W, scale = rng.standard_normal((4, 3)), np.exp(rng.standard_normal(4))
    rounded = (W * scale[:, None]).astype(np.float32).astype(float)
    unit = 2.0**-24 / 2.0**-53  # as if float32 were the unit
    lower, upper, _ = sc.bounds(rounded)
    lower, upper = widened(float(lower), float(upper), rounded, int(unit) + 1)
    assert lower <= np.linalg.norm(W * scale[:, None], 2) <= upper
