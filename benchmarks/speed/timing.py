"""Steps timed in turns, so that a slow moment of the machine hits all of them; and their memory."""

import gc
import tracemalloc
from collections.abc import Callable, Mapping
from itertools import accumulate
from time import perf_counter
from timeit import timeit
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]

LEAST_ROUNDS, MOST_ROUNDS = 7, 200
SLOW_SECONDS, SLOW_ROUNDS = 1.0, 3  # the noise of so slow a step is a small part of it
WARM_UPS = 3
USABLE_MEMORY = 0.9  # the rest is for the interpreter, libraries and a step's own intermediates
COPIED = 2**28  # bytes, well beyond the caches


class LeftOutError(Exception):
    """A peer cannot take part in a case; the message says why, and is shown."""


class Clock(NamedTuple):
    """How to wait for the device, and how long a sample must be for that wait not to count."""

    wait: Callable[[], object] = lambda: None
    least_seconds: float = 0.0


def clock_of(device: str, group: str = "torch") -> Clock:
    """Return the clock of a device: on a GPU many steps are waited for once, as in training."""
    # JAX's steps here wait for themselves. PyTorch waits for CuPy's too.
    if device == "cpu" or group == "jax":
        return Clock()
    return Clock(torch.cuda.synchronize, least_seconds=5e-3)


class Budget(NamedTuple):
    """The time that a case and a group of peers may take."""

    seconds: float = 3.0
    rounds: int = MOST_ROUNDS
    least: int = LEAST_ROUNDS


Timing = dict[str, Any]  # median_ms, quartiles_ms, rounds


def interleaved(steps: Mapping[str, Step], budget: Budget, clock: Clock) -> dict[str, Timing]:
    """Time round by round until the time is spent; a slow step takes part in the first few."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    plans = {name: planned(step, budget, clock) for name, step in steps.items()}
    start = perf_counter()
    for turn in range(budget.rounds):
        if turn >= budget.least and perf_counter() - start > budget.seconds:
            break
        for name, step in steps.items():
            rounds, calls = plans[name]
            if turn < rounds:
                seconds[name].append(sample(step, calls, clock))
    return {name: timing(taken) for name, taken in seconds.items()}


def timing(seconds: list[float]) -> Timing:
    low, middle, high = 1e3 * np.quantile(seconds, [0.25, 0.5, 0.75])
    return {"median_ms": middle, "quartiles_ms": [low, high], "rounds": len(seconds)}


def planned(step: Step, budget: Budget, clock: Clock) -> tuple[int, int]:
    """Warm up, and return how often to time the step and how many calls make a sample."""
    for _ in range(WARM_UPS):
        seconds = sample(step, 1, clock)
        if seconds > SLOW_SECONDS:
            return SLOW_ROUNDS, 1
    return budget.rounds, max(1, round(clock.least_seconds / seconds))


def sample(step: Step, calls: int, clock: Clock) -> float:
    """Return the seconds of a call; `timeit` switches garbage collection off."""

    def called() -> None:
        for _ in range(calls):
            step()
        clock.wait()

    clock.wait()
    return timeit(called, number=1) / calls


def bandwidth(device: str) -> float:
    """Return the bytes a second that a large copy reads and writes."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    steps = {"copy": lambda: target.copy_(source)}
    taken = interleaved(steps, Budget(1.0, least=20), clock_of(device))["copy"]
    return 2e3 * COPIED / taken["median_ms"]


def require_memory(needed: int, device: str) -> None:
    """Raise `LeftOutError` unless there are as many bytes free."""
    if device.startswith("cuda"):
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + cached
    else:
        free = psutil.virtual_memory().available
    if needed > USABLE_MEMORY * free:
        raise LeftOutError(f"needs {needed / 2**30:.0f} GiB more, {free / 2**30:.0f} GiB are free")


def require_short(work: float, most: float) -> None:
    """Raise `LeftOutError` if a call would take many seconds."""
    if work > most:
        raise LeftOutError("a call would take longer than 10 s or so")


def peak_memory(step: Step, device: str) -> tuple[int, int | None]:
    """Return the bytes that a step takes at its peak, by PyTorch and by Python and NumPy."""
    step()
    if device == "cpu":
        return peak_by_profiler(step), peak_by_tracemalloc(step)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, None


def peak_by_profiler(step: Step) -> int:
    """Return the highest sum of what was allocated and freed since the step began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    events = sorted(events, key=lambda event: event.start_ns())
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
