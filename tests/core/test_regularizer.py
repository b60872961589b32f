import dataclasses
import re
from fractions import Fraction

import array_api_compat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import gaussian, get, on, outer, svd_norm
from spectral_core import Layout, add_gradient, add_gradient_, as_matrix, init, iterate
from spectral_core.step import plain_step_

LAYOUTS = {"conv": "oihw", "dense": "io", "heads": Layout("(go)i", groups=2)}
SHAPES = {"conv": (4, 3, 2, 2), "dense": (5, 3), "heads": (4, 6)}
not_finite = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)


def model(dtype="float64", seed=0, shapes=SHAPES):
    """Weights and gradients, in NumPy."""
    rng = np.random.default_rng(seed)
    weights = {name: gaussian(rng, *shape, dtype=dtype) for name, shape in shapes.items()}
    grads = {name: gaussian(rng, *shape, dtype=dtype) for name, shape in shapes.items()}
    return weights, grads


def state_to_numpy(backend, state):
    return backend.tree_to_numpy(state.v), backend.tree_to_numpy(state.sigma)


def assert_equal(found, expected):
    """Mappings of arrays, bit for bit."""
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def assert_close(found, expected, rtol=1e-13):
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=rtol, err_msg=name)


# The start


def test_init_is_reproducible_and_seeded():
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


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
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
        assert state.v[name].shape == (*W.shape[:-2], W.shape[-1])
        np.testing.assert_allclose(np.linalg.norm(state.v[name], axis=-1), 1, rtol=1e-14)
        expected = sc.power_iteration(W, state.v[name]).sigma
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
def test_layouts_by_name_pattern_or_default(layouts, expected):
    state = init(model()[0], layouts=layouts)
    assert {name: layout.axes for name, layout in state.layouts.items()} == expected


def test_one_layout_for_all():
    state = init({"a": np.ones((2, 3)), "b": np.ones((4, 5))}, layouts="io")
    assert {name: v.shape for name, v in state.v.items()} == {"a": (2,), "b": (4,)}


# The step


@given(st.integers(0, 2**32), st.floats(0, 10), st.integers(1, 3))
def test_step_is_algorithm_1(seed, factor, n_iter):
    weights, grads = model(seed=seed)
    state = init(weights, seed=seed, layouts=LAYOUTS)
    found, new = add_gradient(weights, grads, state, factor=factor, n_iter=n_iter)
    for name, weight in weights.items():
        W = as_matrix(weight, LAYOUTS[name])
        sigma, u, v = sc.power_iteration(W, state.v[name], n_iter=n_iter)
        np.testing.assert_allclose(new.sigma[name], sigma, rtol=1e-9)
        np.testing.assert_allclose(new.v[name], v, atol=1e-9)
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
def test_inputs_stay_as_they_are(backend, dtype):
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
    in_place = add_gradient_(mine, my_grads, state, factor=0.3, n_iter=2)
    precision = 1e-6 if dtype == "float32" else 1e-14
    assert_close(backend.tree_to_numpy(my_grads), backend.tree_to_numpy(expected), rtol=precision)
    for one, other in zip(
        state_to_numpy(backend, in_place), state_to_numpy(backend, pure), strict=True
    ):
        assert_equal(one, other)
    assert_equal(backend.tree_to_numpy(mine), weights)
    assert_equal(backend.tree_to_numpy(state.v), v)


def test_read_only_weights_and_state_in_place():
    readonly = get("numpy-readonly")
    weights, grads = model()
    state = init(readonly.tree(weights), layouts=LAYOUTS)
    for v in state.v.values():
        v.flags.writeable = False
    expected, _ = add_gradient(weights, grads, state)
    add_gradient_(readonly.tree(weights), grads, state)
    assert_close(grads, expected)


def test_step_is_replaceable():
    weights, grads = model()
    state = init(weights, layouts=LAYOUTS)
    expected, after = add_gradient(weights, grads, state)
    seen = []

    def step(tasks, n_iter):
        seen.extend(task.name for task in tasks)
        return plain_step_(tasks, n_iter)

    new = add_gradient_(weights, grads, state, step=step)
    assert seen == list(weights)
    assert_close(grads, expected)
    assert_equal(new.v, after.v)


# Several vectors for each matrix


@pytest.mark.parametrize("layout", ["oihw", "hwio", "iohw", Layout("hwi(go)", groups=2)])
def test_several_vectors_are_block_iteration(backend, layout):
    weights, grads = model(shapes={"w": (4, 3, 2, 6)})
    mine, start = backend.tree(weights), backend.tree(grads)
    state = init(mine, layouts=layout, n_vectors=3)
    matrix = as_matrix(weights["w"], layout)
    V = backend.to_numpy(state.v["w"])
    assert V.shape == (*matrix.shape[:-2], 3, matrix.shape[-1])
    found = start
    for _ in range(3):
        found, state = add_gradient(mine, start, state, factor=0.3)
        sigma, u, v, V = sc.block_iteration(matrix, V)
        # The later rows of one that has converged are what rounding leaves there.
        np.testing.assert_allclose(backend.to_numpy(state.v["w"])[..., 0, :], v, atol=1e-10)
        np.testing.assert_allclose(backend.to_numpy(state.sigma["w"]), sigma, rtol=1e-10)
    term = as_matrix(backend.to_numpy(found["w"]) - grads["w"], layout)
    np.testing.assert_allclose(term, 0.3 * outer(sigma, u, v), atol=1e-10)


@on(in_place=True)
def test_several_vectors_in_place(backend):
    weights, grads = model()
    mine, expected_state = backend.tree(weights), init(weights, layouts=LAYOUTS, n_vectors=2)
    state, mine_grads = init(mine, layouts=LAYOUTS, n_vectors=2), backend.tree(grads)
    expected, _ = add_gradient(weights, grads, expected_state)
    add_gradient_(mine, mine_grads, state)
    assert_close(backend.tree_to_numpy(mine_grads), expected, rtol=1e-10)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_the_number_of_vectors_is_checked(wrong):
    with pytest.raises(sc.ArgumentError, match="n_vectors must be an integer ≥ 1"):
        init(model()[0], n_vectors=wrong)


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


def test_no_iteration_needs_u():
    weights, grads = model()
    state = dataclasses.replace(init(weights, layouts=LAYOUTS), u={})
    with pytest.raises(sc.ArgumentError, match="n_iter is 0, but the state holds no u of 'conv'"):
        add_gradient(weights, grads, state, n_iter=0)
    _, after = add_gradient(weights, grads, state)
    assert after.u == {}  # and none is kept where none was
    with pytest.raises(sc.ArgumentError, match="n_iter must be an integer ≥ 0"):
        add_gradient(weights, grads, state, n_iter=-1)


def test_no_gradient_no_step(backend):
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
def test_no_gradient_in_place(backend):
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
    """What a step with this factor adds to gradients of zero."""
    weights, grads = model(dtype)
    mine = backend.tree(weights)
    zeros = backend.tree({name: 0 * grad for name, grad in grads.items()})
    found, _ = add_gradient(mine, zeros, init(mine, layouts=LAYOUTS), factor=factor)
    assert {backend.dtype_name(grad) for grad in found.values()} == {dtype}
    return backend.tree_to_numpy(found)


def test_factor_of_each_name(backend):
    unit = terms(backend, 1)
    found = terms(backend, {"*": 0.5, "dense": 0.25, "h*": backend.asarray(np.array(2.0))})
    assert_close(
        found, {name: 0.5 * x if name != "dense" else 0.25 * x for name, x in unit.items()}
    )
    ordered = terms(backend, {"h*": backend.asarray(np.array(2.0)), "*": 0.5})
    assert_close(ordered, {name: (2 if name == "heads" else 0.5) * x for name, x in unit.items()})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("factor_dtype", ["float32", "float64"])
def test_factor_as_an_array(backend, dtype, factor_dtype):
    factor = backend.asarray(np.array(0.25), factor_dtype)
    assert_close(terms(backend, factor, dtype), terms(backend, 0.25, dtype), rtol=1e-6)


@pytest.mark.parametrize(
    "factor",
    [np.float64(0.25), np.float32(0.25), np.array(0.25), Fraction(1, 4)],
    ids=lambda factor: type(factor).__name__,
)
def test_factor_as_a_number_of_another_kind(backend, factor):
    assert_close(terms(backend, factor), terms(backend, 0.25))


def test_factor_zero_changes_no_gradient(backend):
    weights, grads = model()
    mine = backend.tree(weights)
    state = init(mine, layouts=LAYOUTS)
    found, new = add_gradient(mine, backend.tree(grads), state, factor=0)
    assert_equal(backend.tree_to_numpy(found), grads)
    assert np.any(backend.to_numpy(new.v["conv"]) != backend.to_numpy(state.v["conv"]))


# Data types


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("weight_dtype", ["float32", "half"])
@pytest.mark.parametrize(
    ("half", "name", "ulp"),
    [
        ("float16", "numpy", 2**-10),
        ("float16", "torch-cpu", 2**-10),
        ("bfloat16", "torch-cpu", 2**-7),
        ("float16", "torch-cuda", 2**-10),
        ("bfloat16", "torch-cuda", 2**-7),
        ("float16", "jax-cpu", 2**-10),
        ("bfloat16", "jax-cpu", 2**-7),
        ("bfloat16", "jax-gpu", 2**-7),
        ("float16", "cupy", 2**-10),
    ],
)
def test_half_precision_gradient_is_rounded_once(half, name, ulp, weight_dtype, in_place):
    """The term is a little more than half an ulp of the gradient: rounded by itself to half
    precision, it becomes a tie, and the sum is rounded down to the gradient it was.
    """
    backend = get(name)
    if in_place and not backend.in_place:
        pytest.skip(f"{name}: arrays are immutable")
    weights = {"w": backend.asarray([[1.0]], half if weight_dtype == "half" else "float32")}
    grads = {"w": backend.asarray([[1.0]], half)}
    state = init(weights)
    assert backend.dtype_name(state.v["w"]) == "float32"
    assert backend.dtype_name(state.sigma["w"]) == "float32"
    factor = ulp / 2 * (1 + ulp / 2)
    if in_place:
        add_gradient_(weights, grads, state, factor=factor)
    else:
        grads, _ = add_gradient(weights, grads, state, factor=factor)
    assert backend.dtype_name(grads["w"]) == half
    assert backend.to_numpy(grads["w"]).item() == 1 + ulp


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
def test_float16(backend):
    check_half_precision(backend, "float16")


@on(dtype="bfloat16")
def test_bfloat16(backend):
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


@pytest.mark.parametrize(("wide", "narrow"), [("float64", "float32"), ("complex128", "complex64")])
@pytest.mark.parametrize("wide_weights", [True, False])
def test_weight_and_gradient_of_two_precisions(backend, wide, narrow, wide_weights):
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
def test_bad_weight_is_alone_and_recovers(backend, value):
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
def test_bad_matrix_of_a_stack_is_alone(backend, value):
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
    # Not to the bit: a product of a stack may take its matrices together.
    np.testing.assert_allclose(grad[2:], backend.to_numpy(expected["heads"])[2:], rtol=1e-13)
    np.testing.assert_allclose(v[1], backend.to_numpy(expected_state.v["heads"])[1], rtol=1e-13)


def test_zero_weight_waits(backend):
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


# Mistakes


def mistaken(**changes):
    """The arguments of a step over two matrices, but for the changes to the second."""
    weights = {"first": np.eye(2), "w": np.ones((3, 2))}
    grads = {"first": np.zeros((2, 2)), "w": np.zeros((3, 2))}
    state = init(weights)
    if "weight" in changes:
        weights["w"] = changes.pop("weight")
    if "grad" in changes:
        grads["w"] = changes.pop("grad")
    if "v" in changes:
        state.v["w"] = changes.pop("v")
    if "missing" in changes:
        del {"weights": weights, "grads": grads}[changes.pop("missing")]["w"]
    if "unexpected" in changes:
        weights["bias"] = changes.pop("unexpected")
    return (weights, grads, state), changes


MISTAKES = [
    ({"weight": np.ones(6)}, sc.ShapeError, "'w'.*(6,)"),
    ({"weight": np.ones((2, 3))}, sc.ShapeError, "'w'.*(2, 3)"),
    ({"weight": np.ones((3, 2), dtype=int)}, sc.DTypeError, "int64|float64.*int64"),
    ({"weight": np.ones((3, 2), dtype=bool)}, sc.DTypeError, "bool"),
    ({"weight": np.ones((3, 2)) * 1j}, sc.DTypeError, "'w' has dtype float64.*complex128"),
    ({"grad": np.ones((2, 3))}, sc.ShapeError, "gradient of 'w' has shape (2, 3).*(3, 2)"),
    ({"grad": np.ones((3, 2), dtype=int)}, sc.DTypeError, "gradient of 'w' has dtype int64"),
    (
        {"grad": np.ones((3, 2)) * 1j},
        sc.DTypeError,
        "gradient of 'w' has dtype complex128.*float64",
    ),
    ({"v": np.ones(3)}, sc.ShapeError, "weight 'w' of shape (3, 2).*(2,).*(3,)"),
    ({"v": np.ones(2, dtype=int)}, sc.DTypeError, "v has dtype int64"),
    ({"v": np.ones(2) * 1j}, sc.DTypeError, "v has dtype complex128"),
    ({"missing": "weights"}, sc.NamesError, "missing ['w']"),
    ({"missing": "grads"}, sc.NamesError, "grads has no entry for ['w']"),
    ({"unexpected": np.ones(3)}, sc.NamesError, "unexpected ['bias']"),
    ({"factor": -0.1}, sc.ArgumentError, "factor must be a finite number ≥ 0.*-0.1"),
    ({"factor": np.nan}, sc.ArgumentError, "factor must be.*nan"),
    ({"factor": np.inf}, sc.ArgumentError, "factor must be.*inf"),
    ({"factor": True}, sc.ArgumentError, "factor must be.*True"),
    ({"factor": "0.1"}, sc.ArgumentError, "factor must be.*'0.1'"),
    ({"factor": None}, sc.ArgumentError, "factor must be.*None"),
    ({"factor": np.array(-0.1)}, sc.ArgumentError, "factor must be.*-0.1"),
    ({"factor": np.array(1j)}, sc.ArgumentError, "factor must be.*1j"),
    ({"factor": np.ones(1)}, sc.ArgumentError, "factor must be.*array"),
    ({"factor": {"first": 0.1, "w": -1}}, sc.ArgumentError, "factor['w'] must be.*-1"),
    ({"factor": {"first": 0.1}}, sc.NamesError, "factor has no entry for ['w']"),
    ({"factor": {"*": 0.1, "v*": 0.1}}, sc.NamesError, "factor: 'v*' matches none.*'w'"),
    ({"n_iter": -1}, sc.ArgumentError, "n_iter must be an integer ≥ 0, not -1"),
    ({"n_iter": 1.5}, sc.ArgumentError, "n_iter must be an integer ≥ 0, not 1.5"),
]


def words_to_pattern(words):
    return "|".join(
        ".*".join(re.escape(part) for part in choice.split(".*")) for choice in words.split("|")
    )


@pytest.mark.parametrize("step", [add_gradient, add_gradient_])
@pytest.mark.parametrize(("changes", "error", "words"), MISTAKES, ids=lambda x: str(x)[:40])
def test_a_mistake_is_named_before_any_gradient_changes(step, changes, error, words):
    arguments, changes = mistaken(**changes)
    with pytest.raises(error, match=words_to_pattern(words)):
        step(*arguments, **changes)
    assert not np.any(arguments[1]["first"])


@pytest.mark.parametrize(
    ("weights", "arguments", "error", "words"),
    [
        ({}, {}, sc.NamesError, "at least one"),
        ([np.eye(2)], {}, sc.NamesError, "weights must be a mapping"),
        ({"w": [[1.0]]}, {}, sc.DTypeError, "weight 'w'.*builtins.list"),
        ({"w": np.array(1.0)}, {}, sc.ShapeError, "weight 'w' has 0 axes"),
        ({"w": np.ones(3)}, {}, sc.ShapeError, "weight 'w' has 1 axes"),
        ({"w": np.ones((3, 0))}, {}, sc.ShapeError, "weight 'w' of shape (3, 0).*empty"),
        ({"w": np.ones((3, 2), dtype=int)}, {}, sc.DTypeError, "weight 'w' has dtype int64"),
        ({"w": np.ones((3, 2), dtype=bool)}, {}, sc.DTypeError, "weight 'w' has dtype bool"),
        ({"w": np.eye(2)}, {"seed": -1}, sc.ArgumentError, "seed must be an integer ≥ 0, not -1"),
        ({"w": np.eye(2)}, {"seed": "x"}, sc.ArgumentError, "seed must be an integer ≥ 0, not 'x'"),
        (
            {"w": np.eye(2)},
            {"layouts": {"v.*": "oi"}},
            sc.NamesError,
            "layouts: 'v.*' matches none",
        ),
        (
            {"w": np.eye(2)},
            {"layouts": "oihw"},
            sc.ShapeError,
            "weight 'w' of shape (2, 2).*4 axes",
        ),
        ({"w": np.eye(2)}, {"layouts": "xy"}, sc.ArgumentError, "cannot read layout 'xy'"),
    ],
)
def test_mistakes_at_the_start(weights, arguments, error, words):
    with pytest.raises(error, match=".*".join(re.escape(part) for part in words.split(".*"))):
        init(weights, **arguments)


def test_iterate_names_mistakes():
    (weights, _, state), _ = mistaken(missing="weights")
    with pytest.raises(sc.NamesError, match=r"missing \['w'\]"):
        iterate(weights, state)
    (weights, _, state), _ = mistaken()
    with pytest.raises(sc.ArgumentError, match="n_iter"):
        iterate(weights, state, n_iter=0)


@on("array-api-strict", "torch-cpu", "jax-cpu")
def test_weight_and_gradient_of_two_libraries(backend):
    arguments, _ = mistaken(grad=backend.asarray(np.zeros((3, 2))))
    with pytest.raises(sc.DTypeError, match=r"weight 'w'.* its gradient.*numpy\.ndarray"):
        add_gradient(*arguments)


@on("array-api-strict", "torch-cpu", "jax-cpu")
def test_weight_and_v_of_two_libraries(backend):
    weights = {"w": backend.asarray(np.eye(2))}
    with pytest.raises(sc.DTypeError, match=r"weight 'w'.*numpy\.ndarray"):
        iterate(weights, init({"w": np.eye(2)}))


@pytest.mark.parametrize("what", ["weight", "grad"])
def test_a_list_is_not_an_array(what):
    arguments, _ = mistaken(**{what: [[1.0, 2.0]] * 3})
    with pytest.raises(sc.DTypeError, match=r"'w'.*builtins\.list"):
        add_gradient(*arguments)
    assert not np.any(arguments[1]["first"])


@on("torch-cpu", "array-api-strict")
def test_factor_of_another_library_changes_no_gradient(backend):
    (weights, grads, state), _ = mistaken()
    factor = {"first": 0.1, "w": backend.asarray(np.array(0.1))}
    with pytest.raises(sc.DTypeError, match=r"weight 'w'.*factor.*one library"):
        add_gradient_(weights, grads, state, factor=factor)
    assert not np.any(grads["first"])


@on(in_place=False)
def test_immutable_gradients_are_rejected_in_place(backend):
    weights, grads = model()
    mine, my_grads = backend.tree(weights), backend.tree(grads)
    state = init(mine, layouts=LAYOUTS)
    with pytest.raises(sc.DeviceError, match="gradient of 'conv' cannot be written in place"):
        add_gradient_(mine, my_grads, state)
    assert_equal(backend.tree_to_numpy(my_grads), grads)


def test_one_read_only_gradient_leaves_the_others_alone():
    (weights, grads, state), _ = mistaken()
    grads["w"].flags.writeable = False
    with pytest.raises(sc.DeviceError, match="gradient of 'w' cannot be written"):
        add_gradient_(weights, grads, state)
    assert not np.any(grads["first"])


def elsewhere(backend, x):
    """The array on a second device, which both libraries have for such tests."""
    if backend.module == "torch":
        return x.to("meta")
    xp = array_api_compat.array_namespace(x)
    return xp.asarray(x, device=xp.Device("device1"))


@on("torch-cpu", "array-api-strict")
def test_two_devices(backend):
    x = backend.asarray(np.eye(2))
    y = elsewhere(backend, x)
    state = init({"w": x})
    with pytest.raises(sc.DeviceError, match=r"weight 'w' is on .* but its gradient is on"):
        add_gradient({"w": x}, {"w": y}, state)
    with pytest.raises(sc.DeviceError, match=r"weight 'w' is on .* but its v is on"):
        add_gradient({"w": y}, {"w": y}, state)


@on("array-api-strict")
def test_everything_stays_on_the_device_of_the_weight(backend):
    weights, grads = model()
    there = {name: elsewhere(backend, backend.asarray(x)) for name, x in weights.items()}
    my_grads = {name: elsewhere(backend, backend.asarray(x)) for name, x in grads.items()}
    found, state = add_gradient(there, my_grads, init(there, layouts=LAYOUTS))
    for arrays in (found, state.v, state.sigma):
        assert {str(x.device) for x in arrays.values()} == {"array_api_strict.Device('device1')"}
    add_gradient_(there, my_grads, state)


# PyTorch


@on(module="torch")
def test_no_autograd_graph(backend):
    weights, grads = model()
    mine = {name: weight.requires_grad_() for name, weight in backend.tree(weights).items()}
    my_grads = backend.tree(grads)
    state = iterate(mine, init(mine, layouts=LAYOUTS))
    found, new = add_gradient(mine, my_grads, state)
    newer = add_gradient_(mine, my_grads, state)
    for arrays in (found, my_grads, *((s.v | s.sigma) for s in (state, new, newer))):
        assert not any(x.requires_grad for x in arrays.values())
    assert all(weight.requires_grad for weight in mine.values())


@on(module="torch")
def test_parameters_train(backend):
    """A loop as a user writes it: σ of the weight falls towards the penalty's minimum, zero."""
    weight = backend.asarray(model()[0]["conv"]).requires_grad_()
    state = init({"w": weight})
    before = svd_norm(as_matrix(backend.to_numpy(weight), "oihw"))
    for _ in range(30):
        weight.grad = weight.detach() * 0
        state = add_gradient_({"w": weight}, {"w": weight.grad}, state, factor=0.5)
        weight.data -= 0.5 * weight.grad
    assert svd_norm(as_matrix(backend.to_numpy(weight), "oihw")) < 0.5 * before


def watcher():
    """A PyTorch dispatch mode: it refuses copies to the host, and keeps the size of the largest
    new tensor, a view of an input not being one.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    def pointers(tree):
        return {x.untyped_storage().data_ptr(): x for x in tree_leaves(tree) if torch.is_tensor(x)}

    class Watcher(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
                raise AssertionError(f"{func} waits for the device")
            result = func(*args, **(kwargs or {}))
            old = pointers((args, kwargs))
            for pointer, x in pointers(result).items():
                if pointer not in old:
                    self.largest = max(self.largest, x.untyped_storage().nbytes())
            return result

    return Watcher()


@on(module="torch")
def test_watcher_sees(backend):
    x = backend.asarray(np.ones((8, 8)))
    with watcher() as seen:
        x.add_(x)
        x.T.reshape(8, 2, 4)[0, 0]
    assert seen.largest == 0
    with watcher() as seen:
        x + x
    assert seen.largest == 8 * 8 * 8
    with pytest.raises(AssertionError, match="waits"), watcher():
        float(x[0, 0])


@on(module="torch")
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_step_never_waits_for_the_device(backend, dtype):
    weights, grads = model(dtype)
    mine, my_grads = backend.tree(weights), backend.tree(grads)
    state = init(mine, layouts=LAYOUTS)
    factor = backend.asarray(np.array(0.1))
    with watcher():
        state = add_gradient_(mine, my_grads, state, factor=factor, n_iter=2)
        add_gradient(mine, my_grads, state, factor={"*": factor})
        iterate(mine, state)


@on(module="torch")
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1024, 1024), "oi"),
        ((1024, 1024), "io"),
        ((256, 256, 4, 4), "oihw"),
        ((4, 4, 256, 256), "hwio"),
        ((1024, 64, 4, 4), Layout("(go)ihw", groups=4)),
        ((4, 4, 64, 1024), Layout("hwi(go)", groups=4)),
        ((4, 512, 512), "sio"),
    ],
    ids=str,
)
def test_step_in_place_makes_no_temporary_of_the_size_of_a_weight(backend, shape, layout):
    weights = {"w": backend.asarray(gaussian(np.random.default_rng(0), *shape), "float32")}
    grads = {"w": weights["w"] * 0}
    state = init(weights, layouts=layout)
    with watcher() as seen:
        add_gradient_(weights, grads, state)
    vectors = max(state.v["w"].shape[0] * state.v["w"].shape[-1], 4 * 1024)
    assert 0 < seen.largest <= 4 * vectors
    assert seen.largest < weights["w"].numel()  # bytes: a quarter of the weight's
    assert float(abs(grads["w"]).max()) > 0


# JAX


@on(module="jax")
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_step_under_jit(backend, dtype):
    """Traced as a whole, so it cannot look at a value."""
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
    """The regularizer by autodiff: u held constant, `penalty_at` added to a loss."""
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
                name: jax.lax.stop_gradient(sc.power_iteration(W, v[name]).u)
                for name, W in matrices.items()
            }
            return sum(sc.penalty_at(W, u[name], factor=0.3) for name, W in matrices.items())

        return jax.grad(total)(weights)

    found = backend.tree_to_numpy(gradient(mine, state.v))
    zeros = backend.tree({name: 0 * grad for name, grad in grads.items()})
    expected, _ = add_gradient(mine, zeros, state, factor=0.3)
    expected = backend.tree_to_numpy(expected)
    assert_close({name: found[name] for name in expected}, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda w, g, s: init({3: w["w"]}), sc.NamesError, "must be a string, not 3"),
        (lambda w, g, s: add_gradient([w], g, s), sc.NamesError, "weights must be a mapping"),
        (lambda w, g, s: add_gradient(w, None, s), sc.NamesError, "grads must be a mapping"),
        (lambda w, g, s: add_gradient_(w, None, s), sc.NamesError, "grads must be a mapping"),
        (lambda w, g, s: add_gradient(w, g, s, factor=np.True_), sc.ArgumentError, "factor"),
        (lambda w, g, s: sc.spectral_norm(w["w"], tol="x"), sc.ArgumentError, "tol"),
        (lambda w, g, s: sc.Layout(5), sc.ArgumentError, "string of axes"),
        (lambda w, g, s: sc.as_matrix(w["w"], None), sc.ArgumentError, "string of axes"),
    ],
)
def test_arguments_of_a_wrong_kind(call, error, words):
    weights, grads = {"w": np.ones((3, 2))}, {"w": np.zeros((3, 2))}
    with pytest.raises(error, match=words):
        call(weights, grads, init(weights))


@on("torch-cpu", "jax-cpu", "array-api-strict")
def test_a_complex_factor_changes_no_gradient(backend):
    weights = backend.tree({"a": np.ones((3, 2)), "b": np.ones((2, 2))})
    grads = backend.tree({"a": np.zeros((3, 2)), "b": np.zeros((2, 2))})
    factor = {"a": 0.1, "b": backend.asarray(np.array(1j))}
    step = add_gradient_ if backend.in_place else add_gradient
    with pytest.raises(sc.DTypeError, match=r"factor of 'b' has dtype .*complex128"):
        step(weights, grads, init(weights), factor=factor)
    assert not backend.to_numpy(grads["a"]).any()


# Other penalties than the paper's


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("target", "power"), [(0.0, 1), (2.0, 1), (2.0, 2)])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_another_penaltys_term(backend, dtype, target, power, in_place):
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
        # What the state says is σ itself.
        np.testing.assert_allclose(backend.to_numpy(new.sigma[name]), s[..., 0], rtol=1e-9)
    if not in_place:
        again, same = add_gradient(mine, my_grads, new, **{**options, "n_iter": 0})
        assert_close(backend.tree_to_numpy(again), backend.tree_to_numpy(found))
        assert_equal(backend.tree_to_numpy(same.sigma), backend.tree_to_numpy(new.sigma))


def test_a_target_of_each_name():
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


def test_an_error_tells_of_all_weights_whose_shape_does_not_fit(backend):
    weights = backend.tree(dict.fromkeys("abc", np.ones((4, 3))))
    state = init(weights)
    others = {**weights, **backend.tree({"a": np.ones((4, 5)), "c": np.ones((3, 3, 1))})}
    grads = dict.fromkeys("abc")
    grads.update({"a": others["a"], "c": weights["c"]})
    message = r"'a' of shape \(4, 5\) needs a v of shape \(5,\)(.|\n)*'c'"
    with pytest.raises(sc.ShapeError, match=message) as error:
        add_gradient(others, grads, state)
    assert "'b'" not in str(error.value)
    with pytest.raises(sc.ShapeError, match=message):
        iterate(others, state)
