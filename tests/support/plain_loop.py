"""The reference of the training stacks: a loop in plain PyTorch that adds the term by hand."""

from contextlib import nullcontext

import torch
from sklearn.datasets import load_digits
from torch import nn

from spectral_torch import SpectralNormRegularizer

torch.set_num_threads(1)  # on small networks, several wait for each other

FACTOR = 0.1


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def batches(steps, size=32):
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32).split(size)
    return list(zip(x, torch.tensor(labels).split(size), strict=True))[:steps]


def overflowing(data, index):
    """The data with a batch whose loss is not finite."""
    x, y = data[index]
    return [*data[:index], (torch.full_like(x, torch.inf), y), *data[index + 1 :]]


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)


def cross_entropy(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def train(
    model,
    data,
    optimizer_of=sgd,
    loss_of=cross_entropy,
    *,
    accumulate=1,
    clip=None,
    autocast=None,
    scaler=None,
):
    """Train ``model`` and return its regularizer."""
    reg = SpectralNormRegularizer(model, factor=FACTOR)
    optimizer = optimizer_of(model)
    for index, batch in enumerate(data, start=1):
        with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
            loss = loss_of(model, batch) / accumulate
        (loss if scaler is None else scaler.scale(loss)).backward()
        if index % accumulate:
            continue
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if all(p.grad.isfinite().all() for p in model.parameters()):
            reg.add_gradients_()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return reg


def assert_same(model, other, reg, other_reg, **tolerance):
    """Weights, and v and σ, are the same; by default in every bit."""
    found, expected = (
        {**module.state_dict(), **regularizer.state_dict()}
        for module, regularizer in ((model, reg), (other, other_reg))
    )
    assert len(found) == len(expected)
    for name, value in expected.items():
        close = torch.allclose(found[name], value, **{"rtol": 0.0, "atol": 0.0, **tolerance})
        assert close, f"{name} differs by {(found[name] - value).abs().max()}"


def assert_smaller(model, plain, reg):
    """The weights' spectral norms are smaller than without, and what ``reg`` says of them holds."""
    for name, sigma in reg.sigmas().items():
        norm, without = (torch.linalg.matrix_norm(m.get_parameter(name), 2) for m in (model, plain))
        assert norm < 0.95 * without, name
        assert 0.8 * norm < sigma < 1.05 * norm, name  # as of the step before, and from below
