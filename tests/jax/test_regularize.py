"""The optax transformation, with each library's parameters."""

import pickle

import numpy as np
import pytest

import spectral_core as sc

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402

import spectral_jax  # noqa: E402
from spectral_jax import add_spectral_norm_regularization  # noqa: E402

RNG = np.random.default_rng(0)


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


def test_equals_the_core():
    params = params_of()
    weights = {"conv/kernel": params["conv"]["kernel"], "dense/kernel": params["dense"]["kernel"]}
    layouts = {"conv/kernel": "hwio", "dense/kernel": "io"}
    expected, core_state = by_core(weights, layouts, factor=0.1, n_iter=2)
    for jit in (False, True):
        updates, state = run(add_spectral_norm_regularization(0.1, n_iter=2), params, jit=jit)
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
    tx = optax.chain(add_spectral_norm_regularization(0.1), optax.sgd(0.5))
    updates, state = run(tx, params, steps=1)
    alone, _ = run(add_spectral_norm_regularization(0.1), params, steps=1)
    assert_trees_close(updates, jax.tree.map(lambda g: -0.5 * g, alone))
    assert sorted(spectral_jax.sigmas(state)) == ["conv/kernel", "dense/kernel"]


def test_masks():
    params = {**params_of(), "embed": {"embedding": jnp.ones((7, 3))}}
    unmasked, _ = run(add_spectral_norm_regularization(0.1), params)
    assert not unmasked["embed"]["embedding"].any()
    mask = jax.tree.map(lambda _: False, params)
    mask["embed"]["embedding"] = True
    updates, state = run(add_spectral_norm_regularization(0.1, mask=mask), params)
    assert list(spectral_jax.sigmas(state)) == ["embed/embedding"]
    assert updates["embed"]["embedding"].any()
    assert not updates["dense"]["kernel"].any()
    by_function = add_spectral_norm_regularization(
        0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim == 4, tree)
    )
    assert list(spectral_jax.sigmas(run(by_function, params)[1])) == ["conv/kernel"]
    outside = optax.masked(
        add_spectral_norm_regularization(0.1), {"conv": True, "dense": False, "embed": True}
    )
    assert list(spectral_jax.sigmas(run(outside, params)[1])) == ["conv/kernel"]


def test_a_mask_that_marks_a_bias_is_refused_by_name():
    params = params_of()
    tx = add_spectral_norm_regularization(0.1, mask=jax.tree.map(lambda _: True, params))
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
    direct = add_spectral_norm_regularization(schedule, **options)
    by_injection, state = run(injected, params, steps=4)
    assert_trees_close(by_injection, run(direct, params, steps=4)[0])
    constant, _ = run(add_spectral_norm_regularization(0.3, **options), params, steps=4)
    assert_trees_close(by_injection, constant)
    assert float(state.hyperparams["factor"]) == pytest.approx(0.3)


def test_a_factor_by_path():
    factors = {"conv/*": 0.1, "*": 0.4}
    updates, state = run(add_spectral_norm_regularization(factors), params_of(), steps=40)
    sigma = spectral_jax.sigmas(state)
    for name, factor in (("conv", 0.1), ("dense", 0.4)):
        length = float(jnp.linalg.norm(updates[name]["kernel"]))
        assert length == pytest.approx(factor * float(sigma[f"{name}/kernel"]), rel=1e-5)


@pytest.mark.parametrize("factor", [-0.1, float("nan"), "a"])
def test_a_bad_factor_is_refused(factor):
    with pytest.raises(sc.ArgumentError, match="factor"):
        run(add_spectral_norm_regularization(factor), params_of())


def test_update_needs_params():
    tx = add_spectral_norm_regularization(0.1)
    params = params_of()
    with pytest.raises(ValueError, match="params"):
        tx.update(zeros(params), tx.init(params))


def test_sigmas_of_another_optimizer():
    with pytest.raises(sc.NamesError, match="SpectralNormState"):
        spectral_jax.sigmas(optax.adam(0.1).init(params_of()))


def test_missing_updates_are_skipped():
    params = params_of()
    tx = add_spectral_norm_regularization(0.1)
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
    updates, state = run(add_spectral_norm_regularization(0.5), params, steps=60)
    assert updates["dense"]["kernel"].dtype == dtype
    sigma = spectral_jax.sigmas(state)["dense/kernel"]
    assert sigma.dtype == jnp.float32
    exact = np.linalg.norm(np.asarray(params["dense"]["kernel"], np.float64), 2)
    np.testing.assert_allclose(sigma, exact, rtol=1e-4)


def test_init_runs_under_jit_and_eval_shape():
    params, tx = params_of(), add_spectral_norm_regularization(0.1)
    eager, traced = tx.init(params), jax.jit(tx.init)(params)
    assert_trees_close(eager, traced)
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, eager)


def test_resuming_is_bit_equal():
    params = params_of()
    tx = optax.chain(add_spectral_norm_regularization(0.1), optax.sgd(0.1, 0.9, nesterov=True))

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
    params, tx = params_of(), add_spectral_norm_regularization(0.1)
    compiled = jax.jit(tx.update).lower(zeros(params), tx.init(params), params).compile()
    text = compiled.as_text()
    assert "callback" not in text
    assert "outfeed" not in text


def test_multi_transform():
    params = params_of()
    labels = {"conv": "regular", "dense": "plain"}
    tx = optax.multi_transform(
        {"regular": add_spectral_norm_regularization(0.1), "plain": optax.identity()}, labels
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


def test_a_tree_without_weights_is_refused_and_an_empty_one_is_not():
    with pytest.raises(sc.NamesError, match=r"nothing to regularize.*'norm/scale'"):
        add_spectral_norm_regularization(0.1).init({"norm": {"scale": jnp.ones((3, 3))}})
    nothing = optax.masked(add_spectral_norm_regularization(0.1), {"conv": False, "dense": False})
    updates, state = run(nothing, params_of())
    assert not updates["dense"]["kernel"].any()
    assert spectral_jax.sigmas(state) == {}


def test_a_name_for_two_leaves_is_refused():
    params = {"a/b": jnp.ones((3, 2)), "a": {"b": jnp.ones((4, 3))}}
    with pytest.raises(sc.NamesError, match=r"several leaves have the path \['a/b'\]"):
        add_spectral_norm_regularization(0.1).init(params)


def test_numpy_parameters_gradients_and_states():
    params, tx = params_of(), add_spectral_norm_regularization(0.1)
    state = tx.init(params)
    expected, after = tx.update(zeros(params), state, params)
    host = jax.tree.map(np.asarray, (zeros(params), state, params))
    found, found_after = tx.update(*host)
    assert_trees_close(found, expected)
    assert_trees_close(found_after, after)
    assert_trees_close(tx.init(host[2]), state)


def test_a_state_can_be_donated():
    for mask in (None, {"conv": False, "dense": False}):
        params, tx = params_of(), add_spectral_norm_regularization(0.1, mask=mask)
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
    tx = optax.chain(add_spectral_norm_regularization(0.1), optax.trace(0.9))
    state = tx.init(params)
    mapped = optax.tree_map_params(tx, lambda x: x + 1, state)
    assert_trees_close(mapped[0], state[0])
    assert bool((mapped[1].trace["dense"]["kernel"] == 1).all())


# The products, and the steps between refreshes


@pytest.mark.parametrize("layout", ["io", "oi", "sio", "hwio", "oihw"])
@pytest.mark.parametrize(
    "dtype",
    [jnp.float32, jnp.bfloat16, pytest.param(jnp.complex64, marks=pytest.mark.thorough)],
)
def test_the_iteration_equals_the_core_s(layout, dtype):
    w = RNG.standard_normal((3, 4, 5, 2)[: len(layout)])
    w = w + 1j * RNG.standard_normal(w.shape) if dtype == jnp.complex64 else w
    params = {"a": jnp.asarray(w, dtype), "b": jnp.asarray(2 * w, dtype)}
    options = {"factor": {"a": 0.1, "b": 0.4}, "n_iter": 2}
    expected, core = by_core(params, layout, **options)
    tx = add_spectral_norm_regularization(**options, layouts={"*": layout})
    updates, state = run(tx, params)
    assert_trees_close(state.v, dict(core.v), rtol=1e-4)
    assert_trees_close(state.sigma, dict(core.sigma), rtol=1e-5)
    wide = {k: (np.asarray(updates[k], w.dtype), np.asarray(expected[k], w.dtype)) for k in "ab"}
    for found, wanted in wide.values():
        np.testing.assert_allclose(found, wanted, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-4)


@pytest.mark.parametrize("layout", ["io", "oi", "hwio", "oihw"])
def test_no_product_transposes_a_weight(layout):
    # XLA's CPU compiler takes 10 times as long for it.
    params = {"w": jnp.ones((2, 3, 4, 5)[-len(layout) :])}
    tx = add_spectral_norm_regularization(0.1, layouts={"w": layout})
    text = jax.jit(tx.update).lower(zeros(params), tx.init(params), params).as_text()
    shape = "x".join(map(str, params["w"].shape)) + "xf32"
    transposes = [line for line in text.splitlines() if "stablehlo.transpose" in line]
    assert not [line for line in transposes if f"(tensor<{shape}>)" in line]
    assert text.count("stablehlo.dot_general") == 2


def every_third(params, steps, schedule):
    """A loop by hand."""
    w = params["dense"]["kernel"].T
    v = sc.start_vector((w.shape[1],), w, name="dense/kernel")
    terms = []
    for count in range(steps):
        if count % 3 == 0:
            sigma, u, v = sc.power_iteration(w, v)
        terms.append(schedule(count) * sigma * jnp.outer(v, u))
        w = 0.9 * w
    return terms, sigma


@pytest.mark.parametrize("jit", [False, True])
def test_every_n_steps_equals_a_loop_by_hand_and_resumes(jit):
    params = {"dense": params_of()["dense"]}
    schedule = optax.linear_schedule(0.0, 0.7, 7)
    expected, sigma = every_third(params, 7, schedule)
    tx = add_spectral_norm_regularization(schedule, every_n_steps=3)
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


def test_between_refreshes_no_weight_is_read_or_copied():
    params = {"w": jnp.ones((48, 32))}
    tx = add_spectral_norm_regularization(0.1, every_n_steps=4)
    args = (zeros(params), tx.init(params), params)
    text = jax.jit(tx.update, donate_argnums=(0, 1)).lower(*args).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert "conditional(" in entry
    assert not any("dot" in line.split("metadata")[0] for line in entry.splitlines())
    made = [line for line in text.splitlines() if "= f32[48,32]" in line or "= f32[32,48]" in line]
    assert not [line for line in made if " copy(" in line or " transpose(" in line]


def test_without_it_the_state_holds_no_u():
    assert add_spectral_norm_regularization(0.1).init(params_of()).u == {}


def test_a_state_without_u_is_refused_between_iterations():
    params = params_of()
    state = add_spectral_norm_regularization(0.1).init(params)
    with pytest.raises(sc.ArgumentError, match="every_n_steps is 4, but the state holds no u"):
        add_spectral_norm_regularization(0.1, every_n_steps=4).update(zeros(params), state, params)


def test_every_n_steps_with_missing_updates_and_injection():
    params = params_of()
    injected = optax.inject_hyperparams(add_spectral_norm_regularization)(
        factor=0.1, n_iter=2, every_n_steps=2
    )
    direct = add_spectral_norm_regularization(0.1, n_iter=2, every_n_steps=2)
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
        add_spectral_norm_regularization(0.1, every_n_steps=every)


@pytest.mark.filterwarnings("error")
def test_gradients_and_state_can_be_donated_without_a_warning():
    for every in (1, 3):
        params, tx = params_of(), add_spectral_norm_regularization(0.1, every_n_steps=every)
        step = jax.jit(tx.update, donate_argnums=(0, 1))
        grads, state = zeros(params), tx.init(params)
        for _ in range(3):
            grads, state = step(grads, state, params)


def test_accumulated_steps():
    params = params_of()
    tx = optax.MultiSteps(add_spectral_norm_regularization(0.1), every_k_schedule=2)
    updates, _ = run(tx, params, steps=4)
    expected, _ = run(add_spectral_norm_regularization(0.1), params, steps=2)
    assert_trees_close(updates, expected, rtol=1e-5)


# Layouts


def test_layouts_by_pattern_reach_scanned_and_left_out_leaves():
    params = {"blocks": {"kernel": jnp.asarray(RNG.standard_normal((3, 4, 5)), jnp.float32)}}
    params["embed"] = {"embedding": jnp.ones((7, 3))}
    tx = add_spectral_norm_regularization(0.1, layouts={"blocks/*": "sio", "embed/*": "io"})
    _, state = run(tx, params, steps=100)
    exact = np.linalg.svd(np.asarray(params["blocks"]["kernel"]), compute_uv=False)[:, 0]
    np.testing.assert_allclose(spectral_jax.sigmas(state)["blocks/kernel"], exact, rtol=1e-4)
    assert "embed/embedding" in spectral_jax.sigmas(state)
    with pytest.raises(sc.NamesError, match="'block/\\*' matches none"):
        add_spectral_norm_regularization(0.1, layouts={"block/*": "sio"}).init(params)


def test_hand_written_trees():
    params = [(jnp.ones((4, 3)), jnp.zeros(3)), (jnp.ones((3, 2)), jnp.zeros(2))]
    _, state = run(add_spectral_norm_regularization(0.1), params)
    assert sorted(spectral_jax.sigmas(state)) == ["0/0", "1/0"]
    named = {
        "W1": jnp.ones((4, 3)),
        "b1": jnp.zeros(3),
        "pos_embedding": jnp.ones((9, 4)),
        "layer": {"W": jnp.ones((3, 2)), "bias": jnp.ones((1, 2)), "b": jnp.ones((1, 2))},
        "b": [jnp.ones((2, 2))],  # a branch, not a bias
    }
    _, state = run(add_spectral_norm_regularization(0.1), named)
    assert sorted(spectral_jax.sigmas(state)) == ["W1", "b/0", "layer/W"]


def matrices(state):
    return {name: v.shape for name, v in state.v.items()}


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (2, 5), rngs=rngs)
            self.attend = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.embed = nnx.Embed(5, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(8, 6, rngs=rngs)])

    model = Model(nnx.Rngs(0))
    expected = {
        "conv/kernel": (30,),
        "attend/key/kernel": (8,),
        "attend/query/kernel": (8,),
        "attend/value/kernel": (8,),
        "attend/out/kernel": (8,),
        "layers/0/kernel": (8,),
    }
    tx = add_spectral_norm_regularization(0.01)
    assert matrices(tx.init(nnx.state(model, nnx.Param))) == expected

    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(0.1)), wrt=nnx.Param)
    before = np.asarray(model.layers[0].kernel[...])

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: 0.0 * jnp.sum(m.layers[0](jnp.ones((1, 8)))))(model)
        optimizer.update(model, grads)

    for _ in range(60):
        step(model, optimizer)
    after = np.asarray(model.layers[0].kernel[...])
    assert np.linalg.norm(after, 2) < np.linalg.norm(before, 2)
    found = spectral_jax.sigmas(optimizer.opt_state)
    assert sorted(found) == sorted(expected)
    sigma = found["layers/0/kernel"]
    assert float(jnp.asarray(sigma)) == pytest.approx(float(np.linalg.norm(after, 2)), rel=0.01)


def test_flax_linen():
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.ConvTranspose(6, (2, 2))(x)
            x = nn.LayerNorm()(x).reshape(x.shape[0], -1)
            x = nn.RNN(nn.LSTMCell(5))(x[:, None, :])
            return nn.Dense(2)(x)

    params = Model().init(jax.random.key(0), jnp.ones((1, 4, 4, 3), jnp.float32))["params"]
    _, state = run(add_spectral_norm_regularization(0.1), params)
    shapes = matrices(state)
    assert shapes["Conv_0/kernel"] == (27,)
    assert shapes["ConvTranspose_0/kernel"] == (16,)
    assert shapes["Dense_0/kernel"] == (5,)
    assert len([name for name in shapes if "LSTM" in name]) == 8
    assert all(name.endswith("kernel") for name in shapes)


def test_flax_scan():
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4)(x), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = stack.init(jax.random.key(0), jnp.ones((1, 4)), None)["params"]
    tx = add_spectral_norm_regularization(0.1, layouts={"Dense_0/kernel": "sio"})
    updates, state = run(tx, params, steps=200)
    exact = np.linalg.svd(np.asarray(params["Dense_0"]["kernel"]), compute_uv=False)[:, 0]
    np.testing.assert_allclose(spectral_jax.sigmas(state)["Dense_0/kernel"], exact, rtol=1e-4)
    lengths = np.linalg.norm(np.asarray(updates["Dense_0"]["kernel"]), axis=(1, 2))
    np.testing.assert_allclose(lengths, 0.1 * exact, rtol=1e-4)


def test_equinox():
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
    keys = iter(jax.random.split(jax.random.key(0), 8))
    model = {
        "mlp": eqx.nn.MLP(3, 2, 4, 1, key=next(keys)),
        "conv": eqx.nn.Conv2d(4, 6, 3, groups=2, key=next(keys)),
        "up": eqx.nn.ConvTranspose1d(4, 6, 3, key=next(keys)),
        "cell": eqx.nn.GRUCell(3, 5, key=next(keys)),
        "embed": eqx.nn.Embedding(7, 3, key=next(keys)),
        "norm": eqx.nn.LayerNorm((3, 4)),
        "attend": eqx.nn.MultiheadAttention(2, 8, key=next(keys)),
    }
    params = eqx.filter(model, eqx.is_inexact_array)
    _, state = run(add_spectral_norm_regularization(0.1), params)
    assert matrices(state) == {
        "mlp/layers/0/weight": (3,),
        "mlp/layers/1/weight": (4,),
        "conv/weight": (2, 18),
        "up/weight": (12,),
        "cell/weight_ih": (3,),
        "cell/weight_hh": (5,),
        "attend/query_proj/weight": (8,),
        "attend/key_proj/weight": (8,),
        "attend/value_proj/weight": (8,),
        "attend/output_proj/weight": (8,),
    }


def test_haiku():
    hk = pytest.importorskip("haiku", reason="Haiku is not installed")

    def forward(x):
        x = hk.Conv2D(4, 3)(x)
        x = hk.Conv2DTranspose(6, 2)(x)
        return hk.Linear(2)(x.reshape(x.shape[0], -1))

    params = hk.transform(forward).init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
    _, state = run(add_spectral_norm_regularization(0.1), params)
    assert matrices(state) == {
        "conv2_d/w": (27,),
        "conv2_d_transpose/w": (16,),
        "linear/w": (96,),
    }


# Products


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
@pytest.mark.parametrize("n_vectors", [1, pytest.param(3, marks=pytest.mark.thorough)])
def test_every_layout_gives_the_cores_step(layout, shape, n_vectors):
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal(shape), rng.standard_normal(shape)
    tx = add_spectral_norm_regularization(0.3, layouts={"w": layout}, n_vectors=n_vectors)
    params = {"w": jnp.asarray(w)}
    state = tx.init(params)
    expected_state = sc.init({"w": w}, layouts=layout, n_vectors=n_vectors)
    found, state = jax.jit(tx.update)({"w": jnp.asarray(g)}, state, params)
    expected, expected_state = sc.add_gradient({"w": w}, {"w": g}, expected_state, factor=0.3)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(state.sigma["w"], expected_state.sigma["w"], rtol=1e-10)
    assert state.v["w"].shape == expected_state.v["w"].shape


# Other penalties than the paper's, and the hard bound


@pytest.mark.parametrize("every_n_steps", [1, 2])
@pytest.mark.parametrize(("target", "power"), [(None, 1), (1.5, 1), (1.5, 2), ("schedule", None)])
def test_another_penaltys_updates(target, power, every_n_steps):
    limit = 0.0 if target is None else 1.5
    given = (lambda count: 1.5 + 0 * count) if target == "schedule" else target
    U, _, Vh = np.linalg.svd(
        np.random.default_rng(0).standard_normal((2, 4, 3)), full_matrices=False
    )
    W = U * np.array([[[3, 1, 0.5]], [[1, 0.3, 0.2]]]) @ Vh  # few iterations converge
    tx = spectral_jax.add_spectral_norm_regularization(
        0.3,
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


def test_inject_hyperparams_schedules_the_target_and_refuses_a_traced_power():
    params = {"w": jnp.diag(jnp.array([3.0, 1.0]))}
    zero = jax.tree.map(jnp.zeros_like, params)
    make = optax.inject_hyperparams(spectral_jax.add_spectral_norm_regularization)
    tx = make(1.0, n_iter=30, target=lambda count: 1.0 * count)
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(zero, state, params)
        assert float(updates["w"][0, 0]) == pytest.approx(3.0 - step)
    tx = make(1.0, power=1)
    with pytest.raises(sc.ArgumentError, match="power is traced"):
        jax.jit(tx.update)(zero, tx.init(params), params)


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
            {"blocks/*": 1.0, "*": 2.5},
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
        lambda count: 2.0 - count, n_iter=50, mask={"a": True, "b": False}
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


def test_normalized_weights_are_those_of_flaxs_spectral_norm():
    """Flax normalizes the layer's parameters where they are, and starts from the outputs' side."""
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    rngs = nnx.Rngs(0)
    layer = nnx.Conv(3, 4, (2, 2), rngs=rngs, param_dtype=jnp.float64)
    norm = nnx.SpectralNorm(layer, n_steps=2, rngs=rngs, param_dtype=jnp.float64)
    (u,) = (value for path, value in norm.batch_stats.items() if path[-1] == "u")
    tx = spectral_jax.constrain_spectral_norm(
        1.0, normalize=True, n_iter=2, layouts={"kernel": "oooi"}
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
        np.testing.assert_allclose(params["kernel"], layer.kernel[...], rtol=1e-9)  # its epsilon


def test_the_bound_leaves_what_has_no_update_and_refuses_traced_numbers():
    params = {"a": jnp.diag(jnp.array([3.0, 1.0])), "c": jnp.diag(jnp.array([3.0, 1.0]))}
    tx = spectral_jax.constrain_spectral_norm(1.0, n_iter=50)
    state = tx.init(params)
    updates, after = tx.update({"a": jnp.zeros((2, 2)), "c": None}, state, params)
    assert updates["c"] is None
    assert float(jnp.linalg.norm((params["a"] + updates["a"]), 2)) == pytest.approx(1.0)
    np.testing.assert_array_equal(after.v["c"], state.v["c"])
    assert set(after.v) == set(state.v)
    make = optax.inject_hyperparams(spectral_jax.constrain_spectral_norm)
    tx = make(1.0)
    state = tx.init(params)
    with pytest.raises(sc.ArgumentError, match="static_args"):
        jax.jit(tx.update)(params, state, params)
    static = ("n_iter", "normalize", "n_vectors", "seed", "mask")
    make = optax.inject_hyperparams(spectral_jax.constrain_spectral_norm, static_args=static)
    tx = make(lambda count: 2.0 - count, n_iter=50)
    state = tx.init(params)
    for bound in (2.0, 1.0):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
        assert float(jnp.linalg.norm(params["a"] + updates["a"], 2)) == pytest.approx(bound)
