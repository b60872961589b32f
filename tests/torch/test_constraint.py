"""Other penalties than the paper's, and the hard bound, beside a PyTorch optimizer."""

import copy
import pickle

import numpy as np
import pytest

import spectral_core as sc

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402

from spectral_torch import SpectralNormConstraint, SpectralNormRegularizer  # noqa: E402

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
FAMILY = pytest.mark.parametrize(("target", "power"), [(0.0, 1), (0.7, 1), (0.7, 2)])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def zoo(dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "linear": nn.Linear(7, 5),
            "conv": nn.Conv2d(3, 4, 3),
            "last": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
            "grouped": nn.Conv1d(4, 8, 3, groups=2),
            "transposed": nn.ConvTranspose2d(4, 3, 2),
        }
    ).to(device, dtype)


LAYOUTS = {
    "linear.weight": "oi",
    "conv.weight": "oikk",
    "last.weight": "oikk",
    "grouped.weight": sc.Layout("(go)ik", groups=2),
    "transposed.weight": "iokk",
}


def matrices(model):
    return {
        name: sc.as_matrix(model.get_parameter(name).detach().double().cpu().numpy(), layout)
        for name, layout in LAYOUTS.items()
    }


def norms(model):
    return {name: np.linalg.svd(W, compute_uv=False)[..., 0] for name, W in matrices(model).items()}


def exact_term(weight):
    u, s, vh = np.linalg.svd(weight.detach().numpy())
    return s[0] * np.outer(u[:, 0], vh[0])


def slopes(s, target, power):
    return np.maximum(s - target, 0) if power == 2 else 1.0 * (s > target)


def value(s, target, power):
    return (np.maximum(s - target, 0) ** power).sum() / power


# Penalties


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"kernels": False}, {"n_vectors": 2}], ids=str)
@FAMILY
def test_the_term_and_the_penalty(target, power, options, device):
    model = zoo(device=device)
    reg = SpectralNormRegularizer(
        model, factor=0.3, target=target, power=power, warmup_iters=600, **options
    )
    model.requires_grad_(True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    reg.add_gradients_()
    total = 0.0
    for name, W in matrices(model).items():
        u, s, vh = np.linalg.svd(W, full_matrices=False)
        force = 0.3 * slopes(s[..., 0], target, power)
        term = force[..., None, None] * u[..., :, :1] * vh[..., :1, :]
        grad = sc.as_matrix(model.get_parameter(name).grad.cpu().numpy(), LAYOUTS[name])
        np.testing.assert_allclose(grad, term, rtol=1e-6, atol=1e-6, err_msg=name)
        total += 0.3 * value(s[..., 0], target, power)
        np.testing.assert_allclose(reg.sigmas()[name].cpu(), s[..., 0], rtol=1e-9)
    penalty = reg.penalty(differentiable=True)
    assert float(penalty.detach()) == pytest.approx(total, rel=1e-9)
    by_hook = {name: model.get_parameter(name).grad.clone() for name in LAYOUTS}
    model.zero_grad()
    penalty.backward()
    for name, grad in by_hook.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-6, atol=1e-7)


@FAMILY
def test_a_training_run_with_the_hook_is_one_with_the_penalty_in_the_loss(target, power):
    runs = []
    for in_loss in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        reg = SpectralNormRegularizer(model, factor=0.3, target=target, power=power)
        if not in_loss:
            reg.attach(optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 6, dtype=torch.float64)).square().mean()
            if in_loss:
                reg.penalty().item()  # what is only logged changes nothing
                loss = loss + reg.penalty()
            loss.backward()
            optimizer.step()
        runs.append(model)
    for p, q in zip(*(model.parameters() for model in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_line_search_sees_the_penalty_that_is_meant():
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    SpectralNormRegularizer(model, factor=2.0, target=0.1, power=1, warmup_iters=300).attach(
        optimizer
    )

    def closure():
        model.zero_grad()
        loss = 0 * model(torch.ones(1, 4).double()).sum()
        loss.backward()
        return loss

    sigma = torch.linalg.matrix_norm(model.weight.detach(), 2)
    assert optimizer.step(closure).item() == pytest.approx(2.0 * float(sigma - 0.1))


def test_a_schedule_of_targets():
    model = nn.Linear(4, 3).double()
    reg = SpectralNormRegularizer(model, factor=1.0, target={"weight": 1e6}, warmup_iters=300)
    model.weight.grad = torch.zeros_like(model.weight)
    reg.add_gradients_()
    assert not model.weight.grad.any()
    reg.target = torch.tensor(0.25, dtype=torch.float64)
    reg.add_gradients_()
    sigma = reg.sigmas()["weight"]
    torch.testing.assert_close(torch.linalg.matrix_norm(model.weight.grad, 2), sigma - 0.25)
    with pytest.raises(sc.ArgumentError, match="target must be"):
        reg.target = -1.0
    with pytest.raises(sc.ArgumentError, match="power must be 1 or 2"):
        SpectralNormRegularizer(model, power=3)


@pytest.mark.parametrize("every_n_steps", [1, 2])
def test_the_iteration_goes_on_as_without_a_target(every_n_steps):
    """v, σ and the number of steps do not depend on the penalty."""
    states = []
    for target in (0.0, 0.7):
        model = zoo()
        reg = SpectralNormRegularizer(
            model, target=target, every_n_steps=every_n_steps, warmup_iters=0
        )
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            reg.add_gradients_()
        states.append(reg.state_dict())
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


def test_a_hook_registered_after_clips_with_the_term_and_clipping_before_does_not():
    """The order that the docstring tells."""

    def lengths(after):
        model = nn.Linear(4, 3, bias=False).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        reg = SpectralNormRegularizer(model, factor=100.0, restore_gradients=False)
        reg.attach(optimizer)

        def clip(*_):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        if after:
            optimizer.register_step_pre_hook(clip)
        model.weight.grad = torch.full_like(model.weight, 5.0)
        if not after:
            clip()
        clipped = model.weight.grad.clone()
        optimizer.step()
        return float(model.weight.grad.norm()), model, clipped

    length, *_ = lengths(after=True)
    assert length == pytest.approx(1.0, rel=1e-5)
    _, model, clipped = lengths(after=False)
    term = torch.from_numpy(100.0 * exact_term(model.weight))
    torch.testing.assert_close(model.weight.grad, clipped + term, rtol=1e-3, atol=1e-3)
    assert float(clipped.norm()) == pytest.approx(1.0, rel=1e-5)


# The bound


def train(model, optimizer, steps=4):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = grad.to(p.device, p.dtype)
        optimizer.step()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normalize", [False, True])
def test_each_step_ends_with_the_projection(normalize, device):
    model, plain = zoo(device=device), zoo(device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bound = {"linear.weight": 0.8, "*": 1.2}
    SpectralNormConstraint(model, bound=bound, normalize=normalize, n_iter=300).attach(optimizer)
    train(model, optimizer)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for name, p in plain.named_parameters():
            p.data -= 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(
                device
            )
            if name in LAYOUTS:
                layout = LAYOUTS[name]
                W = sc.as_matrix(p.detach().cpu().numpy(), layout)
                s = np.linalg.svd(W, compute_uv=False)[..., 0]
                scale = bound.get(name, 1.2) / s
                scale = scale if normalize else np.minimum(1, scale)
                p.data = torch.from_numpy(
                    sc.from_matrix(scale[..., None, None] * W, layout, p.shape).copy()
                ).to(device)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, plain.get_parameter(name), rtol=1e-8, atol=1e-8)


def test_one_iteration_a_step_keeps_the_bound_nearly():
    model = zoo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    cap = SpectralNormConstraint(model, bound=0.5).attach(optimizer)
    train(model, optimizer, steps=30)
    for name, s in norms(model).items():
        assert np.all(s < 0.5 * 1.1), (name, s)
        assert np.all(cap.sigmas()[name].numpy() <= 0.5 * (1 + 1e-12))


def test_before_the_first_step_nothing_changes_until_told():
    model = zoo()
    before = norms(model)
    cap = SpectralNormConstraint(model, bound=0.1, warmup_iters=300)
    np.testing.assert_equal(norms(model), before)
    cap.constrain_()
    for s in norms(model).values():
        np.testing.assert_allclose(s, 0.1)


def test_optimizers_scale_what_they_hold():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)
    cap = SpectralNormConstraint(model, bound=0.1, warmup_iters=300).attach(first, second)
    before = model[1].weight.detach().clone()
    train(model, first, steps=1)
    assert torch.linalg.matrix_norm(model[0].weight.detach(), 2) < 0.11
    torch.testing.assert_close(model[1].weight.detach(), before, rtol=0, atol=0)
    cap.detach(first)
    train(model, first, steps=1)
    assert torch.linalg.matrix_norm(model[0].weight.detach(), 2) > 0.2
    train(model, second, steps=1)
    assert torch.linalg.matrix_norm(model[1].weight.detach(), 2) < 0.11


def test_attach_accepts_one_optimizer_for_each_parameter():
    model = nn.Linear(5, 4)
    of_weight, of_bias = (torch.optim.SGD([p], lr=0.1) for p in model.parameters())
    with pytest.raises(sc.ArgumentError, match="SGD holds none of the weights"):
        SpectralNormConstraint(model).attach(of_bias)
    with pytest.raises(sc.ArgumentError, match="got no optimizer"):
        SpectralNormConstraint(model).attach()
    SpectralNormConstraint(model).attach(of_bias, of_weight)


def test_a_frozen_weight_stays_as_it_is():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SpectralNormConstraint(model, bound=0.1, warmup_iters=300).attach(optimizer)
    before = model[0].weight.requires_grad_(False).clone()
    model(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=0, atol=0)
    assert torch.linalg.matrix_norm(model[1].weight.detach(), 2) < 0.11


def test_a_constrained_run_goes_on_bit_for_bit_and_copies():
    def make():
        model = zoo()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, SpectralNormConstraint(model, bound=0.5, seed=3).attach(optimizer)

    model, optimizer, cap = make()
    train(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), cap.state_dict()))
    pickle.loads(pickle.dumps(cap)).constrain_()  # its own copies
    train(model, optimizer)
    other, other_optimizer, other_cap = make()
    other.load_state_dict(saved[0])
    other_cap.load_state_dict(saved[1])
    train(other, other_optimizer)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_bounded_to_their_rounding(dtype):
    model = zoo(dtype)
    SpectralNormConstraint(model, bound=0.5, warmup_iters=300).constrain_()
    for s in norms(model).values():
        np.testing.assert_allclose(s, 0.5, rtol=4 * torch.finfo(dtype).eps)


def test_errors_of_the_bound():
    model = nn.Linear(4, 3)
    with pytest.raises(sc.ArgumentError, match="bound must be a finite number"):
        SpectralNormConstraint(model, bound=-1.0)
    with pytest.raises(sc.NamesError, match="bound has no entry for"):
        SpectralNormConstraint(model, bound={})
    cap = SpectralNormConstraint(model, bound=1.0)
    with pytest.raises(sc.ArgumentError, match="bound must be"):
        cap.bound = float("nan")
    assert "bound=1.0" in repr(cap)


# PyTorch's own spectral normalization


@pytest.mark.parametrize("n_iter", [1, 3])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_normalized_weights_are_those_of_pytorchs_parametrization(kind, n_iter):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5) if kind == "linear" else nn.Conv2d(3, 4, 3)
    layer = parametrizations.spectral_norm(layer.double(), n_power_iterations=n_iter)
    layout = "oi" if kind == "linear" else "oikk"
    original = layer.parametrizations.weight.original
    state = sc.init({"w": original.detach()}, layouts=layout)
    v = layer.parametrizations.weight[0]._v.clone()[None]
    state = sc.SpectralState(v={"w": v}, sigma=state.sigma, layouts=state.layouts)
    for _ in range(5):
        weights, state = sc.constrain(
            {"w": original.detach()}, state, normalize=True, n_iter=n_iter
        )
        torch.testing.assert_close(weights["w"], layer.weight.detach(), rtol=1e-7, atol=1e-8)
        with torch.no_grad():
            original += 0.1 * torch.randn_like(original)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("n_vectors", [1, 2])
def test_a_bound_holds_though_v_began_in_another_block(n_vectors, kernels):
    """The loss pulls on the second block alone, of which v has no part."""
    weight = nn.Parameter(torch.zeros(24, 24))
    with torch.no_grad():
        weight[:12, :12] = torch.eye(12)
    cap = SpectralNormConstraint({"w": weight}, 1.0, n_vectors=n_vectors, kernels=kernels)
    assert cap.sigmas()["w"] == pytest.approx(1.0)
    optimizer = torch.optim.SGD([weight], lr=0.02)
    cap.attach(optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        (-weight[12:, 12:].diagonal() @ torch.linspace(0.1, 1.0, 12)).backward()
        optimizer.step()
    true = float(torch.linalg.matrix_norm(weight.detach(), 2))
    assert 0.9 < true < 1.05
    assert cap.sigmas()["w"] == pytest.approx(true, rel=0.05)


def test_summary_shows_the_bound_as_one():
    cap = SpectralNormConstraint(torch.nn.Linear(2, 3), bound=1.5)
    assert cap.summary().rows[0].factor == "σ ≤ 1.5"
