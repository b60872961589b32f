"""The compiled engine equals the reference, for every dtype, shape and division."""

import dataclasses
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import KINDS, gaussian, get, matrix
from spectral_core.engine import JobList, ReferenceEngine, Slope, dispatch, make_jobs

pytest.importorskip("numba", reason="Numba is not installed")


from spectral_core.numba import NUMPY, NumbaEngine
from spectral_core.numba import engine as numba_engine
from spectral_core.numba.division import GRAIN, Division, Stacks

BESIDE_BLAS = numba_engine._BESIDE_BLAS


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch):
    get("numpy")
    monkeypatch.setattr(numba_engine, "_BESIDE_BLAS", 2 * GRAIN)  # as for PyTorch


LAYOUTS = {"grouped": sc.Layout("(go)ihw", groups=4), "dense": "io", "stack": "soi"}
SHAPES = {
    "matrix": (13, 37),
    "row": (1, 9),
    "column": (9, 1),
    "conv": (6, 4, 3, 3),
    "grouped": (8, 2, 3, 3),
    "stack": (3, 5, 4),
    "dense": (5, 7),  # its matrix is the transposed tensor
    "big": (457, 301),  # several threads share it
}
VECTORS = ("v", "sigma", "u")


def model(dtype, shapes=SHAPES, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        {name: gaussian(rng, *shape, dtype=dtype) for name, shape in shapes.items()}
        for _ in range(2)
    )


def assert_same_step(weights, grads, state, engine=None, rtol=1e-12, **options):
    """Run both engines from the same state; return the state after the step."""
    mine, theirs = ({name: grad.copy("K") for name, grad in grads.items()} for _ in range(2))
    before = {field: {k: x.copy() for k, x in getattr(state, field).items()} for field in VECTORS}
    found = sc.add_gradient_(weights, mine, state, engines=[engine or NumbaEngine()], **options)
    expected = sc.add_gradient_(weights, theirs, state, engines=(), **options)
    for name in weights:
        np.testing.assert_allclose(mine[name], theirs[name], rtol, rtol, err_msg=name)
        for field in VECTORS:
            was, is_, should = (
                before[field][name],
                getattr(found, field)[name],
                getattr(expected, field)[name],
            )
            assert (is_.dtype, is_.shape) == (should.dtype, should.shape)
            np.testing.assert_allclose(is_, should, rtol, rtol, err_msg=f"{field} of {name}")
            np.testing.assert_array_equal(getattr(state, field)[name], was)  # unchanged
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128", "float16"])
@pytest.mark.parametrize("n_iter", [1, 3])
def test_engine_equals_the_reference(dtype, n_iter):
    weights, grads = model(dtype)
    state = sc.init(weights, layouts=LAYOUTS)
    rtol = {"float16": 2e-3, "float32": 2e-5}.get(dtype, 1e-12)
    factor = {"*": 0.3, "conv": 0.7, "matrix": np.asarray(0.2)}
    for _ in range(3):
        state = assert_same_step(weights, grads, state, rtol=rtol, factor=factor, n_iter=n_iter)
    again = assert_same_step(weights, grads, state, rtol=rtol, factor=factor, n_iter=0)
    assert all(np.array_equal(again.v[name], state.v[name]) for name in weights)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(list(KINDS)),
    st.sampled_from(["float32", "float64"]),
    st.integers(0, 2**32 - 1),
)
def test_engine_equals_the_reference_on_any_matrix(m, n, kind, dtype, seed):
    rng = np.random.default_rng(seed)
    weights, grads = {"w": matrix(rng, kind, m, n).astype(dtype)}, {"w": np.zeros((m, n), dtype)}
    rtol = 1e-4 if dtype == "float32" else 1e-10
    assert_same_step(weights, grads, sc.init(weights, seed=seed), rtol=rtol)


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([(), (3,)]),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([0.0, 0.4, 0.9, 3.0]),
    st.sampled_from([1, 2]),
    st.integers(0, 3),
    st.sampled_from([None, 0.0, np.nan, np.inf]),
    st.integers(0, 2**32 - 1),
)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_engine_has_the_slope_of_the_reference(
    m, n, stack, dtype, target, power, n_iter, special, seed
):
    """The matrices have σ₁ = 1 and 0.5, or are zero or not finite."""
    rng = np.random.default_rng(seed)
    shape = (*stack, m, n)
    W = np.stack([matrix(rng, "decaying", m, n) for _ in range(prod(stack))]).reshape(shape)
    weights = {"w": W.astype(dtype), "half": (W / 2).astype(dtype)}
    if special is not None:
        weights["w"][..., 0, 0] = special
        weights["zero"] = np.zeros((4, 3), dtype)
    grads = {name: rng.standard_normal(w.shape).astype(dtype) for name, w in weights.items()}
    layouts = {name: "soi"[-w.ndim :] for name, w in weights.items()}
    state = sc.init(weights, seed=seed, layouts=layouts)
    engine, jobs_run = NumbaEngine(), []
    counted = engine.run
    engine.run = lambda jobs, n_iter: jobs_run.extend(jobs) or counted(jobs, n_iter)
    options = {"factor": 0.3, "target": target, "power": power, "n_iter": n_iter}
    rtol = 2e-4 if dtype == "float32" else 1e-9
    assert_same_step(weights, grads, state, engine, rtol=rtol, **options)
    assert len(jobs_run) == len(weights)  # none went to the reference


def assert_same_block_step(weights, grads, state, rtol, fields=VECTORS, **options):
    """Run both engines from the same state, and compare σ, the terms and the first rows of V."""
    mine, theirs = ({name: grad.copy("K") for name, grad in grads.items()} for _ in range(2))
    before = {name: V.copy() for name, V in state.v.items()}
    engine, jobs_run = NumbaEngine(), []
    counted = engine.run
    engine.run = lambda jobs, n_iter: jobs_run.extend(jobs) or counted(jobs, n_iter)
    found = sc.add_gradient_(weights, mine, state, engines=[engine], **options)
    expected = sc.add_gradient_(weights, theirs, state, engines=(), **options)
    assert len(jobs_run) == len(weights)
    for name in weights:
        np.testing.assert_array_equal(state.v[name], before[name])
        assert found.v[name].shape == expected.v[name].shape
        np.testing.assert_allclose(found.sigma[name], expected.sigma[name], rtol, err_msg=name)
        if "u" in fields:
            rows = found.v[name][..., 0, :], expected.v[name][..., 0, :]
            np.testing.assert_allclose(*rows, rtol, rtol, err_msg=f"v of {name}")
            us = found.u[name], expected.u[name]
            np.testing.assert_allclose(*us, rtol, rtol, err_msg=f"u of {name}")
            np.testing.assert_allclose(mine[name], theirs[name], rtol, rtol, err_msg=name)
    return found


BLOCKS = {name: shape for name, shape in SHAPES.items() if name != "dense"}
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}


@pytest.mark.parametrize("k", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_several_vectors_equal_the_reference(dtype, k):
    weights, grads = model(dtype, BLOCKS)
    layouts = {name: layout for name, layout in LAYOUTS.items() if name in BLOCKS}
    state = sc.init(weights, layouts=layouts, n_vectors=k)
    options = {"factor": {"*": 0.3, "conv": 0.7}, "rtol": TOLERANCE[dtype]}
    for n_iter in (1, 3, 1, 0):
        state = assert_same_block_step(weights, grads, state, n_iter=n_iter, **options)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(2, 9),
    st.sampled_from(list(KINDS)),
    st.sampled_from(["float32", "float64"]),
    st.integers(0, 2**32 - 1),
)
def test_several_vectors_have_the_properties_of_the_reference(m, n, k, kind, dtype, seed):
    """σ is a lower bound that never falls, and V holds v and unit vectors orthogonal to it."""
    rng = np.random.default_rng(seed)
    weights = {"w": matrix(rng, kind, m, n).astype(dtype)}
    state, one = sc.init(weights, seed=seed, n_vectors=k), None
    close = TOLERANCE[dtype]
    bound = np.linalg.svd(weights["w"].astype("float64"), compute_uv=False)[0] * (1 + close)
    sigma = 0.0
    for _ in range(4):
        one = dataclasses.replace(
            state, v={"w": state.v["w"][:1]}, u={"w": state.u["w"]}, sigma=state.sigma
        )
        one = sc.iterate(weights, one)
        state = sc.iterate(weights, state, engines=[NumbaEngine()])
        assert max(sigma, one.sigma["w"]) * (1 - close) <= state.sigma["w"] <= bound
        sigma, V, u = state.sigma["w"], state.v["w"], state.u["w"]
        np.testing.assert_allclose(u @ weights["w"], sigma * V[0], atol=close * bound)
        lengths = np.linalg.norm(V, axis=1)
        assert np.all((abs(lengths - 1) < close) | (lengths == 0))
        np.testing.assert_allclose(V[1:] @ V[0], 0, atol=close)


@given(
    st.integers(2, 30),
    st.integers(2, 30),
    st.sampled_from([(), (3,)]),
    st.integers(2, 5),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([0.4, 3.0]),
    st.sampled_from([1, 2]),
    st.integers(0, 2**32 - 1),
)
def test_several_vectors_have_the_slope_of_the_reference(
    m, n, stack, k, dtype, target, power, seed
):
    rng = np.random.default_rng(seed)
    W = np.stack([matrix(rng, "decaying", m, n) for _ in range(prod(stack))])
    weights = {"w": W.reshape(*stack, m, n).astype(dtype), "zero": np.zeros((4, 3), dtype)}
    grads = {name: rng.standard_normal(w.shape).astype(dtype) for name, w in weights.items()}
    state = sc.init(
        weights, seed=seed, layouts={"w": "soi"[-W.ndim :]} if stack else {}, n_vectors=k
    )
    options = {"factor": 0.3, "target": target, "power": power}
    assert_same_block_step(weights, grads, state, 10 * TOLERANCE[dtype], n_iter=2, **options)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["close pair", "close cluster", "repeated", "decaying"])
def test_several_vectors_find_sigma_in_a_cluster_as_the_reference_does(kind, dtype):
    rng = np.random.default_rng(5)
    weights = {"w": matrix(rng, kind, 40, 30).astype(dtype)}
    found = expected = sc.init(weights, n_vectors=4)
    for _ in range(60):
        found = sc.iterate(weights, found, engines=[NumbaEngine()])
        expected = sc.iterate(weights, expected)
    rtol = {"float32": 1e-6, "float64": 1e-8}[dtype]
    np.testing.assert_allclose(found.sigma["w"], expected.sigma["w"], rtol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("k", [2, 4])
def test_rows_that_collapsed_recover(k, dtype):
    """After a matrix of rank one, the block follows the larger matrix that appears beside it."""
    first, second = np.zeros((12, 9), dtype), np.zeros((12, 9), dtype)
    first[0, 0] = 1.0
    second[0, 0], second[5, 4] = 1.0, 1.5
    state = sc.init({"w": first}, n_vectors=k)
    for W, sigma in ((first, 1.0), (second, 1.5)):
        state = sc.iterate({"w": W}, state, n_iter=60, engines=[NumbaEngine()])
        assert state.sigma["w"] == pytest.approx(sigma, rel=1e-5)


def test_owned_rows_are_written_in_place():
    weights, grads = model("float64", {"a": (4, 3), "b": (300, 500)})
    rows = {"a": 2, "b": 3}
    state = sc.init(weights)
    V = {
        name: sc.start_vector((k, weights[name].shape[1]), weights[name])
        for name, k in rows.items()
    }
    state = dataclasses.replace(state, v=V)
    jobs = JobList(
        make_jobs(weights, weights, state, grads=grads, factors=dict.fromkeys("ab", 0.1))
    )
    expected = sc.iterate(weights, state, n_iter=2)
    result = NumbaEngine(owned=True).run(jobs, 2)
    for triplet, name in zip(result.triplets, weights, strict=True):
        assert triplet.V is state.v[name]
        np.testing.assert_allclose(state.v[name][0], expected.v[name][0], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(state.u[name], expected.u[name], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(state.sigma[name], expected.sigma[name], rtol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 50])
def test_threads_share_a_block(rank):
    """A matrix of low rank is read again, by all threads."""
    rng = np.random.default_rng(1)
    W = rng.standard_normal((400, rank)) @ rng.standard_normal((rank, 700))
    weights = {"w": W, "small": W[:9, :7].copy(), "x": W.T.copy()}
    grads = {name: np.zeros_like(w) for name, w in weights.items()}
    state = sc.init(weights, n_vectors=4)
    for _ in range(3):
        state = assert_same_block_step(weights, grads, state, 1e-9, fields=())


def test_each_weight_has_its_own_slope():
    weights = {name: np.diag([3.0, 1.0]) for name in "abc"}
    grads = {name: np.zeros((2, 2)) for name in weights}
    state = sc.iterate(weights, sc.init(weights), n_iter=60)
    options = {"factor": 1.0, "target": {"a": 1.0, "b": np.asarray(4.0), "c": 0.0}}
    sc.add_gradient_(weights, grads, state, engines=[NumbaEngine()], **options)
    for name, force in (("a", 2.0), ("b", 0.0), ("c", 3.0)):
        np.testing.assert_allclose(grads[name], np.diag([force, 0.0]), atol=1e-7)


@pytest.mark.parametrize("accepted", [("a",), ("a", "b")], ids=str)
def test_job_list_gives_each_step_its_factors_and_gradients(accepted):
    """λ is kept between steps until the list announces other numbers; arrays are read each time."""
    weights = {"a": np.diag([3.0, 1.0]), "b": np.array([[2.0, 0.0], [1e-9, 1.0]])}
    if "b" not in accepted:
        weights["b"] = np.asfortranarray(weights["b"])  # goes to the reference
    state = sc.iterate(weights, sc.init(weights), n_iter=60)
    grads = {name: np.zeros((2, 2)) for name in weights}
    factors, array = dict.fromkeys(weights, 1.0), np.asarray(1.0)
    jobs = JobList(make_jobs(weights, weights, state, grads=grads, factors=factors))
    engines = [NumbaEngine(owned=True), ReferenceEngine(in_place=True)]

    def first_element():
        for job in jobs:
            job.grad = np.zeros((2, 2))
        dispatch(jobs, 1, engines)
        return jobs[0].grad[0, 0]

    assert first_element() == pytest.approx(3.0)
    jobs[0].factor = 2.0
    jobs.renew()
    assert first_element() == pytest.approx(6.0)
    assert first_element() == pytest.approx(6.0)
    jobs[0].factor = array
    jobs.renew()
    assert first_element() == pytest.approx(3.0)
    array[...] = 4.0
    assert first_element() == pytest.approx(12.0)
    jobs[0].rule = Slope(1.0, 2)
    jobs.renew()
    assert first_element() == pytest.approx(8.0)


def test_owned_results_are_written_in_place():
    weights, grads = model("float64", {"a": (4, 3), "b": (3, 5)})
    state = sc.init(weights)
    jobs = JobList(
        make_jobs(weights, weights, state, grads=grads, factors=dict.fromkeys("ab", 0.1))
    )
    expected = sc.iterate(weights, state, n_iter=2)
    result = NumbaEngine(owned=True).run(jobs, 2)
    for triplet, name in zip(result.triplets, weights, strict=True):
        assert triplet.V is state.v[name]
        assert triplet.u is state.u[name]
        assert triplet.sigma is state.sigma[name]
        np.testing.assert_allclose(state.v[name], expected.v[name], rtol=1e-12)
        np.testing.assert_allclose(state.sigma[name], expected.sigma[name], rtol=1e-12)


def test_sigma_converges_to_that_of_the_svd():
    weights, _ = model("float32", {"big": (257, 301)})
    state = sc.iterate(weights, sc.init(weights), n_iter=3000, engines=[NumbaEngine()])
    expected = np.linalg.svd(weights["big"].astype("float64"), compute_uv=False)[0]
    np.testing.assert_allclose(state.sigma["big"], expected, rtol=1e-6)


@given(
    dtype=st.sampled_from(["float32", "float64"]),
    bound=st.sampled_from([0.0, 0.3, 2.0, 1e6]),
    normalize=st.booleans(),
    n_iter=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_bounds_equal_the_reference(dtype, bound, normalize, n_iter, seed):
    weights, _ = model(dtype, seed=seed)
    weights["zero"] = np.zeros((3, 4), dtype)
    weights["nan"] = np.full((3, 4), np.nan, dtype)
    state = sc.init(weights, layouts=LAYOUTS)
    found, expected = ({name: w.copy() for name, w in weights.items()} for _ in range(2))
    options = {"bound": bound, "normalize": normalize, "n_iter": n_iter}
    mine = sc.constrain_(found, state, engines=[NumbaEngine()], **options)
    plain = sc.constrain_(expected, state, engines=(), **options)
    rtol = 1e-5 if dtype == "float32" else 1e-12
    for name in weights:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=rtol, err_msg=name)
        for field in VECTORS:
            pair = (getattr(s, field)[name] for s in (mine, plain))
            np.testing.assert_allclose(*pair, rtol=rtol, atol=rtol, err_msg=f"{field} of {name}")
        if (bound == 1e6 and not normalize) or name in ("zero", "nan"):
            np.testing.assert_array_equal(found[name], weights[name])


def in_channels_last(x):
    """Return the same array with axis 1 last in memory."""
    return np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)


@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_channels_last_equals_the_reference(dtype, n_iter):
    """A permutation of v in place of a copy of W: convolutions, in groups, zero, bounded."""
    shapes = {
        "conv": (6, 4, 3, 2),
        "cube": (5, 3, 2, 2, 3),
        "grouped": (8, 2, 3, 3),
        "big": (64, 64, 3, 3),
    }
    weights, grads = model(dtype, shapes)
    weights["zero"], grads["zero"] = np.zeros((2, 3, 4, 4), dtype), np.ones((2, 3, 4, 4), dtype)
    weights, grads = ({k: in_channels_last(x) for k, x in xs.items()} for xs in (weights, grads))
    assert not any(x.flags.c_contiguous for x in (*weights.values(), *grads.values()))
    layouts = {"grouped": LAYOUTS["grouped"]}
    state = sc.iterate(weights, sc.init(weights, layouts=layouts))
    engine = NumbaEngine()
    seen = Seen(engine)
    rtol = {"float32": 1e-5, "float64": 1e-12, "float16": 1e-3}[dtype]
    assert_same_step(weights, grads, state, seen, rtol=rtol, n_iter=n_iter, factor=0.3)
    assert seen.names == list(weights)
    if n_iter:
        mine, theirs = ({k: x.copy("K") for k, x in weights.items()} for _ in range(2))
        found = sc.constrain_(mine, state, bound=0.5, n_iter=n_iter, engines=[engine])
        expected = sc.constrain_(theirs, state, bound=0.5, n_iter=n_iter, engines=())
        for name in weights:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=rtol, atol=rtol)
            np.testing.assert_allclose(found.v[name], expected.v[name], rtol=rtol, atol=rtol)


def test_channels_last_of_one_alone_goes_to_the_reference():
    weights, grads = model("float32", {"conv": (6, 4, 3, 2)})
    state = sc.init(weights)
    for changed in (weights, grads):
        before = changed["conv"]
        changed["conv"] = in_channels_last(before)
        seen = Seen(NumbaEngine())
        assert_same_step(weights, grads, state, seen, rtol=1e-5)
        assert seen.names == []
        changed["conv"] = before


TURNED = {
    "io": ((7, 5), "io"),
    "big": ((700, 300), "io"),
    "flax": ((3, 2, 8, 6), "hwio"),
    "large flax": ((3, 3, 100, 200), "hwio"),
    "stack": ((3, 6, 5), "sio"),
    "rows first": ((4, 3, 2, 5), "ohwi"),
    "column": ((1, 6), "io"),
    "row": ((6, 1), "io"),
    "transposed convolution": ((5, 4, 3, 3), "iohw"),
    "large transposed convolution": ((100, 67, 3, 4), "iohw"),
    "in one channel": ((1, 3, 2), "iok"),
    "of one output": ((3, 1, 4), "iok"),
    "at one position": ((5, 4, 1, 1), "iohw"),
    "in groups": ((8, 3, 2, 2), sc.Layout("(gi)ohw", groups=2)),
    "flax in groups": ((3, 2, 5, 12), sc.Layout("hwi(go)", groups=3)),
    "each channel alone": ((3, 3, 1, 40), sc.Layout("hwi(go)", groups=40)),
    "heads": ((50, 4, 80), "iso"),
    "large flax in groups": ((3, 3, 60, 300), sc.Layout("hwi(go)", groups=3)),
}


# Depthwise convolutions and other stacks of small matrices: name: layout and shape.
SMALL_STACKS = {
    "depthwise": (sc.Layout("(go)ihw", groups=40), (40, 1, 3, 3)),
    "flax": (sc.Layout("hwi(go)", groups=20), (3, 2, 1, 40)),
    "grouped": (sc.Layout("(go)ihw", groups=16), (32, 2, 2, 2)),
    "rows": ("soi", (33, 4, 5)),
    "dense": ("sio", (17, 3, 2)),
    "heads": ("iso", (4, 16, 3)),
    "experts": ("ssio", (4, 5, 2, 6)),
}


def small_stacks(dtype, value=None):
    shapes = {name: shape for name, (_, shape) in SMALL_STACKS.items()}
    weights, grads = model(dtype, shapes)
    if value is not None:
        for weight in weights.values():
            weight[-1] = value
    return weights, grads, {name: layout for name, (layout, _) in SMALL_STACKS.items()}


def counted_stacks(monkeypatch):
    """Return a list that gets the shapes of each new table of small stacks."""
    made, new = [], Stacks.__init__
    monkeypatch.setattr(
        Stacks, "__init__", lambda self, *args: made.append(args) or new(self, *args)
    )
    return made


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_small_matrices_of_a_stack_equal_the_reference(dtype, monkeypatch):
    weights, grads, layouts = small_stacks(dtype)
    made = counted_stacks(monkeypatch)
    state, engine = sc.init(weights, layouts=layouts), NumbaEngine()
    rtol = {"float16": 2e-3, "float32": 2e-5}.get(dtype, 1e-12)
    factor = {"*": 0.3, "flax": 0.7}
    for n_iter, target in ((1, 0.0), (3, 0.5), (0, 0.5)):
        options = {"factor": factor, "n_iter": n_iter, "target": target, "rtol": rtol}
        state = assert_same_step(weights, grads, state, engine, **options)
    ((_, shapes, _),) = made  # one launch has them all, in each step
    assert len(shapes) == len(weights)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_a_small_matrix_that_has_no_direction_changes_no_other(value):
    weights, grads, layouts = small_stacks("float32", value)
    state = sc.init(weights, layouts=layouts)
    assert_same_step(weights, grads, state, rtol=2e-5, factor=0.3, n_iter=2)
    before = state.v["depthwise"][-1].copy()
    state = sc.iterate(weights, state, engines=[NumbaEngine()])
    np.testing.assert_array_equal(state.v["depthwise"][-1], before)


@pytest.mark.parametrize(("bound", "normalize"), [(0.7, False), (0.7, True), (1e6, False)])
def test_bounds_of_small_matrices_equal_the_reference(bound, normalize):
    weights, _, layouts = small_stacks("float32")
    state = sc.init(weights, layouts=layouts)
    mine, theirs = ({name: w.copy() for name, w in weights.items()} for _ in range(2))
    options = {"bound": bound, "normalize": normalize}
    found = sc.constrain_(mine, state, engines=[NumbaEngine()], **options)
    expected = sc.constrain_(theirs, state, engines=(), **options)
    for name in weights:
        np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.sigma[name], expected.sigma[name], rtol=1e-5)
        if bound == 1e6:
            np.testing.assert_array_equal(mine[name], weights[name])


@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_transposed_matrices_equal_the_reference(dtype, n_iter):
    """Outputs last in memory, as in Flax: zero, not finite, in several threads, bounded."""
    shapes = {name: shape for name, (shape, _) in TURNED.items()}
    layouts = {name: layout for name, (_, layout) in TURNED.items()}
    weights, grads = model(dtype, shapes)
    weights["zero"], grads["zero"] = np.zeros((2, 3), dtype), np.ones((2, 3), dtype)
    layouts["zero"] = "io"
    state = sc.iterate(weights, sc.init(weights, layouts=layouts))
    seen = Seen(NumbaEngine())
    rtol = {"float32": 2e-5, "float64": 1e-11, "float16": 2e-3}[dtype]
    assert_same_step(weights, grads, state, seen, rtol=rtol, n_iter=n_iter, factor=0.3)
    assert seen.names == list(weights)
    if n_iter:
        mine, theirs = ({k: x.copy() for k, x in weights.items()} for _ in range(2))
        found = sc.constrain_(mine, state, bound=0.5, n_iter=n_iter, engines=[NumbaEngine()])
        expected = sc.constrain_(theirs, state, bound=0.5, n_iter=n_iter, engines=())
        for name in weights:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=rtol, atol=rtol)
            np.testing.assert_allclose(found.v[name], expected.v[name], rtol=rtol, atol=rtol)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_a_transposed_matrix_that_is_not_finite_keeps_its_v():
    weights = {"nan": np.full((3, 4), np.nan), "good": np.diag([3.0, 1.0])}
    grads = {name: np.zeros_like(w) for name, w in weights.items()}
    state = sc.init(weights, layouts="io")
    found = sc.add_gradient_(weights, grads, state, n_iter=2, engines=[NumbaEngine()])
    np.testing.assert_array_equal(found.v["nan"], state.v["nan"])
    assert np.isnan(found.sigma["nan"])
    assert np.isnan(grads["nan"]).all()
    assert np.isfinite(grads["good"]).all()


@pytest.mark.parametrize("k", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_several_vectors_of_other_orders_equal_the_reference(dtype, k):
    """Outputs last or between, channels last, groups: in one thread and in several."""
    shapes = {name: shape for name, (shape, _) in TURNED.items()} | BLOCKS
    layouts = {name: layout for name, (_, layout) in TURNED.items()}
    layouts |= {name: layout for name, layout in LAYOUTS.items() if name in BLOCKS}
    weights, grads = model(dtype, shapes)
    for name in ("conv", "grouped"):
        weights[name], grads[name] = in_channels_last(weights[name]), in_channels_last(grads[name])
    state = sc.init(weights, layouts=layouts, n_vectors=k)
    options = {"factor": {"*": 0.3, "conv": 0.7}, "rtol": 2 * TOLERANCE[dtype]}
    for n_iter in (1, 3, 1, 0):
        state = assert_same_block_step(weights, grads, state, n_iter=n_iter, **options)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 6),
    st.sampled_from(["kio", "iok", "oki", "i(go)", "kiso", "siok"]),
    st.integers(2, 9),
    st.integers(0, 2**32 - 1),
)
def test_several_vectors_of_any_order_have_the_sigma_of_the_svd(m, n, window, axes, k, seed):
    rng = np.random.default_rng(seed)
    sizes = {"o": m, "i": n, "k": window, "s": 3, "(go)": 2 * m}
    tokens = ["i", "(go)"] if "(" in axes else [*axes]
    layout = sc.Layout(axes, groups=2 if "(" in axes else 1)
    weights = {"w": rng.standard_normal([sizes[token] for token in tokens])}
    state = sc.init(weights, layouts=layout, n_vectors=k, seed=seed)
    seen = Seen(NumbaEngine())
    state = sc.iterate(weights, state, n_iter=300, engines=[seen])
    assert seen.names == ["w"]
    matrices = sc.as_matrix(weights["w"], layout)
    found = np.linalg.svd(matrices, compute_uv=False)[..., 0]
    assert np.all(state.sigma["w"] <= found * (1 + 1e-9))
    np.testing.assert_allclose(state.sigma["w"], found, rtol=1e-2)
    V = state.v["w"]
    product = np.einsum("...mn,...m->...n", matrices, state.u["w"])
    np.testing.assert_allclose(product, state.sigma["w"][..., None] * V[..., 0, :], atol=1e-9)


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.parametrize("axes", ["kio", "iok", "oki"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_several_vectors_of_other_orders_stay_where_sigma_is_zero_or_not_finite(axes, value):
    weights = {"w": np.full((3, 4, 2), value, "float32")}
    grads = {"w": np.ones((3, 4, 2), "float32")}
    state = sc.init(weights, layouts=axes, n_vectors=3)
    after = sc.add_gradient_(weights, grads, state, n_iter=2, engines=[NumbaEngine()])
    np.testing.assert_array_equal(after.v["w"], state.v["w"])


class Seen:
    """An engine that notes which weights it accepted."""

    in_place = True

    def __init__(self, engine):
        self.engine, self.names = engine, []

    def accepts(self, job):
        accepted = self.engine.accepts(job)
        self.names += [job.name] * accepted
        return accepted

    def run(self, jobs, n_iter):
        return self.engine.run(jobs, n_iter)


@pytest.mark.parametrize("native", [True, False])
def test_float16_is_converted_as_numpy_does(native):
    """Every float16, and float32 between them, on them, beside them, too large and too small."""
    from numba import njit

    from spectral_core.numba import kernels

    if native and not kernels.CONVERTS_HALF:
        pytest.skip("this processor does not convert float16")
    of = kernels._half_to_float if native else kernels._of_half
    to = kernels._float_to_half if native else kernels._to_half

    @njit
    def convert(halves, singles):
        for i in range(halves.size):
            singles[i] = of(halves[i])

    @njit
    def round_all(singles, halves):
        for i in range(halves.size):
            halves[i] = to(np.float32(singles[i]))

    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    found = np.empty(65536, np.float32)
    convert(halves.view(np.int16), found)
    np.testing.assert_array_equal(found, halves.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(found), np.signbit(halves))
    exact = np.unique(found[np.isfinite(found)])
    between = (exact[1:] + exact[:-1]) / 2
    near = [np.nextafter(x, np.float32(y)) for x in (exact, between) for y in (-9e9, 9e9)]
    random = np.random.default_rng(0).integers(0, 2**32, 10**5).astype(np.uint32).view(np.float32)
    singles = np.concatenate([found, exact, between, *near, random]).astype(np.float32)
    rounded = np.empty(singles.size, np.int16)
    round_all(singles, rounded)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(rounded.view(np.float16), singles.astype(np.float16))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 3e38])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(("n_vectors", "n_iter"), [(1, 1), (3, 2)])
def test_zero_and_non_finite_weights_keep_v(n_vectors, n_iter, value):
    weights = {"w": np.full((7, 5), value, "float32"), "good": np.ones((3, 4), "float32")}
    grads = {name: np.ones_like(weight) for name, weight in weights.items()}
    state = sc.init(weights, n_vectors=n_vectors)
    after = sc.add_gradient_(weights, grads, state, n_iter=n_iter, engines=[NumbaEngine()])
    np.testing.assert_array_equal(after.v["w"], state.v["w"])  # kept for the next step
    if value == 0:
        assert after.sigma["w"] == 0
        np.testing.assert_array_equal(grads["w"], 1)
        np.testing.assert_array_equal(after.u["w"], 0)
    else:
        assert not np.isfinite(after.sigma["w"])
        assert not np.isfinite(grads["w"]).any()
    np.testing.assert_allclose(grads["good"], 1 + 0.01, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-17, 1e-9, 1e9, 1e18])
@pytest.mark.parametrize("n_vectors", [1, 4])
def test_sigma_is_right_at_the_ends_of_the_float32_range(n_vectors, scale):
    W = matrix(np.random.default_rng(0), "decaying", 8, 6)
    weights = {"w": (W * scale).astype("float32")}
    state = sc.init(weights, n_vectors=n_vectors)
    state = sc.iterate(weights, state, n_iter=20, engines=[NumbaEngine()])
    np.testing.assert_allclose(state.sigma["w"], scale, rtol=1e-5)


def test_non_contiguous_arrays_go_to_the_reference():
    rng = np.random.default_rng(0)
    weights = {"t": rng.standard_normal((9, 5)).T, "every second": np.zeros((4, 12))[:, ::2] + 1}
    grads = {"t": np.zeros((5, 9)), "every second": np.zeros((8, 6))[::2]}
    assert_same_step(weights, grads, sc.init(weights))
    grads = {name: np.asfortranarray(grad) for name, grad in grads.items()}
    weights = {name: np.ascontiguousarray(weight) for name, weight in weights.items()}
    assert_same_step(weights, grads, sc.init(weights))


def test_non_contiguous_vectors_give_the_same_step():
    weights, grads = model("float64", {"stack": (3, 5, 4), "w": (6, 8)})
    state = sc.init(weights, layouts={"stack": "soi"})
    strange = {
        field: {"stack": np.asfortranarray(getattr(state, field)["stack"])} for field in ("v", "u")
    }
    spaced = np.zeros(16)
    spaced[::2] = state.v["w"][0]
    state = dataclasses.replace(
        state,
        v={**strange["v"], "w": spaced[None, ::2]},
        u={**strange["u"], "w": state.u["w"].astype("float32")},
    )
    assert_same_step(weights, grads, state)
    assert_same_step(weights, grads, state, n_iter=0, rtol=1e-6)


def test_gradient_of_another_dtype_goes_to_the_reference():
    weights, _ = model("float32", {"w": (6, 4)})
    assert_same_step(weights, {"w": np.zeros((6, 4))}, sc.init(weights), rtol=1e-6)


def test_one_engine_serves_changing_weights():
    engine = NumbaEngine()
    for shapes in ({"a": (5, 4)}, {"a": (5, 4), "b": (3, 3)}, {"a": (4, 5)}, {"b": (3, 3)}):
        weights, grads = model("float64", shapes, seed=len(shapes))
        state = sc.init(weights)
        for _ in range(2):  # other arrays of the same shapes too
            weights = {name: weight.copy() for name, weight in weights.items()}
            state = assert_same_step(weights, grads, state, engine=engine)


def test_missing_gradient_leaves_its_weight_out():
    weights, grads = model("float64")
    state = sc.init(weights, layouts=LAYOUTS)
    after = sc.add_gradient_(weights, {**grads, "conv": None}, state, engines=[NumbaEngine()])
    assert after.v["conv"] is state.v["conv"]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 900)), min_size=1, max_size=9))
def test_rows_are_divided_evenly_and_once(threads, shapes):
    division = Division("float32", shapes, threads)
    elements = np.zeros(len(division.parts) - 1)
    rows = [[] for _ in shapes]
    assert division.parts[0] == 0
    assert division.parts[-1] == len(division.chunks)
    for t in range(len(elements)):
        for k, first, end, place in division.chunks[division.parts[t] : division.parts[t + 1]]:
            rows[k] += range(first, end)
            elements[t] += (end - first) * shapes[k][1]
            assert place + shapes[k][1] <= division.scratch.size
    assert rows == [list(range(m)) for m, _ in shapes]
    row = max(n for _, n in shapes)
    assert elements.max() <= sum(m * n for m, n in shapes) / len(elements) + row


def test_engine_allocates_no_matrix():
    weights, grads = model("float32", {"w": (1500, 1400)})
    state, engine = sc.init(weights), NumbaEngine()
    sc.add_gradient_(weights, grads, state, engines=[engine])  # compiled, and scratch made
    tracemalloc.start()
    sc.add_gradient_(weights, grads, state, engines=[engine])
    sc.add_gradient_(weights, grads, state, engines=[NumbaEngine()])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * (1500 + 1400) * 4 < weights["w"].nbytes / 30


def test_overlapping_gradients_get_every_term():
    weights, _ = model("float32", {"a": (600, 500), "b": (600, 500), "c": (300, 500)})
    state = sc.init(weights)
    grads = []
    for engines in ([NumbaEngine()], ()):
        grad = np.zeros((600, 500), "float32")
        shared = {"a": grad, "b": grad, "c": grad[100:400]}
        sc.add_gradient_(weights, shared, state, factor=1.0, engines=engines)
        grads.append(grad)
    np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-6)


def test_vectors_of_another_size_raise():
    weights, grads = model("float64", {"w": (500, 30)})
    state = dataclasses.replace(sc.init(weights), u={"w": np.zeros(5)})
    for engines in ([NumbaEngine()], []):
        with pytest.raises(sc.ShapeError, match=r"needs a u of shape \(500,\), but .* has \(5,\)"):
            sc.add_gradient_(weights, grads, state, engines=engines)


@pytest.mark.parametrize("engine", [NumbaEngine(), ReferenceEngine(in_place=True)])
def test_pure_function_refuses_an_engine_in_place(engine):
    weights, grads = model("float64")
    with pytest.raises(sc.ArgumentError, match="pass it to add_gradient_"):
        sc.add_gradient(weights, grads, sc.init(weights), engines=[engine])


def test_no_iteration_without_u_raises():
    weights, grads = model("float64", {"w": (6, 4)})
    state = dataclasses.replace(sc.init(weights), u={})
    with pytest.raises(sc.ArgumentError, match="holds no u of 'w'"):
        sc.add_gradient_(weights, grads, state, n_iter=0, engines=[NumbaEngine()])


def test_callers_threads_take_turns():
    weights, grads = model("float64", {"w": (600, 500), "x": (30, 20)})
    state, engine = sc.init(weights), NumbaEngine()
    expected, _ = sc.add_gradient(weights, grads, state, factor=1.0)

    def work(_):
        mine = {name: grad.copy() for name, grad in grads.items()}
        sc.add_gradient_(weights, mine, state, factor=1.0, engines=[engine])
        return max(float(np.abs(mine[name] - expected[name]).max()) for name in mine)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(60))) < 1e-10


def test_a_small_step_starts_no_threads():
    code = """
import numpy as np, spectral_core as sc
from spectral_core.numba import NumbaEngine
from numba.np.ufunc import parallel
w = {"w": np.ones((6, 6))}
sc.add_gradient_(w, {"w": np.zeros((6, 6))}, sc.init(w), engines=[NumbaEngine()])
print(parallel._is_initialized)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(sc.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_numpy_has_one_thread_for_a_step_that_blas_would_delay(monkeypatch):
    monkeypatch.setattr(numba_engine, "_BESIDE_BLAS", BESIDE_BLAS)
    asked = []
    most = NUMPY._replace(threads=lambda: asked.append(1) or 2)
    weights = {"w": np.ones((1024, 1024), "float32")}
    jobs = make_jobs(weights, weights, sc.init(weights))
    for memory, threads in (
        (most, 1),
        (most._replace(worth_threads=lambda: 0), min(2, numba_engine._kernels().threads(2))),
    ):
        found = NumbaEngine(memory)._launches([dataclasses.replace(j) for j in jobs])
        assert [launch.division.threads for launch in found] == [threads]


def test_kernels_compile_each_time_where_nothing_can_be_cached(monkeypatch):
    kernels, cached = NumbaEngine()._kernels, []

    def njit(*, cache=False, **options):
        cached.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(kernels, "njit", njit)
    assert kernels._compiled(len) is len
    assert kernels._compiled(parallel=True)(len) is len
    assert cached == [True, False, True, False]


def test_number_of_threads_is_restored():
    import numba

    before = numba.get_num_threads()
    weights, grads = model("float32")
    one = NUMPY._replace(threads=lambda: 1)
    sc.add_gradient_(weights, grads, sc.init(weights), engines=[NumbaEngine(one)])
    assert numba.get_num_threads() == before


def test_missing_numba_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "spectral_core.numba.kernels", None)
    monkeypatch.delattr("spectral_core.numba.kernels", raising=False)
    with pytest.raises(ImportError, match=r"pip install spectral-core\[numba\]"):
        NumbaEngine()


# Processes

PRELUDE = """
import os, sys, signal
import numpy as np, spectral_core as sc
import spectral_core.numba.engine
spectral_core.numba.engine._BESIDE_BLAS = 0  # several threads for a small matrix
rng = np.random.default_rng(0)
w = {"big": rng.standard_normal((700, 600)), "small": rng.standard_normal((6, 5))}
state = sc.init(w)
def step(engines=None):
    grads = {name: np.zeros_like(x) for name, x in w.items()}
    after = sc.add_gradient_(w, grads, state, factor=1.0, engines=engines)
    return np.concatenate([*(g.ravel() for g in grads.values()), after.sigma["big"].ravel()])
def right(engines=None):
    return np.allclose(step(engines), step(()), atol=1e-10)
def in_child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        os._exit(0 if work() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run_python(code, **environment):
    root = str(Path(sc.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "NUMBA_NUM_THREADS": "3", **environment}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


@needs_fork
def test_child_that_is_forked_after_the_compiled_step_works():
    code = """
from spectral_core.numba import NumbaEngine
mine = [NumbaEngine()]
print(right(), right(mine))
import numba
assert numba.get_num_threads() > 1
print(in_child(right), in_child(lambda: right(mine)), in_child(lambda: in_child(right) == 0))
print(right(), right(mine))
"""
    assert run_python(code) == ["True", "True", "0", "0", "0", "True", "True"]


@needs_fork
@pytest.mark.thorough
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_child_of_each_threading_layer_works(layer):
    code = """
print(right())
print(in_child(right), in_child(lambda: in_child(right) == 0))
"""
    assert run_python(code, NUMBA_THREADING_LAYER=layer) == ["True", "0", "0"]


@needs_fork
@pytest.mark.thorough
def test_child_that_is_forked_before_or_while_a_step_runs_works():
    """The thread that holds the engine's lock does not exist in the child."""
    code = """
print(in_child(right), right())  # before anything was compiled here
from threading import Thread
going = True
def work():
    while going:
        step()
thread = Thread(target=work)
thread.start()
print(*[in_child(right) for _ in range(5)])
going = False
thread.join()
print(right())
"""
    assert run_python(code) == ["0", "True", *"00000", "True"]


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=needs_fork)])
def test_pool_of_processes_works(method, tmp_path):
    (tmp_path / "jobs_of_a_pool.py").write_text(PRELUDE + "def job(_): return right()\n")
    code = f"""
import multiprocessing
sys.path.insert(0, {str(tmp_path)!r})
from jobs_of_a_pool import job
if __name__ == "__main__":
    print(job(0))
    with multiprocessing.get_context({method!r}).Pool(2) as pool:
        print(*pool.map(job, range(4)))
"""
    assert run_python(code) == ["True"] * 5


def test_numba_that_does_not_compile_leaves_all_to_the_reference():
    code = """
from spectral_core.numba import NumbaEngine
print(right(), right([NumbaEngine()]), np.array_equal(step([NumbaEngine(owned=True)]), step(())))
"""
    assert run_python(code, NUMBA_DISABLE_JIT="1") == ["True", "True", "True"]


def test_broken_numba_warns_once_and_leaves_all_to_the_reference(tmp_path):
    (tmp_path / "numba.py").write_text("raise AttributeError('np.long is gone')")
    code = f"""
import warnings
sys.path.insert(0, {str(tmp_path)!r})
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    print(right(), right())
print(len(found), found[0].category.__name__, "np.long" in str(found[0].message))
"""
    assert run_python(code) == ["True", "True", "1", "SpectralWarning", "True"]


# The default


@pytest.mark.parametrize("engines", ["default", "none"])
def test_numpy_uses_the_compiled_step_without_being_asked(monkeypatch, engines):
    ran = []
    run = NumbaEngine.run
    monkeypatch.setattr(NumbaEngine, "run", lambda *a: ran.append(a) or run(*a))
    weights, grads = model("float64")
    options = {} if engines == "default" else {"engines": ()}
    sc.add_gradient_(weights, grads, sc.init(weights, layouts=LAYOUTS), **options)
    assert bool(ran) == (engines == "default")
    sc.add_gradient_(weights, dict.fromkeys(weights), sc.init(weights, layouts=LAYOUTS))
    assert len(ran) == (engines == "default")


def test_callers_threads_share_the_default_engine():
    weights, grads = model("float64", {"w": (600, 500), "x": (30, 20)})
    state = sc.init(weights)
    expected, _ = sc.add_gradient(weights, grads, state, factor=1.0)

    def work(_):
        mine = {name: grad.copy() for name, grad in grads.items()}
        sc.add_gradient_(weights, mine, state, factor=1.0)
        return max(float(np.abs(mine[name] - expected[name]).max()) for name in mine)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(40))) < 1e-10


# What an engine writes into


@pytest.mark.parametrize("field", VECTORS)
@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: np.broadcast_to(x, x.shape),  # read-only
        lambda x: np.float64(x) if x.ndim == 0 else x[..., ::-1],
        lambda x: x.astype(">f8"),
    ],
    ids=["read-only", "scalar", "big-endian"],
)
def test_engine_writes_into_arrays_alone(field, owned, change):
    """A state from elsewhere may hold scalars, whose memory is gone after the call."""
    weights, grads = model("float64", {"a": (6, 5), "b": (4, 3)})
    state = sc.iterate(weights, sc.init(weights))
    changed = {name: change(x) for name, x in getattr(state, field).items()}
    state = dataclasses.replace(state, **{field: changed})
    before = {name: np.array(x) for name, x in changed.items()}
    expected, after = sc.add_gradient(weights, grads, state, factor=1.0, n_iter=0)
    engine = NumbaEngine(owned=owned)
    found = sc.add_gradient_(weights, grads, state, factor=1.0, n_iter=0, engines=[engine])
    for name in weights:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-12)
        np.testing.assert_allclose(found.sigma[name], after.sigma[name], rtol=1e-12)
        np.testing.assert_array_equal(getattr(state, field)[name], before[name])


def test_state_of_constrain_serves_an_engine_that_owns_its_vectors():
    weights = {name: gaussian(np.random.default_rng(i), 6, 5) for i, name in enumerate("ab")}
    for engines in ([NumbaEngine(owned=True)], [NumbaEngine()], ()):
        _, state = sc.constrain(weights, sc.init(weights), bound=0.5)
        grads = {name: np.zeros((6, 5)) for name in weights}
        state = sc.add_gradient_(weights, grads, state, factor=1.0, engines=engines)
        for name in weights:
            assert np.linalg.norm(grads[name]) == pytest.approx(float(state.sigma[name]))


def test_gradient_that_is_read_only_is_not_accepted():
    weights, grads = model("float64", {"w": (6, 5)})
    state = sc.init(weights)
    grads["w"].flags.writeable = False
    (job,) = make_jobs(weights, weights, state, grads=grads, factors={"w": 1.0})
    assert not NumbaEngine().accepts(job)
