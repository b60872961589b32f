"""Schatten norms and the gain of an embedding, against the SVD."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc

POWERS = [1, 1.5, 2, 2.5, 3, 4, 10, 300, inf]


@st.composite
def stacks(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    W = rng.standard_normal((*draw(st.sampled_from([(), (3,), (2, 2)])), m, n))
    if draw(st.booleans()):
        W = W + 1j * rng.standard_normal(W.shape)
    if draw(st.booleans()):
        W[..., 0] = W[..., -1]
    return W * draw(st.sampled_from([1.0, 1e-300, 1e300, 0.0]))


def expected(W, p):
    scale = np.abs(W).max() or 1.0
    values = np.linalg.svd(W / scale, compute_uv=False)
    return np.linalg.norm(values, p, axis=-1) * scale


@given(stacks(), st.sampled_from([p for p in POWERS if p != 300]))
def test_schatten_norms_agree_with_the_svd(W, p):
    found = sc.schatten_norm(W, p, layout="ss"[: W.ndim - 2] + "oi")
    assert found.shape == W.shape[:-2]
    np.testing.assert_allclose(found, expected(W, p), rtol=1e-12)


def test_a_large_power_does_not_underflow():
    values = np.r_[2e-5, np.full(9, 1e-5)]
    assert float(sc.schatten_norm(np.diag(values), 300)) == pytest.approx(2e-5, rel=1e-12)


@pytest.mark.parametrize("p", POWERS)
def test_each_backend_agrees_with_the_svd(backend, p):
    W = np.random.default_rng(0).standard_normal((2, 9, 5)).astype(np.float32)
    found = sc.schatten_norm(backend.asarray(W), p, layout="soi")
    assert backend.dtype_name(found) == "float32"
    np.testing.assert_allclose(backend.to_numpy(found), expected(W.astype(float), p), rtol=1e-5)
    longest = sc.embedding_norm(backend.asarray(W), layout="sio")
    rows = np.linalg.norm(W.astype(float), axis=-1).max(axis=-1)
    np.testing.assert_allclose(backend.to_numpy(longest), rows, rtol=1e-6)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_the_gradient_is_that_of_the_singular_values(p, shape):
    """d‖W‖_p = Σ (σ_i/‖W‖_p)^(p−1)·u_iᵀ dW v_i."""
    torch = pytest.importorskip("torch")
    W = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).requires_grad_()
    norm = sc.schatten_norm(W, p)
    norm.backward()
    U, s, Vh = np.linalg.svd(W.detach().numpy(), full_matrices=False)
    slopes = (s == s.max()) * 1.0 if p == inf else (s / norm.item()) ** (p - 1)
    np.testing.assert_allclose(W.grad.numpy(), U * slopes @ Vh, atol=1e-9)


@pytest.mark.parametrize("p", POWERS)
def test_a_zero_matrix_has_a_finite_gradient(p):
    torch = pytest.importorskip("torch")
    W = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    (sc.schatten_norm(W, p) + sc.embedding_norm(W)).backward()
    assert torch.isfinite(W.grad).all()


def test_it_runs_inside_jit_with_a_gradient():
    jax = pytest.importorskip("jax")
    W = jax.numpy.asarray(np.diag([3.0, 2.0]))
    for p, slopes in ((1, [1, 1]), (inf, [1, 0])):
        grad = jax.jit(jax.grad(lambda W, p=p: sc.schatten_norm(W, p)))(W)
        np.testing.assert_allclose(grad, np.diag(slopes), atol=1e-6)


@pytest.mark.parametrize("p", POWERS)
def test_special_matrices(p):
    bad = np.array([[[np.nan, 1.0], [0, 1]], [[np.inf, 1.0], [0, 1]], [[0, 0], [0, 2.0]]])
    np.testing.assert_array_equal(sc.schatten_norm(bad, p, layout="soi"), [np.nan, np.nan, 2])
    np.testing.assert_array_equal(sc.embedding_norm(bad, layout="sio"), [np.nan, np.nan, 2])
    tiny = np.array([[5e-324, 0.0]])
    assert float(sc.schatten_norm(tiny, p)) == 5e-324 == float(sc.embedding_norm(tiny))
    assert float(sc.schatten_norm([[3, 0], [0, 4]], 2)) == 5


@given(stacks())
def test_an_embedding_s_gain_is_its_longest_vector(W):
    found = sc.embedding_norm(W, layout="ss"[: W.ndim - 2] + "io")
    scale = np.abs(W).max() or 1.0
    exact = np.linalg.norm(W / scale, axis=-1).max(axis=-1) * scale
    np.testing.assert_allclose(found, exact, rtol=1e-12)
    turned = sc.embedding_norm(W.swapaxes(-1, -2), layout="ss"[: W.ndim - 2] + "oi")
    np.testing.assert_allclose(turned, exact, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(dtype):
    torch = pytest.importorskip("torch")
    W = torch.randn(6, 4).to(getattr(torch, dtype))
    for found, exact in (
        (sc.schatten_norm(W, 1), expected(W.double().numpy(), 1)),
        (sc.embedding_norm(W), np.linalg.norm(W.double().numpy(), axis=1).max()),
    ):
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("p", [0, 0.5, -1, float("nan"), -inf, "one"])
def test_a_power_out_of_range_is_named(p):
    with pytest.raises(sc.ArgumentError, match="p must be"):
        sc.schatten_norm(np.ones((2, 2)), p)


def test_shapes_are_named():
    with pytest.raises(sc.ShapeError, match="layout"):
        sc.schatten_norm(np.ones((2, 2, 2)), 1)
    with pytest.raises(sc.ShapeError, match="empty"):
        sc.embedding_norm(np.ones((0, 2)))
    with pytest.raises(sc.ShapeError, match="3 axes"):
        sc.embedding_norm(np.ones((2, 2)), layout="sio")
