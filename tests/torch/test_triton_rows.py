"""Test the Triton engine with several vectors for each matrix."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from spectral_core import Layout  # noqa: E402
from spectral_core.engine import AT_MOST, EXACTLY, Bound, Slope  # noqa: E402
from triton_jobs import (  # noqa: E402
    DEVICE,
    INTERPRETED,
    REFERENCE,
    TritonEngine,
    bf16,
    bounded,
    check,
    check_others_stay,
    close,
    copy,
    f16,
    f32,
    f64,
    in_channels_last,
    job,
    runs,
    triton_device,
    triton_group,
)

SHAPES = [
    ((12, 108), {}),
    ((70, 130), {}),
    ((24, 3, 3, 3), {}),
    ((16, 3, 5, 5), {"layout": Layout("(go)ihw", 2)}),
    ((3, 16, 20), {"layout": "soi"}),
    ((9, 300), {"last": False}),
]


@runs
@pytest.mark.parametrize(
    ("dtype", "k"),
    [(f32, 2), (f32, 3), (f32, 4), (f32, 8), (f64, 2), (f64, 4), (bf16, 4), (f16, 2)],
    ids=str,
)
def test_equals_the_reference(dtype, k, monkeypatch):
    if INTERPRETED:  # several programs: then there are sums to add
        monkeypatch.setattr(triton_device, "processors", lambda device: 4)
    check([job(shape, dtype, seed=i, k=k, **more) for i, (shape, more) in enumerate(SHAPES)])


@runs
@pytest.mark.parametrize(("k", "n_iter"), [(2, 0), (2, 4), (4, 3)])
def test_iterations(n_iter, k):
    check([job((8, 40), f64, k=k), job((3, 9, 12), f64, layout="soi", k=k)], n_iter)


@runs
@pytest.mark.parametrize(("k", "n_iter"), [(1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_matrices_that_are_read_twice(k, n_iter, dtype, monkeypatch):
    """Rows that do not fit into the registers, beside some that do."""
    monkeypatch.setattr(triton_device, "most_columns", lambda *args: 64)
    jobs = [job((20, 1100), dtype, k=k), job((19, 301), dtype, k=k), job((9, 40), dtype, k=k)]
    jobs.append(in_channels_last(job((9, 16, 3, 3), dtype, k=k)))
    check(jobs, n_iter)


@runs
@pytest.mark.parametrize("k", [2, 4])
def test_penalties_bounds_and_layouts_beside_each_other(k):
    number = torch.tensor(0.4, device=DEVICE)
    jobs = [
        job((9, 40), k=k, rule=Slope(0.25, 2)),
        job((9, 41), k=k, rule=Slope(number, 1), factor=number),
        job((9, 42), k=k, rule=Slope(1e6, 2)),
        bounded((9, 43), 1e-3, k=k),
        bounded((9, 44), 1e6, k=k),
        bounded((9, 45), 0.5, code=EXACTLY, k=k),
        in_channels_last(job((9, 4, 3, 3), k=k)),
        replace(job((9, 46), k=k), grad=None),
    ]
    assert isinstance(jobs[4].rule, Bound)
    assert jobs[4].rule.code == AT_MOST
    before = jobs[2].grad.clone(), jobs[4].weight.clone()
    found = check(jobs)
    assert torch.equal(jobs[2].grad, before[0])
    assert torch.equal(jobs[4].weight, before[1])
    close(float(found.triplets[3].sigma), 1e-3, 1e-5, 0)


def of_spectrum(values, shape, dtype=f32, *, k, seed=0):
    """Return a job whose weight has these singular values."""
    one = job(shape, dtype, k=k, seed=seed)
    left, _, right = torch.linalg.svd(one.weight.double(), full_matrices=False)
    values = torch.tensor(values, dtype=f64, device=DEVICE)
    weight = left[:, : len(values)] * values @ right[: len(values)]
    return replace(one, weight=weight.to(dtype))


def again(engine):
    """Return True for each matrix that the last iteration has read a second time."""
    (group,) = engine._groups.values()
    return group.room.again.bool().tolist()


@runs
@pytest.mark.parametrize(("dtype", "rtol"), [(f32, 1e-4), (f64, 1e-9)], ids=["f32", "f64"])
def test_rows_that_are_nearly_dependent_are_read_again(dtype, rtol):
    """From random vectors, all rows of Y are nearly the same where the first value is large."""
    spectra = [1.0, 1e-2, 5e-3, 2e-3], [1.0, 0.9, 0.8, 0.7], [1.0, 1e-4, 1e-4, 9e-5]
    jobs = [of_spectrum(s, (30, 50 + i), dtype, k=4) for i, s in enumerate(spectra)]
    engine, expected = TritonEngine(), [copy(one) for one in jobs]
    found = engine.run(jobs, 1)
    assert again(engine) == [True, False, True]
    wanted = REFERENCE.run(expected, 1)
    for one, triplet, other in zip(jobs, found.triplets, wanted.triplets, strict=True):
        close(triplet.sigma, other.sigma, rtol, 0)
        close(triplet.u, other.u, 0, rtol)
        close(triplet.V[0], other.V[0], 0, rtol)
        assert triplet.sigma <= 1.00001 * torch.linalg.matrix_norm(one.weight.double(), 2)
        close(triplet.V[1:] @ triplet.V[0], torch.zeros(3).to(triplet.V), 0, rtol)
    engine.run(jobs, 3)  # the rows are singular vectors now, and so are independent
    assert again(engine)[0] is False


@runs
@pytest.mark.parametrize(("k", "dtype"), [(2, f32), (2, f64), (4, f32), (4, f64)], ids=str)
def test_a_rank_below_the_number_of_vectors(k, dtype):
    jobs = [of_spectrum([2.0], (12, 30), dtype, k=k), of_spectrum([3.0, 1.0], (12, 31), dtype, k=k)]
    jobs += [job((1, 9), dtype, k=k), job((9, 1), dtype, k=k), job((2, 3), dtype, k=k)]
    rtol = 1e-5 if dtype == f32 else 1e-11
    for one in jobs:  # nearly there, as after many steps
        one.V[0] = torch.linalg.svd(one.weight, full_matrices=False)[2][0] + 1e-4 * one.V[0]
    engine = TritonEngine()
    for _ in range(2):
        found = engine.run(jobs, 2)
    for one, (sigma, u, V) in zip(jobs, found.triplets, strict=True):
        close(sigma, torch.linalg.matrix_norm(one.weight, 2), rtol, 0)
        close(one.weight @ V[0], sigma * u, rtol, 10 * rtol)
        size = (V**2).sum(1)
        assert size[0] > 0.99
        assert ((size - 1).abs() < 1e-3).logical_or(size == 0).all()
        close(V[1:] @ V[0], torch.zeros(k - 1).to(V), 0, 10 * rtol)


@runs
@pytest.mark.parametrize("k", [2, 4])
def test_zero_and_what_is_not_finite_are_their_own(k):
    check_others_stay((8, 12), k, 1e-4)


@runs
@pytest.mark.parametrize("scale", [1e-17, 1e-8, 1e8, 5e16])
@pytest.mark.parametrize("k", [2, 4])
def test_range(scale, k):
    one = job((20, 30), scale=scale, factor=1 / scale, k=k)
    expected = REFERENCE.run([copy(one)], 2).triplets[0]
    found = TritonEngine().run([one], 2).triplets[0]
    close(found.sigma / scale, expected.sigma / scale, 1e-5, 0)
    close(found.V, expected.V, 0, 2e-5)


@runs
def test_several_vectors_and_one_beside_each_other():
    engine, jobs = TritonEngine(), [job((9, 40 + k), k=k, seed=k) for k in (1, 2, 2, 4)]
    check(jobs, engine=engine)
    check([jobs[0], jobs[2]], engine=engine)  # of the two with two vectors, one is absent


@runs
def test_it_converges_where_one_vector_follows_the_second_direction():
    one = of_spectrum([1.0, 0.999, 0.5, 0.4, 0.3], (20, 30), f64, k=2)
    TritonEngine().run([one], 20)
    close(one.last.sigma, torch.tensor(1.0).to(one.V), 1e-6, 0)


@pytest.mark.parametrize("n_iter", [0, 1, 3])
def test_as_many_launches_for_many_weights(n_iter, monkeypatch):
    launches = []
    monkeypatch.setattr(
        triton_group.Group, "_launch", lambda self, name, *args: launches.append(name)
    )
    counts = []
    for count in (1, 30):
        TritonEngine().run([job((9, 20 + i), k=4) for i in range(count)], n_iter)
        counts.append(len(launches))
        launches.clear()
    assert counts == [6 * n_iter + (n_iter > 0) + 1] * 2
