"""Test that jobs are kept from step to step, and rebuilt where something has changed."""

import copy
import gc
import importlib.util
import weakref

import numpy as np
import pytest

import spectral_core as sc

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402

from spectral_torch import SpectralNormRegularizer  # noqa: E402
from torch_zoo import gradients, zoo  # noqa: E402

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def other_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def less_contiguous(model, reg):
    model["linear"].weight.grad = torch.arange(35.0).view(7, 5).T


def moved(model, reg):
    with torch.no_grad():
        model["conv"].weight.data = model["conv"].weight.data.clone()


def in_place(model, reg):
    with torch.no_grad():
        model["conv"].weight.mul_(2)


def no_gradient(model, reg):
    model["grouped"].weight.grad = None


def frozen(model, reg):
    model["wide"].weight.requires_grad_(False)


def another_factor(model, reg):
    reg.factor = 0.7


def a_mapping(model, reg):
    reg.factor = {"linear.weight": 0.2, "*": 0.1}


def a_tensor(model, reg):
    reg.factor = torch.tensor(0.4)


def more_iterations(model, reg):
    reg.n_iter = 3


def doubled(model, reg):
    model.double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def loaded(model, reg):
    other = SpectralNormRegularizer(model, include=list(reg.sigmas()), seed=5)
    reg.load_state_dict(other.state_dict())


def one_thread(model, reg):
    torch.set_num_threads(1)


def strided(model, reg):
    weight = model["wide"].weight
    weight.data = weight.data.view(-1).as_strided(weight.shape, (1, weight.shape[0]))


CHANGES = [
    *(less_contiguous, moved, in_place, no_gradient, frozen, another_factor, a_mapping, a_tensor),
    *(more_iterations, doubled, loaded, one_thread, strided),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("include", [None, ["linear.*", "wide.*", "conv.*", "grouped.*"]])
def test_a_repeated_step_notices_what_changes(change, include, device):
    if device != "cpu" and change in (less_contiguous, a_tensor, one_thread):
        pytest.skip("of the CPU")
    threads = torch.get_num_threads()
    try:
        models = zoo(device=device), zoo(device=device)
        regs = [SpectralNormRegularizer(model, factor=0.3, include=include) for model in models]
        for step in range(6):
            for model, reg in zip(models, regs, strict=True):
                other_gradients(model, seed=step)
                if step == 3:
                    change(model, reg)
                if reg is regs[1]:
                    reg._jobs.clear()  # everything is checked, each time
                reg.add_gradients_()
            found, expected = (
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
                for model in models
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            if step == 2 and include and device == "cpu" and importlib.util.find_spec("numba"):
                (kept,) = regs[0]._jobs._kept[regs[0]].values()
                assert len(kept.jobs.shares(regs[0]._jobs.engines)) == 1  # all in one call
    finally:
        torch.set_num_threads(threads)


def test_optimizers_that_take_turns_repeat_their_own_steps():
    models = zoo(), zoo()
    regs = [SpectralNormRegularizer(model, factor=0.3) for model in models]
    turns = [(nn.Identity(), ["linear.weight"]), (nn.Identity(), ["conv.weight", "wide.weight"])]
    for step in range(4):
        for model, reg in zip(models, regs, strict=True):
            other_gradients(model, seed=step)
            for optimizer, names in turns:
                if reg is regs[1]:
                    reg._jobs.clear()
                reg._add_terms_(names, optimizer)
    assert len(regs[0]._jobs._kept) == 2
    turns.clear()
    del optimizer
    gc.collect()
    assert len(regs[0]._jobs._kept) == 0
    torch.testing.assert_close(*(gradients(model) for model in models), rtol=0, atol=0)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("rows", [500, 3])
def test_a_weight_of_other_rows_is_refused(rows, kernels):
    model = zoo()["linear"]
    reg = SpectralNormRegularizer(model, kernels=kernels)
    reg.add_gradients_()
    model.weight.data = model.weight.data[:rows] if rows == 3 else torch.randn(rows, 7)
    model.weight.grad = torch.ones_like(model.weight)
    with pytest.raises(sc.ShapeError, match="call init again"):
        reg.add_gradients_()
    assert (model.weight.grad == 1).all()


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="PyTorch has no grad_dtype")
def test_gradients_may_be_of_another_dtype_from_a_step_on():
    models = zoo(torch.bfloat16)["linear"], zoo(torch.bfloat16)["linear"]
    regs = [
        SpectralNormRegularizer(m, kernels=k) for m, k in zip(models, (True, False), strict=True)
    ]
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32):
        for model, reg in zip(models, regs, strict=True):
            model.weight.grad = None
            model.weight.grad_dtype = dtype
            model.weight.grad = torch.ones(5, 7, dtype=dtype)
            reg.add_gradients_()
        torch.testing.assert_close(models[0].weight.grad, models[1].weight.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_tied_by_hand_get_every_term(device):
    models = (
        nn.ModuleList([nn.Linear(500, 600), nn.Linear(500, 600)]).to(device) for _ in range(2)
    )
    found = []
    for model, kernels in zip(models, (True, False), strict=True):
        torch.manual_seed(0)
        for layer in model:
            nn.init.normal_(layer.weight)
        reg = SpectralNormRegularizer(model, factor=1.0, kernels=kernels)
        for _ in range(3):  # of their own, then of one memory
            for layer in model:
                layer.weight.grad = torch.zeros_like(layer.weight)
            reg.add_gradients_()
        model[1].weight.grad = model[0].weight.grad
        for _ in range(2):
            reg.add_gradients_()
        found.append(model[0].weight.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_number_in_an_array_is_read_each_time():
    factor = np.array(1.0)
    model = zoo()["linear"]
    reg = SpectralNormRegularizer(model, factor=factor)
    reg.add_gradients_()
    factor[...] = 0.0
    model.weight.grad = torch.zeros(5, 7)
    reg.add_gradients_()
    assert not model.weight.grad.any()


def test_autograd_notices_what_is_added_to_a_graph():
    weight = nn.Parameter(torch.ones(4, 3))
    reg = SpectralNormRegularizer({"w": weight})
    for _ in range(2):
        (grad,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
        weight.grad = grad * 1
        before = weight.grad._version
        reg.add_gradients_()
        assert weight.grad._version > before


@pytest.mark.parametrize("kernels", [True, False])
def test_no_gradient_is_kept_alive(kernels):
    model = zoo()
    reg = SpectralNormRegularizer(model, kernels=kernels)
    for step in range(3):
        other_gradients(model, seed=step)
        kept = [weakref.ref(p.grad) for p in model.parameters()]
        reg.add_gradients_()
        model.zero_grad(set_to_none=True)
        gc.collect()
        assert not any(ref() is not None for ref in kept)


def test_jobs_are_built_once():
    model = zoo()
    reg = SpectralNormRegularizer(model, factor=0.3)
    built, build = [], reg._jobs.build
    reg._jobs.build = lambda *args: built.append(args) or build(*args)
    for step in range(5):
        other_gradients(model, seed=step)
        reg.factor = 0.1 * step
        reg.add_gradients_()
    assert len(built) == 1
    reg.target = 0.5
    reg.add_gradients_()
    assert len(built) == 2


def test_a_complex_weight_that_is_conjugated_in_place_is_noticed():
    data = torch.randn(4, 3, dtype=torch.complex64)
    weights = [nn.Parameter(data.clone()), nn.Parameter(data.clone())]
    regs = [SpectralNormRegularizer({"w": w}, factor=0.3) for w in weights]
    for step in range(4):
        for weight, reg in zip(weights, regs, strict=True):
            weight.grad = torch.zeros_like(weight)
            if step == 2:
                weight.data = weight.data.conj()
            if reg is regs[1]:
                reg._jobs.clear()
            reg.add_gradients_()
        torch.testing.assert_close(weights[0].grad, weights[1].grad)


def test_a_state_that_moves_to_shared_memory_is_noticed():
    models = zoo(), zoo()
    regs = [SpectralNormRegularizer(model, factor=0.3) for model in models]
    for step in range(4):
        for model, reg in zip(models, regs, strict=True):
            other_gradients(model, seed=step)
            if step == 2 and reg is regs[0]:
                for tensor in reg.state_dict().values():
                    tensor.share_memory_()  # as sending it to another process does
            reg.add_gradients_()
    torch.testing.assert_close(*(reg.state_dict() for reg in regs), rtol=0, atol=0)
    torch.testing.assert_close(*(gradients(model) for model in models), rtol=0, atol=0)


def test_what_a_step_replaces_is_freed_without_a_collection():
    model = zoo()
    reg = SpectralNormRegularizer(model, factor=0.3)
    gc.collect()
    gc.disable()
    try:
        for step in range(2):
            other_gradients(model, seed=step)
            reg.add_gradients_()
        old = weakref.ref(reg._state.v["linear.weight"])
        doubled(model, reg)
        reg.add_gradients_()
        assert old() is None
        other_gradients(model, seed=0)
        gradient = weakref.ref(model["linear"].weight.grad)
        model["conv"].weight.grad = model["conv"].weight.grad.to_sparse()
        with pytest.raises(sc.DTypeError, match="sparse"):
            reg.add_gradients_()
        model.zero_grad(set_to_none=True)
        assert gradient() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("wrong", [torch.tensor(1), torch.tensor(1j)])
def test_a_factor_of_a_wrong_dtype_is_refused_in_any_step(wrong):
    model = zoo()
    reg = SpectralNormRegularizer(model, factor=0.3)
    reg.add_gradients_()
    before = gradients(model)
    reg.factor = wrong
    for _ in range(2):
        with pytest.raises(sc.DTypeError, match="must be a real float"):
            reg.add_gradients_()
    torch.testing.assert_close(gradients(model), before, rtol=0, atol=0)


def test_a_copy_has_a_factor_of_its_own():
    reg = SpectralNormRegularizer(zoo(), factor=0.3)
    other = copy.copy(reg)
    other.factor = 0.5
    assert reg.factor == 0.3
