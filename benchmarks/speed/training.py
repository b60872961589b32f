"""The regularizer's share of whole training steps of real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import models
from spectral_torch import SpectralNormRegularizer

from .device import clock_of
from .timing import Budget, Step, interleaved

NOTE = (
    "forward, backward, SGD with Nesterov momentum, float32; share: the regularizer's own time "
    "within a step over that step, and beside it the difference of steps with and without"
)


@dataclass(frozen=True)
class Training:
    name: str
    title: str
    make: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    batch: int


def images(side: int, classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda count: (torch.randn(count, 3, side, side), torch.randint(classes, (count,)))


def texts(length: int, vocabulary: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def draw(count: int) -> tuple[Tensor, Tensor]:
        text = torch.randint(vocabulary, (count, length + 1))
        return text[:, :-1].contiguous(), text[:, 1:].flatten()

    return draw


def trainings() -> list[Training]:
    small, large, text = images(32, 10), images(224, 1000), texts(256, 50257)
    return [
        Training("densenet-40", "DenseNet-40, 32² images", models.densenet_40, small, 64),
        Training("vgg-16", "VGG-16, 32² images", models.vgg_16, small, 64),
        Training("gpt2-small", "GPT-2 small, 256 tokens", models.gpt2_small, text, 2),
        Training("resnet-50", "ResNet-50, 224² images", models.resnet_50, large, 32),
    ]


def share(training: Training, device: str, budget: Budget) -> dict[str, Any]:
    torch.manual_seed(0)
    model = training.make().to(device)
    data, target = (tensor.to(device) for tensor in training.draw(training.batch))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    regularizer = SpectralNormRegularizer(model, factor=1e-4, warmup_iters=1)
    watch = Stopwatch(device)
    without = step_of(model, data, target, optimizer, lambda: None)
    with_it = step_of(
        model, data, target, optimizer, lambda: watch.time(regularizer.add_gradients_)
    )
    timings = interleaved({"without": without, "with": with_it}, budget, clock_of(device))
    step, plain = timings["with"].median_s, timings["without"].median_s
    own = watch.median(timings["with"].rounds)
    return {
        "title": f"{training.title}, batch {training.batch}",
        "weights": len(regularizer.sigmas()),
        "steps": {name: timing.as_json() for name, timing in timings.items()},
        "regularizer_ms": 1e3 * own,
        "share": own / step,
        "share_by_difference": (step - plain) / step,
    }


def step_of(
    model: nn.Module,
    data: Tensor,
    target: Tensor,
    optimizer: torch.optim.Optimizer,
    before_step: Callable[[], None],
) -> Step:
    """What a training loop does; ``before_step`` is where `attach` would call the regularizer."""

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(data), target).backward()
        before_step()
        optimizer.step()

    return step


class Stopwatch:
    """Seconds of a part of a step: by events on a GPU, which the step must not wait for."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, part: Step) -> None:
        if self._device == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            part()
            pair[1].record()
            self._events.append(pair)
        else:
            start = perf_counter()
            part()
            self._seconds.append(perf_counter() - start)

    def median(self, last: int) -> float:
        """Of the last ones: those before were warming up."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        by_events = [1e-3 * start.elapsed_time(end) for start, end in self._events]
        return median((self._seconds + by_events)[-last:])
