"""``norm="operator"`` in optax transformations."""

import numpy as np
import pytest

import spectral_core as sc

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

import spectral_jax  # noqa: E402

LAYOUTS = {"conv/kernel": sc.Convolution("hwio", stride=2)}


def params(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {
        "conv": {"kernel": jnp.asarray(rng.standard_normal((3, 3, 4, 6)).astype(dtype))},
        "dense": {"kernel": jnp.asarray(rng.standard_normal((5, 4)).astype(dtype))},
    }


def stepper(tx, steps):
    """Return a compiled function that makes so many steps with zero gradients."""

    @jax.jit
    def run(weights, state):
        def step(_, carry):
            weights, state = carry
            zeros = jax.tree.map(jnp.zeros_like, weights)
            updates, state = tx.update(zeros, state, weights)
            return optax.apply_updates(weights, updates), state

        return jax.lax.fori_loop(0, steps, step, (weights, state))

    return run


def true_norm(kernel):
    return sc.convolution_norm(np.asarray(kernel), "hwio", stride=2, tol=1e-8).lower


def test_sigma_and_term_are_those_of_the_core():
    weights = params()
    tx = spectral_jax.add_spectral_norm_regularization(1.0, norm="operator", layouts=LAYOUTS)
    state = jax.jit(tx.init)(weights)
    run = stepper(optax.chain(tx, optax.scale(0.0)), 60)
    _, (state, _) = run(weights, (state, optax.EmptyState()))
    kernel = np.asarray(weights["conv"]["kernel"])
    found = spectral_jax.sigmas(state)
    np.testing.assert_allclose(found["conv/kernel"], true_norm(kernel), rtol=1e-7)
    updates, after = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, weights), state, weights)
    # (1/2)σ² has the derivative σ² along the kernel itself.
    along = np.sum(np.asarray(updates["conv"]["kernel"]) * kernel)
    np.testing.assert_allclose(along, spectral_jax.sigmas(after)["conv/kernel"] ** 2)
    ω = np.asarray(after.v["conv/kernel"])[0, -2:]
    gradient = jax.grad(lambda K: symbol_norm(K, ω))(weights["conv"]["kernel"])
    sigma = float(spectral_jax.sigmas(after)["conv/kernel"])
    np.testing.assert_allclose(updates["conv"]["kernel"], sigma * gradient, atol=1e-8)


def symbol_norm(kernel, ω):
    """Return σ₁ of the symbol of a 3 × 3 kernel with stride 2, by the dense SVD."""
    taps = np.array([*np.ndindex(3, 3)])
    phases = np.exp(-1j * (taps // 2) @ ω)
    classes = (taps % 2) @ [2, 1]
    spread = phases[:, None] * (classes[:, None] == np.arange(4))
    matrix = jnp.einsum("tio,tc->oic", kernel.reshape(9, 4, 6), spread).reshape(6, 16)
    return jnp.linalg.norm(matrix, 2)


@pytest.mark.thorough
def test_resumes_bit_for_bit():
    weights = params(np.float32)
    tx = optax.chain(
        spectral_jax.add_spectral_norm_regularization(0.1, norm="operator", layouts=LAYOUTS),
        optax.sgd(0.1, 0.9),
    )
    run = stepper(tx, 4)
    middle = run(weights, tx.init(weights))
    whole = run(*middle)
    saved = jax.tree.map(np.asarray, middle)  # as a checkpoint keeps them
    resumed = run(*jax.tree.map(jnp.asarray, saved))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.thorough
def test_bound_is_on_the_map():
    weights = params()
    tx = spectral_jax.constrain_spectral_norm(0.7, norm="operator", layouts=LAYOUTS)
    weights, state = stepper(tx, 40)(weights, tx.init(weights))
    assert true_norm(weights["conv"]["kernel"]) == pytest.approx(0.7, rel=1e-4)
    np.testing.assert_allclose(spectral_jax.sigmas(state)["conv/kernel"], 0.7, rtol=1e-6)


@pytest.mark.thorough
def test_every_n_steps_adds_the_last_term_again():
    weights = params()
    tx = spectral_jax.add_spectral_norm_regularization(
        1.0, norm="operator", layouts=LAYOUTS, every_n_steps=2
    )
    state, update = tx.init(weights), jax.jit(tx.update)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    first, state = update(zeros, state, weights)
    second, after = update(zeros, state, weights)
    np.testing.assert_allclose(first["conv"]["kernel"], second["conv"]["kernel"], rtol=1e-12)
    np.testing.assert_array_equal(state.v["conv/kernel"], after.v["conv/kernel"])


def test_stride_of_an_equinox_module_is_read():
    eqx = pytest.importorskip("equinox")
    key = jax.random.key(0)
    model = {
        "down": eqx.nn.Conv2d(3, 4, 3, stride=2, key=key),
        "up": eqx.nn.ConvTranspose2d(3, 4, 3, stride=(1, 2), key=key),
    }
    chosen = spectral_jax._regularize.Selector(norm="operator")(eqx.filter(model, eqx.is_array))
    assert chosen.layouts["down/weight"] == sc.Convolution("oikk", stride=2)
    assert chosen.layouts["up/weight"] == sc.Convolution("iokk", stride=(1, 2))


def test_stride_of_a_flax_module_is_read():
    nnx = pytest.importorskip("flax.nnx")
    from spectral_jax._layers import geometries

    layer = nnx.Conv(3, 4, (3, 3), strides=2, kernel_dilation=(1, 2), rngs=nnx.Rngs(0))
    up = nnx.ConvTranspose(3, 4, (3,), strides=(2,), rngs=nnx.Rngs(0))
    found = geometries({"a": layer, "b": up, "c": nnx.Linear(2, 3, rngs=nnx.Rngs(0))})
    assert set(found) == {"a", "b"}
    assert found["a"][:] == (2, (1, 2), False)
    assert found["b"].transposed


def test_assumed_stride_is_told_once():
    weights = {"conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.zeros(4)}}
    tx = spectral_jax.add_spectral_norm_regularization(norm="operator")
    with pytest.warns(sc.SpectralWarning, match="stride"):
        state = jax.eval_shape(tx.init, weights)
    jax.eval_shape(tx.update, weights, state, weights)  # no second warning, or an error here
    with pytest.raises(sc.ArgumentError, match="norm must be"):
        spectral_jax.constrain_spectral_norm(norm="map")
