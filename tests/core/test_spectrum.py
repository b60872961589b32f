"""The first k singular triplets, and the stable rank, against the SVD."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    k = draw(st.integers(1, min(m, n)))
    W = rng.standard_normal((m, n))
    if draw(st.booleans()):
        W = W + 1j * rng.standard_normal((m, n))
    kind = draw(st.sampled_from(["any", "equal", "rank two", "zero"]))
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    if kind == "equal":
        s = np.ones_like(s)
    elif kind == "rank two":
        s[2:] = 0
    elif kind == "zero":
        s[:] = 0
    return U * s @ Vh, k


@given(cases())
def test_the_first_triplets_agree_with_the_svd(case):
    W, k = case
    found = sc.top_triplets(W, k)
    exact = np.linalg.svd(W, compute_uv=False)
    np.testing.assert_allclose(found.sigma, exact[:k], atol=1e-8 * max(1, exact[0]))
    assert found.converged
    np.testing.assert_allclose(found.v @ found.v.conj().T, np.eye(k), atol=1e-10)
    image = (W.conj().T @ found.u.T).T
    np.testing.assert_allclose(image, found.sigma[:, None] * found.v, atol=1e-7 * max(1, exact[0]))


def test_a_value_that_occurs_several_times_is_found_as_often():
    rng = np.random.default_rng(0)
    Q, R = (np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (120, 90))
    W = Q[:, :90] * np.r_[np.full(4, 2.0), np.linspace(1.5, 0, 86)] @ R
    np.testing.assert_allclose(
        sc.top_triplets(W, 6).sigma, [2, 2, 2, 2, 1.5, 1.5 * 84 / 85], rtol=1e-6
    )


def test_a_large_matrix_needs_few_products():
    W = np.random.default_rng(0).standard_normal((400, 300))
    found = sc.top_triplets(W, 5)
    np.testing.assert_allclose(found.sigma, np.linalg.svd(W, compute_uv=False)[:5], rtol=1e-9)
    assert found.n_iter < 300


@pytest.mark.parametrize("factor", [1e-300, 1e-30, 1e30, 1e300])
def test_scales_do_not_matter(factor):
    W = np.random.default_rng(0).standard_normal((8, 6))
    np.testing.assert_allclose(
        sc.top_triplets(W * factor, 3).sigma, sc.top_triplets(W, 3).sigma * factor, rtol=1e-9
    )
    assert float(sc.stable_rank(W * factor)) == pytest.approx(float(sc.stable_rank(W)), rel=1e-9)


def test_each_backend_agrees_with_the_svd(backend):
    W = np.random.default_rng(0).standard_normal((20, 15)).astype(np.float32)
    found = sc.top_triplets(backend.asarray(W), 3)
    exact = np.linalg.svd(W.astype(float), compute_uv=False)
    np.testing.assert_allclose(backend.to_numpy(found.sigma), exact[:3], rtol=1e-4)
    rank = float(sc.stable_rank(backend.asarray(W)))
    assert rank == pytest.approx((exact**2).sum() / exact[0] ** 2, rel=1e-4)


def test_special_matrices():
    assert np.isnan(sc.top_triplets(np.array([[np.nan, 1.0], [0, 1]]), 2).sigma).all()
    assert float(sc.stable_rank(np.zeros((2, 3)))) == 0
    assert np.isnan(sc.stable_rank(np.array([[np.inf, 1.0]])))
    with pytest.raises(sc.ShapeError, match="no 3 singular"):
        sc.top_triplets(np.ones((2, 5)), 3)
    with pytest.raises(sc.ShapeError, match="stack"):
        sc.top_triplets(np.ones((2, 2, 5)), 1, layout="soi")
    with pytest.raises(sc.ArgumentError, match="k must be"):
        sc.top_triplets(np.ones((2, 5)), 0)
