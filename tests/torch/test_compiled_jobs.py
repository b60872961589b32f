"""Test that the jobs of a compiled step are kept, without its tensors."""

import copy
import gc
import weakref

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import spectral_core as sc  # noqa: E402
from spectral_core.engine import Triplet  # noqa: E402
from spectral_torch import SpectralNormRegularizer, _compile  # noqa: E402
from spectral_torch._compiled_jobs import CompiledJobs  # noqa: E402
from spectral_torch._jobs import LISTS  # noqa: E402
from spectral_torch.engines import engines  # noqa: E402
from torch_zoo import gradients, zoo  # noqa: E402

# Functionalized graphs hand copies to the operation, and others the tensors themselves.
BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def made(monkeypatch):
    """The names of the jobs that are made, one list each time."""
    found, make = [], _compile._made

    def counted(*args):
        jobs = make(*args)
        found.append([job.name for job in jobs])
        return jobs

    monkeypatch.setattr(_compile, "_made", counted)
    return found


def other_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def compiled(function, backend="eager"):
    return torch.compile(function, backend=backend, fullgraph=True)


def assert_same(models, regs):
    torch.testing.assert_close(*map(gradients, models), rtol=0, atol=0)
    torch.testing.assert_close(*(reg.state_dict() for reg in regs), rtol=0, atol=0)


OPTIONS = [
    {},
    {"kernels": False},
    {"n_vectors": 2, "n_iter": 2},
    {"target": torch.tensor(0.5), "factor": {"wide.*": torch.tensor(0.1), "*": 0.3}},
    {"target": {"linear.*": 0.7, "*": 0.0}, "power": 1},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_jobs_are_made_once_and_give_what_an_eager_step_gives(options, backend, made):
    models = zoo(), zoo()
    regs = [SpectralNormRegularizer(model, **{"factor": 0.3, **options}) for model in models]
    steps = [regs[0].add_gradients_, compiled(lambda: regs[1].add_gradients_(), backend)]
    for step in range(4):
        for model, act in zip(models, steps, strict=True):
            other_gradients(model, seed=step)
            with torch.no_grad():
                model["conv"].weight.mul_(0.9)
            act()
        assert_same(models, regs)
    assert len(made) == 1


def test_a_step_of_an_optimizer_makes_jobs_twice(made):
    """The terms are added, and taken out."""
    models = zoo(), zoo()
    regs, steps = [], []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regs.append(SpectralNormRegularizer(model, factor=0.3).attach(optimizer))
        steps.append(optimizer.step)
    steps[1] = torch.compile(steps[1], backend="eager")
    for step in range(3):
        for model, act in zip(models, steps, strict=True):
            other_gradients(model, seed=step)
            act()
        assert_same(models, regs)
    assert len(made) == 2


def test_two_regularizers_have_jobs_of_their_own(made):
    models = zoo(), zoo(), zoo(), zoo()
    regs = [
        SpectralNormRegularizer(model, factor=factor)
        for model, factor in zip(models, (0.3, 0.1, 0.3, 0.1), strict=True)
    ]

    def both():
        for reg in regs[2:]:
            reg.add_gradients_()

    act = compiled(both)
    for step in range(3):
        for model in models:
            other_gradients(model, seed=step)
        for reg in regs[:2]:
            reg.add_gradients_()
        act()
        for one, other in ((0, 2), (1, 3)):
            assert_same([models[one], models[other]], [regs[one], regs[other]])
    assert len(made) == 2


def test_a_copy_has_jobs_of_its_own():
    reg = SpectralNormRegularizer(zoo(), factor=0.3)
    for other in (copy.copy(reg), copy.deepcopy(reg)):
        assert other._compiled_jobs is not reg._compiled_jobs
        assert _compile._by_number[other._number] is other._compiled_jobs
    assert _compile._by_number[reg._number] is reg._compiled_jobs


# The operation itself, as a graph calls it


class Operation:
    """A call of the operation with copies of a weight, its gradient and its state."""

    def __init__(self, shape=(5, 7), dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.W, self.G = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        self.state = sc.init({"w": self.W}, layouts={"w": LAYOUT})

    def tensors(self):
        state = self.state
        fields = self.W, self.G, state.v["w"], state.sigma["w"], state.u["w"]
        return [x.clone() for x in fields]

    def run(self, jobs, factor=0.3, target=0.0, tensors=None):
        """Run the operation, and return the copies that it changed."""
        W, G, V, sigma, u = tensors = self.tensors() if tensors is None else tensors
        _compile.run(
            *([_compile.described("w", LAYOUT)], [W], [G], [Triplet(sigma, u, V)]),
            *([factor], [target]),
            power=2,
            n_iter=1,
            engines=_compile.number_of(jobs),
        )
        return tensors

    def expected(self, factor=0.3, target=0.0):
        weights, grads = {"w": self.W}, {"w": self.G}
        grads, state = sc.add_gradient(weights, grads, self.state, factor=factor, target=target)
        return [self.W, grads["w"], state.v["w"], state.sigma["w"], state.u["w"]]


LAYOUT = sc.Layout("oi")
KERNELS = pytest.mark.parametrize("kernels", [True, False])


@KERNELS
def test_a_call_may_have_other_tensors_and_none_is_kept(kernels, made):
    jobs = CompiledJobs(engines(kernels=kernels))
    gc.collect()
    gc.disable()
    try:
        for seed in range(3):
            one = Operation(seed=seed)
            numbers = torch.tensor(0.1 * (seed + 1)), torch.tensor(0.2 * seed)
            found = one.run(jobs, *numbers)
            torch.testing.assert_close(found, one.expected(*numbers))
            kept = [weakref.ref(x) for x in (*found, *numbers)]
            del found, numbers
            assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()
    assert len(made) == 1


def transposed(one):
    tensors = one.tensors()
    tensors[1] = one.G.T.contiguous().T
    return tensors


def read_only(one):
    """A gradient whose graph is recorded goes to another engine."""
    tensors = one.tensors()
    tensors[1].requires_grad_()
    return tensors


OTHERS = {
    "shape": (Operation((3, 4), seed=1), None),
    "dtype": (Operation(dtype=torch.float64, seed=1), None),
    "half": (Operation(dtype=torch.bfloat16, seed=1), None),
    "strides": (Operation(seed=1), transposed),
    "graph": (Operation(seed=1), read_only),
}


@KERNELS
@pytest.mark.parametrize("what", OTHERS)
def test_tensors_of_another_kind_get_new_jobs(what, kernels, made):
    jobs = CompiledJobs(engines(kernels=kernels))
    usual, (other, change) = Operation(), OTHERS[what]
    for one in (usual, usual, other, usual):
        tensors = change(one) if change is not None and one is other else None
        found = one.run(jobs, tensors=tensors)
        rtol = 1e-2 if what == "half" and one is other else 1e-5
        torch.testing.assert_close(found, one.expected(), rtol=rtol, atol=rtol)
    assert len(made) == 3


@KERNELS
def test_a_weight_that_is_negated_lazily_is_read_as_it_is(kernels):
    """PyTorch writes such elements out before it calls an operation."""
    jobs, one = CompiledJobs(engines(kernels=kernels)), Operation()
    for lazy in (False, True):
        tensors = one.tensors()
        if lazy:
            tensors[0] = torch._neg_view(-one.W)
        torch.testing.assert_close(one.run(jobs, tensors=tensors), one.expected())


@KERNELS
def test_after_an_error_nothing_is_kept(kernels, monkeypatch):
    jobs, one = CompiledJobs(engines(kernels=kernels)), Operation()
    one.run(jobs)
    tensors = one.tensors()
    with monkeypatch.context() as patch:
        patch.setattr(_compile, "dispatch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.run(jobs, tensors=tensors)
    kept = [weakref.ref(x) for x in tensors]
    del tensors
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    torch.testing.assert_close(one.run(jobs), one.expected())


def test_few_sets_of_jobs_are_kept():
    jobs, one = CompiledJobs(engines()), Operation()
    for k in range(LISTS + 5):
        one.run(jobs, factor=0.01 * k)
    assert len(jobs._kept) == LISTS
    torch.testing.assert_close(one.run(jobs, factor=0.5), one.expected(factor=0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_deleted_is_freed(backend):
    model = zoo()
    reg = SpectralNormRegularizer(model, factor=0.3)
    act = compiled(lambda reg: reg.add_gradients_(), backend)
    for _ in range(2):
        act(reg)
    number = reg._number
    kept = [weakref.ref(x) for x in (*model.parameters(), *reg._state.v.values(), reg)]
    kept += [weakref.ref(p.grad) for p in model.parameters()]
    assert number in _compile._by_number
    del model, reg, act
    torch._dynamo.reset()
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    assert number not in _compile._by_number


@KERNELS
def test_autograd_notices_what_the_operation_writes(kernels):
    jobs, one = CompiledJobs(engines(kernels=kernels)), Operation()
    tensors = one.tensors()
    before = [x._version for x in tensors]
    one.run(jobs, tensors=tensors)
    changed = [x._version > old for x, old in zip(tensors, before, strict=True)]
    assert changed == [False, True, True, True, True]
