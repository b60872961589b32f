"""The experiment: one loop for all methods, batch sizes and backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np
from threadpoolctl import threadpool_limits

import spectral_core
from benchmarks.gap import gap_at

from .data import Digits, Images, Labels, batches
from .net import Net, Plan

METHODS = {"vanilla": 0.0, "spectral": 0.01}  # λ

# Batch size, the second of which is all images: initial learning rate. Chosen by vanilla's test
# accuracy on other seeds, which at the small batch is much the same from 0.02 to 0.1, and at the
# large one best at 0.1.
RATES = {64: 0.05, 448: 0.1}

BACKENDS = {
    "torch": "torch_net.TorchNet",
    "jax": "jax_net.JaxNet",
    "numpy": "numpy_net.NumpyNet",
}

# Matrices so small gain nothing from the threads of BLAS, and lose much where cores are busy.
threadpool_limits(1, user_api="blas")

Spectra = dict[str, list[float]]


@dataclass
class Run:
    """What one training leaves: accuracies after each epoch, singular values by layer."""

    method: str
    plan: Plan
    train: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    before: Spectra = field(default_factory=dict)
    after: Spectra = field(default_factory=dict)
    estimates: dict[str, float] = field(default_factory=dict)

    @property
    def gaps(self) -> list[float]:
        """Train accuracy minus test accuracy after each epoch."""
        return [train - test for train, test in zip(self.train, self.test, strict=True)]

    def gap_at(self, threshold: float) -> float:
        """The paper's generalization gap: the least among epochs that test above the threshold."""
        return gap_at(threshold, self.train, self.test)


def backend(name: str) -> type[Net]:
    """The backend's class, importing its framework and no other."""
    module, cls = BACKENDS[name].split(".")
    found: type[Net] = getattr(import_module(f".{module}", __package__), cls)
    return found


def plan(data: Digits, method: str, batch: int, seed: int, epochs: int) -> Plan:
    steps = epochs * (len(data.train_labels) // batch)
    return Plan(seed, batch, RATES[batch], METHODS[method], steps)


def train(
    make: type[Net], data: Digits, method: str, plan: Plan, advance: Callable[[], object]
) -> Run:
    """Train one network; ``advance`` is called after each epoch."""
    net, run = make(plan), Run(method, plan)
    run.before = spectra(net)
    epochs = plan.steps // (len(data.train_labels) // plan.batch)
    for epoch in range(epochs):
        for images, labels in batches(data, plan.batch, plan.seed, epoch):
            net.step(images, labels)
        run.train.append(accuracy(net, data.train_images, data.train_labels))
        run.test.append(accuracy(net, data.test_images, data.test_labels))
        advance()
    run.after, run.estimates = spectra(net), net.sigmas()
    return run


def accuracy(net: Net, images: Images, labels: Labels, chunk: int = 128) -> float:
    """In chunks, which stay in the processor's cache."""
    parts = [net.predict(images[i : i + chunk]) for i in range(0, len(images), chunk)]
    return float(np.mean(np.concatenate(parts) == labels))


def spectra(net: Net) -> Spectra:
    """All singular values of each layer, the first one largest."""
    return {
        layer: np.linalg.svd(
            spectral_core.as_matrix(weight, net.layouts[layer]), compute_uv=False
        ).tolist()
        for layer, weight in net.weights().items()
    }
