"""`dispatch`, `JobList` and the reference engine."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import gaussian, get, on
from models import LAYOUTS, assert_close, assert_equal, model
from spectral_core import Layout, add_gradient, add_gradient_, init, iterate
from spectral_core.engine import (
    JobList,
    ReferenceEngine,
    Slope,
    Triplet,
    dispatch,
    make_jobs,
)


class Recorder:
    """An engine that accepts some names and records what it runs, by the reference."""

    def __init__(self, accepted=None, *, in_place=True):
        self.in_place, self.accepted = in_place, accepted
        self.runs, self.asked = [], []

    def accepts(self, job):
        self.asked.append(job.name)
        return self.accepted is None or job.name in self.accepted

    def run(self, jobs, n_iter):
        self.runs.append([job.name for job in jobs])
        return ReferenceEngine(in_place=self.in_place).run(jobs, n_iter)


def some_jobs(names="abcd", shared=()):
    """Return jobs of 3 × 2 matrices; the gradients of the names in ``shared`` are one array."""
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((3, 2)) for name in names}
    grads = {name: np.zeros((3, 2)) for name in names}
    grads.update(dict.fromkeys(shared, np.zeros((3, 2))))
    state = init(weights)
    factors = dict.fromkeys(names, 0.1)
    return make_jobs(names, weights, state, grads=grads, factors=factors)


def addresses(jobs):
    return [job.grad.__array_interface__["data"][0] for job in jobs]


# Which engine runs a job


@pytest.mark.parametrize("in_place", [False, True])
def test_engine_replaces_the_reference(in_place):
    weights, grads = model()
    state = init(weights, layouts=LAYOUTS)
    expected, after = add_gradient(weights, grads, state)
    engine = Recorder(in_place=in_place)
    if in_place:
        found, new = grads, add_gradient_(weights, grads, state, engines=[engine])
    else:
        found, new = add_gradient(weights, grads, state, engines=[engine])
    assert engine.runs == [list(weights)]
    assert_close(found, expected)
    assert_equal(new.v, after.v)
    iterate(weights, state, engines=[engine])
    init(weights, layouts=LAYOUTS, engines=[engine])
    assert engine.runs == [list(weights)] * 3


def test_first_engine_that_accepts_runs_the_job():
    first, second, last = Recorder("b"), Recorder("bc"), Recorder()
    dispatch(some_jobs(), 1, [first, second, last])
    assert (first.runs, second.runs, last.runs) == ([["b"]], [["c"]], [["a", "d"]])
    assert second.asked == ["a", "c", "d"]


@given(st.lists(st.sets(st.sampled_from("abcdef")), max_size=3))
def test_results_are_in_the_order_of_the_jobs(accepted):
    jobs, twins = some_jobs("abcdef"), some_jobs("abcdef")
    result = dispatch(jobs, 2, [*map(Recorder, accepted), ReferenceEngine(in_place=True)])
    expected = ReferenceEngine(in_place=True).run(twins, 2)
    assert all(grad is job.grad for grad, job in zip(result.grads, jobs, strict=True))
    np.testing.assert_array_equal(result.grads, expected.grads)
    for one, other in zip(result.triplets, expected.triplets, strict=True):
        for array, twin in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, twin)


def test_dispatch_accepts_no_jobs():
    assert dispatch([], 1, [Recorder(), ReferenceEngine()]) == ([], [])


# Gradients that share memory


def test_overlapping_gradients_go_to_the_last_engine():
    jobs = some_jobs(shared="bd")
    first, last = Recorder(), Recorder()
    result = dispatch(jobs, 1, [first, last])
    assert (first.runs, last.runs) == ([["a", "b", "c"]], [["d"]])
    terms = [
        0.1 * sigma * np.outer(u, V[0]) for sigma, u, V in (result.triplets[1], result.triplets[3])
    ]
    np.testing.assert_allclose(jobs[1].grad, sum(terms), rtol=1e-12)
    assert result.grads[1] is result.grads[3]


@on("numpy", "torch-cpu")
def test_parts_of_a_gradient_overlap_with_the_whole(backend):
    memory = backend.asarray(np.zeros((6, 2)))
    grads = {"a": memory, "b": memory[2:4], "c": memory[4:], "d": backend.asarray(np.zeros((2, 2)))}
    weights = {name: backend.asarray(np.ones(tuple(grad.shape))) for name, grad in grads.items()}
    first = Recorder()
    add_gradient_(weights, grads, init(weights), engines=[first])
    assert first.runs == [["a", "d"]]


def test_neighbours_in_memory_do_not_overlap():
    memory = np.zeros((6, 2))
    grads = {"a": memory[:2], "b": memory[4:], "c": memory[2:4], "none": None}
    weights = {name: np.ones((2, 2)) for name in grads}
    first = Recorder()
    add_gradient_(weights, grads, init(weights), engines=[first])
    assert first.runs == [["a", "b", "c"]]


@on("numpy", "torch-cpu", "array-api-strict")
def test_tied_gradients_get_both_terms(backend):
    weights = backend.tree({"a": np.diag([3.0, 1.0]), "b": np.diag([1.0, 2.0])})
    grad = backend.asarray(np.zeros((2, 2)))
    state = iterate(weights, init(weights), n_iter=200)
    add_gradient_(weights, {"a": grad, "b": grad}, state, factor=1.0, engines=[Recorder("a")])
    np.testing.assert_allclose(backend.to_numpy(grad), np.diag([3.0, 2.0]), atol=1e-7)


# A list of jobs that is used in many steps


def test_job_list_is_divided_once():
    jobs = JobList(some_jobs())
    first, last = Recorder("ac"), Recorder()
    for _ in range(3):
        dispatch(jobs, 1, [first, last])
    assert first.asked == list("abcd")
    assert first.runs == [["a", "c"]] * 3
    assert last.runs == [["b", "d"]] * 3


def test_job_list_is_divided_again_only_where_overlaps_change():
    jobs = JobList(some_jobs())
    first, last = Recorder(), Recorder()
    for count, tied in ((1, False), (1, False), (2, True), (2, True), (3, False)):
        for job in jobs:  # as in each step: new gradients at other addresses
            job.grad = np.zeros((3, 2))
        if tied:
            jobs[3].grad = jobs[1].grad
        jobs.addresses = addresses(jobs)
        dispatch(jobs, 1, [first, last])
        assert first.runs[-1] == (list("abc") if tied else list("abcd"))
        assert len(first.asked) == sum((4, 3, 4)[:count])
    assert last.runs == [["d"], ["d"]]


class Remembering(Recorder):
    """An engine that keeps something for its list of jobs, and records their addresses."""

    made, seen = 0, ()

    def run(self, jobs, n_iter):
        if self not in jobs.memo:
            jobs.memo[self] = True
            self.made += 1
        self.seen = jobs.addresses
        return super().run(jobs, n_iter)


def test_memo_of_a_job_list_lasts_until_it_is_divided_again():
    jobs = JobList(some_jobs())
    first = Remembering("ac")
    for _ in range(3):
        for job in jobs:
            job.grad = np.zeros((3, 2))
        jobs.addresses = addresses(jobs)
        dispatch(jobs, 1, [first, Recorder()])
        assert first.seen == [jobs.addresses[0], jobs.addresses[2]]
    assert first.made == 1
    jobs[2].grad = jobs[0].grad
    jobs.addresses = addresses(jobs)
    dispatch(jobs, 1, [first, Recorder()])
    assert first.made == 2
    assert first.seen == jobs.addresses[:1]


@pytest.mark.parametrize("accepted", ["ac", "abcd"])
def test_renewed_numbers_reach_every_engine(accepted):
    jobs, numbers = JobList(some_jobs()), []
    first = Recorder(accepted)
    reference = first.run
    first.run = lambda jobs, n_iter: numbers.append(jobs.numbers) or reference(jobs, n_iter)
    for changed in (False, False, True, False):
        if changed:
            jobs.renew()
        dispatch(jobs, 1, [first, Recorder()])
    one, two, three, four = numbers
    assert one is two
    assert three is four is jobs.numbers
    assert two is not three


@pytest.mark.parametrize("accepted", ["ac", "abcd"])
def test_other_vectors_to_start_from_reach_every_engine(accepted):
    jobs, seen = JobList(some_jobs()), []
    first, last = Recorder(accepted), Recorder()
    for engine in (first, last):
        run = engine.run
        engine.run = lambda jobs, n_iter, run=run: seen.extend(jobs.lasts) or run(jobs, n_iter)
    dispatch(jobs, 1, [first, last])
    jobs.start_from([Triplet(job.last.sigma, job.last.u, job.V.copy()) for job in jobs])
    assert all(job.V is job.last.V for job in jobs)
    seen.clear()
    dispatch(jobs, 1, [first, last])
    assert {*map(id, seen)} == {id(job.last) for job in jobs}


def test_list_of_jobs_uses_each_steps_gradients():
    jobs, engines = JobList(some_jobs()), [Recorder("ac"), ReferenceEngine(in_place=True)]
    before = dispatch(jobs, 1, engines)
    for job in jobs:
        job.grad = np.zeros((3, 2))
    after = dispatch(jobs, 1, engines)
    assert all(grad is job.grad for grad, job in zip(after.grads, jobs, strict=True))
    np.testing.assert_array_equal(before.grads, after.grads)


# Errors


@pytest.mark.parametrize("engines", [[], [Recorder("a")]], ids=["reference", "two engines"])
def test_missing_u_changes_no_gradient(engines):
    jobs = some_jobs("ab")
    jobs[1].last = None
    with pytest.raises(sc.ArgumentError, match="n_iter is 0, but the state holds no u of 'b'"):
        dispatch(jobs, 0, [*engines, ReferenceEngine(in_place=True)])
    assert not np.any([job.grad for job in jobs])


@pytest.mark.parametrize("engines", [[], [Recorder("a")]], ids=["reference", "two engines"])
def test_misfit_changes_no_gradient(engines):
    weights = {"a": np.eye(2), "b": np.eye(3)}
    grads = {"a": np.zeros((2, 2)), "b": np.zeros((3, 3))}
    state = init(weights)
    state = dataclasses.replace(state, u={**state.u, "b": np.ones(4)})
    with pytest.raises(sc.ShapeError, match=r"weight 'b' .* needs a u of shape \(3,\)"):
        add_gradient_(weights, grads, state, engines=engines)
    assert not np.any(grads["a"])


def test_pure_function_refuses_an_engine_in_place():
    weights, grads = model()
    with pytest.raises(sc.ArgumentError, match="pass it to add_gradient_"):
        add_gradient(weights, grads, init(weights), engines=[Recorder()])


def test_make_jobs_names_every_misfit():
    weights = {name: np.ones((3, 2)) for name in "abc"}
    state = init(weights)
    weights |= {"a": np.ones((2, 3)), "c": np.ones((3, 4))}
    with pytest.raises(sc.ShapeError, match=r"weight 'a' (.|\n)*weight 'c' ") as error:
        make_jobs("abc", weights, state)
    assert "'b'" not in str(error.value)


@pytest.mark.parametrize(
    ("slope", "force"),
    [
        (None, 3.0),
        (Slope(0.0, 1), 1.0),
        (Slope(2.0, 1), 1.0),
        (Slope(2.0, 2), 1.0),
        (Slope(4.0, 2), 0),
    ],
)
def test_term_has_the_slope_of_the_job(slope, force):
    W = np.diag([3.0, 1.0, 1.0])[:, :2]
    job = dataclasses.replace(some_jobs()[0], weight=W, V=np.eye(2)[:1], rule=slope)
    result = ReferenceEngine().run([job], 1)
    np.testing.assert_allclose(result.grads[0], 0.1 * force * W * [[1 / 3, 0]], atol=1e-8)
    assert result.triplets[0].sigma == pytest.approx(3.0)  # σ itself, whatever the slope
    assert not job.grad.any()


# Memory, devices and graphs


@on(module="torch")
def test_results_have_no_autograd_graph(backend):
    weights, grads = model()
    mine = {name: weight.requires_grad_() for name, weight in backend.tree(weights).items()}
    my_grads = backend.tree(grads)
    state = iterate(mine, init(mine, layouts=LAYOUTS))
    found, new = add_gradient(mine, my_grads, state)
    newer = add_gradient_(mine, my_grads, state)
    for arrays in (found, my_grads, *((s.v | s.sigma) for s in (state, new, newer))):
        assert not any(x.requires_grad for x in arrays.values())
    assert all(weight.requires_grad for weight in mine.values())


def watcher():
    """Return a PyTorch dispatch mode that refuses copies to the host.

    It keeps the size of the largest new tensor. A view of an input is not a new tensor.
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
def test_watcher_detects_copies_and_temporaries(backend):
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
    """The term is a little more than half an ulp of the gradient.

    Rounded to half precision by itself, it would become a tie, and the sum would be rounded down
    to the gradient.
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
