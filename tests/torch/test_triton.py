"""Test that the Triton engine gives what the reference engine gives.

On a CUDA machine the kernels run. Elsewhere Triton interprets them, on CPU tensors. Triton must be
told so before it is first imported, and no other test should meet it, so that happens in a process
of its own (`test_in_triton_s_interpreter`). Another process compiles without a GPU.
"""

import copy as copies
import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from spectral_core import ArgumentError, Layout  # noqa: E402
from spectral_core.engine import (  # noqa: E402
    EXACTLY,
    JobList,
    ReferenceEngine,
    Slope,
    Triplet,
    plan_of,
)
from triton_jobs import (  # noqa: E402
    CUDA,
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
    graph_tables,
    in_channels_last,
    job,
    runs,
    triton_device,
    triton_engine,
    triton_group,
    triton_tables,
)

ROOT = Path(__file__).parents[2]
INTERPRETABLE = sorted(Path(__file__).parent.glob("test_triton*.py"))
INTERPRETABLE.append(Path(__file__).with_name("test_machine.py"))
on_gpu = pytest.mark.skipif(not CUDA, reason="no CUDA GPU")


@pytest.fixture(params=[1, 50])
def processors(request, monkeypatch):
    """A machine of few programs, and one of many: then there are many sums to add."""
    if INTERPRETED:
        monkeypatch.setattr(triton_device, "processors", lambda device: request.param)
    elif request.param != 1:
        pytest.skip("a GPU has the multiprocessors that it has")


MIXED = [
    ((5, 7), {}),
    ((1, 9), {}),
    ((9, 1), {}),
    ((12, 108), {}),
    ((100, 130), {}),
    ((24, 3, 3, 3), {}),
    ((8, 3, 5, 5), {"layout": Layout("(go)ihw", 4)}),
    ((3, 40, 16), {"layout": "soi"}),
    ((2, 300), {"last": False}),
]


@runs
@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16], ids=str)
def test_equals_the_reference(dtype, processors):
    check([job(shape, dtype, seed=i, **more) for i, (shape, more) in enumerate(MIXED)])


@runs
def test_dtypes_beside_each_other():
    pairs = [(f32, f32), (f64, f64), (bf16, f32), (f32, bf16), (f16, f16), (f64, f32), (f32, f64)]
    check([job((6, 40), W, grad=G, seed=i) for i, (W, G) in enumerate(pairs)])


@runs
@pytest.mark.parametrize(
    "shape", [(300, 500), (12, 4000), (3, 9000), (2, 16384), (2, 16500), (2000, 24)]
)
def test_sizes(shape, processors):
    check([job(shape)])


@runs
@pytest.mark.parametrize(("dtype", "k"), [(f32, 1), (f64, 2)], ids=str)
def test_many_sums_are_added_in_two_levels(dtype, k, monkeypatch):
    for name, value in (("_MANY_SUMS", 3), ("_SUMS_TOGETHER", 4)):
        monkeypatch.setattr(triton_tables, name, value)
    monkeypatch.setattr(triton_device, "processors", lambda device: 200)
    engine = TritonEngine()
    jobs = [job((150, 40), dtype, k=k), job((9, 40), dtype, k=k), job((110, 70), dtype, k=k)]
    check(jobs, engine=engine)
    check(jobs[:2], engine=engine)  # one with many sums is absent
    (group,) = engine._groups.values()
    assert len(group.work.parts) > 2
    assert len({*group.work.parts[:, 0].tolist()}) == 2  # the second matrix has few sums


@pytest.mark.parametrize(
    ("shape", "share", "programs"),
    [((4096, 4096), 0.07, 128), ((2048, 2048), 0.13, 64), ((50257, 768), 0.03, 24)],
    ids=str,
)
def test_sums_are_a_small_share_and_enough_programs_add_them(shape, share, programs, monkeypatch):
    """On an H100, by the tables: bytes of sums over bytes of W, and programs of `columns`."""
    monkeypatch.setattr(triton_device, "processors", lambda device: 132)
    monkeypatch.setattr(triton_device, "most_columns", lambda *args: 16384)
    shapes = [triton_tables.Shape(plan_of("oi", shape, "w"), 1)]
    group = triton_group.Group(triton_tables.Kind(torch.device("cpu"), f32, f32, 1), shapes)
    assert len(group.work.sums) <= share * shape[0] * shape[1]
    assert len(group.work.blocks) == programs
    # No program adds more of them one after another than it loads in a few µs.
    sums = group.work.shapes[0].tolist()
    assert sums[3] / sums[12] <= 256
    assert len(group.work.items) >= 132  # and every multiprocessor has work


@runs
@pytest.mark.parametrize("n_iter", [0, 1, 3])
def test_iterations(n_iter):
    check([job((6, 40)), job((7, 5)), job((2, 3, 4), layout="soi")], n_iter)


@runs
def test_zero_and_what_is_not_finite_are_their_own():
    check_others_stay((4, 8), 1, 1e-5)
    check([job((4, 8), seed=4)], 2)


@runs
@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e-6, 1e6, 1e12, 5e17])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_range(scale, dtype):
    one = job((20, 30), dtype, scale=scale, factor=1 / scale)
    found = check([one], 2)
    sigma = torch.linalg.matrix_norm(one.weight.double(), 2)
    assert 0.5 * sigma < found.triplets[0].sigma < 1.00001 * sigma


@runs
def test_factors():
    shared = torch.tensor(0.3, device=DEVICE)
    other = torch.tensor(2.0, device=DEVICE, dtype=f64)
    factors = [0.5, shared, 0.0, shared, other, 1]
    check([job((4, 6 + i), factor=factor) for i, factor in enumerate(factors)])
    engine = TritonEngine()
    jobs = [job((4, 6)), job((5, 6))]
    for factor in (0.1, 0.2, shared, 0.2):
        check([replace(one, factor=factor) for one in jobs], engine=engine)


@runs
def test_what_moves_is_found_and_results_stay_where_they_are():
    engine, jobs = TritonEngine(), [job((6, 40)), job((5, 7))]
    for _ in range(3):
        found = check(jobs, engine=engine)
        for one, triplet in zip(jobs, found.triplets, strict=True):
            assert triplet.V is one.V
            assert triplet.sigma is one.last.sigma
            assert triplet.u is one.last.u
        # Gradients and a weight elsewhere, where no 16-byte load may be used.
        grads = [torch.zeros(one.grad.numel() + 1, device=DEVICE)[1:] for one in jobs]
        jobs = [
            replace(one, grad=grad.view(one.weight.shape).copy_(one.grad))
            for one, grad in zip(jobs, grads, strict=True)
        ]
    moved = torch.zeros(241, device=DEVICE)[1:].view(6, 40).copy_(jobs[0].weight)
    check([replace(jobs[0], weight=moved), jobs[1]], engine=engine)


@runs
def test_accepts_only_what_the_kernels_can_run():
    one, accepts = job((6, 40)), TritonEngine().accepts
    assert accepts(one)
    assert accepts(replace(one, last=None))
    assert accepts(replace(one, grad=None))
    assert accepts(replace(one, weight=torch.nn.Parameter(one.weight)))
    assert accepts(replace(one, rule=Slope(0.5, 2)))
    assert not accepts(replace(one, weight=torch.zeros(40, 6, device=DEVICE).T))
    assert not accepts(replace(one, grad=torch.zeros(40, 6, device=DEVICE).T))
    assert not accepts(replace(one, grad=one.grad.to_sparse()))
    assert not accepts(replace(one, grad=one.grad.clone().requires_grad_()))
    assert not accepts(replace(one, V=one.V.double()))
    assert not accepts(replace(one, V=torch.zeros(2, 41, device=DEVICE)))
    assert not accepts(replace(one, V=torch.zeros(40, 2, device=DEVICE).T[:1]))
    assert not accepts(replace(one, last=one.last._replace(u=torch.zeros(12, device=DEVICE)[::2])))
    assert not accepts(replace(one, factor=torch.tensor([0.1], device=DEVICE)))
    assert not accepts(replace(one, rule=Slope(torch.tensor([0.1], device=DEVICE), 2)))
    assert not accepts(replace(one, weight=one.weight.to(torch.complex64)))
    assert accepts(job((6, 40), layout="io"))
    assert not accepts(job((3, 6, 40), layout="kio"))
    assert not accepts(job((3, 6, 40), layout="iso"))
    turned = job((40, 6), layout="io")
    assert not accepts(replace(turned, weight=torch.zeros(6, 40, device=DEVICE).T))
    assert not accepts(replace(turned, grad=torch.zeros(6, 40, device=DEVICE).T))
    assert accepts(job((6, 40), k=8))
    assert not accepts(job((6, 40), k=9))
    with pytest.raises(ArgumentError, match="iterate at least once"):
        TritonEngine().run([replace(one, last=None)], 0)


SLOPES = {
    "acting": Slope(0.25, 2),
    "not acting": Slope(1e6, 2),
    "tensor": Slope(torch.tensor(0.4, device=DEVICE), 2),
    "linear": Slope(0.25, 1),
    "linear, not acting": Slope(1e6, 1),
    "linear from zero": Slope(0.0, 1),
    "paper": None,
}


@runs
@pytest.mark.parametrize("n_iter", [0, 1, 2])
@pytest.mark.parametrize("dtype", [f32, f64, bf16], ids=str)
def test_slopes_of_all_kinds_beside_each_other(dtype, n_iter):
    factors = 0.1, torch.tensor(0.3, device=DEVICE)
    jobs = [
        job((6, 40 + i), dtype, factor=factors[i % 2], rule=slope, seed=i)
        for i, slope in enumerate(SLOPES.values())
    ]
    jobs.append(job((3, 4, 16), dtype, layout="soi", rule=Slope(6.0, 2)))
    before = [one.grad.clone() for one in jobs]
    check(jobs, n_iter)
    for one, grad, name in zip(jobs, before, SLOPES, strict=False):
        assert torch.equal(one.grad, grad) == name.endswith("not acting")


@runs
@pytest.mark.parametrize("slope", [Slope(0.5, 2), Slope(1e6, 2), Slope(0.5, 1), Slope(0.0, 1)])
def test_a_nan_is_not_below_the_target(slope):
    jobs = [job((4, 8), rule=slope, seed=i) for i in range(3)]
    jobs[0].weight[2, 3] = torch.nan
    jobs[1].weight.zero_()
    grad = jobs[1].grad.clone()
    check(jobs)
    assert jobs[0].grad.isnan().all()
    assert torch.equal(jobs[1].grad, grad)


@runs
@pytest.mark.parametrize(
    ("dtype", "n_iter"),
    [(f32, 0), (f32, 1), (f64, 3), (bf16, 1)],
    ids=["f32-0", "f32-1", "f64-3", "bf16-1"],
)
def test_channels_last(dtype, n_iter):
    """Convolutions in 2 and 3 dimensions, in groups, zero, bounded, beside a matrix."""
    shapes = [(24, 3, 3, 3), (8, 16, 2, 5), (6, 4, 2, 3, 2)]
    jobs = [job(shape, dtype) for shape in shapes]
    jobs += [job((8, 3, 5, 5), dtype, layout=Layout("(go)ihw", 4)), job((6, 16, 3, 3), dtype)]
    jobs = [in_channels_last(one) for one in jobs]
    jobs[-1].weight.zero_()
    assert not any(one.weight.is_contiguous() for one in jobs)
    if n_iter:
        bound = in_channels_last(bounded((8, 16, 3, 3), 0.5, dtype))
        jobs.append(replace(bound, grad=bound.weight))
    check([*jobs, job((6, 40), dtype)], n_iter)


@runs
@pytest.mark.parametrize(
    ("dtype", "n_iter", "k"), [(f32, 1, 1), (f64, 2, 2), (bf16, 0, 1)], ids=str
)
def test_inputs_before_outputs(dtype, n_iter, k):
    """Transposed convolutions, alone and in groups, and layers as GPT-2's, beside others."""
    jobs = [
        job((10, 12, 3, 3), dtype, layout="iohw", k=k),
        job((20, 6, 5), dtype, layout="iok", k=k, rule=Slope(0.5, 2)),
        job((8, 6, 3, 3), dtype, layout=Layout("(gi)ohw", 2), k=k),
        job((8, 40), dtype, layout="io", k=k),
        job((6, 7, 5), dtype, layout="sio", k=k),
        job((6, 4, 3), dtype, layout="ioo", k=k),
        job((9, 13), dtype, k=k),
    ]
    if n_iter:
        jobs.append(bounded((9, 5, 2, 2), 0.5, dtype, layout="iohw", k=k))
    check(jobs, n_iter)


@runs
def test_wide_matrices_with_inputs_before_outputs(monkeypatch):
    monkeypatch.setattr(triton_device, "most_columns", lambda *args: 64)
    check([job((100, 6, 3, 3), layout="iohw"), job((9, 7), layout="io")])


@runs
def test_channels_last_of_one_alone_goes_elsewhere():
    one = in_channels_last(job((8, 16, 3, 3)))
    assert TritonEngine().accepts(one)
    assert not TritonEngine().accepts(replace(one, grad=one.grad.contiguous()))
    assert not TritonEngine().accepts(replace(one, weight=one.weight.contiguous()))
    rows = in_channels_last(job((8, 4, 3, 3), layout="ooik"))  # its rows are not whole in memory
    assert not TritonEngine().accepts(rows)


@runs
@pytest.mark.parametrize(
    ("dtype", "n_iter"), [(f32, 1), (f64, 3), (bf16, 1)], ids=["f32-1", "f64-3", "bf16-1"]
)
def test_bounds_beside_terms(dtype, n_iter):
    """A bound of 1e6 does not act, and 1e-3 does; a zero and a NaN stay as they are."""
    limit = torch.tensor(0.5, device=DEVICE, dtype=f64)
    jobs = [
        bounded((6, 40), 1e-3, dtype),
        bounded((40, 6), 1e6, dtype),
        bounded((12, 108), limit, dtype),
        bounded((5, 7), 1e6, dtype, code=EXACTLY),
        bounded((3, 40, 16), 6.0, dtype, layout="soi"),
        bounded((4, 8), 1.0, dtype),
        bounded((4, 9), 1.0, dtype, code=EXACTLY),
        job((6, 33), dtype),
    ]
    jobs[5].weight[2, 3] = torch.nan
    jobs[6].weight.zero_()
    before = [one.weight.clone() for one in jobs]
    found = check(jobs, n_iter)
    torch.testing.assert_close(float(found.triplets[0].sigma), 1e-3, rtol=1e-5, atol=0)
    for place in (1, 5, 6):
        torch.testing.assert_close(
            jobs[place].weight, before[place], rtol=0, atol=0, equal_nan=True
        )
    for place in (0, 2, 3):
        assert not torch.equal(jobs[place].weight, before[place])


@runs
def test_targets_may_change_from_step_to_step():
    engine, target = TritonEngine(), torch.tensor(3.0, device=DEVICE, dtype=f64)
    jobs = [job((4, 6)), job((5, 6))]
    for slope in (Slope(0.1, 2), Slope(2.0, 2), Slope(target, 2), Slope(2.0, 1), None):
        check([replace(one, rule=slope) for one in jobs], engine=engine)
    jobs = [replace(one, rule=Slope(target, 2)) for one in jobs]
    for value in (1.0, 5.0):
        target.fill_(value)
        check(jobs, engine=engine)


@runs
@pytest.mark.parametrize("n_iter", [0, 1, 3])
def test_jobs_without_gradients_are_only_iterated(n_iter):
    jobs = [job((6, 40)), job((3, 4, 16), layout="soi"), job((7, 5)), job((2, 8), bf16)]
    for place in (0, 1, 3):
        jobs[place].grad = None
    check(jobs, n_iter)


@runs
def test_a_job_list_is_prepared_once(monkeypatch):
    engine = TritonEngine()
    jobs = JobList([job((6, 40)), job((5, 7)), job((4, 8), bf16), job((2, 3, 4), layout="soi")])
    prepared = []
    addresses_of = triton_engine._addresses_of
    monkeypatch.setattr(
        triton_engine, "_addresses_of", lambda *args: prepared.append(args) or addresses_of(*args)
    )
    for step in range(4):
        for i, one in enumerate(jobs):
            one.grad = torch.randn_like(one.weight) if i or step != 2 else None
            one.factor = 0.1 * step
        jobs.addresses = [0 if one.grad is None else one.grad.data_ptr() for one in jobs]
        check(jobs, engine=engine, n_iter=step % 3)
    assert len(prepared) == 2  # one for each dtype


@runs
def test_a_job_list_whose_tensors_move_is_followed():
    engine, jobs = TritonEngine(), JobList([job((6, 40)), job((4, 8), bf16), job((5, 7))])
    jobs.moves = True
    for step in range(3):
        for one in jobs:
            one.weight, one.grad = one.weight + step, torch.randn_like(one.weight)
        jobs.start_from([Triplet(*[x.clone() for x in one.last]) for one in jobs])
        jobs.addresses = [one.grad.data_ptr() for one in jobs]
        found = check(jobs, engine=engine, n_iter=(1, 0, 2)[step])
        assert [*map(id, found.triplets)] == [id(one.last) for one in jobs]


@pytest.mark.parametrize(
    ("room", "expected"),
    [(227 * 1024, (16384, 8192, 16384)), (99 * 1024, (8192, 4096, 16384))],
    ids=["H100", "a workstation card"],
)
def test_the_number_of_columns_follows_the_shared_memory(monkeypatch, room, expected):
    """A wider weight goes elsewhere, alone: no launch fails and turns the kernels off for all."""
    properties = SimpleNamespace(shared_memory_per_block_optin=room)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    most = triton_device.most_columns.__wrapped__
    assert tuple(most(dtype, torch.device("cuda")) for dtype in (f32, f64, bf16)) == expected


@runs
def test_a_captured_step_of_a_list_keeps_its_numbers(monkeypatch):
    engine, jobs = TritonEngine(), JobList([job((6, 40)), job((5, 7))])

    def table_of(factor, *, captured=False):
        for module in (graph_tables, triton_group):
            monkeypatch.setattr(module, "capturing", lambda device: captured)
        if factor != jobs[0].factor:
            jobs.renew()
        for one in jobs:
            one.factor = factor
        engine.run(jobs, 1)
        (group,) = engine._groups.values()
        return group._penalties(jobs, None)[0]

    read = table_of(0.1)
    assert table_of(0.1, captured=True) is read
    before = read.tolist()
    assert table_of(0.7) is not read
    assert read.tolist() == before


@runs
def test_a_factor_on_the_cpu_is_read_in_each_step(monkeypatch):
    if INTERPRETED:  # where the weights are on the CPU too
        monkeypatch.setattr(triton_group.Group, "_is_on_device", lambda self, x: False)
    engine, factor, target = TritonEngine(), torch.tensor(0.1), torch.tensor(0.5, dtype=f64)
    jobs = JobList([job((6, 40)), job((5, 7), rule=Slope(target, 2))])
    for one in jobs:
        one.factor = factor
    assert all(map(engine.accepts, jobs))
    for value in (0.1, 0.4, 0.2):
        factor.fill_(value)
        target.fill_(2 * value)
        jobs.addresses = [one.grad.data_ptr() for one in jobs]
        check(jobs, engine=engine)
    monkeypatch.setattr(triton_group, "capturing", lambda device: True)
    with pytest.raises(ArgumentError, match="on the CPU, which the replays of a CUDA graph"):
        engine._groups[next(iter(engine._groups))]._penalties(list(jobs), None)


class Launches:
    """A kernel that counts how it is launched: by Triton, or as it was compiled."""

    def __init__(self, kernel):
        self.kernel, self.by_triton, self.bound = kernel, 0, 0

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.by_triton += 1
            self.kernel[grid](*args, **options)
            return self.Compiled(self)

        return launch

    class Compiled:
        def __init__(self, owner):
            self.owner = owner

        def __getitem__(self, grid):
            def launch(*args):  # the constants too, in the order of the kernel's arguments
                self.owner.bound += 1
                self.owner.kernel[grid](*args)

            return launch


@pytest.mark.skipif(not INTERPRETED, reason="it looks into the launches of the interpreter")
def test_triton_launches_each_case_once(monkeypatch):
    """Later steps launch the compiled kernels: Triton's own launch costs 16 µs each time."""
    names = ("products", "columns", "directions", "update")
    real = triton_device.kernels()
    kernels = {name: Launches(getattr(real, name)) for name in names}
    monkeypatch.setattr(triton_device, "kernels", lambda: SimpleNamespace(tl=real.tl, **kernels))
    engine, jobs = TritonEngine(), JobList([job((6, 40)), job((5, 7))])

    def steps(n_iter):
        for one in jobs:
            one.grad = torch.randn_like(one.weight)
        jobs.addresses = [one.grad.data_ptr() for one in jobs]
        jobs.renew()
        check(jobs, n_iter, engine=engine)
        return [(kernels[name].by_triton, kernels[name].bound) for name in names]

    assert steps(1) == [(1, 0), (1, 0), (0, 0), (1, 0)]
    assert steps(1) == [(1, 1), (1, 1), (0, 0), (1, 1)]
    assert steps(2) == [(2, 2), (1, 3), (1, 0), (1, 2)]  # the second iteration has no fresh part
    assert steps(2) == [(2, 4), (1, 5), (1, 1), (1, 3)]
    for factor, expected in ((torch.tensor(0.3), 2), (torch.tensor(0.3, dtype=f64), 3), (0.2, 3)):
        for one in jobs:
            one.factor = factor
        assert steps(1)[3][0] == expected


@runs
def test_a_job_list_whose_results_go_elsewhere_is_not_remembered():
    engine, one = TritonEngine(), job((6, 40))
    last = Triplet(one.last.sigma, one.last.u, one.V.clone())
    for jobs in (JobList([replace(one, last=None)]), JobList([replace(one, last=last)])):
        check(jobs, engine=engine)
        assert engine not in jobs.memo


@runs
def test_a_copy_has_no_memory_of_the_other():
    engine = TritonEngine(fallback=REFERENCE)
    check([job((4, 6))], engine=engine)
    other = copies.deepcopy(engine)
    assert not other._groups
    assert other._fallback.in_place


def test_nothing_gives_nothing():
    assert TritonEngine().run([], 1) == ([], [])


@runs
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": {"0.weight": 0.3, "*": 1e6}},
        {"power": 1},
        {"target": torch.tensor(0.7, device=DEVICE)},
    ],
    ids=str,
)
def test_a_regularizer_keeps_its_kernels_whatever_the_penalty(options, monkeypatch):
    spectral_torch = pytest.importorskip("spectral_torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(8, 4, dtype=bf16))
    models = model.to(DEVICE), copies.deepcopy(model).to(DEVICE)
    regs = [
        spectral_torch.SpectralNormRegularizer(m, factor=0.3, kernels=kernels, **options)
        for m, kernels in zip(models, (True, False), strict=True)
    ]
    regs[0]._jobs.engines = TritonEngine(), Never()  # the CPU has another engine before it
    before = regs[0].state_dict()
    for step in range(3):  # checked, then repeated
        for m, reg in zip(models, regs, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in m.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p)
            reg.add_gradients_()
        for p, q in zip(*(m.parameters() for m in models), strict=True):
            rtol = 1e-2 if p.dtype == bf16 else 1e-4
            torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=rtol)
    after = regs[0].state_dict()
    assert all(after[key] is tensor for key, tensor in before.items())
    close(after, regs[1].state_dict(), 1e-4, 1e-4)


class Never(ReferenceEngine):
    """An engine that no job should reach."""

    def run(self, jobs, n_iter):
        raise AssertionError(f"{[one.name for one in jobs]} should go through the kernels")


# Where Triton fails


def failing(monkeypatch, error, *, of=lambda group: True):
    """Let the launches of some groups raise ``error``, and those of others do nothing."""

    def run(self, addresses, jobs, n_iter):
        if error is not None and of(self):
            raise error

    monkeypatch.setattr(triton_group.Group, "run", run)


@pytest.mark.parametrize("last", [True, False])
def test_kernels_that_cannot_be_compiled_are_warned_of_once(monkeypatch, last):
    failing(monkeypatch, RuntimeError("no C compiler"))
    engine = TritonEngine(fallback=REFERENCE)
    jobs = [job((6, 40), last=last), job((5, 7), bf16)]
    expected = [copy(one) for one in jobs]
    results = []
    with pytest.warns(RuntimeWarning, match="Triton's kernels cannot be used here.*no C compiler"):
        results.append(engine.run(jobs, 1))
    assert not engine.accepts(jobs[0])
    results.append(engine.run(jobs, 2))  # as a division that was made before does; no warning
    for n_iter, result in zip((1, 2), results, strict=True):
        wanted = REFERENCE.run(expected, n_iter)
        for one, triplet, triplet_ in zip(jobs, result.triplets, wanted.triplets, strict=True):
            assert triplet.V is one.V
            assert one.last is None or triplet.u is one.last.u
            if n_iter == 2:
                torch.testing.assert_close(tuple(triplet), tuple(triplet_))
        expected = [
            replace(one, V=triplet.V, last=triplet if one.last else None)
            for one, triplet in zip(expected, wanted.triplets, strict=True)
        ]
    for one, other in zip(jobs, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_jobs_that_the_fallback_does_not_accept_go_to_the_reference(monkeypatch):
    failing(monkeypatch, RuntimeError("no C compiler"))
    fallback = importlib.import_module("spectral_torch.engines.foreach").ForeachEngine()
    jobs = [job((6, 40)), job((5, 7), bf16), job((2, 3, 4), layout="soi")]
    expected = [copy(one) for one in jobs]
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        found = TritonEngine(fallback=fallback).run(jobs, 1)
    wanted = REFERENCE.run(expected, 1)
    for one, other, x, y in zip(jobs, expected, found.triplets, wanted.triplets, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
        torch.testing.assert_close(tuple(x), tuple(y))
        assert x.V is one.V


def test_only_the_jobs_that_failed_and_later_ones_fall_back(monkeypatch):
    failing(monkeypatch, RuntimeError("no"), of=lambda group: group.weight_dtype == bf16)
    engine = TritonEngine(fallback=REFERENCE)
    jobs = [job((6, 40)), job((5, 7), bf16), job((5, 8), f64)]
    before = [one.grad.clone() for one in jobs]
    with pytest.warns(RuntimeWarning, match="no"):
        engine.run(jobs, 1)
    changed = [not torch.equal(one.grad, grad) for one, grad in zip(jobs, before, strict=True)]
    assert changed == [False, True, True]  # the first one's kernels here do nothing


@pytest.mark.parametrize("error", [RuntimeError("illegal address"), torch.OutOfMemoryError()])
def test_kernels_that_fail_later_are_an_error(error, monkeypatch):
    engine, jobs = TritonEngine(fallback=REFERENCE), [job((6, 40))]
    failing(monkeypatch, None)
    engine.run(jobs, 1)
    failing(monkeypatch, error)
    with pytest.raises(type(error)):
        engine.run(jobs, 1)


def test_memory_that_runs_out_is_an_error_from_the_start(monkeypatch):
    failing(monkeypatch, torch.OutOfMemoryError())
    with pytest.raises(torch.OutOfMemoryError):
        TritonEngine(fallback=REFERENCE).run([job((6, 40))], 1)


def test_a_failure_in_a_capture_is_an_error(monkeypatch):
    engine, jobs = TritonEngine(fallback=REFERENCE), [job((6, 40))]
    for module in (triton_engine, triton_group):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run one first"):
        engine.run(jobs, 1)


def test_without_a_fallback_a_failure_is_an_error(monkeypatch):
    failing(monkeypatch, RuntimeError("no C compiler"))
    with pytest.raises(RuntimeError, match="no C compiler"):
        TritonEngine().run([job((6, 40))], 1)
    with pytest.raises(ArgumentError, match="in place"):
        TritonEngine(fallback=ReferenceEngine())


def test_the_tables_of_a_capture_are_its_own(monkeypatch):
    table = graph_tables.GraphTable((2,), torch.int64, torch.device("cpu"))

    def get(*values, capturing=False):
        monkeypatch.setattr(graph_tables, "capturing", lambda device: capturing)
        found, _ = table.get(values, lambda key: (np.array(key), None))
        assert found.tolist() == list(values)
        return found

    first = get(1, 2)
    assert get(2, 3) is first  # nothing else reads it: filled anew
    assert not table.captured
    assert get(2, 3, capturing=True) is first
    captured = get(3, 4, capturing=True)
    assert captured is not first
    assert get(3, 4, capturing=True) is captured
    moved = get(5, 6)
    assert get(3, 4) is moved  # the captured one may not have been filled yet
    assert (first.tolist(), captured.tolist()) == ([2, 3], [3, 4])
    assert table.captured
    for i in range(graph_tables._SPARE_TABLES):
        get(i, i, capturing=True)
    with pytest.raises(RuntimeError, match="run one between them"):
        get(9, 9, capturing=True)


def layers(count):
    return [job((12, 108 + 12 * i), seed=i) for i in range(count)]


@on_gpu
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("moved", [False, True])
def test_a_graph_replays_steps(moved, k):
    jobs = [job(shape, seed=i, k=k, **more) for i, (shape, more) in enumerate(MIXED[:-1])]
    eager = [copy(one) for one in jobs]
    engine, side = TritonEngine(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        engine.run([copy(one) for one in jobs] if moved else jobs, 1)
    torch.cuda.current_stream().wait_stream(side)
    for one, other in zip(jobs, eager, strict=True):
        one.V.copy_(other.V)
        one.grad.copy_(other.grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.run(jobs, 1)
    for i in range(10):
        graph.replay()
        if i == 4:  # a step beside the graph, of other tensors, changes nothing for it
            engine.run([copy(one) for one in jobs], 1)
    reference = TritonEngine()
    for _ in range(10):
        reference.run(eager, 1)
    for one, other in zip(jobs, eager, strict=True):
        close(one.grad, other.grad, 0, 0)
        close(one.V, other.V, 0, 0)
        close(one.last.sigma, other.last.sigma, 0, 0)


def events_of(jobs, engine):
    from torch.profiler import ProfilerActivity, profile

    engine.run(jobs, 1)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        engine.run([replace(one, grad=one.grad.clone(), factor=0.7) for one in jobs], 1)
        torch.cuda.synchronize()
    return [event.name for event in profiled.events()]


@on_gpu
def test_nothing_is_copied_to_the_host():
    assert not [name for name in events_of(layers(6), TritonEngine()) if "DtoH" in name]


@on_gpu
def test_as_many_launches_for_many_layers():
    few, many = (
        [
            name
            for name in events_of(layers(count), TritonEngine())
            if name in ("products", "columns", "update", "directions")
        ]
        for count in (4, 40)
    )
    assert few == many
    assert len(set(few)) == 3


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels run in this process")
@pytest.mark.thorough
def test_in_triton_s_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", *INTERPRETABLE],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "test_machine.py::TestInterpreted" in done.stdout  # of those that passed
    assert "test_equals_the_reference" in done.stdout


WITHOUT = """
import sys
sys.modules["triton"] = None
sys.path[:0] = ["adapters"]
from spectral_torch.engines import triton, triton_device
assert not triton_device.available()
assert not triton_device.interpreted()
assert triton.TritonEngine().run([], 1) == ([], [])
"""


def test_without_triton_it_is_not_available():
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, check=True)


# Launches of `TritonEngine`, compiled for sm_90 and not run: the driver has no device.
COMPILE = """
import re, subprocess, sys, tempfile
import torch
from dataclasses import replace
sys.path[:0] = ["adapters", "tests/support"]
import triton_jobs as here
from spectral_core.engine import Bound, Slope
from spectral_torch.engines import triton as engine, triton_device
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Driver())
triton_device.processors = lambda device: 132
kernels, run = triton_device.kernels(), triton.JITFunction.run
compiled = {}

def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    compiled[kernel.hash] = self.__name__, kwargs, kernel.asm["ptx"], kernel.asm["cubin"]

triton.JITFunction.run = compile_only
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
models = [
    [((n, m), W, G)]
    for W, G in ((f32, f32), (bf16, bf16), (f16, f16), (bf16, f32), (f64, f64))
    for n, m in ((64, 1024), (64, 4096), (64, 8192))
]
models += [[((64, 16384), W, W)] for W in (f32, bf16)]
models += [[((64, n), W, W) for n in (768, 3072)] for W in (f32, bf16)]
models += [[((12, 108 + 108 * i), f32, f32) for i in range(36)] + [((24, 27), f32, f32)]]
models += [[((64, 128, 3, 3), W, W)] for W in (f32, bf16)]
models = [(model, 1) for model in models]
models += [([((64, 20000), f32, f32)], 1)]  # read twice
turned = [here.job((64, 128, 4, 4), W, layout="iohw", k=k) for W in (f32, bf16) for k in (1, 2)]
models += [([((40000, 256), f32, f32)], k) for k in (1, 4)]  # with many sums
models += [([((64, 1024), f32, f32)], k) for k in (2, 4, 8)]
models += [([((64, n), W, W)], 4) for W, n in ((bf16, 1024), (f64, 1024), (f32, 20000))]
models += [([((64, 20000), f32, f32)], 8)]
models += [([((64, 8192), f32, f32)], 2), ([((64, 4096), f32, f32)], 4), ([((9, 96), f32, f32)], 3)]
for one in turned:
    engine.TritonEngine().run([one], 1)
for model, k in models:
    jobs = [here.job(shape, W, grad=G, k=k) for shape, W, G in model]
    if len(model[0][0]) == 4:
        jobs = list(map(here.in_channels_last, jobs))
    for n_iter in (2, 0):
        engine.TritonEngine().run(jobs, n_iter)
    number = torch.tensor(0.1)
    changes = [{"factor": number}, {"rule": Slope(0.5, 2)}, {"rule": Slope(number, 1)}]
    for change in (*changes, {"rule": Bound(number, 3)}):
        engine.TritonEngine().run([replace(one, **change) for one in jobs], 1)
cuobjdump = triton.knobs.nvidia.cuobjdump.path
for name, kwargs, ptx, cubin in compiled.values():
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(key + r":(\\d+)", said)[1]) for key in ("REG", "STACK"))
    wide = len(re.findall(r"ld\\.global[^\\n]*\\.v[248]|cp\\.async\\.cg", ptx))
    print("kernel", name, registers, stack, wide, *(f"{k}={v}" for k, v in kwargs.items()))
"""


@pytest.mark.skipif(INTERPRETED, reason="compiled in the process that is not interpreted")
@pytest.mark.thorough
def test_compiles_for_hopper_without_spills():
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "Cannot find" in done.stderr:  # Debian's and conda's Triton come without NVIDIA's tools
        pytest.skip("Triton has no ptxas or cuobjdump here")
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [line.split() for line in done.stdout.splitlines() if line.startswith("kernel ")]
    of_rows = {
        *["row_products", "orthonormalize", "row_columns", "sort_rows", "renew", "left_vectors"]
    }
    of_one = {"products", "add_sums", "columns", "directions", "update"}
    assert {kernel[1] for kernel in kernels} == of_one | of_rows
    # Spilled registers lie on the stack: none, but for an address or two that wait there, outside
    # of the loop, in a kernel of many widths or of float64. Eight vectors of more columns than
    # registers hold are the exception.
    for kernel in kernels:
        classes = [int(part[8:]) for part in kernel if part.startswith("CLASSES=")]
        many = (classes and classes[0].bit_count() > 2) or "ACC=fp64" in kernel
        in_chunks = "K=8" in kernel and classes == [1 << 31]
        allowed = 64 if in_chunks else 24 if many else 0
        assert int(kernel[3]) <= allowed, " ".join(kernel)
    # 16-byte loads wherever a large tensor is read.
    large = "products", "row_products", "update"
    turned = "TRANSPOSED=True"  # their elements are apart in memory
    assert all(int(one[4]) > 0 for one in kernels if one[1] in large and turned not in one)
