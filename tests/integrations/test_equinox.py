"""Equinox modules, with the regularizer in an optax chain."""

import numpy as np
import pytest

eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
import jax  # noqa: E402

import spectral_jax  # noqa: E402
import with_equinox as example  # noqa: E402
from backends import svd_norm  # noqa: E402
from by_hand import sgd  # noqa: E402

LAYOUTS = {"layers/0/weight": "oihw", "layers/4/weight": "oihw", "layers/8/weight": "oi"}


def batches(n):
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((16, 1, 8, 8)), rng.integers(0, 10, 16)) for _ in range(n)]


def begun(factor=0.1, lr=0.05):
    """The example's model in float64, the optimizer, and its state."""
    model = example.network(jax.random.key(0))
    model = jax.tree.map(lambda x: x.astype("float64") if eqx.is_inexact_array(x) else x, model)
    tx = optax.chain(
        spectral_jax.add_spectral_norm_regularization(factor=factor),
        optax.sgd(lr, momentum=0.9, nesterov=True),
    )
    return model, tx, tx.init(eqx.filter(model, eqx.is_array))


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(tree, eqx.is_array))
    name = jax.tree_util.keystr
    return {name(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def gradients_of(model):
    arrays, static = eqx.partition(model, eqx.is_array)
    structure = jax.tree.structure(arrays)
    gradient = eqx.filter_jit(eqx.filter_grad(example.cross_entropy))

    def gradients(params, batch):
        here = eqx.combine(jax.tree.unflatten(structure, list(params.values())), static)
        return by_path(gradient(here, *batch))

    return gradients


def test_steps_equal_a_loop_by_hand_in_one_compilation(monkeypatch):
    traces, loss = [], example.cross_entropy

    def counted(model, x, y):
        traces.append(1)
        return loss(model, x, y)

    model, tx, state = begun()
    start, gradients = by_path(model), gradients_of(model)
    expected, sigma = sgd(start, gradients, batches(6), LAYOUTS, factor=0.1, lr=0.05)
    monkeypatch.setattr(example, "cross_entropy", counted)
    for x, y in batches(6):
        model, state = example.train_step(model, state, tx, x, y)
    assert len(traces) == 1
    found = by_path(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-10, err_msg=name)
    assert spectral_jax.sigmas(state).keys() == LAYOUTS.keys()
    for name, value in spectral_jax.sigmas(state).items():
        np.testing.assert_allclose(value, sigma[name], rtol=1e-10)


def test_sigmas_converge_once_the_weights_stand_still():
    model, tx, state = begun(lr=optax.piecewise_constant_schedule(0.05, {10: 0.0}))
    for x, y in batches(10) * 25:
        model, state = example.train_step(model, state, tx, x, y)
    weights = by_path(model)
    for name, sigma in spectral_jax.sigmas(state).items():
        W = weights[name].reshape(len(weights[name]), -1)
        np.testing.assert_allclose(sigma, svd_norm(W), rtol=1e-5, err_msg=name)


def test_a_saved_run_goes_on_bit_for_bit(tmp_path):
    model, tx, state = begun()
    for x, y in batches(3):
        model, state = example.train_step(model, state, tx, x, y)
    eqx.tree_serialise_leaves(tmp_path / "run.eqx", (model, state))
    like = jax.tree.map(lambda x: x + 1 if eqx.is_array(x) else x, begun()[::2])
    resumed = eqx.tree_deserialise_leaves(tmp_path / "run.eqx", like)
    for x, y in batches(3):
        model, state = example.train_step(model, state, tx, x, y)
        resumed = example.train_step(*resumed, tx, x, y)
    expected, found = by_path((model, state)), by_path(resumed)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_digits():
    plain, _ = example.main(epochs=2, factor=0.0)
    found, accuracy = example.main(epochs=2, factor=0.05)
    assert accuracy > 0.9
    assert found.keys() == LAYOUTS.keys()
    assert sum(found.values()) < sum(plain.values())
