"""Time a step beside its peers: `python -m benchmarks.speed --help`."""

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from benchmarks.common import RESULTS, machine, read_json, write_json

CHANGING = {"date", "load_at_start"}  # from run to run on one machine


def main() -> None:
    given = arguments()
    # Before the frameworks are imported: each on the device that is asked for, and quiet.
    os.environ["JAX_PLATFORMS"] = "cpu" if given.device == "cpu" else ""
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler that counts memory announces itself
    measure(given)


def measure(given: argparse.Namespace) -> None:
    from . import figure, report
    from .suite import GROUPS, Settings, parts, run
    from .timing import Budget, bandwidth

    console = Console()
    console = console if console.is_terminal else Console(width=140)
    budget = Budget(0.3 if given.quick else given.seconds)
    chosen = (given.device, given.only, given.groups or [*GROUPS], given.without, given.quick)
    settings, here = Settings(*chosen, budget), machine(given.device)
    folder, stem = RESULTS if given.save else given.out, report.stem(here)
    path = (folder or RESULTS) / f"{stem}.json.gz"
    old = report.EMPTY | (read_json(path) if path.exists() else {})
    if given.list:
        known = {part.name: old["seconds_of"].get(part.name, 0) for part in parts(settings)}
        lines = [f"{name:32} {seconds:5.0f} s" for name, seconds in known.items()]
        console.print("\n".join([*lines, f"{sum(known.values()):.0f} s in the result there"]))
        return
    result = report.EMPTY | {"machine": here}
    if (given.merge or given.resume) and "machine" in old:
        differ = {key for key in here if here[key] != old["machine"].get(key)} - CHANGING
        if differ:
            raise SystemExit(f"the result there has another {', '.join(differ)}: leave --merge out")
        result = old | {"machine": here}
    else:
        result["bytes_per_second"] = bandwidth(given.device)
    wanted = parts(settings, result["bytes_per_second"])
    if given.resume:
        wanted = [part for part in wanted if part.name not in result["seconds_of"]]
    for _ in run(track(wanted, "measuring", console=console), result):
        if folder:
            write_json(folder / f"{stem}.json.gz", result, report.DIGITS)
    console.print(Markdown(report.summary(result, picture=False)))
    if folder:
        figure.save(folder / f"{stem}.png", result)
        figure.save_scaling(folder / f"{stem}-scaling.png", result)
        console.print(f"wrote {folder.name}/{stem}.json.gz and its pictures")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    example = "parts by name, such as 'square-4096-*', 'options-*', 'training-*', compilation"
    add("--only", nargs="+", metavar="PATTERN", default=["*"], help=example)
    add("--groups", nargs="+", choices=("torch", "jax", "numpy", "cupy"), help="all if none")
    words = "steps to leave out: words of their names or descriptions, such as svd"
    add("--without", nargs="+", metavar="WORD", default=[], help=words)
    add("--list", action="store_true", help="print the parts, and the seconds they once took")
    add("--seconds", type=float, default=1.0, help="for a case and framework")
    add("--quick", action="store_true", help="a few small cases, briefly")
    add("--out", type=Path, help="folder to write the results into")
    add("--save", action="store_true", help="write the repository's results instead")
    add("--merge", action="store_true", help="keep what the result there has of other parts")
    add("--resume", action="store_true", help="measure the parts that the result there lacks")
    options = parser.parse_args()
    part = options.only != ["*"] or options.groups or options.without
    if options.save and (options.quick or (part and not options.merge)):
        parser.error("--save writes a whole run, or with --merge a part of one, but not --quick")
    return options


if __name__ == "__main__":
    main()
