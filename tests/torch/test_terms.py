"""The term of each step: added once, and gone when the step has ended."""

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402

import spectral_core as sc  # noqa: E402
from spectral_torch import SpectralNormRegularizer  # noqa: E402

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)
    )


def backward(model, seed=0):
    x = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    model(x.to(next(model.parameters()).dtype)).square().mean().backward()


def grads_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def term_of(weight, factor):
    """Return λσuvᵀ by SVD."""
    U, S, Vh = np.linalg.svd(weight.detach().double().numpy(), full_matrices=False)
    return torch.from_numpy(factor * S[0] * np.outer(U[:, 0], Vh[0])).to(weight.dtype)


@pytest.mark.parametrize(
    "options", [{}, {"kernels": False}, {"n_vectors": 2}, {"target": 0.1}], ids=str
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_after_a_step_are_those_of_backward(name, options):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    reg = SpectralNormRegularizer(model, factor=0.7, **options).attach(optimizer)
    for step in range(3):
        model.zero_grad(set_to_none=step == 1)
        backward(model, step)
        before = grads_of(model)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.grad, before[n], rtol=1e-5, atol=1e-6)
            assert not torch.equal(p.detach(), weights[n])
    assert all(sigma.min() > 0 for sigma in reg.sigmas().values())


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("lend", ["two optimizers", "two steps"])
def test_each_step_on_one_backward_adds_its_own_term(lend, kernels):
    layer = nn.Linear(6, 5, bias=False)
    W = layer.weight.detach().clone()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.5) for _ in range(2)]
    if lend == "two steps":
        optimizers = optimizers[:1] * 2
    reg = SpectralNormRegularizer(layer, 0.2, warmup_iters=500, kernels=kernels, n_iter=50)
    reg.attach(*optimizers)
    layer.weight.grad = torch.ones_like(layer.weight)
    for optimizer in optimizers:
        optimizer.step()
        W -= 0.5 * (1 + term_of(W, 0.2))
    torch.testing.assert_close(layer.weight.detach(), W, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, torch.ones_like(W), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_the_term_of_another_target_is_taken_out(kind, kernels):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = SpectralNormRegularizer(model, factor=0.7, kernels=kernels).attach(optimizer)
    for step in range(3):
        reg.target = kind(0.1 + 0.2 * step)
        model.zero_grad()
        backward(model, step)
        before = grads_of(model)
        optimizer.step()
        for n, p in model.named_parameters():
            torch.testing.assert_close(p.grad, before[n], rtol=1e-5, atol=1e-6)


def test_accumulated_gradients_hold_no_term():
    """A loop that never sets the gradients to zero, as an optimizer with its own momentum may."""
    models, sums = [net(), net()], []
    reg = SpectralNormRegularizer(models[0], factor=0.5)
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.0)
    reg.attach(optimizer)
    for step in range(4):
        for model in models:
            backward(model, step)
        optimizer.step()
        sums = [grads_of(model) for model in models]
    for name, grad in sums[0].items():
        torch.testing.assert_close(grad, sums[1][name], rtol=1e-5, atol=1e-6)


def test_a_line_search_has_the_term_once():
    model = net().double()
    reg = SpectralNormRegularizer(model, factor=0.5)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    reg.attach(optimizer)
    seen = []

    def closure():  # sets nothing to zero: the gradients accumulate, without the terms
        seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        backward(model)
        return torch.tensor(1.0)

    optimizer.step(closure)
    assert len(seen) == 3
    with torch.enable_grad():
        other = net().double()
        backward(other)
    for grad, p in zip(seen[1], other.parameters(), strict=True):
        torch.testing.assert_close(grad, p.grad)


@pytest.mark.parametrize("kernels", [True, False])
def test_an_optimizer_in_the_backward_pass(kernels):
    model = net()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    reg = SpectralNormRegularizer(model, factor=0.7, kernels=kernels).attach(*optimizers.values())
    other = net()
    one = torch.optim.SGD(other.parameters(), lr=0.1)
    SpectralNormRegularizer(other, factor=0.7, kernels=kernels).attach(one)

    def step(p):
        optimizers[p].step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for seed in range(3):
        backward(model, seed)
        one.zero_grad()
        backward(other, seed)
        one.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert reg.summary().rows[0].last_step == 2


def test_a_step_that_fails_leaves_no_term_for_the_next():
    layer = nn.Linear(4, 3, bias=False)

    class Failing(torch.optim.SGD):
        fails = True

        @torch.no_grad()
        def step(self, closure=None):
            if self.fails:
                raise RuntimeError("out of memory")
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad)

    optimizer = Failing(layer.parameters(), lr=1.0)
    SpectralNormRegularizer(layer, 0.5, warmup_iters=500).attach(optimizer)
    layer.weight.grad = torch.zeros_like(layer.weight)
    with pytest.raises(RuntimeError, match="memory"):
        optimizer.step()
    W = layer.weight.detach().clone()
    optimizer.fails = False
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), W - term_of(W, 0.5), rtol=1e-4, atol=1e-5)
    assert layer.weight.grad.abs().max() < 1e-6


def test_a_step_within_a_step_adds_the_term_once():
    """PyTorch runs every hook twice where a step reaches its parent's step by a helper."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # from now on its step runs hooks

    class Helped(torch.optim.SGD):
        def step(self, closure=None):
            return self.go(closure)

        def go(self, closure):
            return super().step(closure)

    layer = nn.Linear(4, 3, bias=False)
    optimizer = Helped(layer.parameters(), lr=1.0)
    runs = []
    optimizer.register_step_pre_hook(lambda *_: runs.append(1))
    reg = SpectralNormRegularizer(layer, 0.5).attach(optimizer)
    for step in range(3):
        reg.iterate_(500)
        layer.weight.grad = torch.zeros_like(layer.weight)
        W = layer.weight.detach().clone()
        optimizer.step()
        wanted = W - term_of(W, 0.5)
        torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-4, atol=1e-5)
        assert len(runs) == 2 * (step + 1)  # if it is one a step, `is_nested` can go


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("closure", [True, False])
def test_sigma_shrinks_where_the_optimizer_maximizes(closure, kernels):
    layer = nn.Linear(6, 5, bias=False)
    groups = [{"params": layer.parameters(), "maximize": True}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    reg = SpectralNormRegularizer(layer, 0.5, kernels=kernels).attach(optimizer)
    before = np.linalg.norm(layer.weight.detach(), 2)
    for _ in range(40):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step(*([lambda: torch.tensor(0.0)] if closure else []))
    after = np.linalg.norm(layer.weight.detach(), 2)
    assert after < 0.8 * before
    assert float(reg.sigmas()["weight"]) < 0.9 * before


def test_a_fused_optimizer_that_unscales_leaves_the_unscaled_gradient():
    layers = [nn.Linear(6, 5, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.Adam(layers[0].parameters(), lr=0.1, fused=True)
    SpectralNormRegularizer(layers[0], 0.5).attach(optimizer)
    plain = torch.optim.Adam(layers[1].parameters(), lr=0.1)
    SpectralNormRegularizer(layers[1], 0.5).attach(plain)
    for _ in range(2):
        x = torch.randn(7, 6)
        optimizer.zero_grad()
        scaler.scale(layers[0](x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        layers[1](x).square().mean().backward()
        plain.step()
        torch.testing.assert_close(*(layer.weight.detach() for layer in layers))
        torch.testing.assert_close(*(layer.weight.grad for layer in layers))


def test_gradients_keep_the_term_where_asked():
    layer = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    reg = SpectralNormRegularizer(layer, 0.5, warmup_iters=500, restore_gradients=False)
    reg.attach(optimizer)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    wanted = term_of(layer.weight, 0.5)
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-4, atol=1e-5)


def test_add_gradients_by_hand_stays():
    layer = nn.Linear(4, 3, bias=False)
    reg = SpectralNormRegularizer(layer, 0.5, warmup_iters=500)
    layer.weight.grad = torch.zeros_like(layer.weight)
    reg.add_gradients_()
    wanted = term_of(layer.weight, 0.5)
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_backward_saved_is_not_changed_unseen():
    for kernels in (False, True):
        p, q = nn.Parameter(torch.randn(4, 3)), torch.ones(4, 3, requires_grad=True)
        reg = SpectralNormRegularizer({"p": p}, 1.0, kernels=kernels)
        p.grad = torch.randn(4, 3)
        saved = (p.grad * q).sum()
        reg.add_gradients_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", ["one tensor", "a view of it", "expanded"])
def test_shared_gradients_get_a_copy_of_their_own(kind, kernels):
    a, b = (nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(2))
    optimizer = torch.optim.SGD([a, b], lr=0.0)
    SpectralNormRegularizer(
        {"a": a, "b": b}, 1.0, warmup_iters=500, kernels=kernels, restore_gradients=False
    ).attach(optimizer)
    for seed in range(3):
        grad = torch.full((4, 3), float(seed), dtype=torch.float64)
        if kind == "expanded":
            grad = torch.full((1, 1), float(seed), dtype=torch.float64).expand(4, 3)
        a.grad, b.grad = grad, grad if kind == "one tensor" else grad.view(4, 3)
        optimizer.step()
        for w in (a, b):
            torch.testing.assert_close(w.grad, seed + term_of(w, 1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", [True, False])
def test_two_threads_step_while_the_factor_is_on_a_schedule(kernels):
    """One regularizer, a thread for each optimizer: every step has its whole term."""
    weights = {name: nn.Parameter(torch.randn(200, 150)) for name in "abcdef"}
    reg = SpectralNormRegularizer(weights, 0.1, kernels=kernels, restore_gradients=False)
    parts = [[weights[n] for n in names] for names in ("abc", "def")]
    optimizers = [torch.optim.SGD(part, lr=0.0) for part in parts]
    reg.attach(*optimizers)
    reg.iterate_(100)
    wrong = []

    def run(part, optimizer):
        for step in range(60):
            for p in part:
                p.grad = torch.zeros_like(p)
            reg.factor = 0.1 * (1 + 1e-9 * step)
            optimizer.step()
            for p in part:
                sigma = float(torch.linalg.matrix_norm(p.detach(), 2)) if step == 0 else p.sigma
                p.sigma = sigma
                if abs(float(p.grad.norm()) - 0.1 * sigma) > 1e-3 * sigma:
                    wrong.append(step)

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(parts, optimizers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_gradient_of_another_dtype_is_refused_before_any_changes():
    layer = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    SpectralNormRegularizer(layer, 0.5).attach(optimizer)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    layer[1].weight.grad = layer[1].weight.grad.to_sparse()
    with pytest.raises(sc.DTypeError, match=r"1\.weight"):
        optimizer.step()
    assert not layer[0].weight.grad.any()
