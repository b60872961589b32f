"""XlaEngine: every layout's products, and the core's numbers."""

import numpy as np
import pytest

import spectral_core as sc

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402

from jax_params import assert_trees_close, by_core, run, zeros  # noqa: E402
from spectral_jax import XlaEngine, _regularize, add_spectral_norm_regularization  # noqa: E402

THOROUGH = pytest.mark.thorough


@pytest.fixture(autouse=True)
def _without_numba(monkeypatch):
    """Leave compiled steps to XlaEngine too."""
    monkeypatch.setattr(_regularize, "ENGINES", [XlaEngine()])


@pytest.mark.parametrize(
    "layout", ["io", "hwio", *(pytest.param(x, marks=THOROUGH) for x in ("oi", "sio", "oihw"))]
)
@pytest.mark.parametrize(
    "dtype",
    [
        jnp.bfloat16,
        pytest.param(jnp.float32, marks=THOROUGH),
        pytest.param(jnp.complex64, marks=THOROUGH),
    ],
)
def test_the_iteration_equals_the_core_s(layout, dtype):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 4, 5, 2)[: len(layout)])
    w = w + 1j * rng.standard_normal(w.shape) if dtype == jnp.complex64 else w
    params = {"a": jnp.asarray(w, dtype), "b": jnp.asarray(2 * w, dtype)}
    options = {"factor": {"a": 0.1, "b": 0.4}, "n_iter": 2}
    expected, core = by_core(params, layout, **options)
    tx = add_spectral_norm_regularization(**options, layouts={"*": layout})
    updates, state = run(tx, params)
    assert_trees_close(state.v, dict(core.v), rtol=1e-4)
    assert_trees_close(state.sigma, dict(core.sigma), rtol=1e-5)
    wide = {k: (np.asarray(updates[k], w.dtype), np.asarray(expected[k], w.dtype)) for k in "ab"}
    for found, wanted in wide.values():
        rtol = 1e-2 if dtype == jnp.bfloat16 else 1e-4
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("oi", (5, 7)),
        ("io", (7, 5)),
        ("io", (1, 5)),
        ("io", (7, 1)),
        ("hwio", (3, 1, 4, 5)),
        ("hwio", (1, 1, 4, 5)),
        ("iohw", (4, 5, 2, 2)),
        ("sio", (3, 4, 5)),
        ("iso", (4, 3, 5)),
        (sc.Layout("hwi(go)", groups=2), (2, 2, 3, 6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("n_vectors", [1, pytest.param(3, marks=THOROUGH)])
def test_every_layout_gives_the_cores_step(layout, shape, n_vectors):
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal(shape), rng.standard_normal(shape)
    tx = add_spectral_norm_regularization(factor=0.3, layouts={"w": layout}, n_vectors=n_vectors)
    params = {"w": jnp.asarray(w)}
    state = tx.init(params)
    expected_state = sc.init({"w": w}, layouts=layout, n_vectors=n_vectors)
    found, state = jax.jit(tx.update)({"w": jnp.asarray(g)}, state, params)
    expected, expected_state = sc.add_gradient({"w": w}, {"w": g}, expected_state, factor=0.3)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state.sigma["w"], expected_state.sigma["w"], rtol=1e-10)
    assert state.v["w"].shape == expected_state.v["w"].shape


@pytest.mark.parametrize("layout", ["io", "oi", "hwio", "oihw"])
def test_no_product_transposes_a_weight(layout):
    # XLA's CPU compiler takes 10 times as long for it.
    params = {"w": jnp.ones((2, 3, 4, 5)[-len(layout) :])}
    tx = add_spectral_norm_regularization(factor=0.1, layouts={"w": layout})
    text = jax.jit(tx.update).lower(zeros(params), tx.init(params), params).as_text()
    shape = "x".join(map(str, params["w"].shape))
    transposes = [line for line in text.splitlines() if "stablehlo.transpose" in line]
    assert not [line for line in transposes if f"(tensor<{shape}x" in line]
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len([line for line in products if f"tensor<{shape}x" in line]) == 2


@pytest.mark.parametrize("n_vectors", [1, pytest.param(2, marks=THOROUGH)])
def test_many_iterations_are_one_loop_that_equals_the_cores(n_vectors):
    params = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((5, 6)))}
    options = {"factor": 0.1, "n_iter": 40}
    tx = add_spectral_norm_regularization(**options, n_vectors=n_vectors)
    text = jax.jit(tx.update).lower(zeros(params), tx.init(params), params).as_text()
    one = add_spectral_norm_regularization(factor=0.1, n_vectors=n_vectors)
    once = jax.jit(one.update).lower(zeros(params), one.init(params), params).as_text()
    assert "stablehlo.while" in text
    assert text.count("stablehlo.dot_general") == once.count("stablehlo.dot_general")
    weights, state = {"w": params["w"]}, sc.init(params, layouts="io", n_vectors=n_vectors)
    expected, core = sc.add_gradient(weights, zeros(weights), state, **options)
    for jit in (True, False):
        updates, state = run(tx, params, steps=1, jit=jit)
        assert_trees_close(updates, expected, rtol=1e-10)
        assert_trees_close(state.sigma, dict(core.sigma), rtol=1e-12)


def test_only_jax_arrays_are_accepted():
    class Job:
        xp = np

    assert not XlaEngine().accepts(Job)
    Job.xp = jnp
    assert XlaEngine().accepts(Job)
