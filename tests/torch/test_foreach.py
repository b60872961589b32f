"""Test that ForeachEngine equals the reference engine."""

from dataclasses import replace

import pytest

from spectral_core import Layout, start_vector
from spectral_core.engine import (
    AT_MOST,
    EXACTLY,
    Bound,
    Job,
    ReferenceEngine,
    Slope,
    Triplet,
    array_namespace,
    dispatch,
    plan_of,
)

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch import is_tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from spectral_torch.engines import ForeachEngine  # noqa: E402

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def weight(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


WEIGHTS = [
    (weight(5, 7), "oi"),
    (weight(4, 6, dtype=torch.float64), "oi"),
    (weight(3, 2, 4), "soi"),
    (weight(9, 3, seed=1), "io"),
    (weight(1, 8), "oi"),
    (weight(8, 1), "oi"),
    (weight(6, 5, dtype=torch.bfloat16), "oi"),
    (weight(6, 5, dtype=torch.float16), "oi"),
    (weight(3, 4, dtype=torch.complex64), "oi"),
    (weight(2, 3, 4, 5), "hwio"),  # its columns have another order in memory
    (weight(4, 3, 2, 2), "iohw"),
    (weight(8, 3, 3), Layout("(go)ik", groups=2)),
    (torch.zeros(3, 5), "oi"),
    (torch.full((2, 3), torch.nan), "oi"),
    (torch.full((2, 3), torch.inf), "oi"),
    (torch.full((2, 3), 3e38), "oi"),
    (weight(7, 4).T, "oi"),  # not contiguous
]


REFERENCE = ReferenceEngine(in_place=True)


def foreach(jobs, n_iter):
    return dispatch(jobs, n_iter, [ForeachEngine(), REFERENCE])


def jobs_on(device, factor=0.3, *, n_vectors=1):
    made = []
    for i, (W, layout) in enumerate(WEIGHTS):
        W = W.to(device)
        plan = plan_of(layout, W.shape, "w")
        V = start_vector(plan.rows(n_vectors), W, name=str(i))
        u, sigma = (torch.ones(shape, device=device).to(V) for shape in (plan.left, plan.stack))
        grad = None if i == 1 else torch.ones_like(W)
        last = Triplet(sigma.real.contiguous(), u, V)
        each = torch.tensor(factor, device=device) if i == 2 else factor
        xp = array_namespace(W)
        made.append(Job(str(i), W, grad, V, each, None, plan, xp, last))
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("n_vectors", [1, 2])
def test_equals_the_reference(n_iter, n_vectors, device):
    found = foreach(jobs_on(device, n_vectors=n_vectors), n_iter)
    expected = REFERENCE.run(jobs_on(device, n_vectors=n_vectors), n_iter)
    for i, (triplet, other) in enumerate(zip(found.triplets, expected.triplets, strict=True)):
        assert triplet.sigma.dtype == other.sigma.dtype
        torch.testing.assert_close(triplet.V, other.V, rtol=1e-4, atol=1e-4)
        if not other.sigma.isfinite().all():  # NaN or Inf, in either
            assert not triplet.sigma.isfinite().any()
            assert not found.grads[i].isfinite().all()
            continue
        torch.testing.assert_close(triplet.sigma, other.sigma, rtol=1e-5, atol=0)
        torch.testing.assert_close(triplet.u, other.u, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.grads[i], expected.grads[i], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_each_weight_has_its_factor(device):
    mine, theirs = jobs_on(device)[:6], jobs_on(device)[:6]
    for group in (mine, theirs):
        for i in range(6):
            number = 0.1 * (i + 1)
            factor = torch.tensor(number, device=device) if i % 2 else number
            group[i] = replace(group[i], factor=factor)
    found, expected = foreach(mine, 1), REFERENCE.run(theirs, 1)
    for grad, other in zip(found.grads, expected.grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


def test_one_engine_serves_other_shapes():
    engine = ForeachEngine()
    for chosen in (slice(0, 1), slice(3, 6), slice(0, 1), slice(4, 5)):
        found = engine.run(jobs_on("cpu")[chosen], 1)
        expected = REFERENCE.run(jobs_on("cpu")[chosen], 1)
        for triplet, other in zip(found.triplets, expected.triplets, strict=True):
            torch.testing.assert_close(tuple(triplet), tuple(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_iter", [0, 2])
@pytest.mark.parametrize(
    "slopes",
    [
        [Slope(0.5, 2)] * 4,
        [Slope(0.0, 1)] * 4,
        [None, Slope(2.0, 2), Slope(2.0, 1), Slope(torch.tensor(1.0), 2)],
    ],
    ids=["hinge", "linear", "mixed"],
)
def test_slopes_equal_the_reference(slopes, n_iter):
    engine, found = ForeachEngine(), []
    for run in (engine.run, REFERENCE.run):
        jobs = [jobs_on("cpu")[i] for i in (0, 3, 4, 5)]
        jobs = [replace(job, rule=slope) for job, slope in zip(jobs, slopes, strict=True)]
        assert all(map(engine.accepts, jobs))
        found.append(run(jobs, n_iter))
    for grad, other in zip(found[0].grads, found[1].grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bounds",
    [
        [Bound(0.5, AT_MOST)] * 4,
        [Bound(9.0, EXACTLY)] * 4,
        [Bound(0.5, AT_MOST), Bound(torch.tensor(2.0), EXACTLY), Bound(1e6, AT_MOST), None],
    ],
    ids=["at most", "exactly", "mixed"],
)
@pytest.mark.parametrize("n_iter", [0, 2])
def test_bounds_equal_the_reference(bounds, n_iter):
    engine, found = ForeachEngine(), []
    for run in (engine.run, REFERENCE.run):
        jobs = [jobs_on("cpu")[i] for i in (0, 3, 4, 5)]
        jobs = [
            replace(job, weight=job.weight.clone(), rule=b)
            for job, b in zip(jobs, bounds, strict=True)
        ]
        jobs = [job if job.rule is None else replace(job, grad=job.weight) for job in jobs]
        assert all(map(engine.accepts, jobs))
        found.append(run(jobs, n_iter))
        assert all(g is job.grad for g, job in zip(found[-1].grads, jobs, strict=True))
    for grad, other in zip(found[0].grads, found[1].grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)
    for triplet, other in zip(found[0].triplets, found[1].triplets, strict=True):
        torch.testing.assert_close(tuple(triplet), tuple(other), rtol=1e-5, atol=1e-5)


def test_no_jobs_give_an_empty_result():
    assert ForeachEngine().run([], 1) == ([], [])


def test_the_cache_of_index_tensors_is_bounded():
    engine, first = ForeachEngine(), jobs_on("cpu")[0]
    for i in range(40):
        engine.run([replace(first, name=str(k)) for k in range(i + 1)], 1)
    assert engine._owners.cache_info().currsize <= 16


# Half precision


HALF = [
    (weight(300, 700), "oi"),  # more than one block
    (weight(700, 300), "io"),
    (weight(3, 3, 40, 400), "hwio"),
    (weight(6, 5), "oi"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", [slice(0, 4), slice(0, 1), slice(1, 2)])
@pytest.mark.parametrize("bound", [None, Bound(0.5, EXACTLY)])
def test_half_precision_equals_the_reference(dtype, chosen, bound):
    found, engine = [], ForeachEngine()
    for run in (engine.run, REFERENCE.run):
        jobs = []
        for i, (W, layout) in enumerate(HALF[chosen]):
            W = W.to(dtype)
            plan = plan_of(layout, W.shape, "w")
            V = start_vector(plan.rows(1), W, name=str(i))
            grad = W if bound else torch.ones_like(W)
            jobs.append(Job(str(i), W, grad, V, 0.3, bound, plan, array_namespace(W), None))
        assert all(map(engine.accepts, jobs))
        found.append(run(jobs, 2))
    for grad, other in zip(found[0].grads, found[1].grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=2**-7, atol=1e-3)
        assert (grad == other).float().mean() > 0.99  # rounded once, from float32
    for triplet, other in zip(found[0].triplets, found[1].triplets, strict=True):
        torch.testing.assert_close(tuple(triplet), tuple(other), rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """Record the bytes of the largest new tensor."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for x in filter(is_tensor, tree_leaves(result)):
            if x.untyped_storage().data_ptr() not in old:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("layout", ["oi", "io"])
@pytest.mark.parametrize("slope", [None, Bound(0.5, EXACTLY)])
def test_half_precision_makes_no_copy_of_a_weight(layout, slope):
    W = weight(2048, 1024, dtype=torch.bfloat16)
    plan = plan_of(layout, W.shape, "w")
    V = start_vector(plan.rows(1), W)
    grad = W if slope else torch.zeros_like(W)
    job = Job("w", W, grad, V, 0.3, slope, plan, array_namespace(W), None)
    with Largest() as seen:
        ForeachEngine().run([job], 1)
    assert 0 < seen.bytes < W.nbytes / 2
