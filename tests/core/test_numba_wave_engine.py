"""The compiled engine of waves equals the reference, for every dtype, shape and layout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import get
from spectral_core.engine import JobList, ReferenceEngine, make_jobs

pytest.importorskip("numba", reason="Numba is not installed")

import numba

from spectral_core.numba import NumbaEngine, NumbaWaveEngine, wave_kernels
from spectral_core.numba import engine as numba_engine

KERNEL = {1: "k", 2: "hw", 3: "dhw"}
VECTORS = ("v", "sigma", "u")


@pytest.fixture(autouse=True)
def numpy_backend():
    get("numpy")


def kernel(shape, dtype="float64", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def channels_last(weight):
    return np.moveaxis(np.moveaxis(weight, 1, -1).copy(), -1, 1)


def model(dtype="float64"):
    """Return weights that the waves span, and that they do not, and their layouts."""
    weights = {
        "narrow": kernel((7, 6, 3, 3), dtype),
        "wide": kernel((30, 5, 3, 3), dtype, 1),
        "strided": kernel((29, 4, 3, 3), dtype, 2),
        "last": channels_last(kernel((30, 4, 3, 3), dtype, 3)),
        "groups": kernel((34, 3, 4), dtype, 4),
    }
    layouts = {name: sc.Convolution("oihw", waves=6) for name in ("narrow", "wide", "last")}
    layouts["strided"] = sc.Convolution("oihw", stride=(1, 2), dilation=(2, 1), waves=5)
    layouts["groups"] = sc.Convolution("(go)ik", 2, waves=3)
    return weights, layouts


def step(engine, weights, state, **options):
    grads = {name: np.ones_like(weight) for name, weight in weights.items()}
    state = sc.add_gradient_(weights, grads, state, 0.1, engines=[engine], **options)
    return grads, state


def assert_same_step(weights, state, rtol, **options):
    """Compare a step of both engines from one state; return the state after it."""
    assert all(NumbaWaveEngine().accepts(job) for job in make_jobs(weights, weights, state))
    grads, mine = step(NumbaWaveEngine(), weights, state, **options)
    expected, after = step(ReferenceEngine(in_place=True), weights, state, **options)
    for name in weights:
        np.testing.assert_allclose(grads[name], expected[name], rtol=rtol, atol=rtol)
        for field in VECTORS:
            one, other = (np.asarray(getattr(x, field)[name]) for x in (mine, after))
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol, err_msg=name)
    return after


@pytest.mark.parametrize("options", [{}, {"power": 1, "target": 1.0}, {"target": 1e6}])
def test_step_is_that_of_the_reference(options):
    weights, layouts = model()
    state = sc.init(weights, layouts=layouts)
    for n_iter in (1, 1, 2, 0):
        state = assert_same_step(weights, state, 1e-6, n_iter=n_iter, **options)


@st.composite
def convolutions(draw):
    n = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2]))
    shape = (groups * draw(st.integers(1, 9)), draw(st.integers(1, 6)))
    sizes = tuple(draw(st.integers(1, 4 if n < 3 else 3)) for _ in range(n))
    layout = sc.Convolution(
        "(go)i" + KERNEL[n],
        groups,
        stride=tuple(draw(st.integers(1, 3)) for _ in range(n)),
        dilation=tuple(draw(st.integers(1, 3)) for _ in range(n)),
        waves=draw(st.integers(1, 5)),
    )
    return kernel((*shape, *sizes), seed=draw(st.integers(0, 999))), layout


@given(convolutions())
def test_sigma_is_that_of_the_reference(case):
    """Far from ties of two waves: there, rounding decides which one comes first."""
    weight, layout = case
    weights = {"w": weight}
    state = sc.init(weights, layouts={"w": layout})
    if "w" in state.layouts and not isinstance(state.layouts["w"], sc.Convolution):
        return
    _, mine = step(NumbaWaveEngine(), weights, state)
    _, after = step(ReferenceEngine(in_place=True), weights, state)
    np.testing.assert_allclose(mine.sigma["w"], after.sigma["w"], rtol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [("float32", 2e-5), pytest.param("float16", 1e-3, marks=pytest.mark.thorough)],
)
def test_narrow_dtypes_find_the_norm(dtype, rtol):
    weights, layouts = model(dtype)
    state = sc.init(weights, layouts=layouts)
    _, mine = step(NumbaWaveEngine(), weights, state, n_iter=60)
    _, after = step(ReferenceEngine(in_place=True), weights, state, n_iter=60)
    for name in weights:
        assert mine.v[name].dtype == np.float32
        np.testing.assert_allclose(mine.sigma[name], after.sigma[name], rtol=0.02)
    norm = sc.convolution_norm(weights["wide"], "oihw", tol=1e-6).lower
    np.testing.assert_allclose(mine.sigma["wide"], norm, rtol=2e-3)
    grads, _ = step(NumbaWaveEngine(), weights, mine, power=1, n_iter=0)
    expected, _ = step(ReferenceEngine(in_place=True), weights, mine, power=1, n_iter=0)
    for name in weights:
        np.testing.assert_allclose(grads[name], expected[name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("options", [{}, {"normalize": True}])
def test_bound_is_that_of_the_reference(options):
    weights, layouts = model()
    state = sc.iterate(weights, sc.init(weights, layouts=layouts), n_iter=3)
    found = []
    for engine in (NumbaWaveEngine(), ReferenceEngine(in_place=True)):
        copies = {name: weight.copy() for name, weight in weights.items()}
        copies["last"] = channels_last(weights["last"])
        found.append((copies, sc.constrain_(copies, state, 2.0, engines=[engine], **options)))
    (mine, one), (expected, other) = found
    for name in weights:
        np.testing.assert_allclose(mine[name], expected[name], rtol=1e-7)
        np.testing.assert_allclose(one.sigma[name], other.sigma[name], rtol=1e-7)


@pytest.mark.parametrize("make", [NumbaWaveEngine, lambda: ReferenceEngine(in_place=True)])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [("float32", 1e20), ("float32", 1e-25), ("float64", 1e180), ("float64", 1e-180)],
)
def test_scales_whose_squares_leave_the_range(dtype, scale, make):
    weights, layouts = model()
    layouts = {name: layouts[name] for name in ("narrow", "wide")}
    weights = {name: weights[name] for name in layouts}
    state = sc.init(weights, layouts=layouts)
    _, expected = step(ReferenceEngine(in_place=True), weights, state, n_iter=60)
    scaled = {name: (scale * weight).astype(dtype) for name, weight in weights.items()}
    state = sc.init(scaled, layouts=layouts)
    _, found = step(make(), scaled, state, n_iter=60)
    for name in weights:
        sigma = np.float64(found.sigma[name]) / scale
        np.testing.assert_allclose(sigma, expected.sigma[name], rtol=5e-3)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_weights_without_a_norm_leave_the_waves_alone(value):
    weights, layouts = model()
    state = sc.iterate(weights, sc.init(weights, layouts=layouts), n_iter=2)
    bad = {name: np.full_like(weight, value) for name, weight in weights.items()}
    _, after = step(NumbaWaveEngine(), bad, state)
    for name in weights:
        np.testing.assert_array_equal(after.v[name], state.v[name])
        assert not (np.asarray(after.sigma[name]) > 0).any() or value == np.inf


def test_several_threads_run_the_parallel_loop(monkeypatch):
    called, before = [], numba.get_num_threads()
    monkeypatch.setattr(numba, "set_num_threads", called.append)
    monkeypatch.setattr(wave_kernels, "_together", lambda *given: called.append(given))
    wave_kernels.run(before + 1, "tables", "room")
    assert called == [before + 1, ("tables", "room"), before]


@pytest.mark.thorough  # the parallel loop takes as long to compile as all other code
def test_threads_and_a_list_of_jobs_change_no_bit(monkeypatch):
    weights, layouts = model("float32")
    state = sc.init(weights, layouts=layouts)
    alone = step(NumbaWaveEngine(), weights, state, n_iter=3)
    monkeypatch.setattr(numba_engine, "_BESIDE_BLAS", 1)
    together = step(NumbaWaveEngine(), weights, state, n_iter=3)
    for name in weights:
        np.testing.assert_array_equal(alone[0][name], together[0][name])
        for field in VECTORS:
            np.testing.assert_array_equal(
                getattr(alone[1], field)[name], getattr(together[1], field)[name]
            )


def test_writes_where_the_state_is():
    """A list of jobs keeps its tables, and what belongs to the engine is written in place."""
    weights, layouts = model()
    state = sc.iterate(weights, sc.init(weights, layouts=layouts))
    grads = {name: np.zeros_like(weight) for name, weight in weights.items()}
    jobs = JobList(
        make_jobs(weights, weights, state, grads=grads, factors=dict.fromkeys(weights, 0.1))
    )
    engine = NumbaWaveEngine(owned=True)
    before = {job.name: job.V.copy() for job in jobs}
    for _ in range(2):
        result = engine.run(jobs, 1)
        assert result.triplets is jobs.lasts
    for job, triplet in zip(jobs, result.triplets, strict=True):
        assert triplet.V is job.V
        assert not np.array_equal(job.V, before[job.name])
        assert grads[job.name].any()


def test_resumes_bit_for_bit():
    weights, layouts = model("float32")
    state = sc.init(weights, layouts=layouts)
    _, state = step(NumbaWaveEngine(), weights, state, n_iter=5)
    saved = {key: np.array(x) for key, x in sc.state_dict(state).items()}
    resumed = sc.load_state_dict(sc.init(weights, layouts=layouts, seed=3), saved)
    one, other = (step(NumbaWaveEngine(), weights, s, n_iter=8)[1] for s in (state, resumed))
    for key, array in sc.state_dict(one).items():
        np.testing.assert_array_equal(array, sc.state_dict(other)[key])


def test_refuses_what_it_does_not_know():
    weights = {"flax": kernel((3, 3, 4, 8)), "flat": kernel((4, 3, 3, 3))}
    state = sc.init(weights, layouts={"flax": sc.Convolution("hwio"), "flat": "oihw"})
    jobs = make_jobs(weights, weights, state)
    assert not any(NumbaWaveEngine().accepts(job) for job in jobs)
    waves = sc.init({"w": weights["flat"]}, layouts={"w": sc.Convolution("oihw")})
    (job,) = make_jobs(["w"], {"w": weights["flat"]}, waves)
    assert NumbaWaveEngine().accepts(job)
    assert not NumbaEngine().accepts(job)
