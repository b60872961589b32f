"""`nnx.Optimizer` with the regularizer in its chain."""

import pickle

import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
import jax  # noqa: E402

import spectral_jax  # noqa: E402
import with_flax_nnx as example  # noqa: E402
from backends import svd_norm  # noqa: E402
from by_hand import sgd  # noqa: E402

LAYOUTS = {"conv1/kernel": "hwio", "conv2/kernel": "hwio", "out/kernel": "io"}


def batches(n):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((16, 8, 8, 1)), rng.integers(0, 10, 16)) for _ in range(n)]


def begun(factor=0.1, lr=0.05):
    """The example's model in float64, and its optimizer."""
    model = example.Network(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype("float64"), nnx.state(model)))
    tx = optax.chain(
        spectral_jax.add_spectral_norm_regularization(factor=factor),
        optax.sgd(lr, momentum=0.9, nesterov=True),
    )
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def by_path(state):
    return {"/".join(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def sigmas(optimizer):
    return {name: np.asarray(s) for name, s in spectral_jax.sigmas(optimizer.opt_state).items()}


def gradients_of(model):
    model = nnx.clone(model)
    gradient = nnx.jit(nnx.grad(example.cross_entropy))

    def gradients(params, batch):
        flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
        given = [(path, leaf.replace(params["/".join(path)])) for path, leaf in flat]
        nnx.update(model, nnx.from_flat_state(given))
        return by_path(gradient(model, *batch))

    return gradients


def test_steps_equal_a_loop_by_hand_in_one_compilation(monkeypatch):
    traces, loss = [], example.cross_entropy

    def counted(model, x, y):
        traces.append(1)
        return loss(model, x, y)

    model, optimizer = begun()
    start, gradients = by_path(nnx.state(model, nnx.Param)), gradients_of(model)
    expected, sigma = sgd(start, gradients, batches(6), LAYOUTS, factor=0.1, lr=0.05)
    monkeypatch.setattr(example, "cross_entropy", counted)
    for x, y in batches(6):
        example.train_step(model, optimizer, x, y)
    assert len(traces) == 1
    found = by_path(nnx.state(model, nnx.Param))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-10, err_msg=name)
    assert sigmas(optimizer).keys() == LAYOUTS.keys()
    for name, value in sigmas(optimizer).items():
        np.testing.assert_allclose(value, sigma[name], rtol=1e-10)


def test_sigmas_converge_once_the_weights_stand_still():
    model, optimizer = begun(lr=optax.piecewise_constant_schedule(0.05, {10: 0.0}))
    for x, y in batches(10) * 25:
        example.train_step(model, optimizer, x, y)
    weights = by_path(nnx.state(model, nnx.Param))
    for name, sigma in sigmas(optimizer).items():
        W = weights[name].reshape(-1, weights[name].shape[-1])
        np.testing.assert_allclose(sigma, svd_norm(W), rtol=1e-5, err_msg=name)


def test_a_run_that_was_split_and_merged_goes_on_bit_for_bit():
    model, optimizer = begun()
    for x, y in batches(3):
        example.train_step(model, optimizer, x, y)
    graph, state = nnx.split((model, optimizer))
    file = pickle.dumps(jax.tree.map(np.asarray, nnx.to_pure_dict(state)))
    nnx.replace_by_pure_dict(state, pickle.loads(file))
    resumed = nnx.merge(graph, state)
    for x, y in batches(3):
        example.train_step(model, optimizer, x, y)
        example.train_step(*resumed, x, y)
    expected, found = nnx.state((model, optimizer)), nnx.state(resumed)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_digits():
    plain, _ = example.main(epochs=2, factor=0.0)
    found, accuracy = example.main(epochs=2, factor=0.05)
    assert accuracy > 0.9
    assert found.keys() == LAYOUTS.keys()
    assert sum(found.values()) < sum(plain.values())
