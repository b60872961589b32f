"""Test that NumPy's own engine equals the reference."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from models import LAYOUTS, assert_close, model
from spectral_core._host import HostEngine
from spectral_core.engine import (
    AT_MOST,
    EXACTLY,
    Bound,
    ReferenceEngine,
    Slope,
    dispatch,
    make_jobs,
)


class Counting(HostEngine):
    """Count the jobs that are run."""

    ran = 0

    def run(self, jobs, n_iter):
        self.ran += len(jobs)
        return super().run(jobs, n_iter)


def assert_same_step(weights, grads, state, *, rtol, **options):
    mine, theirs = ({name: grad.copy() for name, grad in grads.items()} for _ in range(2))
    engine = Counting()
    found = sc.add_gradient_(weights, mine, state, engines=[engine], **options)
    expected = sc.add_gradient_(weights, theirs, state, engines=(), **options)
    assert_close(mine, theirs, rtol=rtol)
    for field in ("v", "sigma", "u"):
        assert_close(getattr(found, field), getattr(expected, field), rtol=rtol)
        for name in weights:
            one, other = getattr(found, field)[name], getattr(expected, field)[name]
            assert (type(one), one.dtype, one.shape) == (type(other), other.dtype, other.shape)
    return found, engine.ran


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128", "float16"])
@pytest.mark.parametrize("n_iter", [1, 3])
def test_equals_the_reference(dtype, n_iter):
    weights, grads = model(dtype)
    state = sc.init(weights, layouts=LAYOUTS)
    rtol = {"float32": 2e-5, "float16": 2e-3}.get(dtype, 1e-12)
    for _ in range(2):
        options = {"rtol": rtol, "factor": {"*": 0.3, "conv": 0.7}, "n_iter": n_iter}
        state, ran = assert_same_step(weights, grads, state, **options)
        assert (ran > 0) == (dtype in ("float32", "float64"))
    assert_same_step(weights, grads, state, rtol=rtol, n_iter=0, target=0.5)


@pytest.mark.parametrize("layouts", [{"a": "io", "b": "hwio"}, {"a": "oi", "b": "iohw"}])
def test_any_layout_equals_the_reference(layouts):
    rng = np.random.default_rng(0)
    weights = {"a": rng.standard_normal((7, 5)), "b": rng.standard_normal((3, 2, 4, 5))}
    grads = {name: np.zeros_like(w) for name, w in weights.items()}
    state = sc.init(weights, layouts=layouts)
    _, ran = assert_same_step(weights, grads, state, rtol=1e-12, n_iter=2)
    assert ran == 2


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide) encountered:RuntimeWarning")
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([0.0, 0.9, 3.0]),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 0.0, np.nan, np.inf]),
    st.integers(0, 2**32 - 1),
)
def test_slopes_and_special_numbers_equal_the_reference(m, n, dtype, target, power, special, seed):
    rng = np.random.default_rng(seed)
    weights = {"w": rng.standard_normal((m, n)).astype(dtype), "zero": np.zeros((2, 3), dtype)}
    if special is not None:
        weights["w"][0, 0] = special
    grads = {name: rng.standard_normal(w.shape).astype(dtype) for name, w in weights.items()}
    state = sc.init(weights, seed=seed)
    rtol = 2e-4 if dtype == "float32" else 1e-9
    _, ran = assert_same_step(weights, grads, state, rtol=rtol, target=target, power=power)
    assert ran == 2


@pytest.mark.parametrize("bound", [Bound(0.5, AT_MOST), Bound(9.0, EXACTLY), Bound(1e6, AT_MOST)])
def test_bounds_equal_the_reference(bound):
    weights = {"w": np.diag([3.0, 1.0]), "conv": np.ones((4, 3, 2, 2))}
    state, found = sc.init(weights), []
    for engines in ([Counting()], []):
        mine = {name: w.copy() for name, w in weights.items()}
        jobs = make_jobs(mine, mine, state, grads=mine, rules=dict.fromkeys(mine, bound))
        found.append(dispatch(jobs, 2, [*engines, ReferenceEngine(in_place=True)]))
        assert not engines or engines[0].ran == 2
    for one, other in zip(found[0].grads, found[1].grads, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    for one, other in zip(found[0].triplets, found[1].triplets, strict=True):
        np.testing.assert_allclose(one.sigma, other.sigma, rtol=1e-12)


def test_large_gradients_are_changed_by_blocks():
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((300, 701)), "t": rng.standard_normal((90, 900)).T}
    grads = {name: np.zeros_like(w) for name, w in weights.items()}
    _, ran = assert_same_step(weights, grads, sc.init(weights), rtol=1e-10)
    assert ran == 2


def test_state_of_before_does_not_change():
    weights = {"w": np.diag([3.0, 1.0])}
    grads = {"w": np.zeros((2, 2))}
    state = sc.init(weights)
    kept = {name: getattr(state, name)["w"].copy() for name in ("v", "sigma", "u")}
    after = sc.add_gradient_(weights, grads, state, engines=[HostEngine()])
    for name, value in kept.items():
        np.testing.assert_array_equal(getattr(state, name)["w"], value)
        assert not np.shares_memory(getattr(after, name)["w"], getattr(state, name)["w"])


def test_jobs_without_a_gradient_are_iterated():
    weights = {"w": np.diag([3.0, 1.0])}
    state = sc.init(weights)
    assert_close(
        sc.iterate(weights, state, n_iter=5, engines=[HostEngine()]).v,
        sc.iterate(weights, state, n_iter=5).v,
    )


def test_several_vectors_and_stacks_are_not_accepted():
    weights = {"w": np.ones((3, 4, 5)), "m": np.ones((4, 5))}
    state = sc.init(weights, layouts={"w": "soi"}, n_vectors=2)
    assert not any(map(HostEngine().accepts, make_jobs(weights, weights, state)))
    one = sc.init(weights, layouts={"w": "soi"})
    accepted = [job.name for job in make_jobs(weights, weights, one) if HostEngine().accepts(job)]
    assert accepted == ["m"]
    slope = dataclasses.replace(make_jobs(["m"], weights, one)[0], rule=Slope(1.0, 2))
    assert HostEngine().accepts(slope)
