"""Train, compare, report: python -m benchmarks.demo --help."""

from __future__ import annotations

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import figure
from .cost import cost
from .data import Digits, digits
from .net import Net
from .report import print_report, write_json
from .results import as_json
from .train import BACKENDS, METHODS, RATES, Run, backend, plan, train


def main() -> None:
    options, console, start = arguments(), Console(), perf_counter()
    data, make = digits(), backend(options.backend)
    costs = [cost(make, data, batch) for batch in RATES]
    runs = train_all(console, make, data, options.seeds, options.epochs)
    seconds = perf_counter() - start
    print_report(console, options.backend, runs, costs)
    folder = Path(__file__).parent / "results" if options.save else options.out
    picture, numbers = (folder / f"{options.backend}.{kind}" for kind in ("png", "json"))
    figure.save(
        picture, runs, f"Digits with {options.backend}: mean and range over {options.seeds} seeds"
    )
    write_json(numbers, as_json(options.backend, runs, costs, options.epochs, seconds))
    console.print(f"{len(runs)} runs in {seconds:.0f} s; wrote {picture.name} and {numbers.name}")


def arguments() -> Namespace:
    parser = ArgumentParser(
        prog="python -m benchmarks.demo",
        description="Train a small convolutional network on scikit-learn's digits with and "
        "without spectral norm regularization (λ = 0.01), at a small and a large batch.",
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--backend", choices=BACKENDS, default="torch", help="who computes")
    parser.add_argument("--epochs", type=positive, default=100, help="of each run")
    parser.add_argument("--seeds", type=positive, default=3, help="how many; each is four runs")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="where to write")
    parser.add_argument("--save", action="store_true", help="write into the repository's results")
    return parser.parse_args()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def train_all(
    console: Console, make: type[Net], data: Digits, seeds: int, epochs: int
) -> list[Run]:
    runs = []
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=seeds * len(RATES) * len(METHODS) * epochs)
        for seed in range(seeds):
            for batch in RATES:
                for method in METHODS:
                    progress.update(task, description=f"seed {seed}, batch {batch}, {method}")
                    chosen = plan(data, method, batch, seed, epochs)
                    runs.append(train(make, data, method, chosen, lambda: progress.advance(task)))
    return runs


if __name__ == "__main__":
    main()
