"""From the command line to the files."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.rounding import rounded

from . import figure, markdown, report, results
from .suite import Options, Part, names, run
from .timing import LEAST_ROUNDS, Budget


def session(given: Namespace, console: Console) -> None:
    if given.list:
        console.print("\n".join(names(given.device)))
        return
    start, result = perf_counter(), None
    for result in run(options_of(given), lambda parts: shown(parts, console)):
        result["seconds"] = perf_counter() - start
        if given.out is not None:
            results.write(given.out, result)
    if result is None:
        console.print(f"no case matches {given.only}: --list names them")
        return
    report.show(console, result)
    console.print(f"{result['seconds']:.0f} s", style="dim")
    for folder in (given.out, results.FOLDER if given.save else None):
        if folder is not None:
            write(folder, result, console)


def options_of(given: Namespace) -> Options:
    seconds = 0.3 if given.quick else given.seconds
    budget = Budget(seconds, given.rounds, min(LEAST_ROUNDS, given.rounds))
    return Options(given.device, tuple(given.only), given.quick, budget)


def shown(parts: list[Part], console: Console) -> Iterator[Part]:
    """Say what is being measured: the bar is gone afterwards."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(parts))
        for part in parts:
            progress.update(task, description=part.name)
            yield part
            progress.advance(task)


def write(folder: Path, result: dict[str, Any], console: Console) -> None:
    path = results.write(folder, result)
    saved = rounded(result, results.DIGITS)
    figure.save(path.with_suffix(".png"), saved)
    path.with_suffix(".md").write_text(markdown.everything(saved), encoding="utf-8")
    console.print(f"wrote {path.stem}.json, .png and .md")
