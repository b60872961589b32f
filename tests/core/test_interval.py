"""Bounds from both sides hold for the exact largest singular value, on adversarial spectra."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from spectral_core.errors import DTypeError


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


@st.composite
def integer_matrices(draw):
    """Draw a small integer matrix: its Gram matrix is exact in integers."""
    m, n = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["any", "rank one", "equal values", "near"]))
    numbers = st.integers(-9, 9)
    if kind == "rank one":
        u = [draw(numbers) for _ in range(m)]
        v = [draw(numbers) for _ in range(n)]
        return np.outer(u, v)
    if kind == "equal values":
        return np.eye(m, n, dtype=int) * draw(numbers)
    W = np.array([[draw(numbers) for _ in range(n)] for _ in range(m)])
    if kind == "near":
        W = np.eye(m, n, dtype=int) * 10**6 + W
    return W


def exceeds(square, W):
    """Return True if square·I − WᵀW is positive semidefinite, in rational arithmetic.

    That is σ₁² ≤ square. Elimination without rounding decides it.
    """
    from fractions import Fraction

    gram = W.T.astype(object) @ W.astype(object)
    n = len(gram)
    A = [
        [Fraction(square) * (i == j) - Fraction(int(gram[i, j])) for j in range(n)]
        for i in range(n)
    ]
    while A:
        pivot = A[0][0]
        if pivot < 0 or (pivot == 0 and any(x != 0 for x in A[0])):
            return False
        rest = A[1:]
        A = [
            [
                x - (row[0] * y / pivot if pivot else 0)
                for x, y in zip(row[1:], A[0][1:], strict=True)
            ]
            for row in rest
        ]
    return True


@given(integer_matrices(), st.sampled_from([np.float64, np.float32]))
def test_bounds_hold_in_rational_arithmetic(W, dtype):
    from fractions import Fraction

    lower, upper, method = sc.bounds(W.astype(dtype))
    assert method == "factorization"
    assert exceeds(Fraction(float(upper)) ** 2, W)
    assert lower == 0 or not exceeds(Fraction(float(lower)) ** 2 * (1 - Fraction(1, 10**15)), W)
    assert upper - lower <= 1e-11 * upper
    above = float(sc.gram_bound(W.astype(dtype), n_iter=12))
    assert exceeds(Fraction(above) ** 2, W)
    rank = max(1, min(W.shape))
    assert above <= float(upper) * rank ** (1 / 2**13) * (1 + 1000 * np.finfo(dtype).eps)


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-8, 1e-3])
@pytest.mark.parametrize("shape", [(40, 40), (60, 40), (40, 60)])
def test_bounds_hold_for_close_values(gap, shape):
    rng = np.random.default_rng(0)
    S = np.zeros(shape)
    S[range(40), range(40)] = np.r_[1, np.full(20, 1 - gap), np.linspace(0.9, 0, 19)]
    W = orthogonal(rng, shape[0]) @ S @ orthogonal(rng, shape[1])
    exact = np.linalg.norm(W, 2)
    lower, upper, _ = sc.bounds(W)
    assert lower <= exact * (1 + 1e-14)
    assert exact * (1 - 1e-14) <= upper <= lower * (1 + 1e-10)
    for seed in range(5):
        random = sc.bounds(W, probability=1e-9, seed=seed)
        assert random.lower <= exact * (1 + 1e-14)
        assert exact * (1 - 1e-14) <= random.upper


@pytest.mark.parametrize("n_iter", [1, 2, 5, 12, 20])
def test_a_probability_says_how_often_the_bound_may_fail(n_iter):
    """A slow spectrum and few steps: at probability 1/2 the bound may fail, not at 1e-6."""
    rng = np.random.default_rng(0)
    W = orthogonal(rng, 60) * np.linspace(1, 0.8, 60) @ orthogonal(rng, 60)
    likely = [sc.bounds(W, probability=0.5, n_iter=n_iter, seed=s).upper for s in range(100)]
    certain = [sc.bounds(W, probability=1e-6, n_iter=n_iter, seed=s).upper for s in range(100)]
    assert np.mean(np.array(likely) < 1 - 1e-9) <= 0.5
    assert min(certain) >= 1 - 1e-12
    assert min(np.array(certain) - likely) >= 0


def test_the_probability_of_many_steps_is_close():
    W = np.random.default_rng(0).standard_normal((300, 200))
    lower, upper, method = sc.bounds(W, probability=1e-9)
    exact = np.linalg.norm(W, 2)
    assert method == "lanczos"
    assert lower <= exact <= upper <= exact * 1.01


@pytest.mark.parametrize("exponent", [-1074, -1040, -700, -160, 0, 160, 700, 1020])
def test_scales_do_not_matter(exponent):
    W = np.random.default_rng(0).integers(1, 9, (6, 5)) * 2.0**exponent
    exact = np.linalg.norm(W * 2.0 ** (-exponent // 2) * 2.0 ** (-exponent + exponent // 2), 2)
    for options in ({}, {"probability": 1e-9}):
        lower, upper, _ = sc.bounds(W, **options)
        assert math.ldexp(exact, 0) > 0
        if exponent < 1020:
            assert lower <= math.ldexp(exact, exponent) <= upper
        else:
            assert lower <= math.ldexp(exact, 1000) * 2.0**20
        assert exponent < -1000 or upper <= lower * (1 + 1e-8)


@pytest.mark.parametrize("options", [{}, {"probability": 1e-6}])
def test_special_matrices(options):
    assert tuple(sc.bounds(np.zeros((3, 2)), **options))[:2] == (0, 0)
    assert np.isnan(sc.bounds(np.array([[np.nan, 1.0]]), **options).upper)
    assert np.isnan(sc.bounds(np.array([[np.inf, 1.0]]), **options).lower)
    lower, upper, _ = sc.bounds([[3, 4]], **options)
    assert lower <= 5 <= upper <= 5 + 1e-8
    stack = sc.bounds(np.ones((2, 3, 4, 5)), layout="ssoi", **options)
    assert stack.lower.shape == stack.upper.shape == (2, 3)
    with pytest.raises(sc.ShapeError, match="layout"):
        sc.bounds(np.ones((2, 3, 4)), **options)


@pytest.mark.parametrize("value", [0, 1, -0.1, 2, float("nan")])
def test_a_probability_out_of_range_is_named(value):
    with pytest.raises(sc.ArgumentError, match="probability"):
        sc.bounds(np.ones((2, 2)), probability=value)


def test_each_backend_bounds_its_own_arrays(backend):
    rng = np.random.default_rng(0)
    host = rng.standard_normal((2, 30, 20)).astype(np.float32)
    exact = np.linalg.norm(host.astype(float), 2, axis=(-2, -1))
    W = backend.asarray(host)
    for options in ({}, {"probability": 1e-9}):
        lower, upper, _ = sc.bounds(W, layout="soi", **options)
        assert np.all(lower <= exact * (1 + 1e-14))
        assert np.all(exact <= upper * (1 + 1e-14))
    above = np.asarray(backend.to_numpy(sc.gram_bound(W)), float)
    assert np.all(exact <= above)
    assert np.all(above <= exact * 20 ** (1 / 2**11) * 1.001)


def test_gram_bound_never_falls_below_however_many_products():
    W = np.random.default_rng(0).standard_normal((64, 64))
    exact = np.linalg.norm(W, 2)
    found = [float(sc.gram_bound(W, n_iter=t)) for t in range(1, 30)]
    assert min(found) >= exact
    assert found[14] <= exact * 64 ** (1 / 2**16) * (1 + 1e-12)


def test_gram_bound_has_the_gradient_of_sigma():
    torch = pytest.importorskip("torch")
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).requires_grad_()
    sc.gram_bound(W, n_iter=12).backward()
    expected = np.zeros((3, 3))
    expected[0, 0] = 1
    np.testing.assert_allclose(W.grad.numpy(), expected, atol=1e-6)


def test_gram_bound_of_special_matrices():
    assert float(sc.gram_bound(np.zeros((3, 2)))) == 0
    assert np.isnan(float(sc.gram_bound(np.array([[np.nan, 1.0]]))))
    for scale in (1e-300, 1e300):
        assert 5 * scale <= float(sc.gram_bound(np.array([[3.0, 4.0]]) * scale)) <= 5.001 * scale


@given(integer_matrices(), st.sampled_from([np.float64, np.float32, np.float16]))
def test_cheap_bounds_hold_in_rational_arithmetic(W, dtype):
    from fractions import Fraction

    stored = np.clip(W, -60000, 60000).astype(dtype)
    whole = stored.astype(int)
    lower, upper, method = sc.bounds(stored, method="cheap")
    assert method == "cheap"
    assert exceeds(Fraction(float(upper)) ** 2, whole)
    assert lower == 0 or not exceeds(Fraction(float(lower)) ** 2 * (1 - Fraction(1, 10**15)), whole)
    size = np.abs(whole)
    least = min(np.sum(size**2), size.sum(axis=0).max() * size.sum(axis=1).max()) ** 0.5
    assert upper <= least * (1 + 1e-12)
    longest = max((size**2).sum(axis=0).max(), (size**2).sum(axis=1).max()) ** 0.5
    assert lower >= longest * (1 - 1e-12)


def test_cheap_bounds_of_each_backend(backend):
    host = np.random.default_rng(0).standard_normal((2, 30, 20)).astype(np.float32)
    lower, upper, _ = sc.bounds(backend.asarray(host), layout="soi", method="cheap")
    exact = np.linalg.norm(host.astype(float), 2, axis=(-2, -1))
    assert np.all((exact / 3 < lower) & (lower < exact) & (exact < upper) & (upper < 3 * exact))


def test_the_largest_of_many_rows_is_bounded_closely():
    """Sums of more than a thousand rows are cut: rounding decides how close the bounds are."""
    W = np.random.default_rng(0).standard_normal((5000, 60))
    lower, upper, _ = sc.bounds(W)
    exact = np.linalg.norm(W, 2)
    assert lower <= exact * (1 + 1e-14)
    assert exact * (1 - 1e-14) <= upper <= lower * (1 + 6e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "svd"}, "factorization, lanczos, cheap"),
        ({"method": "lanczos"}, "needs a probability"),
        ({"method": "cheap", "probability": 0.1}, "no probability"),
        ({"method": "factorization", "probability": 0.1}, "no probability"),
    ],
)
def test_a_method_that_does_not_fit_is_named(options, words):
    with pytest.raises(sc.ArgumentError, match=words):
        sc.bounds(np.ones((2, 2)), **options)


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [("complex128", -1074), ("complex128", -1000), ("float32", -149), ("complex64", -140)],
)
def test_gram_bound_of_subnormal_numbers_is_rounded_up(dtype, exponent):
    """A division by a subnormal number overflows, and the last digit of a result rounds down."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        whole = rng.integers(-9, 10, (4, 3)) + 1j * rng.integers(-9, 10, (4, 3))
        whole = whole if dtype.startswith("c") else whole.real
        values = whole.astype(complex).view(float) * 2.0 ** (exponent // 2)
        W = (values * 2.0 ** (exponent - exponent // 2)).view(complex)
        W = (W if dtype.startswith("c") else W.real).astype(dtype)
        with np.errstate(all="raise", under="ignore"):
            above = float(sc.gram_bound(W))
        exact = np.linalg.norm(whole, 2)
        assert exact <= math.ldexp(above, -exponent) <= exact * 1.01 + 3


def test_gram_bound_where_rounding_leaves_none_is_infinite():
    W = np.ones((2**12, 2), np.float32)
    assert np.isfinite(sc.gram_bound(W))
    assert np.isinf(sc.gram_bound(np.ones((2**23, 2), np.float32), n_iter=1))


@pytest.mark.parametrize("method", ["factorization", "cheap"])
def test_a_complex_element_may_be_beyond_float64_itself(method):
    """Both of its parts are finite, so the matrix is."""
    lower, upper, _ = sc.bounds(np.full((2, 3), 1.7e308 * (1 + 1j)), method=method)
    assert lower == sys.float_info.max
    assert upper == np.inf
    found = sc.convolution_norm(np.full((1, 1, 2), 1.7e308 * (1 + 1j)), "oik")
    assert found[:2] == (sys.float_info.max, np.inf)


@pytest.mark.skipif(np.finfo(np.longdouble).maxexp <= 1024, reason="longdouble is float64 here")
@pytest.mark.parametrize("value", ["1e-400", "1e400"])
def test_numbers_that_float64_has_no_place_for_are_refused(value):
    """1e-400 would become zero, and so would its upper bound."""
    W = np.full((2, 3, 1), np.longdouble(value))
    for method in ("factorization", "cheap"):
        with pytest.raises(DTypeError, match="range of float64"):
            sc.bounds(W[..., 0], method=method)
    with pytest.raises(DTypeError, match="range of float64"):
        sc.spectral_norm(W[..., 0])
    with pytest.raises(DTypeError, match="range of float64"):
        sc.convolution_norm(W, "oik")
