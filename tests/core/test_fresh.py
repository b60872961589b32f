"""A step leaves every subspace: sigma finds the largest singular value wherever v began."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import on, slow, svd_norm
from fresh import start_of
from spectral_core._arrays import array_namespace
from spectral_core._power import fresh_direction

STEPS = 200


def blocks(first, second, n=12, seed=0):
    """Return a matrix of two blocks with these spectral norms."""
    rng = np.random.default_rng(seed)
    W = np.zeros((2 * n, 2 * n))
    for i, sigma in enumerate((first, second)):
        block = rng.standard_normal((n, n))
        part = slice(i * n, (i + 1) * n)
        W[part, part] = block * (sigma / svd_norm(block))
    return W


def settled(backend, W, dtype, n_vectors=1):
    """Return a state whose vectors have had time to forget all but the first block of W."""
    state = sc.init({"w": backend.asarray(W, dtype)}, n_vectors=n_vectors)
    V = np.zeros((n_vectors, W.shape[1]))
    half = len(W) // 2
    V[:, :half] = np.linalg.svd(W[:half, :half])[2][:n_vectors]
    v, u = ({"w": backend.asarray(x, dtype)} for x in (V, np.zeros(len(W))))
    return sc.SpectralState(v, state.sigma, state.layouts, u)


@pytest.mark.parametrize("dtype", ["float32", *slow("float64", "complex64")])
@pytest.mark.parametrize("n", [1, 2, 7, 4097])
def test_it_is_the_same_small_direction_everywhere(backend, n, dtype):
    V = backend.asarray(np.zeros((1, n)), dtype)
    found = backend.to_numpy(fresh_direction(V, array_namespace(V)))
    assert (found.dtype, found.shape) == (np.dtype(dtype), (n,))
    np.testing.assert_allclose(found, start_of(np.zeros(n, dtype)), rtol=1e-6)
    assert np.max(np.abs(found)) <= (2**-27 if dtype == "float64" else 2**-20)


@pytest.mark.parametrize("n", [4, 16, 100, 1000, 25088])
def test_it_has_a_part_along_every_vector(n):
    """Also along the ones that a network's weights often have: constant, alternating, a wave."""
    fresh = start_of(np.zeros(n)) * 2**27
    rng = np.random.default_rng(n)
    vectors = [np.ones(n), (-1.0) ** np.arange(n), np.cos(np.arange(n)), *rng.normal(size=(97, n))]
    parts = [abs(fresh @ v) / np.linalg.norm(v) for v in vectors]
    assert np.min(parts) > 1e-3
    assert np.median(parts) > 0.2


@pytest.mark.parametrize("n_vectors", [1, 2])
@pytest.mark.parametrize("act", ["add_gradient", "iterate", "constrain"])
def test_sigma_finds_another_block(backend, act, n_vectors):
    W = blocks(1.0, 1.06)
    state, weights = settled(backend, W, "float32", n_vectors), {"w": backend.asarray(W, "float32")}
    grads = {"w": backend.asarray(np.zeros_like(W), "float32")}
    assert float(sc.iterate(weights, state).sigma["w"]) == pytest.approx(1.0, rel=1e-5)
    for _ in range(STEPS):
        if act == "add_gradient":
            _, state = sc.add_gradient(weights, grads, state)
        elif act == "iterate":
            state = sc.iterate(weights, state)
        else:
            _, state = sc.constrain(weights, state, bound=9.0)
    assert float(state.sigma["w"]) > 0.95 * 1.06


@on("numpy", "torch-cpu")
@given(
    ratio=st.floats(1.06, 30),
    n=st.integers(1, 60),
    seed=st.integers(0, 2**16),
    rotated=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_sigma_leaves_any_subspace(backend, ratio, n, seed, rotated, dtype):
    W = blocks(1.0, ratio, n, seed)
    v = np.concatenate([np.linalg.svd(W[:n, :n])[2][0], np.zeros(n)])
    if rotated:  # where rounding may take v + r back to v
        Q = np.linalg.qr(np.random.default_rng(seed).standard_normal(W.shape))[0]
        W, v = W @ Q.T, Q @ v
    weights = {"w": backend.asarray(W, dtype)}
    state = sc.init(weights)
    state = sc.SpectralState({"w": backend.asarray(v[None], dtype)}, state.sigma, state.layouts)
    for _ in range(STEPS):
        state = sc.iterate(weights, state)
    assert float(state.sigma["w"]) > 0.95 * ratio


def test_a_block_that_wakes_late_is_found(backend):
    W = blocks(1.0, 4.5)
    asleep = W.copy()
    asleep[12:, 12:] = 0
    state = sc.init({"w": backend.asarray(asleep, "float32")})
    for step in range(40):
        weights = {"w": backend.asarray(asleep if step < 20 else W, "float32")}
        state = sc.iterate(weights, state)
    assert float(state.sigma["w"]) == pytest.approx(4.5, rel=0.05)


@on("numpy", "torch-cpu", "jax-cpu")
def test_a_matrix_that_v_does_not_reach_is_found(backend):
    """With v in the null space, the plain iteration has σ = 0 for ever."""
    W = np.array([[0.0, 2.0], [0.0, 1.0]])
    weights = {"w": backend.asarray(W)}
    state = sc.init(weights)
    v = {"w": backend.asarray(np.array([[1.0, 0.0]]))}
    state = sc.SpectralState(v, state.sigma, state.layouts)
    assert float(sc.iterate(weights, state).sigma["w"]) == pytest.approx(5**0.5)


def test_v_of_a_zero_matrix_stays(backend):
    weights = {"w": backend.asarray(np.zeros((3, 4)))}
    state = sc.init(weights)
    after = sc.iterate(weights, state, n_iter=3)
    np.testing.assert_array_equal(*(backend.to_numpy(s.v["w"]) for s in (state, after)))
