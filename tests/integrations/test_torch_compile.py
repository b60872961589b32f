"""`torch.compile` of the training step: the same weights, no graph more than without the term."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402
from torch._dynamo.backends.registry import lookup_backend  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

import spectral_core as sc  # noqa: E402
from spectral_torch import (  # noqa: E402
    SpectralNormConstraint,
    SpectralNormRegularizer,
    _compile,
)
from spectral_torch._compiled_jobs import CompiledJobs  # noqa: E402
from spectral_torch.engines import engines  # noqa: E402

STEPS = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Counted:
    """A backend that counts the graphs it is given."""

    def __init__(self, backend="aot_eager"):
        self.graphs, self._backend = 0, lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self._backend(graph, inputs)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@contextmanager
def autograd_traced():
    """Newer versions of PyTorch can trace ``backward`` too."""
    config = torch._dynamo.config
    if not hasattr(config, "trace_autograd_ops"):
        yield
        return
    with config.patch(trace_autograd_ops=True):
        yield


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)
    ).to(DEVICE)


def batch(step):
    return torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(step)).to(DEVICE)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
}


def train(backend=None, *, make="SGD", term=True, **options):
    """The model, σ, graphs after each step, and graph breaks in all."""
    torch._dynamo.reset()
    counters.clear()
    model = net()
    optimizer = OPTIMIZERS[make](model.parameters())
    reg = None
    if term:
        reg = SpectralNormRegularizer(model, **{"factor": 0.3, **options}).attach(optimizer)

    def step(x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    if backend is not None:
        step = torch.compile(step, backend=backend)
    graphs = []
    with autograd_traced():
        for i in range(STEPS):
            step(batch(i))
            graphs.append(backend.graphs if backend else 0)
    sigmas = reg.sigmas() if reg else {}
    return dict(model.named_parameters()), sigmas, graphs, sum(counters["graph_break"].values())


def assert_same(found, expected):
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_whole_step_has_no_break_and_no_recompilation_more(make):
    without = train(Counted(), make=make, term=False)
    found = train(Counted(), make=make)
    assert_same(found, train(make=make))
    graphs, breaks = found[2:]
    assert breaks == without[3]  # PyTorch's own, within Optimizer.step
    assert graphs[1:] == [graphs[1]] * (STEPS - 1)
    assert graphs[-1] <= without[2][-1] + 2  # the term is added in one, taken out in the other


@pytest.mark.parametrize(
    "options",
    [
        {"kernels": False},
        {"n_vectors": 2, "n_iter": 2},
        {"target": 0.5, "power": 1},
        {
            "factor": {"0.*": torch.tensor(0.2, device=DEVICE), "*": 0.3},
            "target": {"2.*": 0.7, "*": 0.0},
        },
        {"every_n_steps": 2},
        pytest.param({"factor": lambda step: 0.1 * (step + 1)}, id="a schedule"),
    ],
    ids=str,
)
def test_options(options):
    assert_same(train(Counted(), **options), train(**options))


@pytest.mark.skipif(shutil.which("cc") is None, reason="Inductor needs a C compiler")
def test_inductor():
    assert_same(train(Counted("inductor")), train())


def plain_sgd(parameters, reg):
    reg.add_gradients_()
    with torch.no_grad():
        for p in parameters:
            p -= 0.1 * p.grad


@pytest.mark.parametrize("factor", [0.3, {"0.*": 0.2, "4.weight": 0.5, "*": 0.3}], ids=str)
def test_the_term_is_within_one_graph(factor):
    models = net(), net()
    regs = [SpectralNormRegularizer(model, factor=factor) for model in models]
    backend = Counted()
    fast = torch.compile(plain_sgd, backend=backend, fullgraph=True)
    for i in range(3):
        for model, reg, step in zip(models, regs, (plain_sgd, fast), strict=True):
            model.zero_grad()
            model(batch(i)).square().mean().backward()
            step(list(model.parameters()), reg)
    assert backend.graphs == 1
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


def test_a_schedule_in_a_tensor_never_recompiles():
    model, backend = net(), Counted()
    factor = torch.tensor(0.0, device=DEVICE)
    reg = SpectralNormRegularizer(model, factor=factor)
    fast = torch.compile(lambda: reg.add_gradients_(), backend=backend, fullgraph=True)
    lengths = []
    for value in (0.0, 1.0, 2.0):
        factor.fill_(value)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        fast()
        lengths.append(float(torch.linalg.matrix_norm(model[4].weight.grad)))
    assert backend.graphs == 1
    sigma = float(reg.sigmas()["4.weight"])
    assert lengths == pytest.approx([0.0, sigma, 2 * sigma], rel=1e-3)


def test_a_schedule_goes_on_in_compiled_calls_by_hand():
    asked = []

    def factor(step):
        asked.append(step)
        return 0.1

    model = net()
    reg = SpectralNormRegularizer(model, factor=factor)
    fast = torch.compile(lambda: reg.add_gradients_(), backend="eager")
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        asked.clear()
        fast()
    assert asked == [2]


def test_the_bound_is_kept_after_a_compiled_step():
    models = net(), net()
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        SpectralNormConstraint(model, bound=0.5).attach(optimizer)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for i in range(STEPS):
            optimizer.zero_grad()
            model(batch(i)).square().mean().backward()
            step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)
    norm = float(torch.linalg.matrix_norm(models[1][4].weight.detach(), 2))
    assert norm == pytest.approx(0.5, rel=0.05)


def test_the_compiler_is_not_imported_before_it_is_used():
    code = "import sys, spectral_torch; print('torch._dynamo' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    assert found.stdout.strip() == "False"


def test_a_model_that_was_moved_is_followed():
    model = net()
    reg = SpectralNormRegularizer(model, factor=0.3)
    model.double()
    fast = torch.compile(lambda: reg.add_gradients_(), backend="aot_eager")
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        fast()
    assert reg.sigmas()["4.weight"].dtype == torch.float64
    expected = 0.3 * float(reg.sigmas()["4.weight"])
    assert float(torch.linalg.matrix_norm(model[4].weight.grad)) == pytest.approx(expected)


def test_a_weight_that_was_frozen_takes_part_again():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reg = SpectralNormRegularizer(model, factor=0.3, restore_gradients=False).attach(optimizer)
    step, weight = torch.compile(optimizer.step, backend="aot_eager"), model[4].weight
    for frozen in (False, True, False):
        weight.requires_grad_(not frozen)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        step()
    expected = 0.3 * float(reg.sigmas()["4.weight"])
    assert float(torch.linalg.matrix_norm(weight.grad)) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_finds_the_operation_well_formed(dtype):
    W = torch.randn(4, 3, dtype=dtype)
    layout, jobs = sc.Layout("oi"), CompiledJobs(engines(kernels=False))
    state = sc.init({"w": W})
    empty = [[], [0.0], []]
    torch.library.opcheck(
        torch.ops.spectral_torch.step_.default,
        (
            *([W], [torch.zeros_like(W)], [state.v["w"]], [state.sigma["w"]], [state.u["w"]]),
            *([0.3], *empty, _compile.described("w", layout), 2, 1, _compile.number_of(jobs)),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )
