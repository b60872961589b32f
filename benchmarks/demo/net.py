"""The network that each backend builds, and what a backend offers.

conv 3×3, 1→32; conv 3×3 with stride 2, 32→64; dense 1024→128; dense 128→10; ReLU between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .data import Images, Labels

MOMENTUM = 0.9

SHAPES: Mapping[str, tuple[int, ...]] = {
    "conv1": (32, 1, 3, 3),
    "conv2": (64, 32, 3, 3),
    "dense1": (128, 1024),
    "dense2": (10, 128),
}

LAYOUTS: Mapping[str, str] = {"conv1": "oihw", "conv2": "oihw", "dense1": "oi", "dense2": "oi"}


@dataclass(frozen=True)
class Plan:
    """All that decides a run, besides the data."""

    seed: int
    batch: int
    rate: float
    factor: float  # λ; zero trains without the regularizer
    steps: int

    @property
    def milestones(self) -> tuple[int, int]:
        """The steps after which the learning rate is divided by ten."""
        return self.steps // 2, 3 * self.steps // 4


class Net(Protocol):
    """A network in training."""

    layouts: Mapping[str, str]

    def __init__(self, plan: Plan) -> None: ...

    def step(self, images: Images, labels: Labels) -> None:
        """One step of Algorithm 1."""

    def wait(self) -> None:
        """Return when the last step is done, on backends that run ahead."""

    def predict(self, images: Images) -> Labels: ...

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """By layer, each in the axes of ``layouts``."""

    def sigmas(self) -> dict[str, float]:
        """The regularizer's own running estimates by layer; empty without it."""


def initial_weights(seed: int) -> dict[str, NDArray[np.float32]]:
    """He's, in the axes of ``SHAPES``: output, input, kernel. Biases start at zero."""
    rng = np.random.default_rng(seed)
    return {
        layer: rng.normal(0, (2 / prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        for layer, shape in SHAPES.items()
    }
