"""Train, search, and show the tables and figures: python -m benchmarks.paper --help."""

import os
import sys
from argparse import (
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
)
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from time import monotonic
from typing import Any

from rich.console import Console

from . import data, figures, page, runs
from .methods import METHODS, MODELS
from .runs import SUITES, Result, Run, RunError
from .sweep import sweep
from .train import HOW, Settings

CONSOLE = Console()


def run(options: Namespace) -> None:
    """Do the runs of a suite; the same command goes on after an interruption."""
    suite, strengths = SUITES[options.suite], {m: some[-1] for m, some in options.strengths.items()}
    chosen = options.models, options.methods, options.batches, strengths
    searched = suite.search or options.suite
    planned = suite.runs(*chosen, SUITES[searched].decided(found_by_search(searched, options.out)))
    seeds = suite.seeds if options.seeds is None else options.seeds
    planned = [one for one in planned if one.seed < seeds]
    finish(options, options.suite, [replace(one, **changes(options)) for one in planned])


def changes(options: Namespace) -> dict[str, Any]:
    """Return what the command sets in place of the suite's."""
    return {} if options.epochs is None else {"epochs": options.epochs}


def search(options: Namespace) -> None:
    """Try rates and then strengths, judged by images held out of the training set.

    The strengths are tried at the rate that is best for vanilla.
    """
    suite, name = SUITES[options.suite], f"search-{options.suite}"
    planned = suite.rates(options.models, options.batches, options.rates)
    planned = [replace(one, **changes(options)) for one in planned]
    settled = suite.settled(complete(options, name, planned) or [])
    more = suite.grid(settled, options.strengths or suite.strengths)
    finish(options, name, planned + [replace(one, **changes(options)) for one in more])


def found_by_search(suite: str, folder: Path) -> list[Result]:
    """Return the results of a suite's grid: those in the folder, and the committed ones."""
    name = f"search-{suite}"
    found = [*runs.committed(name).get(name, []), *runs.read_folder(folder / name)]
    return [*{one.run: one for one in found}.values()]


def complete(options: Namespace, suite: str, planned: list[Run]) -> list[Result] | None:
    """Do the runs, and return their results; None if some are not finished."""
    folder = options.out / suite
    if not options.fresh:
        runs.restore(suite, planned, folder)
    deadline = monotonic() + 60 * options.minutes if options.minutes else None
    how = {name: getattr(options, name) for name in HOW}
    settings = Settings(**how, threads=options.threads, deadline=deadline)
    files = options.data, options.own
    found = sweep(planned, settings, folder, CONSOLE, options.workers, *files)
    CONSOLE.print(f"{len(found)} of {len(planned)} runs are done, in {folder}.")
    if diverged := [result.run.name for result in found if result.diverged]:
        CONSOLE.print(f"Diverged: {', '.join(diverged)}")
    return found if len(found) == len(planned) else None


def finish(options: Namespace, suite: str, planned: list[Run]) -> None:
    """Do the runs, and show what they say once all are done."""
    if (found := complete(options, suite, planned)) is None:
        CONSOLE.print("The same command goes on with the rest.")
        return
    print(page.block(found))
    if not found[0].run.validate:
        figures.figures(found, options.out / suite)
    if options.save:
        runs.commit(suite, found)
        CONSOLE.print(f"Committed {suite}; now: python -m benchmarks.readme")


def commit(options: Namespace) -> None:
    """Add what is finished in a folder to the repository's results, also of unfinished suites."""
    for name, results in chosen(options).items():
        runs.commit(name, results)
        CONSOLE.print(f"Committed {len(results)} runs of {name}.")
    CONSOLE.print("Now: python -m benchmarks.readme")


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


class Strengths(Action):
    """Collect the strengths by method."""

    def __call__(self, _: Any, options: Namespace, pairs: Any, __: Any = None) -> None:
        by_method: dict[str, list[float]] = {}
        for method, value in pairs:
            by_method.setdefault(method, []).append(value)
        setattr(options, self.dest, by_method)


def own_parser() -> ArgumentParser:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    help = "a file that adds models, methods, data sets or suites of your own"
    parser.add_argument("--own", type=Path, metavar="FILE", help=help)
    return parser


def arguments() -> ArgumentParser:
    about = {"description": __doc__, "parents": [own_parser()]}
    parser = ArgumentParser(prog="python -m benchmarks.paper", **about)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[Namespace], None]) -> ArgumentParser:
        about = {"help": function.__doc__, "description": function.__doc__}
        added = commands.add_parser(name, formatter_class=ArgumentDefaultsHelpFormatter, **about)
        added.set_defaults(command=function)
        if function not in (table, commit):
            added.add_argument("--out", type=Path, default="paper-output", help="where to write")
        return added

    running, grid = command("run", run), command("search", search)
    for added in (running, grid):
        add = added.add_argument
        titles = "; ".join(f"{name}: {suite.title}" for name, suite in SUITES.items())
        add("suite", choices=SUITES, help=f"which set of runs. {titles}")
        add("--models", nargs="+", choices=MODELS, default=[], help="instead of the suite's")
        example = "instead of the suite's, such as spectral=0.03 (λ)"
        options = {"type": strength, "action": Strengths, "default": {}, "metavar": "METHOD=λ"}
        add("--strengths", nargs="+", help=example, **options)
        add("--batches", type=int, nargs="+", default=[], help="only these of the suite's")
        add("--epochs", type=int, help="instead of the suite's")
        add("--data", type=Path, help="the folder of the data set's files")
        add("--save", action="store_true", help="commit to the repository's results as well")
        add("--fresh", action="store_true", help="do committed runs anew")
        add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
        add("--workers", type=int, default=os.cpu_count() or 1, help="runs side by side")
        add("--threads", type=int, default=1, help="threads of each run")
        add("--minutes", type=float, help="stop then; the same command goes on")
        add("--micro-batch", type=int, help="images at a time, if memory holds no whole batch")
        add("--bfloat16", action="store_true", help="autocast")
        add("--compile", dest="compiled", action="store_true", help="torch.compile the model")
        add("--channels-last", action="store_true", help="the layout that tensor cores like")
    add = running.add_argument
    add("--methods", nargs="+", choices=METHODS, default=[], help="instead of the suite's")
    add("--seeds", type=int, help="only the first so many")
    grid.add_argument("--rates", type=float, nargs="+", default=[], help="initial ones")
    for name, function in {"table": table, "figures": draw, "commit": commit}.items():
        add = command(name, function).add_argument
        add("suites", nargs="*", default=[], help="all if none is given")
        whose = "the folder that `run` wrote into (--out); the committed results if none"
        # `run --out` and then `table --out` read alike; `figures` writes into its --out.
        add("--results", *["--out"] * (function is not draw), type=Path, help=whose)
        if function is draw:
            add("--save", action="store_true", help="the repository's figures as well")
    return parser


def main() -> None:
    # Before the other arguments: a file of one's own adds names that they may have.
    first, rest = own_parser().parse_known_args()
    try:
        if first.own is not None:
            run_path(str(first.own))
        options = arguments().parse_args(rest, first)
        options.command(options)
    except (data.DataError, RunError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
