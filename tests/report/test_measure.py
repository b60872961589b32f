"""Norms, intervals and counts of matrices against a singular value decomposition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectral_core._report import matrix as module
from spectral_core._report import tiling
from spectral_core._report.matrix import measure


@pytest.fixture(params=[False, True], ids=["small", "large"])
def any_route(request, monkeypatch):
    """Measure by the factorization, or by Lanczos steps in tiles that are decoded each time."""
    if request.param:
        monkeypatch.setattr(module, "MOST_PROVEN", 0)
        monkeypatch.setattr(tiling, "_TILE", 64)
        monkeypatch.setattr(tiling, "_KEPT", 0)


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from([0, -160, 140, -1000, 1000]),
    st.integers(0, 99),
)
def test_interval_holds_sigma(any_route, m, n, is_complex, exponent, seed):
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((m, n)) + (1j * rng.standard_normal((m, n)) if is_complex else 0)
    s = np.linalg.svd(W, compute_uv=False)
    scale = 2.0**exponent
    found = measure(W * scale, lambda x: x)
    assert found.lower / scale <= s[0] * (1 + 1e-13)
    assert s[0] * (1 - 1e-13) <= found.upper / scale
    assert found.sigma / scale == pytest.approx(s[0], rel=1e-6)
    assert found.frobenius / scale == pytest.approx(np.linalg.norm(W), rel=1e-12)
    if min(m, n) > 1:
        assert found.ratio == pytest.approx(s[1] / s[0], rel=1e-5, abs=1e-7)
    assert found.nonfinite == 0


def test_counts(any_route):
    W = np.ones((6, 9))
    W[2] = 0
    W[:, 4:6] = 0
    found = measure(W, lambda x: x)
    assert (found.dead_rows, found.dead_columns) == (1, 2)
    assert found.zeros == pytest.approx((9 + 2 * 5) / 54)
    turned = measure(W.T, lambda x: x)
    assert (turned.dead_rows, turned.dead_columns) == (2, 1)
    W[0, 0], W[1, 1] = np.nan, np.inf
    found = measure(W, lambda x: x)
    assert found.nonfinite == 2
    assert np.isnan([found.sigma, found.lower, found.upper]).all()
    assert found.largest == np.inf
    assert measure(np.zeros((3, 2)), lambda x: x)[:4] == (0.0, 0.0, 0.0, "proven")


@pytest.mark.parametrize("W", [[[3.0, -4.0], [np.nan, 2.0]], [[np.nan, -4.0], [np.nan, 2.0]]])
def test_largest_beside_nan(any_route, W):
    assert measure(np.array(W), lambda x: x).largest == 4.0
    assert measure(np.full((2, 2), np.nan), lambda x: x).largest == 0.0


@pytest.mark.parametrize("proven", [False, True])
def test_absolute_values_beyond_float64(any_route, proven):
    W = np.full((9, 5), complex(1.7e308, 1.7e308))
    with np.errstate(over="ignore"):
        found = measure(W, lambda x: x, proven=proven, spectrum=True)
    assert (found.sigma, found.upper, found.frobenius) == (np.inf, np.inf, np.inf)
    assert 0 < found.lower < np.inf
    assert (found.nonfinite, found.spectrum) == (0, None)


def test_bounds_of_a_large_matrix_can_be_proven(monkeypatch):
    monkeypatch.setattr(module, "MOST_PROVEN", 0)
    W = np.random.default_rng(0).standard_normal((80, 70))
    assert measure(W, lambda x: x).method != "proven"
    found = measure(W, lambda x: x, proven=True)
    assert found.method == "proven"
    assert found.upper < found.lower * (1 + 1e-10)


def test_a_large_matrix_is_decoded_in_parts(monkeypatch):
    monkeypatch.setattr(module, "MOST_PROVEN", 0)
    monkeypatch.setattr(tiling, "_KEPT", 0)
    monkeypatch.setattr(tiling, "_TILE", 1000)
    sizes = []

    def decode(x):
        sizes.append(x.size)
        return x.astype(np.float64)

    measure(np.ones((300, 70), np.float32), decode)
    assert max(sizes) <= 1000
