"""Measure the norm of convolutions that training follows: its error, and what a step costs.

Small networks train on digits with `norm="operator"`. Every few steps, σ is compared with the
certified norm of the same kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import numpy as np

import spectral_core as sc

from .common import RESULTS, add_output, machine, markdown, output_of, read_json, write_json

FILE = "operator-norm.json"
WAVES = (4, 8, 14)
SEEDS = 5  # of the weights, each a training
FACTOR, EPOCHS, BATCH, RATE = 0.01, 16, 64, 0.05
SKIPPED, EVERY = 50, 15  # steps before the waves have settled, and between two comparisons
ROUNDS = 12


def plain_network() -> Any:
    """Return the network of two convolutions that `benchmarks.accuracy` trains."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def residual_network() -> Any:
    """Return a small ResNet with batch normalization and two strided blocks."""
    from torch import nn

    from .models import Residual, normalized

    blocks = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*normalized(1, 16, 3), nn.ReLU(), *blocks, *head)


NETWORKS = {"two convolutions": plain_network, "small ResNet": residual_network}


def convolutions(model: Any) -> dict[str, Any]:
    """Return the convolutions of a model with more than one tap, by the names of their weights."""
    from torch import nn

    return {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1
    }


def steps(model: Any, waves: int, epochs: int) -> Iterator[Any]:
    """Train a model, and yield the regularizer before and after each step of the optimizer."""
    import torch

    import spectral_torch

    from .paper.data import batches, digits

    layouts = {
        name: sc.Convolution("oihw", stride=layer.stride, waves=waves)
        for name, layer in convolutions(model).items()
    }
    images, labels, *_ = map(torch.as_tensor, digits(test_share=0.55))
    total = epochs * (len(labels) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [total // 2, 3 * total // 4])
    reg = spectral_torch.SpectralNormRegularizer(
        model, FACTOR, norm="operator", layouts=layouts
    ).attach(optimizer)
    for epoch in range(epochs):
        for chosen in batches(len(labels), BATCH, 0, epoch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            yield reg
            optimizer.step()
            scheduler.step()
            yield reg


def errors(name: str, waves: int, epochs: int = EPOCHS, seed: int = 0) -> list[float]:
    """Return the relative errors of σ of all convolutions in the steps that are compared."""
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model = NETWORKS[name]()
    layers = convolutions(model)
    found: list[float] = []
    kernels: dict[str, Any] = {}
    for k, reg in enumerate(steps(model, waves, epochs)):
        step, is_after = divmod(k, 2)
        if step < SKIPPED or step % EVERY:
            continue
        if not is_after:  # σ belongs to the weights before the optimizer changes them
            kernels = {name: layer.weight.detach().clone() for name, layer in layers.items()}
            continue
        sigmas = reg.sigmas()
        for name, kernel in kernels.items():
            norm = sc.convolution_norm(kernel, "oihw", stride=layers[name].stride, tol=1e-3)
            found.append(1 - float(sigmas[name]) / norm.lower)
    return found


def kernels_of(name: str) -> dict[str, Any]:
    """Return the convolutions of an architecture with 3 × 3 kernels, with gradients."""
    import torch
    from torch import nn

    from .models import conv, densenet

    if name == "DenseNet-40":
        model: Any = densenet()
    else:
        layers, channels = [nn.Conv2d(3, 64, 7, 2, 3, bias=False)], 64
        for width in (64, 128, 256, 512):
            for block in range(2):
                first = 2 if block == 0 and width > 64 else 1
                layers += [conv(channels, width, 3, first), conv(width, width, 3)]
                channels = width
        model = nn.Sequential(*layers)
    for layer in (chosen := convolutions(model)).values():
        layer.weight.grad = torch.zeros_like(layer.weight)
    return chosen


def costs(name: str, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median time of the processor for a step in milliseconds, all kinds by turns."""
    import torch

    import spectral_torch

    torch.set_num_threads(1)
    layers = kernels_of(name)
    weights = {name: layer.weight for name, layer in layers.items()}
    plain = dict.fromkeys(weights, "oihw")
    kinds: dict[str, Any] = {
        "flattened": {"layouts": plain, "kernels": False},
        "flattened, Numba": {"layouts": plain},
    }
    for waves in WAVES:
        maps = {
            n: sc.Convolution("oihw", stride=layer.stride, waves=waves)
            for n, layer in layers.items()
        }
        kinds[str(waves)] = {"layouts": maps}
    regs = {
        kind: spectral_torch.SpectralNormRegularizer(weights, warmup_iters=0, **options)
        for kind, options in kinds.items()
    }
    times: dict[str, list[float]] = {kind: [] for kind in regs}
    for _ in range(rounds):
        for kind, reg in regs.items():
            # The time of the thread: what other processes do to a longer step does not count.
            start = thread_time()
            reg.add_gradients_()
            times[kind].append(1e3 * (thread_time() - start))
    return {kind: median(some[2:]) for kind, some in times.items()}


def page(folder: Path = RESULTS) -> str:
    """Return the tables of the page on penalties: errors, and costs."""
    result = read_json(folder / FILE)
    rows = []
    for waves, found in result["errors"].items():
        cells = [
            ", ".join(f"{100 * values[key]:.2g} %" for key in ("median", "p95", "max"))
            for values in found.values()
        ]
        default = " (the default)" if int(waves) == result["default"] else ""
        rows.append([f"`waves={waves}`{default}", *cells])
    titles = [f"{name}: median, 95th percentile, largest error" for name in NETWORKS]
    times = []
    for name, found in result["costs"].items():
        for waves in result["errors"]:
            flat = (found[kind] for kind in ("flattened", "flattened, Numba"))
            ratios = (f"{found[waves] / one:.1f} ×" for one in flat)
            times.append([f"{name}, `waves={waves}`", *ratios])
    header = ["time of a step on one thread, relative to", "PyTorch's flattened", "Numba's"]
    return "\n\n".join([markdown(["", *titles], rows), markdown(header, times)])


def main() -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator_norm", description=__doc__)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    add_output(parser, "operator-output")
    parser.add_argument("--costs", action="store_true", help="measure the costs alone")
    options = parser.parse_args()
    folder = output_of(options)
    result: dict[str, Any] = read_json(folder / FILE) if options.costs else {}
    result["default"] = sc.Convolution("oihw").waves
    if not options.costs:
        result["errors"] = {
            str(waves): {name: over_seeds(name, waves, options.epochs) for name in NETWORKS}
            for waves in WAVES
        }
        result["seeds"] = SEEDS
    result["costs"] = {name: costs(name) for name in ("DenseNet-40", "ResNet-18")}
    result["machine"] = machine("cpu")
    write_json(folder / FILE, result, 3)
    Console(width=150).print(Markdown(page(folder)))


def over_seeds(name: str, waves: int, epochs: int) -> dict[str, float]:
    """Return the quantiles of the errors in trainings from several starts, taken together."""
    each = [errors(name, waves, epochs, seed) for seed in range(SEEDS)]
    return quantiles([error for some in each for error in some])


def quantiles(values: list[float]) -> dict[str, float]:
    """Return the median, the 95th percentile and the maximum."""
    found = np.quantile(values, (0.5, 0.95, 1.0))
    return dict(zip(("median", "p95", "max"), map(float, found), strict=True))


if __name__ == "__main__":
    main()
