"""Steps timed in turns, so that a slow moment of the machine hits all of them; and their memory."""

import gc
import tracemalloc
from collections.abc import Callable, Mapping
from itertools import accumulate
from math import ceil
from random import Random
from time import perf_counter
from timeit import timeit
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]
Makers = dict[str, Callable[[], Step]]  # each prepares a step, or raises `LeftOutError`
Options = Mapping[str, dict[str, Any]]  # of a step, by what a table calls them
Timing = dict[str, Any]  # median_ms, quartiles_ms, rounds, ratio_to_first

SLOW_SECONDS, SLOW_ROUNDS, IN_ALL = 1.0, 3, 8.0  # noise is a small part of so slow a step
WARM_UPS = 3
GPU_SAMPLE = 5e-3  # seconds of a sample on a GPU, which waits once for many steps, as training does
USABLE_MEMORY = 0.9  # the rest is for the interpreter, libraries and a step's own intermediates
CALLS = {"every_n_steps=4": 4}  # of a step that differs from the one before: the mean counts
COPIED = 2**28  # bytes, well beyond the caches


class LeftOutError(Exception):
    """A peer cannot take part in a case; the message says why, and is shown."""


class Budget(NamedTuple):
    """The time that a case and a group of peers may take."""

    seconds: float = 1.0
    rounds: int = 200
    least: int = 7


def interleaved(steps: Mapping[str, Step], budget: Budget, device: str) -> dict[str, Timing]:
    """Time round by round until the time is spent; a slow step takes part in the first few.

    The order within a round is random: what a step finds in the caches is what another left there.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    plans = {
        name: planned(step, budget, device, CALLS.get(name, 1)) for name, step in steps.items()
    }
    start = perf_counter()
    for turn in range(budget.rounds):
        if turn >= budget.least and perf_counter() - start > budget.seconds:
            break
        for name in Random(turn).sample([*steps], len(steps)):
            rounds, calls = plans[name]
            if turn < rounds:
                seconds[name].append(sample(steps[name], calls, device))
    return summarized(seconds)


def summarized(seconds: Mapping[str, list[float]]) -> dict[str, Timing]:
    """Return medians of the times, and of the ratios to the first step in the same round."""
    first, found = next(iter(seconds.values())), {}
    for name, taken in seconds.items():
        low, middle, high = 1e3 * np.quantile(taken, [0.25, 0.5, 0.75])
        found[name] = {"median_ms": middle, "quartiles_ms": [low, high], "rounds": len(taken)}
        ratios = [one / other for one, other in zip(taken, first, strict=False)]
        found[name]["ratio_to_first"] = np.median(ratios)
    return found


def planned(step: Step, budget: Budget, device: str, calls: int) -> tuple[int, int]:
    """Warm up, and return how often to time the step and how many calls make a sample."""
    for _ in range(WARM_UPS):
        seconds = sample(step, calls, device)
        if seconds > SLOW_SECONDS:
            return max(1, min(SLOW_ROUNDS, int(IN_ALL / seconds / calls))), calls
    return budget.rounds, calls if device == "cpu" else calls * ceil(GPU_SAMPLE / seconds / calls)


def sample(step: Step, calls: int, device: str) -> float:
    """Return the seconds of a step; `timeit` switches garbage collection off."""
    # JAX's steps wait for themselves. PyTorch waits for CuPy's too.
    wait: Step = torch.cuda.synchronize if device == "cuda" else lambda: None

    def called() -> None:
        for _ in range(calls):
            step()
        wait()

    wait()
    return timeit(called, number=1) / calls


def bandwidth(device: str) -> float:
    """Return the bytes a second that a large copy reads and writes."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = interleaved({"copy": lambda: target.copy_(source)}, Budget(1.0, least=20), device)
    return 2e3 * COPIED / taken["copy"]["median_ms"]


def require_memory(needed: int, device: str) -> None:
    """Raise `LeftOutError` unless there are as many bytes free."""
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + cached
    else:
        free = psutil.virtual_memory().available
    if needed > USABLE_MEMORY * free:
        raise LeftOutError(f"needs {needed / 2**30:.0f} GiB more, {free / 2**30:.0f} GiB are free")


def peak_memory(step: Step, device: str) -> int:
    """Return the bytes that a step takes at its peak, on a CPU with Python's and NumPy's."""
    step()
    if device == "cpu":
        return peak_by_profiler(step) + peak_by_tracemalloc(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak_by_profiler(step: Step) -> int:
    """Return the highest sum of what was allocated and freed since the step began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = (event.nbytes() for event in events if event.name() == "[memory]")
    return max(accumulate(changes), default=0)


def peak_by_tracemalloc(step: Step) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        step()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
