"""The sets of runs that are reported together, and the grids that their rates come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from .results import PAPERS, STRENGTHS, Run


@dataclass(frozen=True)
class Setting:
    """How a model is trained."""

    rates: tuple[float, ...]  # initial ones, of each batch size
    epochs: int
    width: float = 1.0  # 1 is the published one


@dataclass(frozen=True)
class Suite:
    """Models on one data set, in general at a small and a large batch."""

    title: str
    data: str
    models: Mapping[str, Setting]
    batches: tuple[int, ...] = (64, 4096)
    methods: Sequence[str] = PAPERS
    seeds: int = 3
    subset: int | None = None
    hessians: int = 0
    frameworks: Sequence[str] = ("torch",)

    def runs(self) -> list[Run]:
        """All of them, seed by seed, so that a sweep that is cut short can be compared."""
        return [
            replace(
                self._run(model, batch, rate),
                method=method,
                strength=STRENGTHS[method],
                seed=seed,
                hessians=self.hessians,
                framework=framework,
            )
            for seed in range(self.seeds)
            for model, setting in self.models.items()
            for batch, rate in zip(self.batches, setting.rates, strict=True)
            for method in self.methods
            for framework in self.frameworks
        ]

    def grid(
        self, models: Iterable[str], method: str, strengths: Iterable[float], rates: Iterable[float]
    ) -> list[Run]:
        """Each strength with each rate, judged by images held out of the training set.

        They are a tenth of it, and batches are a tenth smaller: an epoch has as many steps.
        """
        return [
            replace(
                self._run(model, 9 * batch // 10, rate),
                method=method,
                strength=strength,
                validate=True,
            )
            for model, batch, strength, rate in product(models, self.batches, strengths, rates)
        ]

    def _run(self, model: str, batch: int, rate: float) -> Run:
        setting = self.models[model]
        return Run(
            data=self.data,
            model=model,
            method="vanilla",
            strength=0.0,
            batch=batch,
            rate=rate,
            epochs=setting.epochs,
            seed=SEARCH_SEED,
            width=setting.width,
            subset=self.subset,
        )


SEARCH_SEED = 1000  # no run that is reported has it


def published(model: str, epochs: int) -> Setting:
    """With Table 1's initial rates."""
    slow = model in ("vgg", "densenet-22")
    return Setting((0.01, 0.1) if slow else (0.1, 1.0), epochs)


SUITES = {
    "quick": Suite(
        "scikit-learn's digits, two seeds of one narrow model",
        "digits",
        {"vgg": Setting((0.03, 0.03), epochs=30, width=0.25)},
        batches=(64, 448),
        seeds=2,
        hessians=2,
    ),
    # By `search digits`, within an image: at so few steps others than the paper's are best.
    "digits": Suite(
        "scikit-learn's digits, narrow models",
        "digits",
        {
            "vgg": Setting((0.03, 0.03), epochs=60, width=0.25),
            "densenet-22": Setting((0.1, 0.1), epochs=60, width=0.25),
        },
        batches=(64, 448),
        methods=tuple(STRENGTHS),
        hessians=2,
    ),
    # It leaves chance late with a large batch, and so has more epochs.
    "digits-nin": Suite(
        "scikit-learn's digits, a narrow NIN",
        "digits",
        {"nin": Setting((0.02, 0.05), epochs=200, width=0.25)},
        batches=(64, 448),
        hessians=2,
    ),
    "digits-densenet-40": Suite(
        "scikit-learn's digits, a narrow DenseNet-40",
        "digits",
        {"densenet-40": Setting((0.1, 0.1), epochs=60, width=0.25)},
        batches=(64, 448),
        hessians=2,
    ),
    "two-frameworks": Suite(
        "scikit-learn's digits, a narrow NIN in PyTorch and in JAX",
        "digits",
        {"nin": Setting((0.02,), epochs=40, width=0.25)},
        batches=(64,),
        methods=("vanilla", "spectral"),
        frameworks=("torch", "jax"),
    ),
    "fashion-narrow": Suite(
        "8192 images of Fashion-MNIST, a narrow model",
        "fashion-mnist",
        {"vgg": Setting((0.03, 0.1), epochs=32, width=0.125)},
        batches=(64, 1024),
        subset=8192,
        hessians=8,
    ),
    "fashion": Suite(
        "Fashion-MNIST",
        "fashion-mnist",
        {model: published(model, epochs=60) for model in ("vgg", "nin", "densenet-40")},
        hessians=6,
    ),
    "cifar-10": Suite("CIFAR-10", "cifar-10", {"vgg": published("vgg", epochs=200)}, hessians=8),
    "cifar-100": Suite(
        "CIFAR-100",
        "cifar-100",
        {model: published(model, epochs=200) for model in ("nin", "densenet-40")},
        hessians=8,
    ),
    "stl-10": Suite(
        "STL-10", "stl-10", {"densenet-22": published("densenet-22", epochs=200)}, hessians=8
    ),
}
