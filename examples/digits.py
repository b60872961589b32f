"""Train a plain network on scikit-learn's digits: vanilla, weight decay and spectral.

All methods see the same images, start from the same weights and visit the same batches, so the
results pair up seed by seed. λ and the decay were chosen by ``--search``: on other seeds, by the
accuracy on validation images, which are in neither the training set nor the test set.

Run ``python examples/digits.py``, with ``--backend jax`` or ``--backend numpy`` for another
framework. ``--save`` repeats the search and all trainings, and writes the committed results.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spectral_core as sc
from digits_nets import MOMENTUM, NETS, RATE, Array, Layer, Net
from digits_report import Row, best_strengths, draw, table, verdicts, write_json

WIDTHS = (64, 256, 256, 10)
TRAIN, VALIDATION, TEST = 800, 400, 597  # images
BATCHES = (64, TRAIN)
STEPS = 800
NOISE, DRAWS = 0.3, 4  # standard deviation on pixels in [0, 1], and noisy copies of each image
SEARCH_SEEDS, FIRST_SEED = range(4), 4
VECTORS = (1, 2, 4)

GRID = {
    "vanilla": (0.0,),
    "weight decay": (0.001, 0.003, 0.01, 0.03),
    "spectral": (0.003, 0.01, 0.03, 0.1),
}
# The strengths that --search chose from the grid: the decay, and λ.
CHOSEN = {"vanilla": 0.0, "weight decay": 0.003, "spectral": 0.03}

ROOT = Path(__file__).parent.parent


class Job(NamedTuple):
    """All that decides a training."""

    method: str
    strength: float  # λ of spectral, or the decay
    batch: int
    seed: int
    backend: str = "torch"
    steps: int = STEPS
    batch_norm: bool = False
    n_vectors: int = 1
    validate: bool = False  # measure on the validation images instead of the test images


class Outcome(NamedTuple):
    """Accuracies in percent, and the largest singular value of each layer."""

    test: float
    gap: float  # training accuracy minus test accuracy
    noise: float  # test accuracy under Gaussian noise
    sigma: list[float]


def split(seed: int) -> dict[str, tuple[Array, Array]]:
    """Return images (n, 64) in [0, 1] and labels (n,). The test part is the same for all seeds."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    rest, test, rest_y, test_y = train_test_split(
        images, labels, test_size=TEST, stratify=labels, random_state=0
    )
    train, validation, train_y, validation_y = train_test_split(
        rest, rest_y, train_size=TRAIN, stratify=rest_y, random_state=seed
    )
    return {
        "train": (train, train_y),
        "validation": (validation, validation_y),
        "test": (test, test_y),
    }


def initial_layers(rng: np.random.Generator) -> list[Layer]:
    """Draw weights and biases as ``torch.nn.Linear`` does: uniform within 1/√inputs."""
    return [
        Layer(
            rng.uniform(-(n**-0.5), n**-0.5, (m, n)).astype(np.float32),
            rng.uniform(-(n**-0.5), n**-0.5, m).astype(np.float32),
        )
        for n, m in pairwise(WIDTHS)
    ]


def batches(rng: np.random.Generator, size: int) -> Iterator[Array]:
    """Yield indices of training images, shuffled each epoch. A short last batch is dropped."""
    while True:
        order = rng.permutation(TRAIN)
        yield from (order[i : i + size] for i in range(0, TRAIN - size + 1, size))


def build(job: Job, rng: np.random.Generator) -> Net:
    """Return the untrained network of a job."""
    options: dict[str, Any] = {"factor": 0.0, "decay": 0.0}
    if job.method != "vanilla":
        options["factor" if job.method == "spectral" else "decay"] = job.strength
    if job.batch_norm:
        options["batch_norm"] = True
    if job.n_vectors > 1:
        options["n_vectors"] = job.n_vectors
    return NETS[job.backend](initial_layers(rng), **options)


def train(job: Job) -> Outcome:
    """Train one network, and measure it."""
    parts = split(job.seed)
    # One stream each, so that no choice of batch size or method changes the weights or the noise.
    start, order, noise = np.random.default_rng(job.seed).spawn(3)
    net = build(job, start)
    images, labels = parts["train"]
    for chosen in islice(batches(order, job.batch), job.steps):
        net.step(images[chosen], labels[chosen])

    def accuracy(x: Array, y: Array) -> float:
        return 100 * float(np.mean(net.predict(x) == y))

    x, y = parts["validation" if job.validate else "test"]
    noisy = (x + NOISE * noise.standard_normal(x.shape, np.float32) for _ in range(DRAWS))
    return Outcome(
        test=accuracy(x, y),
        gap=accuracy(images, labels) - accuracy(x, y),
        noise=mean(accuracy(copy, y) for copy in noisy),
        sigma=[float(np.linalg.norm(W, 2)) for W in net.matrices()],
    )


def train_all(jobs: Sequence[Job], title: str, console: Console) -> dict[Job, Outcome]:
    """Train the networks of all jobs, one process a core, long ones first."""
    # Small networks run fastest on one thread each. The new processes read this as they start.
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = min(os.cpu_count() or 1, len(jobs), 8)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(train, job): job for job in sorted(jobs, key=lambda j: -j.batch)}
        done = track(as_completed(futures), title, len(jobs), console=console)
        return {futures[future]: future.result() for future in done}


def experiment(
    strengths: Mapping[str, Sequence[float]],
    seeds: Iterable[int],
    title: str,
    console: Console,
    **options: Any,
) -> list[Row]:
    """Train each method at each strength and batch size: a row each, with a value a seed."""
    groups = {
        (batch, method, strength): [Job(method, strength, batch, s, **options) for s in seeds]
        for batch in BATCHES
        for method, grid in strengths.items()
        for strength in grid
    }
    outcomes = train_all([job for jobs in groups.values() for job in jobs], title, console)
    return [
        {"batch": batch, "method": method, "strength": strength}
        | {name: [getattr(outcomes[job], name) for job in jobs] for name in Outcome._fields}
        for (batch, method, strength), jobs in groups.items()
    ]


def search(console: Console, **options: Any) -> list[Row]:
    """Try the whole grid on the search's own seeds, measuring on the validation images."""
    rows = experiment(GRID, SEARCH_SEEDS, "search", console, validate=True, **options)
    rows = [{"validation" if k == "test" else k: v for k, v in row.items()} for row in rows]
    console.print(table(rows, f"Search, in percent, {len(SEARCH_SEEDS)} seeds, mean ± s.d."))
    best = ", ".join(f"{method} {strength:g}" for method, strength in best_strengths(rows).items())
    console.print(f"Highest validation accuracy: {best}.", highlight=False)
    return rows


def compare(seeds: int, console: Console, **options: Any) -> list[Row]:
    """Train each method at its chosen strength, on seeds that the search did not see."""
    strengths = {method: (strength,) for method, strength in CHOSEN.items()}
    rows = experiment(strengths, range(FIRST_SEED, FIRST_SEED + seeds), "train", console, **options)
    network = "Network with batch normalization" if options["batch_norm"] else "Plain network"
    console.print(
        table(rows, f"{network}, in percent, {seeds} seeds, mean ± s.d.; noise s.d. {NOISE}")
    )
    console.print("\n".join(verdicts(rows)), highlight=False)
    return rows


def compare_vectors(seeds: int, console: Console) -> list[Row]:
    """Train with one, two and four vectors a matrix, at the chosen λ and at the grid's largest."""
    strengths = {"spectral": (CHOSEN["spectral"], max(GRID["spectral"]))}
    rows: list[Row] = []
    for k in VECTORS:
        title = f"n_vectors={k}"
        found = experiment(
            strengths, range(FIRST_SEED, FIRST_SEED + seeds), title, console, n_vectors=k
        )
        console.print(table(found, title))
        rows += [{"n_vectors": k, **row} for row in found]
    return rows


def picture(rows: Sequence[Row], path: Path) -> None:
    title = (
        f"Digits: {'-'.join(map(str, WIDTHS))} network, {TRAIN} training images, "
        f"{len(rows[0]['test'])} seeds, noise s.d. {NOISE}"
    )
    draw(rows, title, path)


def save(seeds: int, console: Console) -> None:
    """Search, train all that the documentation cites, and write the committed files."""
    rows = compare(seeds, console, batch_norm=False)
    content = {
        "command": f"python examples/digits.py --save --seeds {seeds}",
        "machine": machine(),
        "settings": settings(seeds),
        "rows": rows,
        "batch_norm": compare(seeds, console, batch_norm=True),
        "n_vectors": compare_vectors(seeds, console),
        "search": search(console),
    }
    write_json(ROOT / "benchmarks" / "results" / "digits.json", content)
    picture(rows, ROOT / "docs" / "_static" / "digits.png")


def settings(seeds: int) -> dict[str, Any]:
    return {
        "backend": "torch",
        "network": list(WIDTHS),
        "images": {"train": TRAIN, "validation": VALIDATION, "test": TEST},
        "optimizer": {"name": "SGD", "rate": RATE, "momentum": MOMENTUM, "nesterov": True},
        "steps": STEPS,
        "noise": NOISE,
        "strengths": CHOSEN,
        "search_seeds": list(SEARCH_SEEDS),
        "seeds": list(range(FIRST_SEED, FIRST_SEED + seeds)),
    }


def machine() -> dict[str, Any]:
    packages = ("numpy", "scikit-learn", "torch")
    return {
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "spectral-core": sc.__version__,
        **{package: version(package) for package in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=NETS, default="torch")
    parser.add_argument("--seeds", type=int, default=4, help="how many (default: 4)")
    parser.add_argument("--batch-norm", action="store_true", help="normalize hidden layers (torch)")
    parser.add_argument("--search", action="store_true", help="try λ and the decay on a grid")
    parser.add_argument("--save", action="store_true", help="repeat the committed results (torch)")
    parser.add_argument("--picture", type=Path, default=Path("demo-output/digits.png"))
    options, console, start = parser.parse_args(), Console(), time.perf_counter()
    if options.backend != "torch" and (options.batch_norm or options.save):
        parser.error("--batch-norm and --save need --backend torch")
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    variant = {"backend": options.backend, "batch_norm": options.batch_norm}
    if options.save:
        save(options.seeds, console)
    elif options.search:
        search(console, **variant)
    else:
        picture(compare(options.seeds, console, **variant), options.picture)
        console.print(f"Wrote {options.picture}.")
    console.print(f"{time.perf_counter() - start:.0f} seconds.")


if __name__ == "__main__":
    main()
