"""From the runs to the numbers that are reported."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from statistics import mean, stdev
from typing import Any

import spectral_core
from benchmarks import gap

from .cost import Cost, whole_share
from .train import RATES, Run

FRAMEWORKS = {"torch": ["torch"], "jax": ["jax", "jaxlib", "optax"], "numpy": []}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds, and in how many of them the value is below zero."""

    mean: float
    std: float
    seeds: int
    negative: int
    positive: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        std = stdev(values) if len(values) > 1 else 0.0
        negative, positive = sum(v < 0 for v in values), sum(v > 0 for v in values)
        return cls(mean(values), std, len(values), negative, positive)


def select(runs: Sequence[Run], method: str, batch: int) -> list[Run]:
    """In the order of seeds."""
    return [run for run in runs if run.method == method and run.plan.batch == batch]


def threshold(runs: Sequence[Run], batch: int) -> float:
    """α: the highest hundredth that every run of this batch size exceeds at some epoch."""
    return gap.threshold(max(run.test) for run in runs if run.plan.batch == batch)


def differences(runs: Sequence[Run], batch: int) -> dict[str, Spread]:
    """Spectral minus vanilla, seed by seed: both start from the same weights and see one order."""
    alpha = threshold(runs, batch)
    pairs = list(zip(select(runs, "spectral", batch), select(runs, "vanilla", batch), strict=True))
    return {
        "test": Spread.of([s.test[-1] - v.test[-1] for s, v in pairs]),
        "gap": Spread.of([s.gaps[-1] - v.gaps[-1] for s, v in pairs]),
        "gap_at_alpha": Spread.of([s.gap_at(alpha) - v.gap_at(alpha) for s, v in pairs]),
    }


def steps(runs: Sequence[Run]) -> dict[int, int]:
    """Of one run, by batch size."""
    return {run.plan.batch: run.plan.steps for run in runs}


def estimate_error(runs: Sequence[Run]) -> float:
    """The largest relative error of the regularizer's estimates, which are one step old."""
    return max(
        abs(estimate / run.after[layer][0] - 1)
        for run in runs
        for layer, estimate in run.estimates.items()
    )


def as_json(
    backend: str, runs: Sequence[Run], costs: Sequence[Cost], epochs: int, seconds: float
) -> dict[str, Any]:
    """Every number."""
    return {
        "backend": backend,
        "epochs": epochs,
        "seconds": round(seconds, 1),
        "machine": machine(backend),
        "alpha": {batch: threshold(runs, batch) for batch in RATES},
        "spectral_minus_vanilla": {
            batch: {name: asdict(spread) for name, spread in differences(runs, batch).items()}
            for batch in RATES
        },
        "estimate_error": estimate_error(runs),
        "share": whole_share(costs, steps(runs)),
        "step": [{**cost._asdict(), "share": cost.share} for cost in costs],
        "runs": [
            {
                "method": run.method,
                **asdict(run.plan),
                "gap_at_alpha": run.gap_at(threshold(runs, run.plan.batch)),
                "train": run.train,
                "test": run.test,
                "sigma_before": {layer: values[0] for layer, values in run.before.items()},
                "sigma_after": {layer: values[0] for layer, values in run.after.items()},
                "sigma_estimated": run.estimates,
                "spectrum_before": run.before,
                "spectrum_after": run.after,
            }
            for run in runs
        ],
    }


def machine(backend: str) -> dict[str, str | int]:
    """What timings depend on, and nothing that names the machine."""
    packages = ["numpy", "array-api-compat", "scikit-learn", *FRAMEWORKS[backend]]
    return {
        "architecture": platform.machine(),
        "cpus": os.cpu_count() or 0,
        "python": platform.python_version(),
        "spectral-core": spectral_core.__version__,
        **{package: version(package) for package in packages},
    }
