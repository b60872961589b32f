"""What a regularizer is attached to, and what it says when it does not act."""

import re
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402

import spectral_core as sc  # noqa: E402
from spectral_torch import SpectralNormConstraint, SpectralNormRegularizer, Watch  # noqa: E402


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))


def sgd(model, lr=0.01):
    return torch.optim.SGD(model.parameters(), lr=lr)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()


class Sharpness(torch.optim.Optimizer):
    """Two phases and an optimizer within, as sharpness-aware minimization is written."""

    def __init__(self, params, base, **options):
        super().__init__(params, {})
        self.base_optimizer = base(self.param_groups, **options) if base else None

    def first_step(self, zero_grad=False):
        pass

    def second_step(self, zero_grad=False):
        if self.base_optimizer:
            self.base_optimizer.step()

    def step(self, closure=None):
        self.first_step()
        closure()
        self.second_step()


def test_the_optimizer_within_two_phases_is_found():
    model = net()
    optimizer = Sharpness(model.parameters(), torch.optim.SGD, lr=0.0)
    reg = SpectralNormRegularizer(model, 0.5, restore_gradients=False).attach(optimizer)
    assert "attached to SGD" in repr(reg)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.first_step(zero_grad=False)
    optimizer.second_step(zero_grad=False)
    assert all(p.grad.any() for p in model.parameters() if p.ndim == 2)


def test_two_phases_without_an_optimizer_within_are_refused():
    model = net()
    with pytest.raises(sc.ArgumentError, match="works in first_step, second_step"):
        SpectralNormRegularizer(model).attach(Sharpness(model.parameters(), None))


def test_accelerates_wrapper_stands_for_its_optimizer():
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    model = net()
    wrapped = accelerate.Accelerator(cpu=True).prepare(sgd(model))
    reg = SpectralNormRegularizer(model).attach(wrapped)
    train(model, wrapped, 1)
    assert reg.summary().rows[0].last_step == 0
    log = []
    with Watch(lambda *args: log.append(args), every_n_steps=1).attach(reg, wrapped):
        train(model, wrapped, 2)
    assert [step for _, step in log] == [0, 1]


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda model: (), "got no optimizer"),
        (lambda model: ([sgd(model)],), r"one by one, attach\(\*optimizers\)"),
        (lambda model: (model,), "got a Sequential: give it the optimizer"),
        (lambda model: ("SGD",), "got a str"),
        (lambda model: (sgd(net()),), "holds none of the weights"),
    ],
)
def test_what_is_no_optimizer_is_refused(give, message):
    model = net()
    with pytest.raises(sc.ArgumentError, match=message):
        SpectralNormRegularizer(model).attach(*give(model))


def test_a_message_names_ten_weights_at_most():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    with pytest.raises(sc.ArgumentError) as error:
        SpectralNormRegularizer(model).attach(sgd(net()))
    assert "30 more" in str(error.value)
    assert len(str(error.value)) < 300


ASKED = {
    "sigmas": lambda reg: reg.sigmas(),
    "state_dict": lambda reg: reg.state_dict(),
    "summary": lambda reg: reg.summary(),
    "watch": lambda reg: Watch(lambda *_: None, every_n_steps=1)(reg),
    "penalty": lambda reg: reg.penalty(),
}


@pytest.mark.parametrize("ask", ASKED)
def test_a_regularizer_that_never_acts_says_so_once(ask):
    model = net()
    reg = SpectralNormRegularizer(model)
    train(model, sgd(model), 30)
    with pytest.warns(
        sc.SpectralWarning, match=r"has never acted: call attach\(optimizer\)"
    ) as seen:
        ASKED[ask](reg)
    assert seen[0].filename == __file__  # where the user can mend it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ASKED[ask](reg)


def test_an_optimizer_that_was_made_anew_is_noticed():
    model = net()
    first = sgd(model)
    reg = SpectralNormRegularizer(model).attach(first)
    train(model, first, 3)
    train(model, sgd(model), 30)
    with pytest.warns(sc.SpectralWarning, match=r"since its step 2.*attached to SGD.*in use"):
        reg.sigmas()


@pytest.mark.parametrize("kind", [SpectralNormRegularizer, SpectralNormConstraint])
def test_training_that_acts_warns_of_nothing(kind):
    model = net()
    optimizer = sgd(model)
    reg = kind(model).attach(optimizer)
    model.load_state_dict(net().state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg.sigmas()
        train(model, optimizer, 30)
        reg.sigmas(), reg.state_dict(), reg.summary()


def test_a_weight_that_no_attached_optimizer_holds_is_named():
    model = net()
    optimizer = sgd(model[0])
    SpectralNormRegularizer(model).attach(optimizer)
    with pytest.warns(
        sc.SpectralWarning, match=r"no attached optimizer holds \['1.weight'\]"
    ) as seen:
        train(model, optimizer, 5)
    assert len(seen) == 1


def test_all_optimizers_of_a_model_may_be_attached_one_after_the_other():
    model = net()
    optimizers = sgd(model[0]), sgd(model[1])
    reg = SpectralNormRegularizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in optimizers:
            reg.attach(optimizer)
        for optimizer in optimizers:
            train(model, optimizer, 3)


def test_two_regularizers_on_one_weight_are_noticed():
    model = net()
    optimizer = sgd(model)
    SpectralNormRegularizer(model, include="0.weight").attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SpectralNormConstraint(model).attach(optimizer)
        SpectralNormRegularizer(model, include="1.weight").attach(optimizer)
    with pytest.warns(sc.SpectralWarning, match=r"another SpectralNormRegularizer acts on"):
        SpectralNormRegularizer(model).attach(optimizer)


def test_a_penalty_in_a_loss_beside_the_hook_counts_twice_and_says_so():
    model = net()
    optimizer = sgd(model)
    reg = SpectralNormRegularizer(model).attach(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg.penalty().item()
    loss = model(torch.ones(2, 5)).sum() + reg.penalty()
    with pytest.warns(sc.SpectralWarning, match="counts twice"):
        loss.backward()


def test_a_penalty_in_the_loss_alone_lowers_sigma():
    """With a start vector far from the singular one: v moves on with each backward pass."""
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, bias=False)
    reg = SpectralNormRegularizer(layer, 1.0, warmup_iters=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = np.linalg.norm(layer.weight.detach(), 2)
    for _ in range(60):
        optimizer.zero_grad()
        (0.0 * layer(torch.ones(1, 30)).sum() + reg.penalty()).backward()
        optimizer.step()
    after = np.linalg.norm(layer.weight.detach(), 2)
    assert after < 0.7 * before
    assert 0.5 * after < float(reg.sigmas()["weight"]) < 1.001 * after


def test_frozen_weights_count_neither_in_the_penalty_nor_in_the_watch():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).double()
    model[0].requires_grad_(False)
    reg = SpectralNormRegularizer(model, factor=1.0, warmup_iters=500)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.0)
    reg.attach(optimizer)
    log = []
    with Watch(lambda values, step: log.append(values), every_n_steps=1, prefix="") as watch:
        watch.attach(reg, optimizer)
        model(torch.ones(1, 16, dtype=torch.float64)).sum().backward()
        optimizer.step()
    expected = np.linalg.norm(model[1].weight.detach(), 2) ** 2 / 2
    assert reg.penalty().item() == pytest.approx(expected, rel=1e-6)
    assert log[0]["penalty"] == pytest.approx(expected, rel=1e-6)
    assert list(log[0]) == ["sigma/1.weight", "log10_sigma_product", "penalty"]
    frozen, trained = reg.summary().rows
    assert (frozen.note, trained.note) == ("frozen", "")
    model.requires_grad_(False)
    assert reg.penalty().item() == 0.0


def test_summary_shows_what_is_attached():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    reg = SpectralNormRegularizer(model, {"0.weight": 0.5, "2.weight": lambda step: 1.0 + step})
    reg.attach(optimizer)
    conv, linear = reg.summary().rows
    assert conv[:5] == ("0.weight", (6, 2, 3, 3), (2, 3, 18), "(go)ikk", 0.5)
    assert linear.factor == 1.0
    assert (conv.attached, conv.last_step, conv.note) == ("SGD", None, "")
    assert (linear.attached, linear.note) == ("–", "held by no attached optimizer")
    expected = np.linalg.norm(model[0].weight.detach().reshape(2, 3, 18), 2, axis=(1, 2)).max()
    reg.iterate_(500)
    assert reg.summary().rows[0].sigma == pytest.approx(expected, rel=1e-4)
    assert re.search("attached to SGD, no step yet", str(reg.summary()))


# Schedules


def test_a_schedule_is_asked_for_each_step_and_is_resumed():
    def run(model, steps, resume=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        asked = []
        reg = SpectralNormRegularizer(
            model, lambda step: asked.append(step) or 0.1 * (step + 1), restore_gradients=False
        ).attach(optimizer)
        if resume is not None:
            reg.load_state_dict(resume)
        norms = []
        asked.clear()
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            norms.append(float(model[0].weight.grad.norm() / reg.sigmas()["0.weight"]))
        return norms, asked, reg

    model = net()
    norms, asked, reg = run(model, 4)
    assert norms == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-5)
    assert asked == [0, 1, 2, 3]
    norms, asked, _ = run(model, 2, reg.state_dict())
    assert norms == pytest.approx([0.5, 0.6], rel=1e-5)
    assert asked == [4, 5]


def test_each_optimizer_counts_its_own_steps():
    model = net()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model]
    reg = SpectralNormRegularizer(
        model, {"*": lambda step: 1.0 + step}, restore_gradients=False
    ).attach(*optimizers)
    for optimizer in (*optimizers, optimizers[0], optimizers[0]):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert float(model[0].weight.grad.norm() / reg.sigmas()["0.weight"]) == pytest.approx(3.0)
    assert reg.state_dict()["steps"].tolist() == [3, 1]


def test_a_schedule_of_the_bound():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    cap = SpectralNormConstraint(model, lambda step: 0.5 / (step + 1), n_iter=50).attach(optimizer)
    for bound in (0.5, 0.25, 0.5 / 3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert np.linalg.norm(model[0].weight.detach(), 2) == pytest.approx(bound, rel=1e-3)
    assert callable(cap.bound)


@pytest.mark.parametrize("bad", [lambda step: -1.0, {"*": lambda step: float("nan")}])
def test_a_bad_schedule_is_refused_when_it_is_set(bad):
    with pytest.raises(sc.ArgumentError, match="factor"):
        SpectralNormRegularizer(net(), bad)


def test_a_state_can_be_moved_in_inference_mode():
    for kernels in (True, False):
        model = net()
        optimizer = sgd(model)
        reg = SpectralNormRegularizer(model, kernels=kernels).attach(optimizer)
        model.double()
        with torch.inference_mode():
            reg.penalty(), reg.sigmas(), reg.iterate_()
        model(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
        optimizer.step()
        assert reg.summary().rows[0].last_step == 0


def test_a_weight_without_a_gradient_is_not_bounded():
    model = net()
    optimizer = sgd(model)
    SpectralNormConstraint(model, 0.01).attach(optimizer)
    before = model[1].weight.detach().clone()
    model[0](torch.ones(1, 5)).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight.detach(), before)
    assert np.linalg.norm(model[0].weight.detach(), 2) < 0.02


# Layers that compute their weight from the parameter


NORMALIZED = {
    "spectral": nn.utils.parametrizations.spectral_norm,
    "weight": nn.utils.parametrizations.weight_norm,
    "old spectral": nn.utils.spectral_norm,
    "old weight": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", [SpectralNormRegularizer, SpectralNormConstraint])
@pytest.mark.parametrize("name", NORMALIZED)
def test_a_normalized_layer_is_named_once(name, kind):
    model = nn.Sequential(NORMALIZED[name](nn.Linear(5, 4)), nn.Linear(4, 3))
    with pytest.warns(sc.SpectralWarning, match=r"\['0\..*normalized by their layer") as seen:
        kind(model)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", sc.SpectralWarning)
        kind(model, include="1.weight")


@pytest.mark.parametrize("name", ["on_step_begin", "on_train_start", "state_key"])
def test_a_trainer_that_takes_it_for_a_callback_is_told_which_one_is(name):
    reg = SpectralNormRegularizer(net())
    with pytest.raises(AttributeError, match=r"pass spectral_torch\.lightning"):
        getattr(reg, name)
    with pytest.raises(AttributeError, match="no attribute 'lambda_'"):
        _ = reg.lambda_


def test_calls_by_hand_count_as_steps():
    model = net()
    optimizer = sgd(model)
    asked = []
    reg = SpectralNormRegularizer(model, lambda step: asked.append(step) or 0.1)
    asked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            optimizer.zero_grad()
            model(torch.ones(2, 5)).square().sum().backward()
            reg.add_gradients_()
            optimizer.step()
        reg.sigmas(), reg.state_dict()
    assert asked == list(range(30))
    assert "last step 29" in repr(reg)
