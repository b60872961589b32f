"""The sets of runs that are reported together, and the grids that their rates come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from .methods import METHODS, PAPERS
from .results import Run

LARGE = 4096

# Table 1's initial rates at B = 64 and 4096, by the kind of model.
PAPER_RATES = {
    "vgg": (0.01, 0.1),
    "nin": (0.1, 1.0),
    "densenet-40": (0.1, 1.0),
    "densenet-22": (0.01, 0.1),
}

SEARCH_SEED = 1000  # no run that is reported has it


@dataclass(frozen=True)
class Suite:
    """Models on one data set, at a small and a large batch."""

    title: str
    data: str
    rates: Mapping[str, tuple[float, float]]  # by model: at the small and at the large batch
    epochs: int
    batches: tuple[int, int] = (64, LARGE)
    widths: Mapping[str, float] | None = None  # by model; the published one if none is given
    methods: Sequence[str] = PAPERS
    seeds: int = 3
    subset: int | None = None
    hessians: int = 0

    def runs(self) -> list[Run]:
        """All of them, seed by seed, so that a sweep that is cut short can be compared."""
        return [
            Run(
                data=self.data,
                model=model,
                method=method,
                strength=METHODS[method][1],
                batch=batch,
                rate=rate,
                epochs=self.epochs,
                seed=seed,
                width=self._width(model),
                subset=self.subset,
                hessians=self.hessians,
            )
            for seed in range(self.seeds)
            for model, rates in self.rates.items()
            for batch, rate in zip(self.batches, rates, strict=True)
            for method in self.methods
        ]

    def grid(
        self, models: Iterable[str], method: str, strengths: Iterable[float], rates: Iterable[float]
    ) -> list[Run]:
        """Each strength with each rate, judged by images held out of the training set."""
        return [
            Run(
                data=self.data,
                model=model,
                method=method,
                strength=strength,
                batch=batch,
                rate=rate,
                epochs=self.epochs,
                seed=SEARCH_SEED,
                width=self._width(model),
                subset=self.subset,
                validate=True,
            )
            for model, batch, strength, rate in product(models, self.batches, strengths, rates)
        ]

    def _width(self, model: str) -> float:
        return (self.widths or {}).get(model, 1.0)


NARROW = {"vgg": 0.25, "nin": 0.25, "densenet-40": 0.25, "densenet-22": 0.25}

SUITES = {
    "quick": Suite(
        "a small setting, end to end",
        "digits",
        rates={"vgg": (0.03, 0.1)},
        epochs=20,
        batches=(64, 448),
        widths=NARROW,
        seeds=2,
        hessians=2,
    ),
    "digits": Suite(
        "scikit-learn's digits, narrow models",
        "digits",
        rates={"vgg": (0.03, 0.1), "nin": (0.1, 0.1), "densenet-22": (0.1, 0.1)},
        epochs=40,
        batches=(64, 448),
        widths=NARROW,
        methods=tuple(METHODS),
        hessians=4,
    ),
    "fashion-narrow": Suite(
        "10,000 images of Fashion-MNIST, a narrow model",
        "fashion-mnist",
        rates={"vgg": (0.03, 0.1)},
        epochs=12,
        batches=(64, 1024),
        widths={"vgg": 0.125},
        subset=10_000,
        hessians=2,
    ),
    "fashion": Suite(
        "Fashion-MNIST",
        "fashion-mnist",
        rates={model: PAPER_RATES[model] for model in ("vgg", "nin", "densenet-40")},
        epochs=60,
        hessians=6,
    ),
    "cifar-10": Suite(
        "CIFAR-10", "cifar-10", rates={"vgg": PAPER_RATES["vgg"]}, epochs=200, hessians=8
    ),
    "cifar-100": Suite(
        "CIFAR-100",
        "cifar-100",
        rates={model: PAPER_RATES[model] for model in ("nin", "densenet-40")},
        epochs=200,
        hessians=8,
    ),
    "stl-10": Suite(
        "STL-10",
        "stl-10",
        rates={"densenet-22": PAPER_RATES["densenet-22"]},
        epochs=200,
        hessians=8,
    ),
}
