"""Test the engines of a step of the PyTorch adapter: kernels or not, in place, not each time."""

import importlib.util
from itertools import pairwise

import pytest

import spectral_core as sc

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402

from spectral_torch import SpectralNormRegularizer  # noqa: E402
from torch_zoo import gradients, zoo  # noqa: E402

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="Numba is not installed"
)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernels_change_nothing_but_the_time(dtype, device):
    with_kernels, without = zoo(dtype, device), zoo(dtype, device)
    regs = [
        SpectralNormRegularizer(model, factor=0.3, kernels=kernels)
        for model, kernels in ((with_kernels, True), (without, False))
    ]
    rtol = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)
    for _ in range(3):
        for reg in regs:
            reg.add_gradients_()
        found, expected = (gradients(model) for model in (with_kernels, without))
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
        narrow = min(rtol, 1e-4)  # vectors are at least in float32
        torch.testing.assert_close(*(reg.state_dict() for reg in regs), rtol=narrow, atol=narrow)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_for_several_vectors_add_the_same_term(dtype):
    models = zoo(dtype), zoo(dtype)
    regs = [
        SpectralNormRegularizer(model, factor=0.3, n_vectors=4, kernels=kernels)
        for model, kernels in zip(models, (True, False), strict=True)
    ]
    rtol = {torch.float32: 1e-4}.get(dtype, 2e-2)
    for _ in range(2):
        for reg in regs:
            reg.add_gradients_()
        torch.testing.assert_close(*map(gradients, models), rtol=rtol, atol=rtol)
        torch.testing.assert_close(*(reg.sigmas() for reg in regs), rtol=1e-4, atol=1e-4)


@needs_numba
@pytest.mark.parametrize("n_vectors", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_usual_layers_run_in_the_compiled_engine(dtype, n_vectors, monkeypatch):
    def refuse(jobs, n_iter):
        raise AssertionError([job.name for job in jobs])

    model = nn.Sequential(nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.Conv1d(4, 8, 3, groups=2))
    model.to(dtype)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    reg = SpectralNormRegularizer(model, n_vectors=n_vectors)
    for engine in reg._jobs.engines[2:]:
        monkeypatch.setattr(engine, "run", refuse)
    reg.add_gradients_()
    assert all(p.grad.any() for p in model.parameters() if p.ndim > 1)


@pytest.mark.parametrize("kernels", [True, False])
def test_threads_of_torch_are_kept_to(kernels):
    before = torch.get_num_threads()
    model = zoo()
    reg = SpectralNormRegularizer(model, kernels=kernels)
    try:
        for threads in (1, 2, 64):
            torch.set_num_threads(threads)
            reg.add_gradients_()
    finally:
        torch.set_num_threads(before)


# In place


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernels", [True, False])
def test_the_state_keeps_its_tensors(kernels, device):
    model = zoo(device=device)
    reg = SpectralNormRegularizer(model, kernels=kernels, every_n_steps=2, warmup_iters=0)
    before = reg.state_dict()
    values = {key: tensor.clone() for key, tensor in before.items()}
    reg.add_gradients_()
    reg.iterate_()
    reg.load_state_dict(reg.state_dict())
    after = reg.state_dict()
    for key, tensor in before.items():
        if not key.endswith(".steps"):
            assert after[key] is tensor
            assert not torch.equal(tensor, values[key])


def test_sigmas_do_not_change_afterwards():
    model = zoo()
    reg = SpectralNormRegularizer(model)
    before = reg.sigmas()
    values = {name: sigma.clone() for name, sigma in before.items()}
    reg.iterate_(5)
    torch.testing.assert_close(before, values, rtol=0, atol=0)
    assert any(not torch.equal(sigma, before[name]) for name, sigma in reg.sigmas().items())


@pytest.mark.filterwarnings("error")
def test_a_compiled_training_step_learns_the_same():
    plain, compiled = zoo(torch.float64)["linear"], zoo(torch.float64)["linear"]
    regs = [SpectralNormRegularizer(model, factor=0.3) for model in (plain, compiled)]

    def step(model, reg, x):
        model.weight.grad = None
        model(x).square().sum().backward()
        reg.add_gradients_()
        with torch.no_grad():
            model.weight -= 0.01 * model.weight.grad

    fast = torch.compile(step, backend="eager")
    for _ in range(4):
        x = torch.randn(8, 7, dtype=torch.float64)
        step(plain, regs[0], x)
        fast(compiled, regs[1], x)
    torch.testing.assert_close(plain.weight, compiled.weight)
    torch.testing.assert_close(regs[0].sigmas(), regs[1].sigmas())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
@pytest.mark.parametrize("kernels", [True, False])
def test_a_captured_graph_goes_on_iterating(kernels):
    models = zoo(device="cuda"), zoo(device="cuda")
    replayed, stepped = (SpectralNormRegularizer(m, factor=0.3, kernels=kernels) for m in models)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for reg in (replayed, stepped):
            reg.add_gradients_()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.add_gradients_()
    for _ in range(5):
        graph.replay()
        stepped.add_gradients_()
    torch.testing.assert_close(*(gradients(model) for model in models), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(replayed.state_dict(), stepped.state_dict(), rtol=1e-4, atol=1e-4)


# Several vectors


@pytest.mark.parametrize("kernels", [True, False])
def test_several_vectors_follow_a_crossing(kernels):
    """The regularizer pushes σ1 under σ2: one vector stays where the first was."""
    values = torch.tensor([1.0, 0.9, 0.5, 0.2], dtype=torch.float64)
    sigmas = {}
    for n_vectors in (1, 3):
        weight = nn.Parameter(torch.diag(values))
        optimizer = torch.optim.SGD([weight], lr=0.2)
        reg = SpectralNormRegularizer(
            {"w": weight}, factor=1.0, n_vectors=n_vectors, warmup_iters=50, kernels=kernels
        ).attach(optimizer)
        for _ in range(4):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        exact = torch.linalg.matrix_norm(weight.detach(), 2)
        sigmas[n_vectors] = reg.penalty().item() * 2, float(exact) ** 2
    assert sigmas[1][0] < 0.8 * sigmas[1][1]
    assert sigmas[3][0] == pytest.approx(sigmas[3][1], rel=0.05)


def test_several_vectors_resume(tmp_path):
    model = zoo()
    reg = SpectralNormRegularizer(model, n_vectors=2)
    reg.add_gradients_()
    torch.save(reg.state_dict(), tmp_path / "state")
    resumed = SpectralNormRegularizer(model, n_vectors=2, seed=3)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for each in (reg, resumed):
        each.add_gradients_()
    torch.testing.assert_close(reg.state_dict(), resumed.state_dict(), rtol=0, atol=0)
    with pytest.raises(sc.NamesError, match="of another shape"):
        SpectralNormRegularizer(model).load_state_dict(reg.state_dict())


# Not each time


@pytest.mark.parametrize("kernels", [True, False])
def test_every_n_steps_iterates_then_and_adds_always(kernels):
    weight = nn.Parameter(torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)))
    weights = {"w": weight.detach()}
    reg = SpectralNormRegularizer(
        {"w": weight}, factor=0.1, every_n_steps=3, warmup_iters=0, kernels=kernels
    )
    state = sc.init(weights)
    for step in range(8):
        reg.factor = 0.1 + step
        weight.grad = torch.zeros_like(weight)
        reg.add_gradients_()
        iterations = 1 if step % 3 == 0 else 0
        expected, state = sc.add_gradient(
            weights, {"w": torch.zeros(3, 3).double()}, state, factor=0.1 + step, n_iter=iterations
        )
        torch.testing.assert_close(weight.grad, expected["w"])
        torch.testing.assert_close(reg.sigmas(), dict(state.sigma))
        with torch.no_grad():
            weight.mul_(0.9)


@pytest.mark.filterwarnings("ignore::spectral_core.SpectralWarning")
def test_every_weight_counts_its_own_steps():
    model = zoo()
    sgds = [
        torch.optim.SGD(model[key].parameters(), lr=0.0, maximize=True)
        for key in ("linear", "conv")
    ]
    reg = SpectralNormRegularizer(model, every_n_steps=2, warmup_iters=0)
    for optimizer in sgds:
        reg.attach(optimizer)
    seen = []
    for _ in range(4):
        for optimizer in sgds:
            optimizer.step()
        seen.append(reg.sigmas())
    for name in ("linear.weight", "conv.weight"):
        changed = [not torch.equal(a[name], b[name]) for a, b in pairwise(seen)]
        assert changed == [False, True, False]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_resumes_between_two_iterations(after):
    def steps(model, reg, number):
        for _ in range(number):
            reg.add_gradients_()
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)

    straight, halted = zoo(), zoo()
    whole = SpectralNormRegularizer(straight, every_n_steps=3)
    steps(straight, whole, 6)
    first = SpectralNormRegularizer(halted, every_n_steps=3)
    steps(halted, first, after)
    second = SpectralNormRegularizer(halted, every_n_steps=3, seed=1)
    second.load_state_dict({key: tensor.clone() for key, tensor in first.state_dict().items()})
    steps(halted, second, 6 - after)
    torch.testing.assert_close(gradients(straight), gradients(halted), rtol=0, atol=0)
    torch.testing.assert_close(whole.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_a_state_without_u_starts_with_an_iteration():
    model = zoo()
    saved = SpectralNormRegularizer(model).state_dict()
    reg = SpectralNormRegularizer(model, every_n_steps=5, seed=3, warmup_iters=0)
    reg.add_gradients_()
    reg.load_state_dict(saved)
    other = SpectralNormRegularizer(model, seed=4)
    other.load_state_dict(saved)
    for each in (reg, other):
        each.add_gradients_()
    torch.testing.assert_close(reg.sigmas(), other.sigmas())
    other.load_state_dict(reg.state_dict())  # and the other way round


@pytest.mark.parametrize("wrong", [0, -1, 1.5, None])
def test_every_n_steps_is_checked(wrong):
    with pytest.raises(sc.ArgumentError, match="every_n_steps must be an integer ≥ 1"):
        SpectralNormRegularizer(zoo(), every_n_steps=wrong)


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_products_stay_in_float32_whatever_the_process_allows(allowed):
    """TF32 would round the products of stacks, several vectors and half precision."""
    seen = []

    class Products(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in ("matmul", "__matmul__", "__rmatmul__", "mm"):
                seen.append(torch.get_float32_matmul_precision())
            return function(*args, **kwargs or {})

    stack = torch.nn.Parameter(torch.randn(3, 4, 5))
    torch.set_float32_matmul_precision(allowed)
    try:
        with Products():
            reg = SpectralNormRegularizer(
                {"w": stack}, layouts={"w": "soi"}, n_vectors=2, kernels=False
            )
            stack.grad = torch.zeros_like(stack)
            for _ in range(2):
                reg.add_gradients_()
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen
    assert set(seen) == {"highest"}
