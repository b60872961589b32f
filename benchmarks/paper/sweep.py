"""Many runs side by side, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.speed.device import machine

from . import data, results
from .data import Data
from .results import Result, Run
from .train import Settings, train


def sweep(
    runs: Sequence[Run],
    settings: Settings,
    folder: Path,
    checkpoints: Path,
    *,
    workers: int,
    source: Path | None,
    console: Console,
) -> list[Result]:
    """Do what of the runs is not done yet, until it is late."""
    context = multiprocessing.get_context("spawn")  # neither CUDA nor OpenMP outlives a fork
    with (
        ProcessPoolExecutor(workers, context, torch.set_num_threads, (settings.threads,)) as pool,
        _progress(console) as progress,
    ):
        futures = [pool.submit(work, run, settings, folder, checkpoints, source) for run in runs]
        bar = progress.add_task("epochs", total=sum(run.epochs for run in runs))
        _watch(futures, lambda: progress.update(bar, completed=epochs_done(runs, folder)))
    return [future.result() for future in futures]


def work(
    run: Run, settings: Settings, folder: Path, checkpoints: Path, source: Path | None
) -> Result:
    """One run, in whatever process."""
    if settings.late():
        return Result(run)
    images = load(run.data, source, run.subset, run.validate)
    checkpoints.mkdir(parents=True, exist_ok=True)
    # A process that was left behind may be at its last epoch still.
    with FileLock(checkpoints / f"{run.name}.lock"):
        if run.framework == "jax":
            return _in_jax(run, images, folder / f"{run.name}.jsonl")
        return train(run, images, settings, folder, checkpoints, _leave_if_left)


def _leave_if_left() -> None:
    """End this process if the one that began it was killed: nobody waits for it."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


def _in_jax(run: Run, images: Data, path: Path) -> Result:
    """So short that it begins anew if it was stopped."""
    import jax  # who has no JAX needs none for the rest

    from . import jax_nin

    jax.config.update("jax_platforms", "cpu")
    result = results.begun(run, path)
    if not result.done:
        result = jax_nin.train(run, images, machine("cpu"))
        results.write(path, result)
    return result


@cache
def load(name: str, source: Path | None, subset: int | None, validate: bool) -> Data:
    """The images of a run: once for each process."""
    images = data.limited(data.load(name, source), subset)
    return data.held_out(images) if validate else images


def epochs_done(runs: Sequence[Run], folder: Path) -> int:
    """Read off the files, which the processes write; a run that diverged has done its all."""
    return sum(_epochs_of(run, folder / f"{run.name}.jsonl") for run in runs)


def _epochs_of(run: Run, path: Path) -> int:
    if not path.exists():
        return 0
    result = results.read(path)
    return run.epochs if result.done else len(result.epochs)


def _watch(futures: Sequence[Future[Result]], show: Callable[[], None]) -> None:
    """Until all are done, or have failed; an interrupt ends what has not begun."""
    waiting = set(futures)
    try:
        while waiting:
            _, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            show()
    except BaseException:
        for future in waiting:
            future.cancel()
        raise


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
