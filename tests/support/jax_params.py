"""Parameters, and runs of an optax transformation, for the tests of JAX."""

import jax
import jax.numpy as jnp
import numpy as np

import spectral_core as sc


def params_of(dtype=jnp.float32):
    draw = np.random.default_rng(1).standard_normal
    return {
        "conv": {"kernel": jnp.asarray(draw((3, 3, 2, 4)), dtype), "bias": jnp.zeros(4, dtype)},
        "dense": {"kernel": jnp.asarray(draw((5, 6)), dtype), "bias": jnp.zeros(6, dtype)},
    }


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def run(tx, params, steps=3, jit=True):
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    for _ in range(steps):
        updates, state = update(zeros(params), state, params)
    return updates, state


def assert_trees_close(a, b, rtol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)


def by_core(weights, layouts, steps=3, **options):
    """The same through the core alone."""
    state = sc.init(weights, layouts=layouts)
    for _ in range(steps):
        grads, state = sc.add_gradient(weights, zeros(weights), state, **options)
    return grads, state
