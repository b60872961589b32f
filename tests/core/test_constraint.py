"""Constrained weights are the projection onto the bound."""

import re
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import gaussian, get, on, slow, svd_norm
from spectral_core import Layout, as_matrix, constrain, constrain_

LAYOUTS = {"conv": "hwio", "dense": "oi", "groups": Layout("i(go)", groups=2)}
SHAPES = {"conv": (2, 2, 3, 4), "dense": (5, 3), "groups": (6, 8)}


def model(dtype="float64", seed=0):
    rng = np.random.default_rng(seed)
    return {name: gaussian(rng, *shape, dtype=dtype) for name, shape in SHAPES.items()}


def norms(weights):
    return {name: svd_norm(as_matrix(w, LAYOUTS[name])) for name, w in weights.items()}


def projected(weights, bound, normalize):
    """Return W·bound/σ by an SVD of each matrix."""
    found = {}
    for name, weight in weights.items():
        matrices = as_matrix(weight, LAYOUTS[name])
        sigma = svd_norm(matrices)
        scale = bound / sigma if normalize else np.minimum(1.0, bound / sigma)
        found[name] = sc.from_matrix(scale[..., None, None] * matrices, LAYOUTS[name], weight.shape)
    return found


def assert_close(found, expected, rtol=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [*slow("float64"), "complex128"])
def test_constrained_weights_are_the_projection(backend, dtype, normalize, in_place):
    if in_place and not backend.in_place:
        pytest.skip(f"{backend}: arrays are immutable")
    weights = model(dtype)
    bound = float(norms(weights)["groups"].mean())  # between the two groups' norms
    expected = projected(weights, bound, normalize)
    mine = backend.tree(weights)
    state = sc.init(mine, layouts=LAYOUTS)
    options = {"bound": bound, "normalize": normalize, "n_iter": 500}
    if in_place:
        found, new = mine, constrain_(mine, state, **options)
    else:
        found, new = constrain(mine, state, **options)
        assert_close(backend.tree_to_numpy(mine), weights, rtol=0)
    found = backend.tree_to_numpy(found)
    assert_close(found, expected)
    assert_close(backend.tree_to_numpy(new.sigma), norms(found))


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_scaling_a_weight_does_not_change_the_result(scale, bound, seed):
    weights = {"w": gaussian(np.random.default_rng(seed), 4, 3)}
    scaled = {"w": scale * weights["w"]}
    options = {"bound": bound, "normalize": True, "n_iter": 3}
    found, _ = constrain(weights, sc.init(weights), **options)
    same, _ = constrain(scaled, sc.init(scaled), **options)
    np.testing.assert_allclose(found["w"], same["w"], rtol=1e-10)


# A subnormal bound scales a matrix to zero.
@given(st.just(0.0) | st.floats(1e-200, 10), st.booleans(), st.integers(0, 99))
def test_sigma_stays_at_least_the_bound_and_a_second_call_changes_nothing(bound, normalize, seed):
    """Power iteration underestimates σ: the true norm is at least the bound, or unchanged."""
    weights = {"w": gaussian(np.random.default_rng(seed), 4, 3)}
    found, state = constrain(weights, sc.init(weights), bound=bound, n_iter=2)
    before, after = svd_norm(weights["w"]), svd_norm(found["w"])
    assert after >= min(bound, before) * (1 - 1e-12)
    options = {"bound": bound, "n_iter": 200, "normalize": normalize}
    once, state = constrain(found, state, **options)
    twice, _ = constrain(once, state, **options)
    np.testing.assert_allclose(twice["w"], once["w"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered")
def test_zero_and_non_finite_weights_do_not_change(backend, value, normalize):
    odd = np.full((2, 3), 1.0)
    odd[0, 0] = value
    odd = odd * value if value == 0 else odd
    weights = backend.tree({"odd": odd, "w": np.diag([3.0, 4.0])})
    state = sc.init(weights)
    found, new = constrain(weights, state, bound=2.0, normalize=normalize, n_iter=100)
    found = backend.tree_to_numpy(found)
    np.testing.assert_array_equal(found["odd"], odd)
    np.testing.assert_allclose(found["w"], np.diag([1.5, 2.0]), rtol=1e-12)
    if value != 0:
        assert not np.isfinite(backend.to_numpy(new.sigma["odd"]))


@pytest.mark.parametrize(
    ("half", "name"),
    [
        ("float16", "numpy"),
        ("bfloat16", "torch-cpu"),
        ("float16", "torch-cpu"),
        ("bfloat16", "jax-cpu"),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_half_precision_is_rounded_once(half, name, in_place):
    backend = get(name)
    if in_place and not backend.in_place:
        pytest.skip(f"{name}: arrays are immutable")
    w = backend.asarray(gaussian(np.random.default_rng(0), 6, 5), half)
    wide = backend.to_numpy(w).astype("float32")
    expected, _ = constrain({"w": wide}, sc.init({"w": wide}), n_iter=20)
    weights, state = {"w": w}, sc.init({"w": w})
    if in_place:
        constrain_(weights, state, n_iter=20)
    else:
        weights, _ = constrain(weights, state, n_iter=20)
    assert backend.dtype_name(weights["w"]) == half
    rounded = backend.to_numpy(backend.asarray(expected["w"], half))
    different = backend.to_numpy(weights["w"]) != rounded  # σ itself differs in its last digits
    assert different.mean() < 0.1
    ulp = 2**-10 if half == "float16" else 2**-7
    np.testing.assert_allclose(backend.to_numpy(weights["w"]), rounded, rtol=ulp)


def test_each_name_can_have_its_own_bound(backend):
    weights = backend.tree({"a.x": np.diag([3.0, 1.0]), "b": np.diag([3.0, 1.0])})
    bound = {"a.*": 1.5, "b": backend.asarray(np.array(0.5))}
    found, _ = constrain(weights, sc.init(weights), bound=bound, n_iter=60)
    for name, expected in (("a.x", 1.5), ("b", 0.5)):
        assert svd_norm(backend.to_numpy(found[name])) == pytest.approx(expected)


def test_a_bound_in_place_runs_in_the_engines():
    """NumPy's default is Numba where it is installed; the pure function refuses such an engine."""
    pytest.importorskip("numba", reason="Numba is not installed")
    engine = import_module("spectral_core.numba").NumbaEngine()
    weights = {"w": np.diag([3.0, 1.0])}
    with pytest.raises(sc.ArgumentError, match="writes into the weights: pass it to constrain_"):
        constrain(weights, sc.init(weights), engines=[engine])
    seen = []
    engine.accepts = lambda job: seen.append(job.name)
    constrain_(weights, sc.init(weights), engines=[engine])
    assert seen == ["w"]


def test_wrong_arguments_raise():
    weights = {"w": np.eye(2)}
    state = sc.init(weights)
    with pytest.raises(sc.ArgumentError, match=re.escape("bound must be a finite number ≥ 0")):
        constrain(weights, state, bound=-1.0)
    with pytest.raises(sc.NamesError, match="bound has no entry for"):
        constrain({"w": np.eye(2)}, state, bound={})
    with pytest.raises(sc.ArgumentError, match="n_iter"):
        constrain(weights, state, n_iter=0)
    with pytest.raises(sc.NamesError):
        constrain({"other": np.eye(2)}, state)


@on(in_place=False)
def test_read_only_weights_raise_in_place(backend):
    weights = backend.tree({"w": np.eye(2)})
    with pytest.raises(sc.DeviceError, match=r"weight 'w' cannot be written in place.*constrain"):
        constrain_(weights, sc.init(weights))
