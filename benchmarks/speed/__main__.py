"""Time a step beside its peers: `python -m benchmarks.speed --help`."""

import argparse
import os
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from benchmarks.common import RESULTS, write_json


def main() -> None:
    options = arguments()
    # Before the frameworks are imported: each on the device that is asked for, and quiet.
    os.environ["JAX_PLATFORMS"] = "cpu" if options.device == "cpu" else ""
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler that counts memory announces itself
    measure(options)


def measure(given: argparse.Namespace) -> None:
    from . import figure, report
    from .suite import Options, parts, run
    from .timing import LEAST_ROUNDS, Budget

    console = Console()
    console = console if console.is_terminal else Console(width=140)
    seconds = 0.3 if given.quick else given.seconds
    budget = Budget(seconds, given.rounds, min(LEAST_ROUNDS, given.rounds))
    options = Options(given.device, tuple(given.only), given.quick, budget)
    if not (wanted := parts(options)):
        raise SystemExit(f"no case matches {given.only}: --list names them")
    if given.list:
        console.print("\n".join(part.name for part in wanted))
        return
    folders = [folder for folder in (given.out, RESULTS if given.save else None) if folder]
    start = perf_counter()
    for result in run(options, lambda all: track(all, "measuring", console=console)):
        result["seconds"] = perf_counter() - start
        for folder in folders:
            write_json(folder / f"{report.stem(result)}.json.gz", result, report.DIGITS)
    console.print(Markdown(f"{report.summary(result, picture=False)}\n\n{report.goals(result)}"))
    for folder in folders:
        figure.save(folder / f"{report.stem(result)}.png", result)
        console.print(f"wrote {folder.name}/{report.stem(result)}.json.gz and .png")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    example = "cases by name, such as 'square-4096-*', 'training-*', compilation"
    add("--only", nargs="+", metavar="PATTERN", default=["*"], help=example)
    add("--list", action="store_true", help="print the names of the cases")
    add("--seconds", type=float, default=2.0, help="for a case and framework")
    add("--rounds", type=int, default=200, help="at most, for a case and framework")
    add("--quick", action="store_true", help="a few small cases, briefly")
    add("--out", type=Path, help="folder to write the results into")
    add("--save", action="store_true", help="write the repository's results")
    options = parser.parse_args()
    if options.save and (options.quick or options.only != ["*"]):
        parser.error("--save writes a whole run: leave --quick and --only out")
    return options


if __name__ == "__main__":
    main()
