"""Ten steps of Algorithm 1 in each adapter equal NumPy in float64 with a gradient by hand."""

import numpy as np
import pytest

import spectral_core as sc
from fresh import start_of

FACTOR, RATE, MOMENTUM, STEPS = 0.1, 0.05, 0.9, 10
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((32, 7)), RNG.standard_normal((32, 3))
START = {"w1": RNG.standard_normal((9, 7)), "w2": RNG.standard_normal((3, 9))}


def gradients(weights):
    """Return the gradients of ½·mean over samples of ‖W₂·tanh(W₁x) − y‖²."""
    hidden = np.tanh(X @ weights["w1"].T)
    error = (hidden @ weights["w2"].T - Y) / len(X)
    back = (error @ weights["w2"]) * (1 - hidden**2)
    return {"w1": back.T @ X, "w2": error.T @ hidden}


def reference():
    """Run the paper's Algorithm 1, errata fixed, with a fresh direction. v₀ is the library's."""
    weights = {name: w.copy() for name, w in START.items()}
    v = {name: np.asarray(sc.init(weights).v[name][0]) for name in weights}
    velocity = {name: np.zeros_like(w) for name, w in weights.items()}
    sigmas = []
    for _ in range(STEPS):
        grads = gradients(weights)
        sigmas.append({})
        for name, w in weights.items():
            u = w @ start_of(v[name])
            v[name] = w.T @ u
            sigmas[-1][name] = sigma = np.linalg.norm(v[name]) / np.linalg.norm(u)
            u, v[name] = u / np.linalg.norm(u), v[name] / np.linalg.norm(v[name])
            grads[name] += FACTOR * sigma * np.outer(u, v[name])
        for name, grad in grads.items():
            velocity[name] = MOMENTUM * velocity[name] + grad
            weights[name] = weights[name] - RATE * (grad + MOMENTUM * velocity[name])
    return weights, sigmas[-1]


def assert_same(weights, sigmas):
    expected, expected_sigmas = reference()
    for name, w in expected.items():
        np.testing.assert_allclose(np.asarray(weights[name]), w, rtol=0, atol=1e-10)
        np.testing.assert_allclose(float(sigmas[name]), expected_sigmas[name], rtol=1e-10)


def test_gradient_by_hand_is_right():
    def loss(w1):
        return 0.5 * np.mean(np.sum((np.tanh(X @ w1.T) @ START["w2"].T - Y) ** 2, axis=1))

    direction = RNG.standard_normal(START["w1"].shape)
    slope = (loss(START["w1"] + 1e-6 * direction) - loss(START["w1"] - 1e-6 * direction)) / 2e-6
    assert slope == pytest.approx(np.sum(gradients(START)["w1"] * direction), rel=1e-7)


@pytest.mark.parametrize("in_place", [False, True])
def test_numpy_equals_the_reference(in_place):
    weights = {name: w.copy() for name, w in START.items()}
    velocity = {name: np.zeros_like(w) for name, w in weights.items()}
    state = sc.init(weights)
    for _ in range(STEPS):
        grads = gradients(weights)
        if in_place:
            state = sc.add_gradient_(weights, grads, state, factor=FACTOR)
        else:
            grads, state = sc.add_gradient(weights, grads, state, factor=FACTOR)
        for name, grad in grads.items():
            velocity[name] = MOMENTUM * velocity[name] + grad
            weights[name] -= RATE * (grad + MOMENTUM * velocity[name])
    assert_same(weights, state.sigma)


def test_torch_equals_the_reference():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from spectral_torch import SpectralNormRegularizer

    weights = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in START.items()}
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    optimizer = torch.optim.SGD(weights.values(), lr=RATE, momentum=MOMENTUM, nesterov=True)
    reg = SpectralNormRegularizer(weights, factor=FACTOR, warmup_iters=0).attach(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        error = torch.tanh(x @ weights["w1"].T) @ weights["w2"].T - y
        (error.square().sum(1).mean() / 2).backward()
        optimizer.step()
    assert_same({name: w.detach() for name, w in weights.items()}, reg.sigmas())


def test_jax_equals_the_reference():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")
    import jax.numpy as jnp

    import spectral_jax

    jax.config.update("jax_enable_x64", True)  # as for all tests; JAX 0.5 has no context for it
    params = {name: jnp.asarray(w) for name, w in START.items()}
    tx = optax.chain(
        # JAX would read these names as (in, out). They are (out, in), as elsewhere here.
        spectral_jax.add_spectral_norm_regularization(factor=FACTOR, layouts={"*": "oi"}),
        optax.sgd(RATE, MOMENTUM, nesterov=True),
    )

    def loss(params):
        error = jnp.tanh(X @ params["w1"].T) @ params["w2"].T - Y
        return jnp.mean(jnp.sum(error**2, axis=1)) / 2

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    assert_same(params, spectral_jax.sigmas(state))
