"""σ of each weight, their product and the penalty in TensorBoard, without a wait for the device.

Run ``python examples/with_tensorboard.py``, then ``tensorboard --logdir runs``.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import spectral_torch


def main(folder: str = "runs", epochs: int = 20, every_n_steps: int = 10) -> dict[str, float]:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.25, random_state=0)
    x, x_test, y, y_test = (torch.tensor(part) for part in split)
    x, x_test = x.float(), x_test.float()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    reg = spectral_torch.SpectralNormRegularizer(model, factor=0.01).attach(optimizer)

    with (
        SummaryWriter(folder) as writer,
        # ↓ the whole of it
        spectral_torch.Watch(writer, every_n_steps=every_n_steps).attach(reg, optimizer),
    ):
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()

    accuracy = (model(x_test).argmax(1) == y_test).float().mean()
    return {
        **{f"sigma of {name}": float(sigma) for name, sigma in reg.sigmas().items()},
        "test accuracy": float(accuracy),
    }


if __name__ == "__main__":
    for name, value in main(*sys.argv[1:2]).items():
        print(f"{name}: {value:.3f}")
