"""Train, search, and write the table and the figures: python -m benchmarks.paper --help."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from time import monotonic

from rich.console import Console

from benchmarks import readme

from . import figures, page, results
from .data import DataError
from .results import RESULTS, Result, ResultsError
from .suites import SUITES
from .sweep import sweep
from .train import Settings

CONSOLE = Console()


def main() -> None:
    options = arguments()
    try:
        options.command(options)
    except (DataError, ResultsError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run(options: Namespace) -> None:
    """All runs of a suite."""
    runs = SUITES[options.suite].runs()
    if options.seeds is not None:
        runs = [one for one in runs if one.seed < options.seeds]
    if options.models:
        runs = [one for one in runs if one.model in options.models]
    if options.batches:
        runs = [one for one in runs if one.batch in options.batches]
    if options.epochs is not None:
        runs = [replace(one, epochs=options.epochs) for one in runs]
    found = _sweep(options, runs, options.suite)
    done = sum(result.done for result in found)
    diverged = [result.run.name for result in found if result.diverged]
    folder = _folder(options, options.suite)
    if done == len(runs):
        print(page.block(found, folder))
        figures.figures(found, folder)
    CONSOLE.print(f"{done} of {len(runs)} runs are done, in {folder}.")
    if diverged:
        CONSOLE.print(f"Diverged: {', '.join(diverged)}")
    if done < len(runs):
        CONSOLE.print("The same command goes on with the rest.")


def search(options: Namespace) -> None:
    """A grid of rates and strengths, by the accuracy on images held out of the training set."""
    suite = SUITES[options.suite]
    strengths = options.strengths or [results.STRENGTHS[options.method]]
    runs = suite.grid(options.models or suite.models, options.method, strengths, options.rates)
    found = _sweep(options, runs, f"search-{options.suite}")
    for result in sorted(found, key=_setting):
        one = result.run
        outcome = "diverged" if result.diverged else f"{result.curve('test')[-1]:.4f}"
        CONSOLE.print(
            f"{one.model:<12} B = {one.batch:<5} {one.method} {one.strength:g} "
            f"rate {one.rate:<6g} {outcome}"
        )


def table(_: Namespace) -> None:
    """Table 1 and what follows from it, from the committed results; the page and README too."""
    page.write()
    readme.write()
    for name, found in page.suites().items():
        print(f"{name}\n\n{page.block(found, RESULTS / name)}\n")


def draw(_: Namespace) -> None:
    """Figures 1 to 6, from the committed results."""
    for name, found in page.suites().items():
        for path in figures.figures(found, RESULTS / name):
            CONSOLE.print(path.relative_to(RESULTS))


def _setting(result: Result) -> tuple[str, int, float, float]:
    one = result.run
    return one.model, one.batch, one.strength, one.rate


def _sweep(options: Namespace, runs: list[results.Run], suite: str) -> list[Result]:
    settings = Settings(
        device=options.device,
        bfloat16=options.bfloat16,
        compiled=options.compile,
        channels_last=options.channels_last,
        threads=options.threads,
        deadline=monotonic() + 60 * options.minutes if options.minutes else None,
    )
    return sweep(
        runs,
        settings,
        _folder(options, suite),
        options.out / "checkpoints" / suite,
        workers=options.workers,
        source=options.data,
        console=CONSOLE,
    )


def _folder(options: Namespace, suite: str) -> Path:
    return (RESULTS if options.save else options.out) / suite


def arguments() -> Namespace:
    parser = ArgumentParser(
        prog="python -m benchmarks.paper",
        description="The experiments of Yoshida & Miyato (2017), run anew.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function in {"run": run, "search": search, "table": table, "figures": draw}.items():
        command = commands.add_parser(
            name,
            help=function.__doc__,
            description=function.__doc__,
            formatter_class=ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(command=function)
    for name in ("run", "search"):
        add_sweep_options(commands.choices[name])
    add_suite_options(commands.choices["run"])
    add_grid_options(commands.choices["search"])
    return parser.parse_args()


def add_sweep_options(parser: ArgumentParser) -> None:
    titles = "; ".join(f"{name}: {suite.title}" for name, suite in SUITES.items())
    parser.add_argument("suite", choices=SUITES, help=f"which set of runs. {titles}")
    parser.add_argument("--data", type=Path, help="the folder of the data set's files")
    parser.add_argument("--out", type=Path, default=Path("paper-output"), help="where to write")
    parser.add_argument("--save", action="store_true", help="write into the repository's results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="who computes")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="runs side by side"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    parser.add_argument("--bfloat16", action="store_true", help="autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--channels-last", action="store_true", help="as tensor cores like it")


def add_suite_options(parser: ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", help="these of the suite's alone")
    parser.add_argument("--batches", type=int, nargs="+", help="these of the suite's alone")
    parser.add_argument("--seeds", type=int, help="the first so many alone")
    parser.add_argument("--epochs", type=int, help="instead of the suite's")


def add_grid_options(parser: ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", help="all of the suite's if none is given")
    parser.add_argument("--method", choices=results.STRENGTHS, default="vanilla", help="whose grid")
    parser.add_argument("--strengths", type=float, nargs="+", help="the method's default if none")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3], help="initial ones"
    )


if __name__ == "__main__":
    main()
