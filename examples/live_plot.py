"""Train a small net on digits, and see σ of its layers and the penalty move as it does.

Run ``python examples/live_plot.py``; with ``--save out.png`` it needs no screen, and keeps the
last picture.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import spectral_torch


def draw(above: plt.Axes, below: plt.Axes, numbers: dict[str, list[float]]) -> None:
    for axes in (above, below):
        axes.clear()
    for name, values in numbers.items():
        if name.startswith("sigma/"):
            above.plot(numbers["step"], values, label=name.removeprefix("sigma/"))
    below.plot(numbers["step"], numbers["penalty"], color="black")
    above.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, handlelength=1
    )
    above.figure.align_ylabels()
    above.set(ylabel="largest singular value σ", ylim=(0, None))
    below.set(ylabel="penalty (λ/2)·Σσ²", ylim=(0, None), xlabel="training step")


def main(save: str | None = None, epochs: int = 20) -> dict[str, list[float]]:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images.reshape(-1, 1, 8, 8) / 16, labels, random_state=0)
    x, x_test, y, y_test = (torch.tensor(part) for part in split)
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3)
    layers = [conv1, nn.ReLU(), conv2, nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)]
    names = ("conv1", "relu1", "conv2", "relu2", "flat", "dense", "relu3", "out")
    model = nn.Sequential(OrderedDict(zip(names, layers, strict=True)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    reg = spectral_torch.SpectralNormRegularizer(model, factor=0.01).attach(optimizer)

    figure, axes = plt.subplots(2, sharex=True, height_ratios=(2, 1), layout="constrained")
    numbers: dict[str, list[float]] = {}

    def log(values: dict[str, float], step: int) -> None:
        for name, value in {"step": step, **values}.items():
            numbers.setdefault(name, []).append(value)
        if save is None:
            draw(*axes, numbers)
            plt.pause(0.001)

    with spectral_torch.Watch(log, every_n_steps=5, prefix="").attach(reg, optimizer):
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch].float()), y[batch]).backward()
                optimizer.step()

    draw(*axes, numbers)
    plt.show() if save is None else figure.savefig(save, dpi=150)
    accuracy = (model(x_test.float()).argmax(1) == y_test).float().mean()
    print({name: round(float(sigma), 3) for name, sigma in reg.sigmas().items()})
    print(f"test accuracy {accuracy:.3f}")
    return numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", metavar="FILE", help="write the last picture, and show none")
    main(parser.parse_args().save)
