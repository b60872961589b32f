"""Norms of products and of maps that are given by their products, against the SVD."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from spectral_core.engine import array_namespace


@st.composite
def factors(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, r, n = (draw(st.integers(1, 9)) for _ in range(3))
    stack = draw(st.sampled_from([(), (3,), (2, 2)]))
    A, B = rng.standard_normal((*stack, m, r)), rng.standard_normal((*stack, r, n))
    if draw(st.booleans()):
        A, B = A + 1j * rng.standard_normal(A.shape), B + 1j * rng.standard_normal(B.shape)
    if draw(st.booleans()):
        A[..., 0] = A[..., -1]  # a rank that is not full
    return A, B


@given(factors())
def test_a_product_agrees_with_the_svd(AB):
    A, B = AB
    found = sc.product_norm(A, B)
    exact = np.linalg.norm(A @ B, 2, axis=(-2, -1))
    np.testing.assert_allclose(found.sigma, exact, rtol=1e-10, atol=1e-12)
    image = ((A @ B).conj().swapaxes(-1, -2) @ found.u[..., None])[..., 0]
    np.testing.assert_allclose(image, found.sigma[..., None] * found.v, atol=1e-5 * np.max(exact))


@given(factors())
def test_a_map_agrees_with_the_svd(AB):
    A, B = AB
    if A.ndim > 2:
        A, B = A[(0,) * (A.ndim - 2)], B[(0,) * (B.ndim - 2)]
    start = np.random.default_rng(0).standard_normal(B.shape[1]).astype(A.dtype)
    found = sc.operator_norm(lambda x: A @ (B @ x), lambda y: B.conj().T @ (A.conj().T @ y), start)
    exact = np.linalg.norm(A @ B, 2)
    assert float(found.sigma) == pytest.approx(exact, rel=1e-10)
    assert found.converged
    assert float(found.residual) <= 1e-9 * exact


def test_an_update_of_low_rank_is_measured_without_the_sum():
    rng = np.random.default_rng(0)
    W, B, A = (
        rng.standard_normal((40, 30)),
        rng.standard_normal((40, 2)),
        rng.standard_normal((2, 30)),
    )
    found = sc.operator_norm(
        lambda x: W @ x + 0.5 * (B @ (A @ x)),
        lambda y: W.T @ y + 0.5 * (A.T @ (B.T @ y)),
        rng.standard_normal(30),
    )
    assert float(found.sigma) == pytest.approx(np.linalg.norm(W + 0.5 * B @ A, 2), rel=1e-10)


def test_each_backend_measures_its_own_arrays(backend):
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((12, 4), (4, 9)))
    exact = np.linalg.norm(A.astype(float) @ B, 2)
    mine, other = backend.asarray(A), backend.asarray(B)
    found = sc.product_norm(mine, other)
    assert float(found.sigma) == pytest.approx(exact, rel=1e-5)
    xp = array_namespace(mine)
    transposed = xp.matrix_transpose(mine), xp.matrix_transpose(other)
    start = backend.asarray(rng.standard_normal(9).astype(np.float32))
    result = sc.operator_norm(
        lambda x: mine @ (other @ x), lambda y: transposed[1] @ (transposed[0] @ y), start
    )
    assert float(result.sigma) == pytest.approx(exact, rel=1e-4)


def test_a_layer_of_torch_is_measured_with_images_as_arguments():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    start = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        found = sc.operator_norm(
            layer,
            lambda y: torch.nn.functional.conv_transpose2d(y, layer.weight, padding=1),
            start,
        )
    rows = layer(torch.eye(50, dtype=torch.float64).reshape(50, 2, 5, 5)).reshape(50, -1)
    assert float(found.sigma) == pytest.approx(float(torch.linalg.matrix_norm(rows, 2)), rel=1e-9)
    assert found.v.shape == start.shape


def test_maps_that_are_zero_or_not_finite():
    start = np.ones(3)
    zero = sc.operator_norm(lambda x: x * 0, lambda y: y * 0, start)
    assert (float(zero.sigma), zero.converged) == (0, True)
    bad = sc.operator_norm(lambda x: x * np.nan, lambda y: y * np.nan, start)
    assert np.isnan(bad.sigma)
    assert not bad.converged


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sc.product_norm(np.ones((2, 3)), np.ones((2, 3))), sc.ShapeError, "r"),
        (lambda: sc.product_norm(np.ones((2, 3)), np.ones((3, 2), "f4")), sc.DTypeError, "float32"),
        (lambda: sc.operator_norm(abs, abs, np.ones(3, np.float16)), sc.DTypeError, "start"),
        (lambda: sc.operator_norm(abs, abs, np.ones((0, 3))), sc.ShapeError, "empty"),
        (
            lambda: sc.operator_norm(abs, lambda y: y[:2], np.ones(3)),
            sc.ShapeError,
            "adjoint_times",
        ),
    ],
)
def test_errors_name_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_heads_that_share_a_key_broadcast(backend):
    """Grouped queries: two heads of keys, three of queries for each."""
    rng = np.random.default_rng(0)
    Wq, Wk = (rng.standard_normal(s).astype("f4") for s in ((2, 3, 8, 4), (2, 1, 4, 8)))
    found = sc.product_norm(backend.asarray(Wq), backend.asarray(Wk))
    exact = np.linalg.norm(Wq.astype(float) @ Wk, 2, axis=(-2, -1))
    np.testing.assert_allclose(backend.to_numpy(found.sigma), exact, rtol=1e-4)
    u, v = backend.to_numpy(found.u), backend.to_numpy(found.v)
    assert u.shape == v.shape == (2, 3, 8)
    image = np.einsum("...i,...ij,...j->...", u, Wq.astype(float) @ Wk, v)
    np.testing.assert_allclose(image, exact, rtol=1e-4)
    with pytest.raises(sc.ShapeError, match="r"):
        sc.product_norm(backend.asarray(Wq), backend.asarray(np.repeat(Wk, 2, axis=1)))
