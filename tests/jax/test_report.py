"""The penalty as a function, and the table of what an optimizer's state does."""

import numpy as np
import pytest

import spectral_core as sc

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402

import spectral_jax  # noqa: E402
from jax_params import assert_trees_close, params_of, run, zeros  # noqa: E402
from spectral_jax import add_spectral_norm_regularization, constrain_spectral_norm  # noqa: E402


def exact(params):
    conv, dense = params["conv"]["kernel"], params["dense"]["kernel"]
    return np.linalg.norm(conv.reshape(-1, 4), 2), np.linalg.norm(dense, 2)


@pytest.mark.parametrize(
    ("target", "power"), [(1.0, 2), pytest.param(0.0, 1, marks=pytest.mark.thorough)]
)
def test_the_penalty_and_its_gradient(target, power):
    params = params_of(jnp.float64)
    tx = add_spectral_norm_regularization(0.3, n_iter=60, target=target, power=power)
    updates, state = run(tx, params)
    options = {"factor": 0.3, "target": target, "power": power}
    value, grads = jax.jit(jax.value_and_grad(lambda p: spectral_jax.penalty(p, state, **options)))(
        params
    )
    over = [s - target for s in exact(params)]
    assert float(value) == pytest.approx(0.3 / power * sum(x**power for x in over), rel=1e-5)
    assert_trees_close(grads, updates, rtol=1e-4)


def test_the_penalty_counts_what_takes_part():
    params = {**params_of(), "embed": {"embedding": 9 * jnp.ones((7, 3))}}
    state = add_spectral_norm_regularization(include="dense", n_iter=40).init(params)
    bounds = optax.chain(
        add_spectral_norm_regularization(include="dense"), constrain_spectral_norm(1.0)
    )
    sigma = exact(params)[1]
    for one in (state, bounds.init(params)):
        for factor in (0.2, {"dense/*": lambda step: 0.2 + step}):
            value = float(spectral_jax.penalty(params, one, factor=factor))
            assert 0.2 * 0.1 * sigma**2 < value <= 0.1 * sigma**2 * (1 + 1e-6)
    grads = jax.grad(spectral_jax.penalty)(params, state)
    assert grads["dense"]["kernel"].any()
    assert not grads["conv"]["kernel"].any()
    assert not grads["embed"]["embedding"].any()
    masked = add_spectral_norm_regularization(mask=jax.tree.map(lambda _: False, params))
    assert float(spectral_jax.penalty(params, masked.init(params))) == 0


def test_the_penalty_of_another_state_is_refused():
    params = params_of()
    state = add_spectral_norm_regularization(0.1).init(params)
    with pytest.raises(sc.NamesError, match=r"params has no \['conv/kernel'\]"):
        spectral_jax.penalty({"dense": params["dense"]}, state)
    with pytest.raises(sc.ShapeError, match=r"'dense/kernel' in layout 'oi'.*pass the layouts"):
        spectral_jax.penalty(params, state, layouts={"dense": "oi"})
    with pytest.raises(sc.NamesError, match="a bound, but no regularizer"):
        spectral_jax.penalty(params, constrain_spectral_norm(1.0).init(params))


@pytest.mark.thorough
def test_a_loss_with_the_penalty_lowers_sigma():
    params = {"dense": params_of()["dense"]}
    tx = optax.chain(add_spectral_norm_regularization(0.0), optax.sgd(0.1))
    state = tx.init(params)
    before = float(np.linalg.norm(params["dense"]["kernel"], 2))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: spectral_jax.penalty(p, state, factor=0.5))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(20):
        params, state = step(params, state)
    assert float(np.linalg.norm(params["dense"]["kernel"], 2)) < 0.8 * before


def test_the_table():
    params = {**params_of(), "embed": {"embedding": jnp.ones((7, 3))}, "ids": jnp.ones((2, 2), int)}
    tx = optax.chain(
        add_spectral_norm_regularization({"dense": lambda step: 0.5 * step, "*": 0.1}),
        optax.sgd(0.1),
        constrain_spectral_norm(2.0, include="dense"),
    )
    state = tx.init(params)
    assert "No step was made yet." in str(spectral_jax.summary(state, params))
    for _ in range(3):
        _, state = tx.update(zeros(params), state, params)
    factor = {"dense": lambda step: 0.5 * step, "*": 0.1}
    table = spectral_jax.summary(state, params, factor=factor)
    shown = [
        (r.name, r.shape, r.matrix, r.layout, r.factor, r.last_step, r.note) for r in table.rows
    ]
    assert shown == [
        ("conv/kernel", (3, 3, 2, 4), (4, 18), "kkio", 0.1, 2, ""),
        ("dense/kernel", (5, 6), (6, 5), "io", 1.0, 2, ""),
        ("dense/kernel", (5, 6), (6, 5), "io", None, 2, "bound"),
    ]
    assert table.left_out == {"embed/embedding": "an embedding", "ids": "not trainable: int64"}
    assert table.rows[1].sigma == pytest.approx(float(state[0].sigma["dense/kernel"]))
    assert [row.shape for row in spectral_jax.summary(state).rows] == [()] * 3


def test_the_table_of_a_mask_of_a_stack_and_of_an_injected_factor():
    params = {"blocks": {"kernel": jnp.ones((3, 4, 5))}, "head": {"kernel": jnp.ones((5, 2))}}
    make = optax.inject_hyperparams(
        add_spectral_norm_regularization, static_args=("mask", "n_vectors", "seed")
    )
    mask = {"blocks": {"kernel": True}, "head": {"kernel": False}}
    layouts = {"blocks": "sio"}
    state = make(factor=0.25, mask=mask, layouts=layouts).init(params)
    table = spectral_jax.summary(state, params, layouts=layouts)
    assert [(row.name, row.matrix, row.factor) for row in table.rows] == [
        ("blocks/kernel", (3, 5, 4), 0.25)
    ]
    assert table.left_out == {"head/kernel": "not chosen: by include, exclude or a mask"}
    with pytest.raises(sc.ArgumentError, match="between jitted steps"):
        jax.jit(lambda state: [spectral_jax.summary(state), state][1])(state)
    with pytest.raises(sc.NamesError, match="SpectralNormState"):
        spectral_jax.summary(optax.adam(0.1).init(params))


def test_watch_logs_no_penalty_of_a_bound():
    params = {"a": {"kernel": 3 * jnp.eye(2)}, "b": {"kernel": 5 * jnp.eye(2)}}
    logged = []
    for kept, penalty in (("a", 0.5 * 0.1 * 9), ("*", 0.5 * 0.1 * 34)):
        tx = optax.chain(
            add_spectral_norm_regularization(0.1, include=kept), constrain_spectral_norm(9.0)
        )
        state = tx.init(params)
        factor = {kept: lambda step: 0.1 + 0 * step}
        with spectral_jax.Watch(lambda *x: logged.append(x), factor=factor) as watch:
            watch(state, 0)
        values, _ = logged.pop()
        assert values["spectral/penalty"] == pytest.approx(penalty, rel=1e-6)
        assert values["spectral/sigma/b/kernel"] == pytest.approx(5)
    bound = constrain_spectral_norm(9.0).init(params)
    with spectral_jax.Watch(lambda *x: logged.append(x)) as watch:
        watch(bound, 0)
    assert logged[0][0]["spectral/penalty"] == 0
