"""The bound as an optax transformation."""

import numpy as np
import pytest

import spectral_core as sc

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402

import spectral_jax  # noqa: E402


@pytest.mark.parametrize("normalize", [False, True])
def test_the_bound_holds_after_each_step(normalize):
    rng = np.random.default_rng(0)
    params = {
        "blocks": {"kernel": jnp.asarray(rng.standard_normal((2, 4, 3)))},
        "conv": {"kernel": jnp.asarray(rng.standard_normal((2, 2, 3, 4))), "bias": jnp.ones(4)},
    }
    layouts = {"blocks/kernel": "sio", "conv/kernel": "kkio"}
    grads = jax.tree.map(jnp.cos, params)
    tx = optax.chain(
        optax.sgd(0.1),
        spectral_jax.constrain_spectral_norm(
            bound={"blocks/*": 1.0, "*": 2.5},
            normalize=normalize,
            n_iter=300,
            layouts=layouts,
        ),
    )
    state = tx.init(params)
    expected = jax.tree.map(np.array, params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected = jax.tree.map(lambda w, g: w - 0.1 * np.asarray(g), expected, grads)
        for name, bound in (("blocks", 1.0), ("conv", 2.5)):
            layout = layouts[f"{name}/kernel"]
            W = sc.as_matrix(expected[name]["kernel"], layout)
            scale = bound / np.linalg.svd(W, compute_uv=False)[..., :1, None]
            W = W * (scale if normalize else np.minimum(1, scale))
            shape = expected[name]["kernel"].shape
            expected[name]["kernel"] = sc.from_matrix(W, layout, shape)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), params, expected
    )


def test_the_bound_may_be_a_schedule_and_masked():
    params = {"a": jnp.diag(jnp.array([3.0, 1.0])), "b": jnp.diag(jnp.array([3.0, 1.0]))}
    tx = spectral_jax.constrain_spectral_norm(
        bound=lambda count: 2.0 - count, n_iter=50, mask={"a": True, "b": False}
    )
    state = tx.init(params)
    for bound in (2.0, 1.0):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        assert float(jnp.linalg.norm(params["a"], 2)) == pytest.approx(bound)
        assert float(spectral_jax.sigmas(state)["a"]) == pytest.approx(bound)
    np.testing.assert_array_equal(params["b"], np.diag([3.0, 1.0]))
    with pytest.raises(ValueError, match="pass params"):
        tx.update(params, state)


@pytest.mark.thorough
def test_normalized_weights_are_those_of_flaxs_spectral_norm():
    """Flax normalizes the layer's parameters where they are, and starts from the outputs' side."""
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    rngs = nnx.Rngs(0)
    layer = nnx.Conv(3, 4, (2, 2), rngs=rngs, param_dtype=jnp.float64)
    norm = nnx.SpectralNorm(layer, n_steps=2, rngs=rngs, param_dtype=jnp.float64)
    (u,) = (value for path, value in norm.batch_stats.items() if path[-1] == "u")
    tx = spectral_jax.constrain_spectral_norm(
        bound=1.0, normalize=True, n_iter=2, layouts={"kernel": "oooi"}
    )
    params = {"kernel": layer.kernel[...]}
    state = tx.init(params)
    state = state._replace(v={"kernel": u[...][0]})
    for step in range(4):
        grad = {"kernel": 0.1 * jnp.cos(step + jnp.arange(48.0)).reshape(2, 2, 3, 4)}
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        layer.kernel[...] = layer.kernel[...] + grad["kernel"]
        norm(jnp.ones((1, 4, 4, 3)), update_stats=True)
        np.testing.assert_allclose(params["kernel"], layer.kernel[...], rtol=1e-5)  # its epsilon


@pytest.mark.filterwarnings("ignore::spectral_core.SpectralWarning")
def test_the_bound_leaves_what_has_no_update_and_refuses_traced_numbers():
    params = {"a": jnp.diag(jnp.array([3.0, 1.0])), "c": jnp.diag(jnp.array([3.0, 1.0]))}
    tx = spectral_jax.constrain_spectral_norm(bound=1.0, n_iter=50)
    state = tx.init(params)
    updates, after = tx.update({"a": jnp.zeros((2, 2)), "c": None}, state, params)
    assert updates["c"] is None
    assert float(jnp.linalg.norm((params["a"] + updates["a"]), 2)) == pytest.approx(1.0)
    np.testing.assert_array_equal(after.v["c"], state.v["c"])
    assert set(after.v) == set(state.v)
    make = optax.inject_hyperparams(spectral_jax.constrain_spectral_norm)
    tx = make(bound=1.0)
    state = tx.init(params)
    with pytest.raises(sc.ArgumentError, match="static_args"):
        jax.jit(tx.update)(params, state, params)
    static = ("n_iter", "normalize", "n_vectors", "seed", "mask")
    make = optax.inject_hyperparams(spectral_jax.constrain_spectral_norm, static_args=static)
    tx = make(bound=lambda count: 2.0 - count, n_iter=50)
    state = tx.init(params)
    for bound in (2.0, 1.0):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
        assert float(jnp.linalg.norm(params["a"] + updates["a"], 2)) == pytest.approx(bound)


def test_the_bound_holds_though_v_began_in_another_block():
    """The loss pulls on the second block alone, of which v has no part."""
    params = {"w": jnp.diag(jnp.asarray([1.0, 1.0, 0.0, 0.0]))}
    grads = {"w": jnp.diag(jnp.asarray([0.0, 0.0, -1.0, -0.5]))}
    cap = spectral_jax.constrain_spectral_norm(1.0, layouts={"w": "io"})
    tx = optax.chain(optax.sgd(0.02), cap)

    @jax.jit
    def train(params):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 200, step, (params, tx.init(params)))

    params, state = train(params)
    true = float(jnp.linalg.norm(params["w"], 2))
    assert 0.9 < true < 1.05
    assert float(spectral_jax.sigmas(state)["w"]) == pytest.approx(true, rel=0.05)
