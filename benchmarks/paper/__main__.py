"""Train, search, and show the tables and figures: python -m benchmarks.paper --help."""

import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic

from rich.console import Console

from . import data, figures, page, runs
from .methods import METHODS, MODELS
from .runs import SUITES, Result, Run, RunError
from .sweep import sweep
from .train import HOW, Settings

CONSOLE = Console()


def run(options: Namespace) -> None:
    """Do the runs of a suite; the same command goes on after an interruption."""
    suite, strengths = SUITES[options.suite], dict(options.strengths)
    planned = suite.runs(options.models, options.methods, options.batches, strengths)
    seeds = suite.seeds if options.seeds is None else options.seeds
    planned = [one for one in planned if one.seed < seeds]
    if options.epochs is not None:
        planned = [replace(one, epochs=options.epochs) for one in planned]
    finish(options, options.suite, planned)


def search(options: Namespace) -> None:
    """Try a grid of rates and strengths, judged by images held out of the training set."""
    suite = SUITES[options.suite]
    strengths = options.strengths or [runs.STRENGTHS.get(options.method, 0.0)]
    models = options.models or suite.models
    planned = suite.grid(models, options.method, strengths, options.rates)
    finish(options, f"search-{options.suite}", planned)


def finish(options: Namespace, suite: str, planned: list[Run]) -> None:
    """Do the runs, and show what they say once all are done."""
    folder = options.out / suite
    deadline = monotonic() + 60 * options.minutes if options.minutes else None
    how = {name: getattr(options, name) for name in HOW}
    settings = Settings(**how, threads=options.threads, deadline=deadline)
    found = sweep(planned, settings, folder, CONSOLE, options.workers, options.data)
    CONSOLE.print(f"{len(found)} of {len(planned)} runs are done, in {folder}.")
    if diverged := [result.run.name for result in found if result.diverged]:
        CONSOLE.print(f"Diverged: {', '.join(diverged)}")
    if len(found) < len(planned):
        CONSOLE.print("The same command goes on with the rest.")
        return
    print(page.block(found))
    figures.figures(found, folder)
    if options.save:
        runs.commit(suite, found)
        CONSOLE.print(f"Committed {suite}; now: python -m benchmarks.readme")


def table(options: Namespace) -> None:
    """Print Table 1 and what follows from it."""
    for name, results in chosen(options).items():
        print(f"## {name}\n\n{page.block(results)}\n")


def draw(options: Namespace) -> None:
    """Draw Figures 1 to 6."""
    for name, results in chosen(options).items():
        paths = figures.figures(results, options.out / name)
        if options.save and name in figures.ON_PAGES:
            folder = runs.COMMITTED / name
            paths += figures.figures(results, folder, figures.ON_PAGES[name])
        CONSOLE.print("\n".join(map(str, paths)))


def chosen(options: Namespace) -> dict[str, list[Result]]:
    """Return the results by suite, of those that the command names."""
    found = runs.committed()
    if options.results:
        folders = sorted(path for path in options.results.glob("*") if path.is_dir())
        found = {folder.name: runs.read_folder(folder) for folder in folders}
    found = {name: results for name, results in found.items() if results}
    if unknown := set(options.suites) - found.keys():
        raise RunError(f"no results of {', '.join(sorted(unknown))}; there are: {[*found]}")
    if not found:
        raise RunError(f"there are no results in {options.results}")
    return {name: found[name] for name in options.suites or found}


def strength(text: str) -> tuple[str, float]:
    """Parse spectral=0.03."""
    method, _, value = text.partition("=")
    if method not in METHODS:
        raise ArgumentTypeError(f"{method!r} is none of {', '.join(METHODS)}")
    return method, float(value)


def arguments() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[Namespace], None]) -> ArgumentParser:
        about = {"help": function.__doc__, "description": function.__doc__}
        added = commands.add_parser(name, formatter_class=ArgumentDefaultsHelpFormatter, **about)
        added.set_defaults(command=function)
        added.add_argument("--out", type=Path, default="paper-output", help="where to write")
        return added

    running, grid = command("run", run), command("search", search)
    for added in (running, grid):
        add = added.add_argument
        titles = "; ".join(f"{name}: {suite.title}" for name, suite in SUITES.items())
        add("suite", choices=SUITES, help=f"which set of runs. {titles}")
        add("--models", nargs="+", choices=MODELS, default=[], help="instead of the suite's")
        add("--data", type=Path, help="the folder of the data set's files")
        add("--save", action="store_true", help="commit to the repository's results as well")
        add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
        add("--workers", type=int, default=os.cpu_count() or 1, help="runs side by side")
        add("--threads", type=int, default=1, help="threads of each run")
        add("--minutes", type=float, help="stop then; the same command goes on")
        add("--bfloat16", action="store_true", help="autocast")
        add("--compile", dest="compiled", action="store_true", help="torch.compile the model")
        add("--channels-last", action="store_true", help="the layout that tensor cores like")
    add = running.add_argument
    add("--methods", nargs="+", choices=METHODS, default=[], help="instead of the suite's")
    example = "instead of the default ones, such as spectral=0.03 (λ)"
    add("--strengths", nargs="+", type=strength, default=[], metavar="METHOD=λ", help=example)
    add("--batches", type=int, nargs="+", default=[], help="only these of the suite's")
    add("--seeds", type=int, help="only the first so many")
    add("--epochs", type=int, help="instead of the suite's")
    add = grid.add_argument
    add("--method", choices=METHODS, default="vanilla", help="whose grid")
    add("--strengths", type=float, nargs="+", help="the method's default if none")
    add("--rates", type=float, nargs="+", default=[0.01, 0.03, 0.1, 0.3], help="initial ones")
    for name, function in {"table": table, "figures": draw}.items():
        add = command(name, function).add_argument
        add("suites", nargs="*", default=[], help="all if none is given")
        whose = "the folder that `run` wrote into (--out); the committed results if none"
        add("--results", type=Path, help=whose)
        if function is draw:
            add("--save", action="store_true", help="the repository's figures as well")
    return parser


def main() -> None:
    options = arguments().parse_args()
    try:
        options.command(options)
    except (data.DataError, RunError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
