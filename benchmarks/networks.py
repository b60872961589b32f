"""Train small networks on digits, and bound each by every norm: `python -m benchmarks.networks`.

The table is inserted by `python -m benchmarks.readme`.
"""

from math import log10
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import spectral_core as sc
import spectral_torch

from .common import RESULTS, read_json, write_json
from .models import Residual
from .paper.data import batches, digits
from .readme import networks

FILE = "networks.json"
METHODS = {"vanilla": 0.0, "spectral": 0.01}
EPOCHS, BATCH, SEEDS = 30, 64, (0, 1, 2)


def chain() -> nn.Module:
    """Return a chain of convolutions and dense layers."""
    convs = [nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)]
    parts = [part for conv in convs for part in (conv, nn.ReLU())]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def residual() -> nn.Module:
    """Return a network of residual blocks with batch normalization."""
    stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    blocks = [Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


NETWORKS = {"chain": chain, "residual": residual}


def train(network: str, factor: float, seed: int) -> tuple[nn.Module, float]:
    """Return a trained network and its accuracy on the test images in percent."""
    torch.manual_seed(seed)
    model, data = NETWORKS[network](), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    if factor:
        spectral_torch.SpectralNormRegularizer(model, factor=factor).attach(optimizer)
    images, labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
    for epoch in range(EPOCHS):
        for chosen in batches(len(labels), BATCH, seed, epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        answers = model.eval()(torch.from_numpy(data.test_images)).argmax(1).numpy()
    return model, 100 * float(np.mean(answers == data.test_labels))


def measure(model: nn.Module) -> dict[str, float | None]:
    """Return the logarithms of all bounds of a trained network, to base 10."""
    images = torch.from_numpy(digits().test_images[:64])
    found = spectral_torch.lipschitz_bound(model, images)
    assert not found.unbounded, found
    rows = [row for row in found.layers if row.kind.startswith(("Conv", "Linear"))]
    return {
        "flattened": sum(log10(flattened(model, row.name)) for row in rows),
        "operator": sum(log10(row.upper) for row in rows),
        "eclipse": found.log10_eclipse,
        "bound": found.log10_upper,
        "jacobian": log10(found.lower or 0),
    }


def flattened(model: nn.Module, name: str) -> float:
    """Return the norm of a layer's flattened kernel, with the batch norm behind it folded in."""
    modules = dict(model.named_modules())
    layer, names = modules[name], list(modules)
    following = modules[names[names.index(name) + 1]] if name != names[-1] else None
    if isinstance(following, nn.BatchNorm2d):
        layer = fuse_conv_bn_eval(layer, following)
    return float(sc.spectral_norm(layer.weight.detach().flatten(1).double()).sigma)


def run() -> dict[str, Any]:
    """Train and measure every network."""
    torch.set_num_threads(1)
    rows = []
    for network in NETWORKS:
        for method, factor in METHODS.items():
            found = []
            for seed in SEEDS:
                model, accuracy = train(network, factor, seed)
                found.append({"accuracy": accuracy, **measure(model)})
            rows.append({"network": network, "method": method, "seeds": found})
    return {"epochs": EPOCHS, "batch": BATCH, "factor": METHODS["spectral"], "rows": rows}


def main() -> None:
    write_json(RESULTS / FILE, run(), 5)
    print(networks(read_json(RESULTS / FILE)))


if __name__ == "__main__":
    main()
