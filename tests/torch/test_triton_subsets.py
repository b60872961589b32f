"""Test steps in which other weights have gradients each time: experts, LayerDrop, frozen layers."""

import random

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from spectral_core.engine import JobList, Slope  # noqa: E402
from spectral_torch import SpectralNormRegularizer  # noqa: E402
from triton_jobs import (  # noqa: E402
    DEVICE,
    TritonEngine,
    bounded,
    check,
    graph_tables,
    job,
    runs,
    triton_group,
)

# Of these, two have the same shape.
SHAPES = [(6, 40), (5, 7), (6, 40), (4, 33), (3, 4, 16), (9, 3), (2, 65), (7, 7), (1, 9), (8, 8)]


def weights():
    jobs = [job(s, layout="soi" if len(s) == 3 else None, seed=i) for i, s in enumerate(SHAPES)]
    return [*jobs, job((5, 6), rule=Slope(0.5, 2)), bounded((4, 12), 0.5)]


def subsets(count, of, seed=0):
    rng = random.Random(seed)
    return [sorted(rng.sample(range(of), rng.randint(2, of))) for _ in range(count)]


def as_list(jobs):
    jobs = JobList(jobs)
    jobs.addresses = [one.grad.data_ptr() for one in jobs]
    return jobs


@pytest.mark.parametrize("kind", [list, as_list])
def test_a_new_set_of_weights_needs_no_new_tables(kind, monkeypatch):
    groups, filled = [], []
    make, fill = triton_group.Group._make_work, graph_tables.GraphTable._fill
    monkeypatch.setattr(
        triton_group.Group, "_make_work", lambda self: groups.append(self) or make(self)
    )
    monkeypatch.setattr(
        graph_tables.GraphTable, "_fill", lambda *args: filled.append(args) or fill(*args)
    )
    monkeypatch.setattr(triton_group.Group, "_launch", lambda *args: None)
    engine, jobs, counts = TritonEngine(), weights(), []
    for step, mine in enumerate(subsets(50, len(jobs))):
        engine.run(kind([jobs[i] for i in mine]), step % 3)
        counts.append(len(groups))
    assert counts[-1] <= 6  # sets join until one has them all
    assert counts[-1] == counts[15]
    assert len(engine._groups) <= 2
    assert len(filled) <= 2 * len(counts)  # addresses and factors of each step, without waiting


@runs
def test_parts_of_a_set_leave_the_others_alone():
    engine, jobs = TritonEngine(), weights()
    for step, mine in enumerate(subsets(9, len(jobs))):
        before = [(one.V.clone(), one.last.sigma.clone(), one.grad.clone()) for one in jobs]
        check([jobs[i] for i in mine], n_iter=step % 3, engine=engine)
        for i in {*range(len(jobs))} - {*mine}:
            now = jobs[i].V, jobs[i].last.sigma, jobs[i].grad
            assert all(map(torch.equal, now, before[i]))
    assert len(engine._groups) < 9


@runs
def test_a_small_part_has_tables_of_its_own():
    """Of hundreds of weights, one alone should not launch the programs of all."""
    engine, jobs = TritonEngine(), [job((3, 3 + i)) for i in range(20)]
    check(jobs, engine=engine)
    for one in jobs[:3]:
        check([one], engine=engine)
    assert len(engine._groups) == 4
    check(jobs[:10], engine=engine)
    assert len(engine._groups) == 4


@runs
def test_sets_of_the_same_shapes_share_tables():
    engine, jobs = TritonEngine(), [job((6, 40), seed=i) for i in range(3)]
    for one in jobs:
        check([one], engine=engine)
    assert len(engine._groups) == 1


@pytest.mark.parametrize("kernels", [True, False])
def test_a_set_of_weights_that_comes_back_is_not_validated_again(kernels):
    def model():
        torch.manual_seed(0)
        return torch.nn.ModuleList([torch.nn.Linear(3 + i, 4) for i in range(4)]).to(DEVICE)

    models = model(), model()
    regs = [SpectralNormRegularizer(m, factor=0.3, kernels=kernels) for m in models]
    built, build = [], regs[0]._jobs.build
    regs[0]._jobs.build = lambda *args: built.append(args) or build(*args)
    sets = [(0, 1, 2), (1,), (0, 3)]
    for step in range(12):
        for m, reg in zip(models, regs, strict=True):
            for i, layer in enumerate(m):
                present = i in sets[step % 3]
                layer.weight.grad = torch.full_like(layer.weight, 0.1 * step) if present else None
            regs[1]._jobs.clear()
            reg.add_gradients_()
        for layer, other in zip(*models, strict=True):
            if layer.weight.grad is not None:
                torch.testing.assert_close(layer.weight.grad, other.weight.grad)
    assert len(built) == len(sets)
    torch.testing.assert_close(*(reg.state_dict() for reg in regs))


def test_lists_are_bounded_and_keep_no_gradient():
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(7)])
    reg = SpectralNormRegularizer(model)
    for mask in range(1, 128):
        for i, layer in enumerate(model):
            layer.weight.grad = torch.ones(2, 2) if mask >> i & 1 else None
        reg.add_gradients_()
        kept = reg._jobs._kept[reg]
        assert all(one.grad is None for entry in kept.values() for one in entry.jobs)
    assert len(kept) == 64
