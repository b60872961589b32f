"""Pruned parameters: σ, the term and the bound are those of mask · parameter."""

import copy
import io
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from spectral_torch import SpectralNormConstraint, SpectralNormRegularizer  # noqa: E402

LAYERS = {
    "linear": lambda: nn.Linear(9, 7),
    "conv": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "rnn": lambda: nn.RNNCell(5, 4),
}


def pruned(kind, dtype=torch.float64):
    torch.manual_seed(0)
    layer = LAYERS[kind]().to(dtype)
    name = "weight_hh" if kind == "rnn" else "weight"
    prune.random_unstructured(layer, name, amount=0.4)
    return layer, getattr(layer, f"{name}_orig"), getattr(layer, f"{name}_mask"), f"{name}_orig"


def matrices(weight, kind):
    return weight.detach().reshape(3, 2, -1) if kind == "conv" else weight.detach()[None]


def term_of(weight, kind, factor):
    U, S, Vh = np.linalg.svd(matrices(weight, kind).double().numpy(), full_matrices=False)
    term = factor * S[:, :1, None] * U[:, :, :1] * Vh[:, :1, :]
    return torch.from_numpy(term.reshape(weight.shape)).to(weight.dtype)


@pytest.mark.filterwarnings("ignore::spectral_core.SpectralWarning")
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_sigma_and_term_are_those_of_the_masked_weight(kind, kernels):
    layer, parameter, mask, name = pruned(kind)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reg = SpectralNormRegularizer(layer, 0.1, warmup_iters=800, include=name, kernels=kernels)
    reg.attach(optimizer)
    exact = np.linalg.norm(matrices(mask * parameter, kind).numpy(), 2, axis=(1, 2))
    np.testing.assert_allclose(reg.sigmas()[name].reshape(-1), exact, rtol=1e-6)
    assert reg.penalty().item() == pytest.approx(0.05 * (exact**2).sum(), rel=1e-6)
    start = parameter.detach().clone()
    expected = mask * term_of(mask * parameter, kind, 0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(start - 1 - parameter.detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parameter.grad, torch.ones_like(parameter))
    reg.iterate_(800)
    penalty = reg.penalty()
    parameter.grad = None
    penalty.backward()
    torch.testing.assert_close(
        parameter.grad, mask * term_of(mask * parameter, kind, 0.1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_the_bound_is_that_of_the_masked_weight(kind):
    layer, parameter, mask, name = pruned(kind)
    before = parameter.detach().clone()
    SpectralNormConstraint(layer, 0.05, warmup_iters=800, include=name).constrain_()
    found = np.linalg.norm(matrices(mask * parameter, kind).numpy(), 2, axis=(1, 2))
    np.testing.assert_allclose(found, 0.05, rtol=1e-5)
    torch.testing.assert_close(parameter[mask == 0], before[mask == 0])


def test_pruning_on_during_training_and_for_good_is_followed():
    layer, parameter, _, name = pruned("linear")
    reg = SpectralNormRegularizer(layer, 0.1, every_n_steps=2)
    for after in ("again", "for good"):
        if after == "again":
            prune.random_unstructured(layer, "weight", amount=0.5)
        else:
            prune.remove(layer, "weight")
        reg.iterate_(800)
        weight = layer.weight if after == "for good" else layer.weight_mask * parameter
        exact = np.linalg.norm(weight.detach().numpy(), 2)
        assert float(reg.sigmas()[name]) == pytest.approx(exact, rel=1e-6)
        parameter.grad = torch.zeros_like(parameter)
        reg.add_gradients_()
        assert float(parameter.grad.norm()) > 0


def test_a_pruned_model_is_copied_saved_and_resumed():
    layer, parameter, *_ = pruned("linear")
    reg = SpectralNormRegularizer(layer, 0.1)
    twin = copy.deepcopy(reg)
    buffer = io.BytesIO()
    torch.save(reg.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    for one in (reg, twin):
        p = one._parameters["weight_orig"]
        p.grad = torch.zeros_like(p)
        one.add_gradients_()
    assert twin._parameters["weight_orig"] is not parameter
    torch.testing.assert_close(twin._parameters["weight_orig"].grad, parameter.grad)
