"""Optimizers of other libraries, and unusual ways to step: the term arrives exactly once."""

import copy

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
import torch
from torch import nn

import plain_loop
import spectral_core as sc
from plain_loop import FACTOR, assert_same, batches, cross_entropy, sgd
from spectral_torch import SpectralNormRegularizer

STEPS = 8  # RAdam's first ones move nothing


def module_of(name):
    return pytest.importorskip(name, reason=f"{name} is not installed")


def bitsandbytes(name, **options):
    return lambda p: getattr(module_of("bitsandbytes").optim, name)(
        p, lr=1e-3, min_8bit_size=1, **options
    )


def torchao(name):
    return lambda p: getattr(module_of("torchao.optim"), name)(p, lr=1e-2)


def schedulefree(name):
    def make(p):
        optimizer = getattr(module_of("schedulefree"), name)(p, lr=0.1)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def muon(p):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this PyTorch has no Muon")
    return torch.optim.Muon([w for w in p if w.ndim == 2], lr=0.02)


OPTIMIZERS = {
    "bitsandbytes AdamW8bit": bitsandbytes("AdamW8bit"),
    "bitsandbytes PagedAdamW8bit": bitsandbytes("PagedAdamW8bit"),
    "bitsandbytes Lion8bit": bitsandbytes("Lion8bit"),
    "bitsandbytes SGD8bit": bitsandbytes("SGD8bit", momentum=0.9),
    "torchao AdamW8bit": torchao("AdamW8bit"),
    "torchao AdamW4bit": torchao("AdamW4bit"),
    "schedulefree SGD": schedulefree("SGDScheduleFree"),
    "schedulefree AdamW": schedulefree("AdamWScheduleFree"),
    "schedulefree RAdam": schedulefree("RAdamScheduleFree"),
    "lion-pytorch": lambda p: module_of("lion_pytorch").Lion(p, lr=1e-3),
    "transformers Adafactor": lambda p: module_of("transformers").Adafactor(p),
    "Muon": muon,
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def trained(optimizer_of, *, term=True):
    """With the term by the hook."""
    model = net()
    optimizer = optimizer_of(model)
    reg = SpectralNormRegularizer(model, factor=FACTOR)
    if term:
        reg.attach(optimizer)
    for batch in batches(STEPS):
        cross_entropy(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, reg


def assert_once(optimizer_of):
    model, reg = trained(optimizer_of)
    expected = net()
    expected_reg = plain_loop.train(expected, batches(STEPS), optimizer_of)
    assert_same(model, expected, reg, expected_reg)
    without, _ = trained(optimizer_of, term=False)
    assert not torch.equal(without[0].weight, model[0].weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_term_arrives_once(name):
    assert_once(lambda model: OPTIMIZERS[name](model.parameters()))


@pytest.mark.parametrize("name", ["SGDScheduleFreeClosure", "AdamWScheduleFreeClosure"])
def test_a_closure_that_is_called_at_other_weights(name):
    """Such an optimizer moves the weights first; the term is then of those it moved them to."""
    make = schedulefree(name)

    def run(by_hook):
        model = net()
        optimizer = make(model.parameters())
        reg = SpectralNormRegularizer(model, factor=FACTOR)
        if by_hook:
            reg.attach(optimizer)
        for batch in batches(4):

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = cross_entropy(model, batch)
                loss.backward()
                if not by_hook:
                    reg.add_gradients_()
                return loss

            optimizer.step(closure)
        return model, reg

    (model, reg), (expected, expected_reg) = run(True), run(False)
    assert_same(model, expected, reg, expected_reg)


def test_schedulefrees_wrapper_is_refused_and_takes_the_explicit_call():
    # What it wraps steps at weights that are not those of the gradient.
    schedule = module_of("schedulefree")
    model, expected = net(), net()
    reg = SpectralNormRegularizer(model, factor=FACTOR)
    wrapper = schedule.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(sc.ArgumentError, match=r"call add_gradients_\(\) before each step, or"):
        reg.attach(wrapper)
    whole = schedule.SGDScheduleFree(expected.parameters(), lr=0.1)
    expected_reg = SpectralNormRegularizer(expected, factor=FACTOR).attach(whole)
    wrapper.train()
    whole.train()
    for batch in batches(4):
        for net_, optimizer in ((model, wrapper), (expected, whole)):
            optimizer.zero_grad()
            cross_entropy(net_, batch).backward()
            if optimizer is wrapper:
                reg.add_gradients_()
            optimizer.step()
    assert_same(model, expected, reg, expected_reg, rtol=1e-4, atol=1e-5)


SCHEDULES = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
}


@pytest.mark.parametrize("attached_first", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_scheduler_which_replaces_step(schedule, attached_first):
    model, expected = net(), net()
    outcomes = []
    for net_, by_hook in ((model, True), (expected, False)):
        optimizer = sgd(net_)
        reg = SpectralNormRegularizer(net_, factor=FACTOR)
        if by_hook and attached_first:
            reg.attach(optimizer)
        scheduler = SCHEDULES[schedule](optimizer)
        if by_hook and not attached_first:
            reg.attach(optimizer)
        for batch in batches(4):
            cross_entropy(net_, batch).backward()
            if not by_hook:
                reg.add_gradients_()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        outcomes.append(reg)
    assert_same(model, expected, *outcomes)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_zero_redundancy(one_process):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    assert_once(
        lambda model: ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9
        )
    )


def test_local_sgd_stands_for_what_it_wraps(one_process):
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model, expected = net(), net()
    expected_reg = plain_loop.train(expected, batches(4))
    optimizer = PostLocalSGDOptimizer(sgd(model), PeriodicModelAverager(period=2))
    reg = SpectralNormRegularizer(model, factor=FACTOR)
    reg.attach(optimizer)
    assert "attached to SGD" in repr(reg)
    for batch in batches(4):
        cross_entropy(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, expected, reg, expected_reg)


def test_averaged_weights_are_of_regularized_ones():
    model, expected = net(), net()
    reg, reference = (SpectralNormRegularizer(m, factor=FACTOR) for m in (model, expected))
    optimizer, hookless = sgd(model), sgd(expected)
    reg.attach(optimizer)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    seen = []
    for batch in batches(4):
        for m, o in ((model, optimizer), (expected, hookless)):
            o.zero_grad()
            cross_entropy(m, batch).backward()
            if m is expected:
                reference.add_gradients_()
            o.step()
        averaged.update_parameters(model)
        seen.append(copy.deepcopy(expected.state_dict()))
    for name, value in averaged.module.state_dict().items():
        mean = torch.stack([weights[name] for weights in seen]).mean(0)
        torch.testing.assert_close(value, mean)


def in_backward(model, optimizers):
    """Step each parameter as soon as it has its gradient."""
    for parameter, optimizer in optimizers.items():

        def step(_, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    for batch in batches(4):
        cross_entropy(model, batch).backward()


def one_for_each(model):
    return {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}


def test_optimizers_within_the_backward_pass():
    model, expected = net(), net()
    expected_reg = plain_loop.train(expected, batches(4))
    optimizers = one_for_each(model)
    reg = SpectralNormRegularizer(model, factor=FACTOR)
    for parameter, optimizer in optimizers.items():
        if parameter.ndim > 1:
            reg.attach(optimizer)
    in_backward(model, optimizers)
    assert_same(model, expected, reg, expected_reg)


def test_all_optimizers_at_once():
    model, expected = net(), net()
    expected_reg = plain_loop.train(expected, batches(4))
    optimizers = one_for_each(model)
    reg = SpectralNormRegularizer(model, factor=FACTOR).attach(*optimizers.values())
    in_backward(model, optimizers)
    assert_same(model, expected, reg, expected_reg)
    strangers = one_for_each(net())
    with pytest.raises(sc.ArgumentError, match="none of the weights"):
        reg.attach(*strangers.values())
