"""The step in Triton kernels gives what the plain step gives.

On a CUDA machine the kernels run. Elsewhere Triton interprets them, on CPU tensors; it must be told
so before it is first imported, and no other test should meet it, so that happens in a process of
its own (`test_in_triton_s_interpreter`). What a compiler says without a GPU is tested in another.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from spectral_core import ArgumentError, Layout, PowerIteration  # noqa: E402
from spectral_core._arrays import array_namespace  # noqa: E402
from spectral_core.layout import plan_of  # noqa: E402
from spectral_core.step import Task, plain_step_  # noqa: E402

triton_step = importlib.import_module("spectral_torch.triton_step")

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
INTERPRETED = not CUDA and triton_step.interpreted()
DEVICE = torch.device("cuda" if CUDA else "cpu")
runs = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="no GPU: runs in the process of the interpreter's test"
)
on_gpu = pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def task(shape, dtype=f32, *, grad=None, layout=None, factor=0.1, scale=1.0, last=True, seed=0):
    """A task of its own random numbers, on the device."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=f64)

    plan = plan_of(layout or "oi" + "k" * (len(shape) - 2), shape, "w")
    iterated = f64 if dtype == f64 else f32
    v = draw(plan.right)
    v = (v / v.norm(dim=-1, keepdim=True)).to(DEVICE, iterated)
    weight = (draw(shape) * scale).to(DEVICE, dtype)
    sigma, u = (torch.full(s, 0.5).to(v) for s in (plan.matrix[:-2], plan.matrix[:-1]))
    gradient = draw(shape).to(DEVICE, grad or dtype)
    triple = PowerIteration(sigma, u, v) if last else None
    return Task("w", weight, gradient, v, factor, plan, array_namespace(weight), triple)


def copy(one):
    """The same task, in memory of its own."""
    v, last = one.v.clone(), one.last
    if last is not None:
        last = PowerIteration(last.sigma.clone(), last.u.clone(), v)
    return one._replace(grad=one.grad.clone(), v=v, last=last)


def close(found, expected, rtol, atol):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


def check(tasks, n_iter=1, step=None):
    """The step of the tasks, beside the plain one of copies of them; returns what it gave."""
    assert all(triton_step.takes(one) for one in tasks)
    expected = plain_step_([copy(one) for one in tasks], n_iter)
    found = (step or triton_step.TritonStep())(tasks, n_iter)
    for one, grad, triple, grad_, triple_ in zip(
        tasks, found.grads, found.triples, expected.grads, expected.triples, strict=True
    ):
        assert grad is one.grad
        rtol = 1e-12 if one.v.dtype == f64 else 2e-5
        atol = 1e-13 if one.v.dtype == f64 else 2e-6
        half = {bf16: 2**-7, f16: 2**-10}.get(grad.dtype, 0)  # a tie may go the other way
        size = float(one.factor * triple_.sigma.max())  # of the term, which may cancel the gradient
        for x, y, scale in zip(triple, triple_, (0, 1, 1), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            close(x, y, rtol, atol * scale)
        close(grad, grad_, rtol + half, 5 * atol * max(1.0, size))
    return found


@pytest.fixture(params=[1, 50])
def processors(request, monkeypatch):
    """A machine of few programs, and one of many: then there are many sums to add up."""
    if INTERPRETED:
        monkeypatch.setattr(triton_step, "_processors", lambda device: request.param)
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
def test_equals_the_plain_step(dtype, processors):
    check([task(shape, dtype, seed=i, **more) for i, (shape, more) in enumerate(MIXED)])


@runs
def test_dtypes_beside_each_other():
    pairs = [(f32, f32), (f64, f64), (bf16, f32), (f32, bf16), (f16, f16), (f64, f32), (f32, f64)]
    check([task((6, 40), W, grad=G, seed=i) for i, (W, G) in enumerate(pairs)])


@runs
@pytest.mark.parametrize("shape", [(300, 500), (12, 4000), (3, 9000), (2, 16384), (2000, 24)])
def test_sizes(shape, processors):
    check([task(shape)])


@runs
@pytest.mark.parametrize("n_iter", [0, 1, 3])
def test_iterations(n_iter):
    check([task((6, 40)), task((7, 5)), task((2, 3, 4), layout="soi")], n_iter)


@runs
def test_zero_and_what_is_not_finite_are_their_own():
    tasks = [task((4, 8), seed=i) for i in range(5)]
    tasks[0].weight.zero_()
    tasks[1].weight[2, 3] = torch.nan
    tasks[2].weight[2, 3] = torch.inf
    tasks[3].weight.fill_(3e38)
    before = [one.v.clone() for one in tasks]
    grads = [one.grad.clone() for one in tasks]
    found = triton_step.TritonStep()(tasks, 2)
    for one, v in zip(tasks[:4], before[:4], strict=True):
        close(one.v, v, 0, 0)
    close(found.grads[0], grads[0], 0, 0)
    assert found.triples[0].sigma == 0
    assert not found.triples[0].u.any()
    assert not any(found.triples[i].sigma.isfinite() for i in (1, 2, 3))
    check([task((4, 8), seed=4)], 2)
    expected = plain_step_([task((4, 8), seed=4)], 2)
    close(found.grads[4], expected.grads[0], 1e-5, 1e-5)


@runs
@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e-6, 1e6, 1e12, 5e17])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_range(scale, dtype):
    one = task((20, 30), dtype, scale=scale, factor=1 / scale)
    found = check([one], 2)
    sigma = torch.linalg.matrix_norm(one.weight.double(), 2)
    assert 0.5 * sigma < found.triples[0].sigma < 1.00001 * sigma


@runs
def test_factors():
    shared = torch.tensor(0.3, device=DEVICE)
    other = torch.tensor(2.0, device=DEVICE, dtype=f64)
    factors = [0.5, shared, 0.0, shared, other, 1]
    check([task((4, 6 + i), factor=factor) for i, factor in enumerate(factors)])
    step = triton_step.TritonStep()
    tasks = [task((4, 6)), task((5, 6))]
    for factor in (0.1, 0.2, shared, 0.2):
        check([one._replace(factor=factor) for one in tasks], step=step)


@runs
def test_what_moves_is_found_and_results_stay_where_they_are():
    step, tasks = triton_step.TritonStep(), [task((6, 40)), task((5, 7))]
    for _ in range(3):
        found = check(tasks, step=step)
        for one, triple in zip(tasks, found.triples, strict=True):
            assert triple.v is one.v
            assert triple.sigma is one.last.sigma
            assert triple.u is one.last.u
        # Gradients and a weight elsewhere, where no 16-byte load may be used.
        grads = [torch.zeros(one.grad.numel() + 1, device=DEVICE)[1:] for one in tasks]
        tasks = [
            one._replace(grad=grad.view(one.weight.shape).copy_(one.grad))
            for one, grad in zip(tasks, grads, strict=True)
        ]
    moved = torch.zeros(241, device=DEVICE)[1:].view(6, 40).copy_(tasks[0].weight)
    check([tasks[0]._replace(weight=moved), tasks[1]], step=step)


@runs
def test_takes_what_it_can():
    one = task((6, 40))
    takes = triton_step.takes
    assert takes(one)
    assert takes(one._replace(last=None))
    assert not takes(one._replace(weight=torch.zeros(40, 6, device=DEVICE).T))
    assert not takes(one._replace(grad=torch.zeros(40, 6, device=DEVICE).T))
    assert not takes(one._replace(grad=one.grad.to_sparse()))
    assert not takes(one._replace(v=one.v.double()))
    assert not takes(one._replace(factor=torch.tensor([0.1], device=DEVICE)))
    assert not takes(one._replace(weight=one.weight.to(torch.complex64)))
    assert not takes(task((6, 40), layout="io"))
    assert not takes(task((1, 16385)))
    assert not takes(task((1, 8193), f64))
    with pytest.raises(ArgumentError, match="iterate at least once"):
        triton_step.TritonStep()([one._replace(last=None)], 0)


@runs
def test_a_copy_has_no_memory_of_the_other():
    import copy as copies

    step = triton_step.TritonStep()
    check([task((4, 6))], step=step)
    assert not copies.deepcopy(step)._groups


@runs
def test_of_nothing_is_nothing():
    assert triton_step.TritonStep()([], 1) == ([], [])


def test_the_tables_of_a_capture_are_its_own(monkeypatch):
    table = triton_step._Table((2,), torch.int64, torch.device("cpu"))

    def get(*values, capturing=False):
        monkeypatch.setattr(triton_step, "_capturing", lambda device: capturing)
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
    for i in range(triton_step._SPARE_TABLES):
        get(i, i, capturing=True)
    with pytest.raises(RuntimeError, match="run one between them"):
        get(9, 9, capturing=True)


def layers(count):
    return [task((12, 108 + 12 * i), seed=i) for i in range(count)]


@on_gpu
@pytest.mark.parametrize("moved", [False, True])
def test_a_graph_replays_steps(moved):
    tasks = [task(shape, seed=i, **more) for i, (shape, more) in enumerate(MIXED[:-1])]
    eager = [copy(one) for one in tasks]
    step, side = triton_step.TritonStep(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step([copy(one) for one in tasks] if moved else tasks, 1)
    torch.cuda.current_stream().wait_stream(side)
    for one, other in zip(tasks, eager, strict=True):
        one.v.copy_(other.v)
        one.grad.copy_(other.grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(tasks, 1)
    for i in range(10):
        graph.replay()
        if i == 4:  # a step beside the graph, of other tensors, changes nothing for it
            step([copy(one) for one in tasks], 1)
    reference = triton_step.TritonStep()
    for _ in range(10):
        reference(eager, 1)
    for one, other in zip(tasks, eager, strict=True):
        close(one.grad, other.grad, 0, 0)
        close(one.v, other.v, 0, 0)
        close(one.last.sigma, other.last.sigma, 0, 0)


def events_of(tasks, step):
    from torch.profiler import ProfilerActivity, profile

    step(tasks, 1)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step([one._replace(grad=one.grad.clone(), factor=0.7) for one in tasks], 1)
        torch.cuda.synchronize()
    return [event.name for event in profiled.events()]


@on_gpu
def test_nothing_is_copied_to_the_host():
    assert not [name for name in events_of(layers(6), triton_step.TritonStep()) if "DtoH" in name]


@on_gpu
def test_as_many_launches_for_many_layers():
    few, many = (
        [
            name
            for name in events_of(layers(count), triton_step.TritonStep())
            if name in ("products", "columns", "update", "directions")
        ]
        for count in (4, 40)
    )
    assert few == many
    assert len(set(few)) == 3


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels run in this process")
def test_in_triton_s_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this Triton's interpreter does not work with this NumPy")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


WITHOUT = """
import sys
sys.modules["triton"] = None
sys.path[:0] = ["adapters"]
from spectral_torch import triton_step
assert not triton_step.available()
assert not triton_step.interpreted()
assert triton_step.TritonStep()([], 1) == ([], [])
"""


def test_without_triton_it_is_not_available():
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, check=True)


# Launches as `TritonStep` makes them, compiled for sm_90 and not run: a driver that has no device.
COMPILE = """
import re, subprocess, sys, tempfile
import torch
sys.path[:0] = ["adapters", "tests"]
from adapters import test_torch_triton as here
from spectral_torch import triton_step
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Driver())
triton_step._processors = lambda device: 132
kernels, run = triton_step._kernels(), triton.JITFunction.run
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
for model in models:
    tasks = [here.task(shape, W, grad=G) for shape, W, G in model]
    for n_iter in (2, 0):
        triton_step.TritonStep()(tasks, n_iter)
    factor = torch.tensor(0.1)
    triton_step.TritonStep()([one._replace(factor=factor) for one in tasks], 1)
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
    assert {kernel[1] for kernel in kernels} == {"products", "columns", "directions", "update"}
    # Spilled registers lie on the stack: none, but for an address or two that wait there, outside
    # of the loop, in a kernel of many widths.
    for kernel in kernels:
        classes = [int(part[8:]) for part in kernel if part.startswith("CLASSES=")]
        assert int(kernel[3]) <= (16 if classes and classes[0].bit_count() > 2 else 0), kernel
    # 16-byte loads wherever a large tensor is read.
    assert all(int(kernel[4]) > 0 for kernel in kernels if kernel[1] in ("products", "update"))
