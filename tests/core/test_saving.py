"""`state_dict` and `load_state_dict`: a run goes on bit for bit, or nothing is taken."""

import dataclasses
import re

import numpy as np
import pytest

import spectral_core as sc

SHAPES = {"dense": (6, 5), "grouped": (4, 3, 2, 2)}
LAYOUTS = {"grouped": sc.Layout("(go)ihw", groups=2)}


def model(backend, seed=0, **options):
    rng = np.random.default_rng(seed)
    weights = {
        name: backend.asarray(rng.standard_normal(s).astype("float32"))
        for name, s in SHAPES.items()
    }
    return weights, sc.init(weights, seed=seed, layouts=LAYOUTS, **options)


def step(backend, weights, state, n_iter):
    zero = {name: np.zeros(shape, "float32") for name, shape in SHAPES.items()}
    return sc.add_gradient(weights, backend.tree(zero), state, factor=0.1, n_iter=n_iter)


@pytest.mark.parametrize("n_iter", [0, 2])
@pytest.mark.parametrize("n_vectors", [1, 3])
def test_a_run_goes_on_bit_for_bit(backend, tmp_path, n_iter, n_vectors):
    weights, state = model(backend, n_vectors=n_vectors)
    state = sc.iterate(weights, state, n_iter=3)
    np.savez(tmp_path / "state.npz", **backend.tree_to_numpy(sc.state_dict(state)))
    expected, _ = step(backend, weights, state, n_iter)

    other = sc.init(weights, seed=1, layouts=LAYOUTS, n_vectors=n_vectors)
    with np.load(tmp_path / "state.npz") as file:
        resumed = sc.load_state_dict(other, file)
    assert resumed.layouts == state.layouts
    found, _ = step(backend, weights, resumed, n_iter)
    for name in SHAPES:
        np.testing.assert_array_equal(
            backend.to_numpy(found[name]), backend.to_numpy(expected[name])
        )


def test_what_is_taken_is_a_copy_in_the_dtype_of_the_model(backend):
    _, state = model(backend)
    arrays = {
        key: x.astype("float64") for key, x in backend.tree_to_numpy(sc.state_dict(state)).items()
    }
    resumed = sc.load_state_dict(state, arrays)
    kept = backend.tree_to_numpy(sc.state_dict(state))
    for array in arrays.values():
        array[...] = np.nan
    found = sc.state_dict(resumed)
    assert {backend.dtype_name(array) for array in found.values()} == {"float32"}
    for key, array in backend.tree_to_numpy(found).items():
        np.testing.assert_array_equal(array, kept[key])


def test_without_u_a_state_holds_none():
    weights = {"w": np.diag([2.0, 1.0])}
    state = sc.iterate(weights, sc.init(weights), n_iter=5)
    arrays = sc.state_dict(dataclasses.replace(state, u={}))
    assert list(arrays) == ["w.v", "w.sigma"]
    resumed = sc.load_state_dict(sc.init(weights), arrays)
    with pytest.raises(sc.ArgumentError, match="n_iter"):
        sc.add_gradient(weights, {"w": np.zeros((2, 2))}, resumed, n_iter=0)
    assert sc.iterate(weights, resumed).sigma["w"] == sc.iterate(weights, state).sigma["w"]


def test_a_state_of_another_model_is_refused():
    weights = {"a": np.ones((3, 2)), "b": np.ones((4, 2)), "c": np.ones((5, 2))}
    state = sc.init(weights)
    other = sc.init({"a": np.ones((3, 2)), "b": np.ones((4, 7)), "d": np.ones((5, 2))})
    arrays = sc.state_dict(other)
    del arrays["a.u"]
    message = (
        "missing ['a.u', 'c.v', 'c.sigma', 'c.u'], unexpected ['d.v', 'd.sigma', 'd.u'], "
        "of another shape ['b.v ((7,), not (2,))']"
    )
    with pytest.raises(sc.NamesError, match=re.escape(message)):
        sc.load_state_dict(state, arrays)
    with pytest.raises(sc.NamesError, match=r"missing \['a.v', 'a.sigma', 'b.v'"):
        sc.load_state_dict(state, {})
