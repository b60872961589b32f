"""`state_dict` and `load_state_dict`: a run continues bit for bit, or nothing is loaded."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

import spectral_core as sc
from backends import SLOW, get, on, slow
from spectral_core._state_dict import like_own, loaded_arrays, merge, select

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
@pytest.mark.parametrize("n_vectors", [1, *slow(3)])
def test_run_continues_bit_for_bit(backend, tmp_path, n_iter, n_vectors):
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


def test_loaded_arrays_are_copies_in_the_dtype_of_the_model(backend):
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


def test_state_without_u_loads_without_u():
    weights = {"w": np.diag([2.0, 1.0])}
    state = sc.iterate(weights, sc.init(weights), n_iter=5)
    arrays = sc.state_dict(dataclasses.replace(state, u={}))
    assert list(arrays) == ["w.v", "w.sigma"]
    resumed = sc.load_state_dict(sc.init(weights), arrays)
    with pytest.raises(sc.ArgumentError, match="n_iter"):
        sc.add_gradient(weights, {"w": np.zeros((2, 2))}, resumed, n_iter=0)
    assert sc.iterate(weights, resumed).sigma["w"] == sc.iterate(weights, state).sigma["w"]


def test_state_of_another_model_raises():
    weights = {"a": np.ones((3, 2)), "b": np.ones((4, 2)), "c": np.ones((5, 2))}
    state = sc.init(weights)
    other = sc.init({"a": np.ones((3, 2)), "b": np.ones((4, 7)), "d": np.ones((5, 2))})
    arrays = sc.state_dict(other)
    del arrays["a.u"]
    message = (
        "missing ['a.u', 'c.v', 'c.sigma', 'c.u'], unexpected ['d.v', 'd.sigma', 'd.u'], "
        "of another shape ['b.v ((1, 7), not (1, 2))']"
    )
    with pytest.raises(sc.NamesError, match=re.escape(message)):
        sc.load_state_dict(state, arrays)
    with pytest.raises(sc.NamesError, match=r"missing \['a.v', 'a.sigma', 'b.v'"):
        sc.load_state_dict(state, {})


def test_select_and_merge_are_inverse(backend):
    weights, state = model(backend)
    newer = sc.iterate({"dense": weights["dense"]}, select(state, ["dense"]))
    assert newer.v.keys() == newer.u.keys() == newer.sigma.keys() == {"dense"}
    merged = merge(state, newer)
    assert list(merged.v) == list(state.v)
    assert merged.layouts == state.layouts
    for arrays in ("v", "u", "sigma"):
        assert getattr(merged, arrays)["dense"] is getattr(newer, arrays)["dense"]
        assert getattr(merged, arrays)["grouped"] is getattr(state, arrays)["grouped"]


# States of version 0.1.0, whose v has no axis of vectors when there is one vector

DATA = Path(__file__).parents[1] / "data"
OLD_SHAPES = {
    "conv": ((6, 3, 2, 2), "float32"),
    "grouped": ((4, 2, 3), "float32"),
    "out": ((5, 4), "float64"),
}
OLD_LAYOUTS = {"grouped": sc.Layout("(go)ik", groups=2)}


@pytest.mark.parametrize("n_iter", [0, 1])
@pytest.mark.parametrize(
    ("file", "n_vectors"),
    [
        ("state-0.1.0-numpy", 1),
        pytest.param("state-0.1.0-numpy-two-vectors", 2, marks=SLOW),
    ],
)
def test_state_of_version_0_1_0_continues_bit_for_bit(backend, file, n_vectors, n_iter):
    rng = np.random.default_rng(0)  # the model that the files were saved with
    weights = {
        name: backend.asarray(rng.standard_normal(shape), dtype)
        for name, (shape, dtype) in OLD_SHAPES.items()
    }
    grads = {name: backend.asarray(np.zeros(s), t) for name, (s, t) in OLD_SHAPES.items()}
    start = sc.init(weights, layouts=OLD_LAYOUTS, n_vectors=n_vectors)
    with np.load(DATA / f"{file}.npz") as saved:
        old = dict(saved)
    assert old["conv.v"].shape == ((12,) if n_vectors == 1 else (2, 12))
    loaded = sc.load_state_dict(start, old)
    for name in OLD_SHAPES:
        assert loaded.v[name].shape == start.v[name].shape
    new = {
        key: x.reshape(*x.shape[:-1], 1, -1) if n_vectors == 1 and key.endswith(".v") else x
        for key, x in old.items()
    }
    given = sc.load_state_dict(start, new)
    for key, x in backend.tree_to_numpy(sc.state_dict(loaded)).items():
        np.testing.assert_array_equal(x, new[key])

    one, one_state = sc.add_gradient(weights, grads, loaded, factor=0.3, n_iter=n_iter)
    other, other_state = sc.add_gradient(weights, grads, given, factor=0.3, n_iter=n_iter)
    one, other = one | sc.state_dict(one_state), other | sc.state_dict(other_state)
    assert one.keys() == other.keys()
    for key, x in other.items():
        np.testing.assert_array_equal(backend.to_numpy(one[key]), backend.to_numpy(x))


def test_sigma_of_version_0_1_0_is_that_of_its_vectors():
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s).astype(t) for n, (s, t) in OLD_SHAPES.items()}
    with np.load(DATA / "state-0.1.0-numpy.npz") as saved:
        state = sc.load_state_dict(sc.init(weights, layouts=OLD_LAYOUTS), saved)
    expected = sc.iterate(weights, sc.init(weights, seed=3, layouts=OLD_LAYOUTS), n_iter=2)
    for key, x in sc.state_dict(expected).items():
        np.testing.assert_allclose(sc.state_dict(state)[key], x, rtol=1e-5, atol=1e-6)


def test_v_of_another_rank_raises():
    own = {"w.v": np.ones((2, 4)) / 2, "x.v": np.ones((1, 4)) / 2}
    with pytest.raises(sc.NamesError, match=re.escape("w.v ((4,), not (2, 4))")):
        loaded_arrays(own, {"w.v": np.ones(4), "x.v": np.ones(4)})
    loaded_arrays({"x.v": own["x.v"]}, {"x.v": np.ones(4) / 2})
    assert like_own(np.arange(4), own["x.v"]).tolist() == [[0.0, 1.0, 2.0, 3.0]]


# Everything is checked before anything is loaded


def saved(**changes):
    """Return a state, and what it saved with changes to the entries of its second weight."""
    weights = {name: np.random.default_rng(0).standard_normal((4, 3)) for name in "abc"}
    state = sc.iterate(weights, sc.init(weights, n_vectors=2), n_iter=3)
    return state, sc.state_dict(state) | {f"b.{field}": x for field, x in changes.items()}


V = np.eye(3)[:2]
USELESS = {
    "zeros": V * 0,
    "a zero first row": V[::-1] * [[0], [1]],
    "NaN": np.where(V > 0, np.nan, V),
    "Inf": np.where(V > 0, -np.inf, V),
    "NaN in the second row": np.array([[1.0, 0, 0], [np.nan, 0, 0]]),
    "short": V * 1e-300,
    "long": V * 1e300,
    "not unit": V * 3,
}


@pytest.mark.parametrize("kind", USELESS)
def test_v_that_would_never_recover_is_refused(kind):
    state, arrays = saved(v=USELESS[kind])
    with pytest.raises(sc.ArgumentError, match=r"\['b.v'\] must be unit vectors"):
        sc.load_state_dict(state, arrays)


def test_zero_rows_after_the_first_are_loaded():
    state, arrays = saved(v=V * [[1], [0]])
    np.testing.assert_array_equal(sc.load_state_dict(state, arrays).v["b"], arrays["b.v"])


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_v_beyond_the_range_of_the_model_is_refused():
    weights = {"w": np.eye(3, dtype="float32")}
    state = sc.init(weights)
    arrays = sc.state_dict(state) | {"w.v": np.array([[1e300, 0, 0]])}
    with pytest.raises(sc.ArgumentError, match=r"'w\.v'"):
        sc.load_state_dict(state, arrays)


@pytest.mark.parametrize("field", ["v", "sigma", "u"])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.tolist(),
        lambda x: 1.0,
        lambda x: 1,
        lambda x: None,
        lambda x: "x",
        lambda x: x.astype(complex),
        lambda x: x.astype(int),
        lambda x: x > 0,
        lambda x: x.astype(object),
        lambda x: x.astype(str),
        lambda x: np.ma.masked_array(x),
        lambda x: pytest.importorskip("scipy.sparse").csr_array(np.ones((2, 3))),
    ],
    ids=[
        "list",
        "float",
        "int",
        "None",
        "str",
        "complex",
        "ints",
        "bools",
        "object",
        "strings",
        "masked",
        "sparse",
    ],
)
def test_entry_of_another_kind_is_named(field, change):
    state, arrays = saved()
    arrays[f"b.{field}"] = change(arrays[f"b.{field}"])
    with pytest.raises(sc.DTypeError, match=f"'b.{field}'"):
        sc.load_state_dict(state, arrays)


@on("torch-cpu")
def test_tensors_of_pytorch_are_checked_first(backend):
    import torch

    _, state = model(backend)
    whole = sc.state_dict(state)
    kinds = [
        (lambda x: x.to_sparse(), sc.DTypeError),
        (lambda x: x.to("meta"), sc.DeviceError),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), sc.DTypeError),
        (lambda x: x.to(torch.complex64), sc.DTypeError),
        (lambda x: x.bool(), sc.DTypeError),
        (lambda x: x * 0, sc.ArgumentError),
    ]
    for change, error in kinds:
        with pytest.raises(error, match=r"grouped\.v"):
            sc.load_state_dict(state, whole | {"grouped.v": change(whole["grouped.v"])})
        with pytest.raises(error, match=r"grouped\.v"):
            loaded_arrays(whole, whole | {"grouped.v": change(whole["grouped.v"])})


LIBRARIES = ("numpy", "torch-cpu", "jax-cpu", "array-api-strict")


@pytest.mark.parametrize("source", LIBRARIES)
@on(*LIBRARIES)
def test_state_of_one_library_loads_into_another(backend, source):
    _, state = model(backend, n_vectors=2)
    _, other = model(get(source), seed=1, n_vectors=2)
    loaded = sc.load_state_dict(state, sc.state_dict(other))
    for key, x in sc.state_dict(loaded).items():
        assert isinstance(x, type(sc.state_dict(state)[key]))
        expected = get(source).to_numpy(sc.state_dict(other)[key])
        np.testing.assert_array_equal(backend.to_numpy(x), expected)


@on("torch-cpu")
def test_tensors_that_numpy_cannot_view_load_into_numpy(backend):
    import torch

    _, state = model(get("numpy"))
    arrays = {key: torch.tensor(x) for key, x in sc.state_dict(state).items()}
    kinds = (torch.Tensor.requires_grad_, torch.Tensor.bfloat16, lambda x: x.neg().neg_())
    for change in kinds:
        loaded = sc.load_state_dict(state, {key: change(x) for key, x in arrays.items()})
        np.testing.assert_allclose(loaded.v["dense"], state.v["dense"], atol=1e-2)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.astype(x.dtype.newbyteorder(">")), lambda x: x[..., ::-1].copy()[..., ::-1]],
)
def test_arrays_in_another_order_of_memory_load(backend, change):
    _, state = model(backend)
    arrays = backend.tree_to_numpy(sc.state_dict(state))
    strange = {key: change(x) if x.ndim else x for key, x in arrays.items()}
    for key, x in sc.state_dict(sc.load_state_dict(state, strange)).items():
        np.testing.assert_array_equal(backend.to_numpy(x), arrays[key])


@pytest.mark.parametrize("arrays", [None, [1], 3, "state"])
def test_state_that_is_no_mapping_is_refused(arrays):
    state, _ = saved()
    with pytest.raises(sc.NamesError, match="a state is a mapping"):
        sc.load_state_dict(state, arrays)


def test_message_lists_ten_names_at_most():
    state = sc.init({f"w{i}": np.eye(2) for i in range(100)})
    with pytest.raises(sc.NamesError) as error:
        sc.load_state_dict(state, {f"x{i}": np.eye(2) for i in range(100)})
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("layout", ["oi", "io"])
def test_state_holds_arrays_on_every_path(layout):
    """A NumPy scalar has no address of its own: an engine would write into a temporary."""
    weights = {"w": np.random.default_rng(0).standard_normal((4, 3))}
    grads = {"w": np.zeros((4, 3))}
    state = sc.init(weights, layouts=layout)
    states = [state, sc.iterate(weights, state), sc.constrain(weights, state, bound=0.1)[1]]
    states += [sc.constrain(weights, state, normalize=True)[1]]
    states += [sc.add_gradient(weights, grads, state, n_iter=n)[1] for n in (0, 1)]
    states += [sc.add_gradient_(weights, grads, state, n_iter=n) for n in (0, 1)]
    states += [sc.add_gradient_(weights, grads, state, engines=())]
    states += [sc.constrain_(weights, state, bound=0.1)]
    scalars = {key: x if x.ndim else np.float64(x) for key, x in sc.state_dict(state).items()}
    states += [sc.load_state_dict(state, scalars)]
    for each in states:
        assert {type(x) for x in sc.state_dict(each).values()} == {np.ndarray}
