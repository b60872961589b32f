"""The optax transformation: its steps, its options and its state."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import spectral_core as sc

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402

import spectral_jax  # noqa: E402
from fresh import start_of  # noqa: E402
from jax_params import assert_trees_close, by_core, params_of, run, zeros  # noqa: E402
from spectral_jax import add_spectral_norm_regularization  # noqa: E402
from spectral_jax import constrain_spectral_norm as constrain  # noqa: E402

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
THOROUGH = pytest.mark.thorough


def test_equals_the_core():
    params = params_of()
    weights = {"conv/kernel": params["conv"]["kernel"], "dense/kernel": params["dense"]["kernel"]}
    layouts = {"conv/kernel": "hwio", "dense/kernel": "io"}
    expected, core_state = by_core(weights, layouts, factor=0.1, n_iter=2)
    for jit in (False, True):
        updates, state = run(
            add_spectral_norm_regularization(factor=0.1, n_iter=2), params, jit=jit
        )
        np.testing.assert_allclose(
            updates["conv"]["kernel"], expected["conv/kernel"], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            updates["dense"]["kernel"], expected["dense/kernel"], rtol=1e-5, atol=1e-6
        )
        assert not updates["conv"]["bias"].any()
        for name, sigma in spectral_jax.sigmas(state).items():
            np.testing.assert_allclose(sigma, core_state.sigma[name], rtol=1e-6)
        assert int(state.count) == 3


def test_stands_where_weight_decay_would_in_a_chain():
    params = params_of()
    tx = optax.chain(add_spectral_norm_regularization(factor=0.1), optax.sgd(0.5))
    updates, state = run(tx, params, steps=1)
    alone, _ = run(add_spectral_norm_regularization(factor=0.1), params, steps=1)
    assert_trees_close(updates, jax.tree.map(lambda g: -0.5 * g, alone))
    assert sorted(spectral_jax.sigmas(state)) == ["conv/kernel", "dense/kernel"]


def test_masks():
    params = {**params_of(), "embed": {"embedding": jnp.ones((7, 3))}}
    unmasked, _ = run(add_spectral_norm_regularization(factor=0.1), params)
    assert not unmasked["embed"]["embedding"].any()
    mask = jax.tree.map(lambda _: False, params)
    mask["embed"]["embedding"] = True
    updates, state = run(add_spectral_norm_regularization(factor=0.1, mask=mask), params)
    assert list(spectral_jax.sigmas(state)) == ["embed/embedding"]
    assert updates["embed"]["embedding"].any()
    assert not updates["dense"]["kernel"].any()
    by_function = add_spectral_norm_regularization(
        factor=0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim == 4, tree)
    )
    assert list(spectral_jax.sigmas(run(by_function, params)[1])) == ["conv/kernel"]
    outside = optax.masked(
        add_spectral_norm_regularization(factor=0.1), {"conv": True, "dense": False, "embed": True}
    )
    assert list(spectral_jax.sigmas(run(outside, params)[1])) == ["conv/kernel"]


def test_a_mask_that_marks_a_bias_is_refused_by_name():
    params = params_of()
    tx = add_spectral_norm_regularization(factor=0.1, mask=jax.tree.map(lambda _: True, params))
    with pytest.raises(sc.ShapeError, match="'conv/bias' has 1 axes"):
        tx.init(params)


@pytest.mark.parametrize("n_iter", [None, 3])
def test_inject_hyperparams_schedules_the_factor(n_iter):
    params = params_of()
    options = {} if n_iter is None else {"n_iter": n_iter}
    schedule = optax.linear_schedule(0.0, 0.4, 4)
    injected = optax.inject_hyperparams(add_spectral_norm_regularization)(
        factor=schedule, **options
    )
    direct = add_spectral_norm_regularization(factor=schedule, **options)
    by_injection, state = run(injected, params, steps=4)
    assert_trees_close(by_injection, run(direct, params, steps=4)[0])
    constant, _ = run(add_spectral_norm_regularization(factor=0.3, **options), params, steps=4)
    assert_trees_close(by_injection, constant)
    assert float(state.hyperparams["factor"]) == pytest.approx(0.3)


def test_a_factor_by_path():
    factors = {"conv/*": 0.1, "*": 0.4}
    updates, state = run(add_spectral_norm_regularization(factor=factors), params_of(), steps=40)
    sigma = spectral_jax.sigmas(state)
    for name, factor in (("conv", 0.1), ("dense", 0.4)):
        length = float(jnp.linalg.norm(updates[name]["kernel"]))
        assert length == pytest.approx(factor * float(sigma[f"{name}/kernel"]), rel=1e-5)


@pytest.mark.parametrize("factor", [-0.1, float("nan"), "a"])
def test_a_bad_factor_is_refused(factor):
    with pytest.raises(sc.ArgumentError, match="factor"):
        run(add_spectral_norm_regularization(factor=factor), params_of())


def test_update_needs_params():
    tx = add_spectral_norm_regularization(factor=0.1)
    params = params_of()
    with pytest.raises(ValueError, match="params"):
        tx.update(zeros(params), tx.init(params))


def test_sigmas_of_another_optimizer():
    with pytest.raises(sc.NamesError, match="SpectralNormState"):
        spectral_jax.sigmas(optax.adam(0.1).init(params_of()))


def test_missing_updates_are_skipped():
    params = params_of()
    tx = add_spectral_norm_regularization(factor=0.1)
    state = tx.init(params)
    updates = zeros(params)
    updates["dense"]["kernel"] = None
    new, after = tx.update(updates, state, params)
    assert new["dense"]["kernel"] is None
    assert new["conv"]["kernel"].any()
    assert after.v["dense/kernel"] is state.v["dense/kernel"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    params = params_of(dtype)
    updates, state = run(add_spectral_norm_regularization(factor=0.5), params, steps=60)
    assert updates["dense"]["kernel"].dtype == dtype
    sigma = spectral_jax.sigmas(state)["dense/kernel"]
    assert sigma.dtype == jnp.float32
    exact = np.linalg.norm(np.asarray(params["dense"]["kernel"], np.float64), 2)
    np.testing.assert_allclose(sigma, exact, rtol=1e-4)


def test_init_runs_under_jit_and_eval_shape():
    params, tx = params_of(), add_spectral_norm_regularization(factor=0.1)
    eager, traced = tx.init(params), jax.jit(tx.init)(params)
    assert_trees_close(eager, traced)
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, eager)


def test_resuming_is_bit_equal():
    params = params_of()
    tx = optax.chain(
        add_spectral_norm_regularization(factor=0.1), optax.sgd(0.1, 0.9, nesterov=True)
    )

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: 0.1 * jnp.sin(p), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    saved = pickle.dumps(jax.tree.map(np.asarray, (params, state)))
    for _ in range(5):
        params, state = step(params, state)
    resumed, state = pickle.loads(saved)
    for _ in range(5):
        resumed, state = step(resumed, state)
    jax.tree.map(np.testing.assert_array_equal, params, resumed)


def test_nothing_in_a_step_leaves_the_device():
    params, tx = params_of(), add_spectral_norm_regularization(factor=0.1)
    compiled = jax.jit(tx.update).lower(zeros(params), tx.init(params), params).compile()
    text = compiled.as_text()
    assert "callback" not in text
    assert "outfeed" not in text


def test_multi_transform():
    params = params_of()
    labels = {"conv": "regular", "dense": "plain"}
    tx = optax.multi_transform(
        {"regular": add_spectral_norm_regularization(factor=0.1), "plain": optax.identity()}, labels
    )
    updates, state = run(tx, params)
    assert list(spectral_jax.sigmas(state)) == ["conv/kernel"]
    assert not updates["dense"]["kernel"].any()


def test_jit_takes_the_state_of_the_core():
    weights = {"w": jnp.ones((4, 3)), "conv": jnp.ones((2, 2, 3, 4))}
    state = sc.init(weights, layouts={"conv": "hwio"})
    jitted = jax.jit(lambda w, g, s: sc.add_gradient(w, g, s, factor=0.1))
    grads, after = jitted(weights, zeros(weights), state)
    expected, expected_after = sc.add_gradient(weights, zeros(weights), state, factor=0.1)
    assert_trees_close(grads, expected)
    assert_trees_close(after.v, expected_after.v)
    assert after.layouts == state.layouts


def test_numpy_parameters_gradients_and_states():
    params, tx = params_of(), add_spectral_norm_regularization(factor=0.1)
    state = tx.init(params)
    expected, after = tx.update(zeros(params), state, params)
    host = jax.tree.map(np.asarray, (zeros(params), state, params))
    found, found_after = tx.update(*host)
    assert_trees_close(found, expected)
    assert_trees_close(found_after, after)
    assert_trees_close(tx.init(host[2]), state)


def test_a_state_can_be_donated():
    for mask in (None, {"conv": False, "dense": False}):
        params, tx = params_of(), add_spectral_norm_regularization(factor=0.1, mask=mask)
        state = tx.init(params)
        jax.jit(tx.update, donate_argnums=1)(zeros(params), state, params)


def test_a_traced_seed_is_explained():
    injected = optax.inject_hyperparams(add_spectral_norm_regularization)
    with pytest.raises(sc.ArgumentError, match="static_args"):
        jax.jit(injected(factor=0.1).init)(params_of())
    static = optax.inject_hyperparams(
        add_spectral_norm_regularization, static_args=("n_iter", "n_vectors", "seed")
    )
    jax.jit(static(factor=0.1).init)(params_of())


def test_tree_map_params_leaves_the_state_alone():
    params = params_of()
    tx = optax.chain(add_spectral_norm_regularization(factor=0.1), optax.trace(0.9))
    state = tx.init(params)
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state)
    assert_trees_close(mapped[0], state[0])
    assert bool((mapped[1].trace["dense"]["kernel"] == 1).all())


def every_third(params, steps, schedule):
    """A loop by hand."""
    w = params["dense"]["kernel"].T
    v = sc.start_vector((w.shape[1],), w, name="dense/kernel")
    terms = []
    for count in range(steps):
        if count % 3 == 0:
            sigma, u, v = sc.power_iteration(w, start_of(v))
        terms.append(schedule(count) * sigma * jnp.outer(v, u))
        w = 0.9 * w
    return terms, sigma


@pytest.mark.parametrize("jit", [False, True])
def test_every_n_steps_equals_a_loop_by_hand_and_resumes(jit):
    params = {"dense": params_of()["dense"]}
    schedule = optax.linear_schedule(0.0, 0.7, 7)
    expected, sigma = every_third(params, 7, schedule)
    tx = add_spectral_norm_regularization(factor=schedule, every_n_steps=3)
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    assert state.u["dense/kernel"].shape == (6,)
    for count, term in enumerate(expected):
        if count == 5:  # in the middle of a cycle
            state = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))
        updates, state = update(zeros(params), state, params)
        np.testing.assert_allclose(updates["dense"]["kernel"], term, rtol=1e-5, atol=1e-6)
        params = jax.tree.map(lambda p: 0.9 * p, params)
    np.testing.assert_allclose(state.sigma["dense/kernel"], sigma, rtol=1e-6)


def test_steps_that_are_not_compiled_compile_nothing_anew(caplog):
    params = {"w": jnp.ones((4, 3))}
    tx = add_spectral_norm_regularization(factor=0.1, every_n_steps=2)
    state = tx.init(params)
    for step in range(4):
        with jax.log_compiles(step >= 2), caplog.at_level("WARNING"):
            _, state = tx.update(zeros(params), state, params)
    assert not [record for record in caplog.records if "ompil" in record.getMessage()]


def test_between_refreshes_no_weight_is_read_or_copied():
    params = {"w": jnp.ones((48, 32))}
    tx = add_spectral_norm_regularization(factor=0.1, every_n_steps=4)
    args = (zeros(params), tx.init(params), params)
    text = jax.jit(tx.update, donate_argnums=(0, 1)).lower(*args).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "conditional(" in entry
    assert not any("dot" in line.split("metadata")[0] for line in entry.splitlines())
    made = [line for line in text.splitlines() if "= f32[48,32]" in line or "= f32[32,48]" in line]
    assert not [line for line in made if " copy(" in line or " transpose(" in line]


def test_without_it_the_state_holds_no_u():
    assert add_spectral_norm_regularization(factor=0.1).init(params_of()).u == {}


def test_a_state_without_u_is_refused_between_iterations():
    params = params_of()
    state = add_spectral_norm_regularization(factor=0.1).init(params)
    with pytest.raises(sc.ArgumentError, match="every_n_steps is 4, but the state holds no u"):
        add_spectral_norm_regularization(factor=0.1, every_n_steps=4).update(
            zeros(params), state, params
        )


def test_every_n_steps_with_missing_updates_and_injection():
    params = params_of()
    injected = optax.inject_hyperparams(add_spectral_norm_regularization)(
        factor=0.1, n_iter=2, every_n_steps=2
    )
    direct = add_spectral_norm_regularization(factor=0.1, n_iter=2, every_n_steps=2)
    assert_trees_close(run(injected, params)[0], run(direct, params)[0], rtol=1e-5)
    updates, state = zeros(params), direct.init(params)
    updates["dense"]["kernel"] = None
    new, after = direct.update(updates, state, params)
    assert new["dense"]["kernel"] is None
    for field in ("v", "u", "sigma"):
        before = getattr(state, field)["dense/kernel"]
        np.testing.assert_array_equal(getattr(after, field)["dense/kernel"], before)


@pytest.mark.parametrize("every", [0, -1, 1.5, "2"])
def test_a_bad_every_n_steps_is_refused(every):
    with pytest.raises(sc.ArgumentError, match="every_n_steps"):
        add_spectral_norm_regularization(factor=0.1, every_n_steps=every)


@pytest.mark.filterwarnings("error")
def test_gradients_and_state_can_be_donated_without_a_warning():
    for every in (1, 3):
        params, tx = params_of(), add_spectral_norm_regularization(factor=0.1, every_n_steps=every)
        step = jax.jit(tx.update, donate_argnums=(0, 1))
        grads, state = zeros(params), tx.init(params)
        for _ in range(3):
            grads, state = step(grads, state, params)


def test_accumulated_steps():
    params = params_of()
    tx = optax.MultiSteps(add_spectral_norm_regularization(factor=0.1), every_k_schedule=2)
    updates, _ = run(tx, params, steps=4)
    expected, _ = run(add_spectral_norm_regularization(factor=0.1), params, steps=2)
    assert_trees_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("every_n_steps", [pytest.param(1, marks=pytest.mark.thorough), 2])
@pytest.mark.parametrize(("target", "power"), [(0.0, 1), (1.5, 1), (1.5, 2), ("schedule", 2)])
def test_another_penaltys_updates(target, power, every_n_steps):
    limit = 0.0 if target == 0 else 1.5
    given = (lambda count: 1.5 + 0 * count) if target == "schedule" else target
    U, _, Vh = np.linalg.svd(
        np.random.default_rng(0).standard_normal((2, 4, 3)), full_matrices=False
    )
    W = U * np.array([[[3, 1, 0.5]], [[1, 0.3, 0.2]]]) @ Vh  # few iterations converge
    tx = spectral_jax.add_spectral_norm_regularization(
        factor=0.3,
        n_iter=15,
        every_n_steps=every_n_steps,
        layouts={"w": "sio"},
        target=given,
        power=power,
    )
    params = {"w": jnp.asarray(W)}
    state = jax.jit(tx.init)(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
    u, s, vh = np.linalg.svd(W.swapaxes(1, 2), full_matrices=False)
    s = s[:, 0]
    force = np.maximum(s - limit, 0) if power != 1 else 1.0 * (s > limit)
    term = 0.3 * force[:, None, None] * u[:, :, :1] * vh[:, :1]
    np.testing.assert_allclose(updates["w"].swapaxes(1, 2), term, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(spectral_jax.sigmas(state)["w"], s, rtol=1e-10)


def test_inject_hyperparams_schedules_the_target():
    params = {"w": jnp.diag(jnp.array([3.0, 1.0]))}
    zero = jax.tree.map(jnp.zeros_like, params)
    make = optax.inject_hyperparams(spectral_jax.add_spectral_norm_regularization)
    tx = make(factor=1.0, n_iter=30, target=lambda count: 1.0 * count)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(zero, state, params)
        assert float(updates["w"][0, 0]) == pytest.approx(3.0 - step)


@pytest.mark.parametrize(
    ("target", "power", "n_iter", "every_n_steps"),
    [
        (0.0, 2, 1, 1),
        pytest.param(0.0, 1, 9, 1, marks=pytest.mark.thorough),
        pytest.param(1.5, 1, 1, 2, marks=pytest.mark.thorough),
        (1.5, 2, 9, 2),
    ],
)
def test_options_that_inject_hyperparams_traces_give_the_same_updates(
    target, power, n_iter, every_n_steps
):
    options = {
        "factor": 0.3,
        "target": target,
        "power": power,
        "n_iter": n_iter,
        "every_n_steps": every_n_steps,
    }
    traced = optax.inject_hyperparams(add_spectral_norm_regularization)(**options)
    known = optax.inject_hyperparams(
        add_spectral_norm_regularization,
        static_args=("target", "power", "n_iter", "every_n_steps"),
    )(**options)
    direct = add_spectral_norm_regularization(**options)
    params = {"w": params_of()["dense"]["kernel"]}
    expected, state = run(direct, params)
    for tx, jit in ((traced, True), (traced, False), (known, True)):
        updates, found = run(tx, params, jit=jit)
        assert_trees_close(updates, expected, rtol=1e-5)
        assert_trees_close(spectral_jax.sigmas(found), spectral_jax.sigmas(state))


@pytest.mark.parametrize("power", [0, 3, "2", True])
def test_a_bad_power_is_refused(power):
    with pytest.raises(sc.ArgumentError, match="power"):
        add_spectral_norm_regularization(power=power)


@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_a_state_that_0_1_0_saved_goes_on(jit):
    """Version 0.1.0 saved v without its axis of vectors, here after three steps."""
    params = {
        "conv": {"kernel": jnp.sin(jnp.arange(36.0, dtype="float32").reshape(3, 3, 2, 2))},
        "dense": {"kernel": jnp.cos(jnp.arange(8.0, dtype="float32").reshape(4, 2))},
    }
    tx = add_spectral_norm_regularization(factor=0.01, every_n_steps=2)
    with np.load(DATA / "state-0.1.0-jax.npz") as file:
        leaves, structure = jax.tree_util.tree_flatten_with_path(tx.init(params))
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        assert sorted(names) == sorted(file)
        state = jax.tree.unflatten(structure, [file[name] for name in names])
    assert state.v["conv/kernel"].shape == (18,)
    weights = {"conv/kernel": params["conv"]["kernel"], "dense/kernel": params["dense"]["kernel"]}
    core = sc.SpectralState(
        v={name: jnp.asarray(v)[None] for name, v in state.v.items()},
        sigma=jax.tree.map(jnp.asarray, state.sigma),
        u=jax.tree.map(jnp.asarray, state.u),
        layouts={"conv/kernel": sc.Layout("hwio"), "dense/kernel": sc.Layout("io")},
    )
    update = jax.jit(tx.update) if jit else tx.update
    for n_iter in (0, 1):  # the fourth step adds the term of the third, and the fifth its own
        expected, core = sc.add_gradient(weights, zeros(weights), core, factor=0.01, n_iter=n_iter)
        updates, state = update(zeros(params), state, params)
        found = {f"{name}/kernel": leaf["kernel"] for name, leaf in updates.items()}
        assert_trees_close(found, expected)
        assert_trees_close(state.v, dict(core.v))
        assert_trees_close(state.sigma, dict(core.sigma))
    assert state.v["conv/kernel"].shape == (1, 18)
    assert int(state.count) == 5


def test_the_factor_by_position_and_a_mapping_of_schedules():
    params = params_of()
    updates, _ = run(add_spectral_norm_regularization(0.3), params)
    assert_trees_close(updates, run(add_spectral_norm_regularization(factor=0.3), params)[0])
    schedules = {"conv": optax.linear_schedule(0.0, 0.4, 4), "*": 0.4}
    targets = {"conv": 0.0, "dense": lambda count: 0.5 * count}
    tx = add_spectral_norm_regularization(schedules, target=targets)
    updates, state = run(tx, params, steps=4)
    sigma = spectral_jax.sigmas(state)
    for name, length in (
        ("conv", 0.3 * sigma["conv/kernel"]),
        ("dense", 0.4 * (sigma["dense/kernel"] - 1.5)),
    ):
        found = float(jnp.linalg.norm(updates[name]["kernel"]))
        assert found == pytest.approx(float(length), rel=1e-4)


def test_updates_of_other_parameters_are_refused():
    params = params_of()
    tx = add_spectral_norm_regularization(0.1)
    state = tx.init(params)
    wrapped = {"model": zeros(params)}
    missing = {"conv": zeros(params)["conv"]}
    more = {**zeros(params), "head": {"kernel": jnp.ones((2, 2))}}
    for make in (tx, spectral_jax.constrain_spectral_norm(1.0)):
        for updates in (wrapped, missing, more):
            with pytest.raises(sc.NamesError, match="paths of updates are not those of params"):
                make.update(updates, state, params)
    for nothing in (None, optax.MaskedNode()):
        updates, _ = tx.update({**zeros(params), "conv": nothing}, state, params)
        assert updates["conv"] is nothing
        assert updates["dense"]["kernel"].any()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("factor", [0.1, jnp.float16(0.1)])
def test_strict_promotion(dtype, factor):
    params = params_of(dtype)
    tx = add_spectral_norm_regularization(factor, target=0.5)
    cap = spectral_jax.constrain_spectral_norm(jnp.float16(1.0))
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = run(tx, params, steps=1)
        capped, _ = run(cap, params, steps=1)
        value = spectral_jax.penalty(params, tx.init(params), factor=jnp.float16(0.1))
    assert value.dtype == jnp.float32
    assert updates["dense"]["kernel"].dtype == capped["dense"]["kernel"].dtype == dtype
    assert_trees_close(updates, run(tx, params, steps=1)[0])


@pytest.mark.parametrize("make", [add_spectral_norm_regularization, constrain])
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"n_vectors": 2}, marks=THOROUGH), {"every_n_steps": 3}], ids=str
)
def test_the_compiled_program_does_not_grow_with_n_iter(make, options):
    if make is constrain and "every_n_steps" in options:
        pytest.skip("a bound acts in every step")
    params = {"w": jnp.ones((4, 5))}

    def size(n_iter):
        tx = make(0.1, n_iter=n_iter, **options)
        return len(jax.jit(tx.update).lower(params, tx.init(params), params).as_text())

    assert abs(size(200) - size(2)) < 100


def test_a_missing_framework_names_the_extra():
    code = "import sys; sys.modules['optax'] = None; import spectral_jax"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "adapters")))}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "pip install spectral-core[jax]" in ran.stderr
