"""What the regularizer costs: the same training step with it and without it, in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import NamedTuple

from .data import Digits, batches
from .net import Net
from .train import METHODS, plan


class Cost(NamedTuple):
    batch: int
    vanilla_ms: float
    spectral_ms: float

    @property
    def share(self) -> float:
        """Of the step with the regularizer."""
        return 1 - self.vanilla_ms / self.spectral_ms


def whole_share(costs: Sequence[Cost], steps: Mapping[int, int]) -> float:
    """Of all training steps of the demonstration, given how many there are by batch size."""
    spectral = sum(steps[cost.batch] * cost.spectral_ms for cost in costs)
    vanilla = sum(steps[cost.batch] * cost.vanilla_ms for cost in costs)
    return 1 - vanilla / spectral


def cost(make: type[Net], data: Digits, batch: int, repeats: int = 200, warmup: int = 20) -> Cost:
    """Medians over the repeats; taking turns, both see the same noise of the machine."""
    nets = {method: make(plan(data, method, batch, seed=0, epochs=1)) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    images, labels = next(batches(data, batch, seed=0, epoch=0))
    for _ in range(warmup + repeats):
        for method, net in nets.items():
            start = perf_counter()
            net.step(images, labels)
            net.wait()
            times[method].append(1e3 * (perf_counter() - start))
    return Cost(batch, **{f"{method}_ms": median(ms[warmup:]) for method, ms in times.items()})
