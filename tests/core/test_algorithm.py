"""`init`, `iterate` and `add_gradient`: Algorithm 1 over named weights."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import SLOW, get, on, outer, slow, svd_norm
from fresh import start_of
from models import LAYOUTS, assert_close, assert_equal, model, not_finite, state_to_numpy
from spectral_core import Layout, add_gradient, add_gradient_, as_matrix, init, iterate

# Start vectors


def test_init_depends_on_the_seed_alone():
    weights, _ = model()
    assert_equal(init(weights, seed=1).v, init(weights, seed=1).v)
    other = init(weights, seed=2).v
    assert all(np.any(v != other[name]) for name, v in init(weights, seed=1).v.items())


def test_v_depends_on_no_other_weight():
    weights, _ = model()
    together = init(weights, layouts=LAYOUTS).v
    for name, weight in weights.items():
        alone = init({name: 7 * weight}, layouts={name: LAYOUTS[name]}).v
        np.testing.assert_array_equal(alone[name], together[name])
    backwards = init(dict(reversed(weights.items())), layouts=LAYOUTS).v
    assert_equal({name: backwards[name] for name in together}, together)


def test_v_depends_on_the_name():
    v = init({"a": np.eye(4), "b": np.eye(4)}).v
    assert np.any(v["a"] != v["b"])


@pytest.mark.parametrize("dtype", [*slow("float32"), "float64", "complex128"])
def test_v_is_the_same_on_every_backend(backend, dtype):
    weights, _ = model(dtype)
    state = init(backend.tree(weights), seed=5, layouts=LAYOUTS)
    expected = init(weights, seed=5, layouts=LAYOUTS)
    assert_equal(backend.tree_to_numpy(state.v), expected.v)


def test_sigma_of_init_is_what_v_estimates():
    weights, _ = model()
    state = init(weights, layouts=LAYOUTS)
    for name, weight in weights.items():
        W = as_matrix(weight, LAYOUTS[name])
        v = state.v[name]
        assert v.shape == (*W.shape[:-2], 1, W.shape[-1])
        np.testing.assert_allclose(np.linalg.norm(v, axis=-1), 1, rtol=1e-14)
        expected = sc.power_iteration(W, start_of(v)[..., 0, :]).sigma
        np.testing.assert_allclose(state.sigma[name], expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("layouts", "expected"),
    [
        (None, {"conv": "oikk", "dense": "oi", "heads": "oi"}),
        ({"conv": "hwio"}, {"conv": "hwio", "dense": "oi", "heads": "oi"}),
        ({"*s*": "io", "c*": "iohw"}, {"conv": "iohw", "dense": "io", "heads": "io"}),
        ({"heads": Layout("(go)i", 2)}, {"conv": "oikk", "dense": "oi", "heads": "(go)i"}),
    ],
    ids=str,
)
def test_layouts_are_chosen_by_name_pattern_or_default(layouts, expected):
    state = init(model()[0], layouts=layouts)
    assert {name: layout.axes for name, layout in state.layouts.items()} == expected


def test_one_layout_can_serve_all():
    state = init({"a": np.ones((2, 3)), "b": np.ones((4, 5))}, layouts="io")
    assert {name: v.shape for name, v in state.v.items()} == {"a": (1, 2), "b": (1, 4)}


# The step


@given(st.integers(0, 2**32), st.floats(0, 10), st.integers(1, 3))
def test_step_follows_algorithm_1(seed, factor, n_iter):
    weights, grads = model(seed=seed)
    state = init(weights, seed=seed, layouts=LAYOUTS)
    found, new = add_gradient(weights, grads, state, factor=factor, n_iter=n_iter)
    for name, weight in weights.items():
        W = as_matrix(weight, LAYOUTS[name])
        start = start_of(state.v[name])[..., 0, :]
        sigma, u, v = sc.power_iteration(W, start, n_iter=n_iter)
        np.testing.assert_allclose(new.sigma[name], sigma, rtol=1e-9)
        np.testing.assert_allclose(new.v[name][..., 0, :], v, atol=1e-9)
        term = as_matrix(found[name] - grads[name], LAYOUTS[name])
        np.testing.assert_allclose(term, factor * outer(sigma, u, v), atol=1e-8)
    assert new.layouts == state.layouts
    advanced = iterate(weights, state, n_iter=n_iter)
    assert_equal(new.v, advanced.v)
    assert_equal(new.sigma, advanced.sigma)


def test_warm_start_converges(backend):
    weights, _ = model()
    mine = backend.tree(weights)
    state = init(mine, layouts=LAYOUTS)
    for _ in range(3):
        state = iterate(mine, state, n_iter=40)
    for name, weight in weights.items():
        expected = svd_norm(as_matrix(weight, LAYOUTS[name]))
        np.testing.assert_allclose(backend.to_numpy(state.sigma[name]), expected, rtol=1e-7)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_inputs_do_not_change(backend, dtype):
    weights, grads = model(dtype)
    mine, my_grads = backend.tree(weights), backend.tree(grads)
    state = init(mine, layouts=LAYOUTS)
    v, sigma = state_to_numpy(backend, state)
    add_gradient(mine, my_grads, state, n_iter=2)
    iterate(mine, state)
    assert_equal(backend.tree_to_numpy(mine), weights)
    assert_equal(backend.tree_to_numpy(my_grads), grads)
    v_after, sigma_after = state_to_numpy(backend, state)
    assert_equal(v_after, v)
    assert_equal(sigma_after, sigma)


@on(in_place=True)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_in_place_equals_pure(backend, dtype):
    weights, grads = model(dtype)
    mine, my_grads = backend.tree(weights), backend.tree(grads)
    state = init(mine, layouts=LAYOUTS)
    v = backend.tree_to_numpy(state.v)
    expected, pure = add_gradient(mine, my_grads, state, factor=0.3, n_iter=2)
    in_place = add_gradient_(mine, my_grads, state, factor=0.3, n_iter=2, engines=())
    precision = 1e-6 if dtype == "float32" else 1e-14
    assert_close(backend.tree_to_numpy(my_grads), backend.tree_to_numpy(expected), rtol=precision)
    for one, other in zip(
        state_to_numpy(backend, in_place), state_to_numpy(backend, pure), strict=True
    ):
        assert_equal(one, other)
    assert_equal(backend.tree_to_numpy(mine), weights)
    assert_equal(backend.tree_to_numpy(state.v), v)


def test_step_in_place_accepts_read_only_weights_and_state():
    readonly = get("numpy-readonly")
    weights, grads = model()
    state = init(readonly.tree(weights), layouts=LAYOUTS)
    for v in state.v.values():
        v.flags.writeable = False
    expected, _ = add_gradient(weights, grads, state)
    add_gradient_(readonly.tree(weights), grads, state)
    assert_close(grads, expected)


# Several vectors for each matrix


@pytest.mark.parametrize("layout", [*slow("oihw", "hwio", "iohw"), Layout("hwi(go)", groups=2)])
def test_several_vectors_equal_block_iteration(backend, layout):
    weights, grads = model(shapes={"w": (4, 3, 2, 6)})
    mine, start = backend.tree(weights), backend.tree(grads)
    state = init(mine, layouts=layout, n_vectors=3)
    matrix = as_matrix(weights["w"], layout)
    V = backend.to_numpy(state.v["w"])
    assert V.shape == (*matrix.shape[:-2], 3, matrix.shape[-1])
    found = start
    for _ in range(3):
        found, state = add_gradient(mine, start, state, factor=0.3)
        sigma, u, v, V = sc.block_iteration(matrix, start_of(V))
        # The later rows of a converged V are rounding noise: not compared.
        np.testing.assert_allclose(backend.to_numpy(state.v["w"])[..., 0, :], v, atol=1e-10)
        np.testing.assert_allclose(backend.to_numpy(state.sigma["w"]), sigma, rtol=1e-10)
    term = as_matrix(backend.to_numpy(found["w"]) - grads["w"], layout)
    np.testing.assert_allclose(term, 0.3 * outer(sigma, u, v), atol=1e-10)


@on(in_place=True)
def test_several_vectors_work_in_place(backend):
    weights, grads = model()
    mine, expected_state = backend.tree(weights), init(weights, layouts=LAYOUTS, n_vectors=2)
    state, mine_grads = init(mine, layouts=LAYOUTS, n_vectors=2), backend.tree(grads)
    expected, _ = add_gradient(weights, grads, expected_state)
    add_gradient_(mine, mine_grads, state)
    assert_close(backend.tree_to_numpy(mine_grads), expected, rtol=1e-10)


# A step without an iteration


def test_no_iteration_adds_the_last_term_again(backend):
    weights, grads = model()
    mine, zeros = backend.tree(weights), backend.tree({n: 0 * g for n, g in grads.items()})
    state = init(mine, layouts=LAYOUTS)
    first, state = add_gradient(mine, zeros, state, factor=0.3)
    moved = backend.tree({name: 2 * w for name, w in weights.items()})
    again, same = add_gradient(moved, zeros, state, factor=0.3, n_iter=0)
    assert_equal(backend.tree_to_numpy(again), backend.tree_to_numpy(first))
    assert all(same.v[name] is state.v[name] for name in mine)
    assert all(same.sigma[name] is state.sigma[name] for name in mine)


def test_no_iteration_without_u_raises():
    weights, grads = model()
    state = dataclasses.replace(init(weights, layouts=LAYOUTS), u={})
    with pytest.raises(sc.ArgumentError, match="n_iter is 0, but the state holds no u of 'conv'"):
        add_gradient(weights, grads, state, n_iter=0)
    _, after = add_gradient(weights, grads, state)
    assert after.u == {}  # a state without u stays without
    with pytest.raises(sc.ArgumentError, match="n_iter must be an integer ≥ 0"):
        add_gradient(weights, grads, state, n_iter=-1)


# Weights without a gradient


def test_weight_without_a_gradient_is_left_out(backend):
    weights, grads = model()
    mine, my_grads = backend.tree(weights), {**backend.tree(grads), "dense": None}
    state = init(mine, layouts=LAYOUTS)
    found, new = add_gradient(mine, my_grads, state, factor=0.3)
    assert found["dense"] is None
    assert new.v["dense"] is state.v["dense"]
    assert new.sigma["dense"] is state.sigma["dense"]
    everything, all_new = add_gradient(mine, backend.tree(grads), state, factor=0.3)
    for name in ("conv", "heads"):
        np.testing.assert_array_equal(
            backend.to_numpy(found[name]), backend.to_numpy(everything[name])
        )
        np.testing.assert_array_equal(
            backend.to_numpy(new.v[name]), backend.to_numpy(all_new.v[name])
        )


@on(in_place=True)
def test_weight_without_a_gradient_is_left_out_in_place(backend):
    weights, grads = model()
    mine, my_grads = backend.tree(weights), {**backend.tree(grads), "dense": None}
    state = init(mine, layouts=LAYOUTS)
    expected, _ = add_gradient(mine, my_grads, state)
    new = add_gradient_(mine, my_grads, state)
    assert new.v["dense"] is state.v["dense"]
    for name in ("conv", "heads"):
        np.testing.assert_allclose(
            backend.to_numpy(my_grads[name]), backend.to_numpy(expected[name]), rtol=1e-13
        )


def test_other_gradients_pass_through():
    weights, grads = model()
    bias = object()
    found, _ = add_gradient(weights, {"bias": bias, **grads}, init(weights, layouts=LAYOUTS))
    assert found["bias"] is bias
    assert list(found) == ["bias", *grads]


# The factor


def terms(backend, factor, dtype="float64"):
    """Return what a step with this factor adds to gradients of zero."""
    weights, grads = model(dtype)
    mine = backend.tree(weights)
    zeros = backend.tree({name: 0 * grad for name, grad in grads.items()})
    found, _ = add_gradient(mine, zeros, init(mine, layouts=LAYOUTS), factor=factor)
    assert {backend.dtype_name(grad) for grad in found.values()} == {dtype}
    return backend.tree_to_numpy(found)


def test_each_name_can_have_its_own_factor(backend):
    unit = terms(backend, 1)
    found = terms(backend, {"*": 0.5, "dense": 0.25, "h*": backend.asarray(np.array(2.0))})
    assert_close(
        found, {name: 0.5 * x if name != "dense" else 0.25 * x for name, x in unit.items()}
    )
    ordered = terms(backend, {"h*": backend.asarray(np.array(2.0)), "*": 0.5})
    assert_close(ordered, {name: (2 if name == "heads" else 0.5) * x for name, x in unit.items()})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("factor_dtype", ["float32", "float64"])
def test_factor_can_be_an_array(backend, dtype, factor_dtype):
    factor = backend.asarray(np.array(0.25), factor_dtype)
    assert_close(terms(backend, factor, dtype), terms(backend, 0.25, dtype), rtol=1e-6)


@pytest.mark.parametrize(
    "factor",
    [np.float64(0.25), np.float32(0.25), np.array(0.25), Fraction(1, 4)],
    ids=lambda factor: type(factor).__name__,
)
def test_factor_can_be_any_real_number(backend, factor):
    assert_close(terms(backend, factor), terms(backend, 0.25))


def test_factor_zero_changes_no_gradient(backend):
    weights, grads = model()
    mine = backend.tree(weights)
    state = init(mine, layouts=LAYOUTS)
    found, new = add_gradient(mine, backend.tree(grads), state, factor=0)
    assert_equal(backend.tree_to_numpy(found), grads)
    assert np.any(backend.to_numpy(new.v["conv"]) != backend.to_numpy(state.v["conv"]))


# Data types


def check_half_precision(backend, half):
    weights, grads = model("float32")
    weights = {name: backend.to_numpy(x) for name, x in backend.tree(weights, half).items()}
    mine, my_grads = backend.tree(weights, half), backend.tree(grads, half)
    state = init(mine, layouts=LAYOUTS)
    wide = {name: weight.astype("float32") for name, weight in weights.items()}
    wide_state = init(wide, layouts=LAYOUTS)
    assert_equal(backend.tree_to_numpy(state.v), wide_state.v)
    found, new = add_gradient(mine, my_grads, state, factor=0.3, n_iter=2)
    expected, wide_new = add_gradient(
        wide, backend.tree_to_numpy(my_grads), wide_state, factor=np.float32(0.3), n_iter=2
    )
    assert {backend.dtype_name(x) for x in found.values()} == {half}
    assert_close(backend.tree_to_numpy(new.v), wide_new.v, rtol=1e-5)
    assert_close(backend.tree_to_numpy(new.sigma), wide_new.sigma, rtol=1e-5)
    ulp = 2**-10 if half == "float16" else 2**-7
    assert_close(backend.tree_to_numpy(found), expected, rtol=ulp)


@on(dtype="float16")
def test_float16_iterates_in_float32(backend):
    check_half_precision(backend, "float16")


@on(dtype="bfloat16")
def test_bfloat16_iterates_in_float32(backend):
    check_half_precision(backend, "bfloat16")


@pytest.mark.parametrize(
    ("dtype", "real"),
    [("float32", "float32"), ("float64", "float64"), ("complex128", "float64")],
)
def test_dtype_is_kept(backend, dtype, real):
    weights, grads = model(dtype)
    mine = backend.tree(weights)
    found, state = add_gradient(mine, backend.tree(grads), init(mine, layouts=LAYOUTS))
    for name in weights:
        assert backend.dtype_name(found[name]) == dtype
        assert backend.dtype_name(state.v[name]) == dtype
        assert backend.dtype_name(state.sigma[name]) == real


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [("float64", "float32"), pytest.param("complex128", "complex64", marks=SLOW)],
)
@pytest.mark.parametrize("wide_weights", [True, False])
def test_weight_and_gradient_can_differ_in_precision(backend, wide, narrow, wide_weights):
    weights, grads = model(wide)
    weight_dtype, grad_dtype = (wide, narrow) if wide_weights else (narrow, wide)
    mine, my_grads = backend.tree(weights, weight_dtype), backend.tree(grads, grad_dtype)
    state = init(mine, layouts=LAYOUTS)
    found, new = add_gradient(mine, my_grads, state)
    expected, _ = add_gradient(weights, grads, init(weights, layouts=LAYOUTS))
    assert {backend.dtype_name(grad) for grad in found.values()} == {grad_dtype}
    assert {backend.dtype_name(v) for v in new.v.values()} == {weight_dtype}
    assert_close(backend.tree_to_numpy(found), expected, rtol=1e-5)
    if backend.in_place:
        add_gradient_(mine, my_grads, state)
        assert {backend.dtype_name(grad) for grad in my_grads.values()} == {grad_dtype}
        assert_close(backend.tree_to_numpy(my_grads), expected, rtol=1e-5)


# Weights that are zero or not finite


@not_finite
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_bad_weight_affects_no_other_and_recovers(backend, value):
    weights, grads = model()
    bad = {name: weight.copy() for name, weight in weights.items()}
    bad["conv"][1, 2, 0, 1] = value
    sound, mine, my_grads = backend.tree(weights), backend.tree(bad), backend.tree(grads)
    state = iterate(sound, init(sound, layouts=LAYOUTS), n_iter=3)

    found, new = add_gradient(mine, my_grads, state)
    expected, expected_state = add_gradient(sound, my_grads, state)
    assert not np.isfinite(backend.to_numpy(new.sigma["conv"]))
    assert not np.isfinite(backend.to_numpy(found["conv"])).all()
    np.testing.assert_array_equal(
        backend.to_numpy(new.v["conv"]), backend.to_numpy(state.v["conv"])
    )
    for name in ("dense", "heads"):
        for one, other in (
            (found, expected),
            (new.v, expected_state.v),
            (new.sigma, expected_state.sigma),
        ):
            np.testing.assert_array_equal(
                backend.to_numpy(one[name]), backend.to_numpy(other[name])
            )

    recovered = iterate(sound, new)
    np.testing.assert_array_equal(
        backend.to_numpy(recovered.sigma["conv"]), backend.to_numpy(expected_state.sigma["conv"])
    )


@not_finite
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_matrix_of_a_stack_affects_no_other(backend, value):
    weights, grads = model()
    bad = {name: weight.copy() for name, weight in weights.items()}
    bad["heads"][0, 2] = value  # in the first of two groups
    state = init(backend.tree(weights), layouts=LAYOUTS)
    found, new = add_gradient(backend.tree(bad), backend.tree(grads), state)
    expected, expected_state = add_gradient(backend.tree(weights), backend.tree(grads), state)
    sigma, grad, v = (backend.to_numpy(x["heads"]) for x in (new.sigma, found, new.v))
    assert list(np.isfinite(sigma)) == [False, True]
    assert np.isfinite(v).all()
    assert not np.isfinite(grad[:2]).all()
    # Not bit for bit: a library may multiply the matrices of a stack together.
    np.testing.assert_allclose(grad[2:], backend.to_numpy(expected["heads"])[2:], rtol=1e-13)
    np.testing.assert_allclose(v[1], backend.to_numpy(expected_state.v["heads"])[1], rtol=1e-13)


def test_zero_weight_keeps_v(backend):
    weights, grads = model()
    zero = {name: 0 * weight for name, weight in weights.items()}
    state = init(backend.tree(zero), layouts=LAYOUTS)
    found, new = add_gradient(backend.tree(zero), backend.tree(grads), state, factor=10, n_iter=3)
    assert_equal(backend.tree_to_numpy(found), grads)
    v, sigma = state_to_numpy(backend, new)
    assert_equal(v, backend.tree_to_numpy(state.v))
    assert all(np.all(x == 0) for x in sigma.values())
    later = iterate(backend.tree(weights), new, n_iter=3)
    expected = iterate(weights, init(weights, layouts=LAYOUTS), n_iter=3)
    assert_close(backend.tree_to_numpy(later.sigma), expected.sigma)


# Training and tracing


@on(module="torch")
def test_training_reduces_sigma(backend):
    """The loop is a user's. σ of the weight falls towards the penalty's minimum, zero."""
    weight = backend.asarray(model()[0]["conv"]).requires_grad_()
    state = init({"w": weight})
    before = svd_norm(as_matrix(backend.to_numpy(weight), "oihw"))
    for _ in range(30):
        weight.grad = weight.detach() * 0
        state = add_gradient_({"w": weight}, {"w": weight.grad}, state, factor=0.5)
        weight.data -= 0.5 * weight.grad
    assert svd_norm(as_matrix(backend.to_numpy(weight), "oihw")) < 0.5 * before


@on(module="jax")
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_step_runs_under_jit(backend, dtype):
    """The step is traced as a whole, so it cannot read a value."""
    import jax

    weights, grads = model(dtype)
    mine, my_grads = backend.tree(weights), backend.tree(grads)
    state = init(mine, layouts=LAYOUTS)
    layouts, traces = state.layouts, []

    @jax.jit
    def step(weights, grads, v, sigma, factor):
        traces.append(1)
        state = sc.SpectralState(v, sigma, layouts)
        grads, state = add_gradient(weights, grads, state, factor=factor, n_iter=2)
        return grads, state.v, state.sigma

    precision = 1e-5 if dtype == "float32" else 1e-12
    v, sigma = state.v, state.sigma
    for factor in (0.1, 0.2):
        found, v, sigma = step(mine, my_grads, v, sigma, factor)
        expected, state = add_gradient(mine, my_grads, state, factor=factor, n_iter=2)
        for one, other in ((found, expected), (v, state.v), (sigma, state.sigma)):
            other = backend.tree_to_numpy(other)
            one = backend.tree_to_numpy(one)
            assert_close({name: one[name] for name in other}, other, rtol=precision)
    assert len(traces) == 1


@on(module="jax")
def test_gradient_of_the_penalty_under_jit_is_the_step(backend):
    """With u held constant, autodiff of `penalty_at` gives the term of the step."""
    import jax

    weights, grads = model()
    mine = backend.tree(weights)
    state = init(mine, layouts=LAYOUTS)
    layouts = state.layouts

    @jax.jit
    def gradient(weights, v):
        def total(weights):
            matrices = {name: as_matrix(w, layouts[name]) for name, w in weights.items()}
            u = {
                name: jax.lax.stop_gradient(sc.power_iteration(W, start_of(v[name])[..., 0, :]).u)
                for name, W in matrices.items()
            }
            return sum(sc.penalty_at(W, u[name], factor=0.3) for name, W in matrices.items())

        return jax.grad(total)(weights)

    found = backend.tree_to_numpy(gradient(mine, state.v))
    zeros = backend.tree({name: 0 * grad for name, grad in grads.items()})
    expected, _ = add_gradient(mine, zeros, state, factor=0.3)
    expected = backend.tree_to_numpy(expected)
    assert_close({name: found[name] for name in expected}, expected, rtol=1e-12)


# Other penalties


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("target", "power"), [(0.0, 1), (2.0, 1), (2.0, 2)])
@pytest.mark.parametrize("dtype", [*slow("float64"), "complex128"])
def test_term_of_another_penalty_is_its_gradient(backend, dtype, target, power, in_place):
    if in_place and not backend.in_place:
        pytest.skip(f"{backend}: arrays are immutable")
    weights, grads = model(dtype)
    mine, my_grads = backend.tree(weights), backend.tree(grads)
    state = init(mine, layouts=LAYOUTS, seed=3)
    options = {"factor": 0.3, "target": target, "power": power, "n_iter": 300}
    if in_place:
        found, new = my_grads, add_gradient_(mine, my_grads, state, **options)
    else:
        found, new = add_gradient(mine, my_grads, state, **options)
    for name, weight in weights.items():
        matrices = as_matrix(weight, LAYOUTS[name])
        u, s, vh = np.linalg.svd(matrices, full_matrices=False)
        force = np.maximum(s[..., 0] - target, 0) if power == 2 else 1.0 * (s[..., 0] > target)
        term = outer(force, u[..., 0], vh[..., 0, :].conj())
        expected = grads[name] + 0.3 * sc.from_matrix(term, LAYOUTS[name], weight.shape)
        np.testing.assert_allclose(backend.to_numpy(found[name]), expected, rtol=1e-9, atol=1e-9)
        # The state holds σ itself, not the slope.
        np.testing.assert_allclose(backend.to_numpy(new.sigma[name]), s[..., 0], rtol=1e-9)
    if not in_place:
        again, same = add_gradient(mine, my_grads, new, **{**options, "n_iter": 0})
        assert_close(backend.tree_to_numpy(again), backend.tree_to_numpy(found))
        assert_equal(backend.tree_to_numpy(same.sigma), backend.tree_to_numpy(new.sigma))


def test_each_name_can_have_its_own_target():
    weights = {"a": np.diag([3.0, 1.0]), "b": np.diag([3.0, 1.0])}
    grads = {name: np.zeros((2, 2)) for name in weights}
    options = {"factor": 1.0, "target": {"a": 1.0, "*": 4.0}, "n_iter": 50}
    found, _ = add_gradient(weights, grads, init(weights), **options)
    np.testing.assert_allclose(found["a"], np.diag([2.0, 0.0]), atol=1e-12)
    np.testing.assert_array_equal(found["b"], grads["b"])
    with pytest.raises(sc.NamesError, match="target has no entry for"):
        add_gradient(weights, grads, init(weights), target={"a": 1.0})
    with pytest.raises(sc.ArgumentError, match="power must be 1 or 2"):
        add_gradient(weights, grads, init(weights), power=3)
