"""``norm="operator"`` beside a PyTorch optimizer."""

import copy
import warnings

import pytest

import spectral_core as sc

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import spectral_torch  # noqa: E402
from spectral_torch.engines import MEMORY, TensorEngine, WaveEngine  # noqa: E402


def network(dtype=torch.float64):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 6, 1),
        nn.ConvTranspose2d(6, 4, 3, stride=2),
        nn.Flatten(),
        nn.LazyLinear(3),
    ]
    net = nn.Sequential(*layers).to(dtype)
    net(torch.zeros(2, 1, 8, 8, dtype=dtype))
    return net


def regularizer(net, **options):
    return spectral_torch.SpectralNormRegularizer(net, norm="operator", **options)


def trained(net, optimizer, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 1, 8, 8, generator=rng, dtype=dtype)
        net(x).square().mean().backward()
        optimizer.step()


def true_norm(layer):
    transposed = isinstance(layer, nn.ConvTranspose2d)
    layout = sc.Layout(("(gi)o" if transposed else "(go)i") + "hw", layer.groups)
    return sc.convolution_norm(
        layer.weight.detach(),
        layout,
        stride=layer.stride,
        padding=1,
        transposed=transposed,
        tol=1e-5,
    ).lower


def test_sigma_is_that_of_the_layers():
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg = regularizer(net, warmup_iters=80)
    sigmas = reg.sigmas()
    for place in (0, 3, 6):
        found = float(sigmas[f"{place}.weight"].max())
        assert found == pytest.approx(true_norm(net[place]), rel=1e-5)
    flat = spectral_torch.SpectralNormRegularizer(net, warmup_iters=80).sigmas()
    for place in (5, 8):  # 1 × 1, and dense
        assert torch.equal(sigmas[f"{place}.weight"], flat[f"{place}.weight"])


def compiled():
    return pytest.importorskip("spectral_core.numba").NumbaWaveEngine(MEMORY)


@pytest.mark.parametrize("make", [WaveEngine, compiled])
def test_engine_is_equal_to_the_reference(make):
    """Weights together, alone, channels last; terms, bounds and n_iter=0."""
    make()  # or skip
    torch.manual_seed(0)
    weights = {
        "a": torch.randn(20, 6, 3, 3, dtype=torch.float64),
        "b": torch.randn(24, 4, 3, 3, dtype=torch.float64),
        "c": torch.randn(5, 4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last),
        "d": torch.randn(3, 3, 4, 8, dtype=torch.float64),
        "e": torch.randn(8, 4, 3, dtype=torch.float64),
    }
    layouts = {name: sc.Convolution("oihw") for name in "abc"}
    layouts |= {"d": sc.Convolution("hwio", stride=2), "e": sc.Convolution("(go)ik", 2)}
    state = sc.init(weights, layouts=layouts)
    for power, n_iter in ((2, 3), (1, 1), (1, 0)):
        found = []
        for engine in (make(), TensorEngine(in_place=True)):
            grads = {name: torch.ones_like(weight) for name, weight in weights.items()}
            after = sc.add_gradient_(
                weights, grads, state, 0.1, power=power, n_iter=n_iter, engines=[engine]
            )
            found.append((after, grads))
        (one, one_grads), (other, other_grads) = found
        for name in weights:
            torch.testing.assert_close(one_grads[name], other_grads[name])
            for field in ("v", "sigma", "u"):
                torch.testing.assert_close(getattr(one, field)[name], getattr(other, field)[name])
        state = one
    scaled = []
    for engine in (make(), TensorEngine(in_place=True)):
        copies = {name: weight.clone() for name, weight in weights.items()}
        sc.constrain_(copies, state, 0.5, engines=[engine])
        scaled.append(copies)
    torch.testing.assert_close(*scaled)


def test_gradient_is_that_of_the_dense_operator():
    """The layer's own circular convolution of an identity batch, where ω is on the grid of sizes.

    The kernel is symmetric, so its largest value is at ω = 0 or π: on the grid of each even size.
    """
    torch.manual_seed(1)
    half = torch.rand(3, 2, 3, 3, dtype=torch.float64)
    weight = nn.Parameter(half + half.flip(2, 3))
    size = 4
    image = torch.eye(2 * size**2, dtype=torch.float64).reshape(-1, 2, size, size)
    outputs = nn.functional.conv2d(nn.functional.pad(image, [1] * 4, mode="circular"), weight)
    norm = torch.linalg.matrix_norm(outputs.reshape(len(image), -1), 2)
    (expected,) = torch.autograd.grad(norm, weight)
    layouts = {"w": sc.Convolution("oihw")}
    reg = spectral_torch.SpectralNormRegularizer(
        {"w": weight}, 1.0, power=1, layouts=layouts, warmup_iters=100
    )
    torch.testing.assert_close(reg.sigmas()["w"], norm.detach(), rtol=1e-10, atol=0)
    weight.grad = torch.zeros_like(weight)
    reg.add_gradients_()
    torch.testing.assert_close(weight.grad, expected, rtol=0, atol=1e-8)


def test_differentiable_penalty_has_the_gradient_of_a_step():
    net = network()
    by_loss, by_hand = regularizer(net, factor=0.3), regularizer(net, factor=0.3)
    parameters = dict(net.named_parameters())
    names = list(by_loss.sigmas())
    value = by_loss.penalty()
    found = torch.autograd.grad(value, [parameters[name] for name in names])
    for name in names:
        parameters[name].grad = torch.zeros_like(parameters[name])
    by_hand.add_gradients_()
    for name, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(gradient, parameters[name].grad)
    expected = sum(0.15 * (sigma**2).sum() for sigma in by_hand.sigmas().values())
    torch.testing.assert_close(value, expected)


def test_training_lowers_the_norm_and_leaves_gradients_clean():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    regularizer(net, factor=0.5).attach(optimizer)
    before = true_norm(net[3])
    trained(net, optimizer, 20)
    assert true_norm(net[3]) < 0.9 * before
    grads = [p.grad.clone() for p in net.parameters()]
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert all(torch.isfinite(grad).all() for grad in grads), x.shape


@pytest.mark.parametrize("kind", ["penalty", "bound"])
def test_resumes_bit_for_bit(kind):
    def hook(net):
        if kind == "penalty":
            return regularizer(net, factor=0.1, every_n_steps=2)
        return spectral_torch.SpectralNormConstraint(net, 0.5, norm="operator")

    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    own = hook(net).attach(optimizer)
    trained(net, optimizer, 5)
    other = copy.deepcopy(net)
    second = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = hook(other).attach(second)
    resumed.load_state_dict(copy.deepcopy(own.state_dict()))
    trained(net, optimizer, 6, seed=1)
    trained(other, second, 6, seed=1)
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    saved = resumed.state_dict()
    for key, value in own.state_dict().items():
        assert torch.equal(value, saved[key])


@pytest.mark.thorough  # each dtype compiles its own kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compiled(dtype):
    torch.manual_seed(0)
    weights = {"w": torch.randn(30, 8, 3, 3).to(dtype), "n": torch.randn(6, 8, 3, 3).to(dtype)}
    state = sc.init(weights, layouts={name: sc.Convolution("oihw") for name in weights})
    found = []
    for engine in (compiled(), TensorEngine(in_place=True)):
        grads = {name: torch.ones_like(weight) for name, weight in weights.items()}
        after = sc.add_gradient_(weights, grads, state, 0.1, n_iter=2, engines=[engine])
        found.append((after.sigma, grads))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


def test_constraint_bounds_the_map():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    cap = spectral_torch.SpectralNormConstraint(net, 0.8, norm="operator").attach(optimizer)
    cap.constrain_()
    trained(net, optimizer, 10)
    for place in (0, 3, 6):
        assert true_norm(net[place]) < 0.8 * 1.01


def test_state_of_the_flattened_norm_is_refused():
    net = network()
    flat = spectral_torch.SpectralNormRegularizer(net)
    with pytest.raises(sc.NamesError, match='norm="flattened"'):
        regularizer(net).load_state_dict(flat.state_dict())


def test_state_follows_the_model_to_another_precision():
    net = network(torch.float32)
    reg = regularizer(net)
    net.double()
    reg.iterate_(40)
    state = reg.state_dict()
    assert state["0.weight.waves"].dtype == torch.float64
    assert float(reg.sigmas()["0.weight"]) == pytest.approx(true_norm(net[0]), rel=1e-5)


@pytest.mark.thorough  # each dtype compiles its own kernels
def test_state_of_half_precision_is_float32():
    net = network()
    reg = regularizer(net)
    net.bfloat16()
    reg.iterate_(2)
    assert reg.state_dict()["0.weight.waves"].dtype == torch.float32


def test_parameters_without_modules_get_a_warning():
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    with pytest.warns(sc.SpectralWarning, match="stride") as told:
        spectral_torch.SpectralNormRegularizer(
            {"w": weight}, norm="operator", layouts={"w": "oihw"}, warmup_iters=0
        )
    assert told[0].filename == __file__
    with pytest.raises(sc.ArgumentError, match="norm must be"):
        spectral_torch.SpectralNormRegularizer({"w": weight}, norm="no", layouts={"w": "oihw"})


@pytest.mark.thorough
def test_compiled_step_is_the_eager_one():
    results = []
    for compiled in (False, True):
        net = network(torch.float32)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        reg = regularizer(net, factor=0.1).attach(optimizer)
        step = torch.compile(optimizer.step) if compiled else optimizer.step
        for _ in range(3):
            step()
        results.append((reg.sigmas(), [p.detach().clone() for p in net.parameters()]))
    torch.testing.assert_close(*results)
