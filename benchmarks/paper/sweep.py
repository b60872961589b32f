"""Many runs side by side, each in a process of its own."""

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from runpy import run_path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from . import data, runs
from .runs import Result, Run, RunError
from .train import Settings, train

EPOCHS_DONE: Any = None  # a counter that all processes of a sweep share
ENDED = (
    "the system ended a process, most likely because memory ran out with --workers {workers}: "
    "try fewer, or --micro-batch 256; the same command goes on"
)


def sweep(
    planned: Sequence[Run],
    settings: Settings,
    folder: Path,
    console: Console,
    workers: int = 1,
    source: Path | None = None,
    own: Path | None = None,
) -> list[Result]:
    """Do what is not done yet, side by side in processes; return the finished runs.

    ``own`` is a file of models, methods and data sets, which each process runs first.
    """
    context = multiprocessing.get_context("spawn")  # neither CUDA nor OpenMP outlives a fork
    counter = context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, context, begin, (counter, settings.threads, own))
    with pool, Progress(console=console) as progress:
        bar = progress.add_task("epochs", total=sum(one.epochs for one in planned))
        futures = [pool.submit(work, one, settings, folder, source) for one in planned]
        waiting = set(futures)
        try:
            while waiting:
                _, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
                progress.update(bar, completed=counter.value)
            return [result for future in futures if (result := future.result()) is not None]
        except BrokenProcessPool as error:
            raise RunError(ENDED.format(workers=workers)) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def begin(counter: Any, threads: int, own: Path | None) -> None:
    """Prepare a process of the pool."""
    if own is not None:
        run_path(str(own))
    global EPOCHS_DONE
    EPOCHS_DONE = counter
    torch.set_num_threads(threads)


def advance(epochs: int = 1) -> None:
    """Count epochs; end this process if the one that started it was killed: nobody waits for it."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
    if EPOCHS_DONE is not None:
        with EPOCHS_DONE.get_lock():
            EPOCHS_DONE.value += epochs


def work(one: Run, settings: Settings, folder: Path, source: Path | None) -> Result | None:
    """Do one run; None if it is not finished."""
    if settings.late():
        return None
    images = load(one.data, source, one.subset, one.validate)
    folder.mkdir(parents=True, exist_ok=True)
    # A process that was left behind may be at its last epoch still.
    with FileLock(folder / f"{one.name}.lock"):
        if one.framework == "jax" and runs.finished(one, folder) is None:
            import jax  # only these runs need it

            from .jax_nin import train_in_jax

            jax.config.update("jax_platforms", "cpu")
            return runs.write(folder, train_in_jax(one, images, advance))
        train(one, images, settings, folder, advance)
        return runs.finished(one, folder)


@cache
def load(name: str, source: Path | None, subset: int | None, validate: bool) -> data.Data:
    """Return the images of a run; each process reads them once."""
    images = data.load(name, source)
    return data.limited(data.held_out(images) if validate else images, subset)
