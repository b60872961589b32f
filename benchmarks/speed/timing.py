"""Steps timed in turns, so that a slow moment of the machine hits all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import quantiles
from time import perf_counter
from typing import Any, NamedTuple

Step = Callable[[], object]
Makers = Mapping[str, Callable[[], Step]]

LEAST_ROUNDS, MOST_ROUNDS = 7, 200
SLOW_SECONDS, SLOW_ROUNDS = 1.0, 3  # so slow a step is noisy by a small part of it only
WARM_UPS = 3


class LeftOutError(Exception):
    """A peer cannot take part in a case; the message says why, and is shown."""


@dataclass(frozen=True)
class Clock:
    """How to wait for the device, and how long a sample must be for that wait not to count."""

    wait: Callable[[], object] = lambda: None
    least_seconds: float = 0.0


@dataclass(frozen=True)
class Budget:
    """Of a case and a group of peers."""

    seconds: float = 3.0
    rounds: int = MOST_ROUNDS
    least: int = LEAST_ROUNDS


class Timing(NamedTuple):
    median_s: float
    quartiles_s: tuple[float, float]
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        if len(seconds) == 1:
            return cls(seconds[0], (seconds[0], seconds[0]), 1)
        low, middle, high = quantiles(seconds, n=4, method="inclusive")
        return cls(middle, (low, high), len(seconds))

    def as_json(self) -> dict[str, Any]:
        return {
            "median_ms": 1e3 * self.median_s,
            "quartiles_ms": [1e3 * quartile for quartile in self.quartiles_s],
            "rounds": self.rounds,
        }


class Plan(NamedTuple):
    """Of one step: at most how often it is timed, and how many calls make a sample."""

    rounds: int
    calls: int


def interleaved(
    steps: Mapping[str, Step], budget: Budget, clock: Clock | None = None
) -> dict[str, Timing]:
    """Round by round until the time is spent; a slow step takes part in the first few."""
    clock = clock or Clock()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with no_garbage_collection():
        plans = {name: planned(step, budget, clock) for name, step in steps.items()}
        for _ in rounds_within(budget):
            for name, step in steps.items():
                if len(seconds[name]) < plans[name].rounds:
                    seconds[name].append(sample(step, plans[name].calls, clock))
    return {name: Timing.of(taken) for name, taken in seconds.items()}


def rounds_within(budget: Budget) -> Iterator[int]:
    start = perf_counter()
    for turn in range(budget.rounds):
        if turn >= budget.least and perf_counter() - start > budget.seconds:
            return
        yield turn


def planned(step: Step, budget: Budget, clock: Clock) -> Plan:
    """Warm up: fill caches and take memory. Libraries are loaded and code compiled before."""
    for _ in range(WARM_UPS):
        seconds = sample(step, 1, clock)
        if seconds > SLOW_SECONDS:
            return Plan(SLOW_ROUNDS, 1)
    return Plan(budget.rounds, max(1, round(clock.least_seconds / seconds)))


def sample(step: Step, calls: int, clock: Clock) -> float:
    clock.wait()
    start = perf_counter()
    for _ in range(calls):
        step()
    clock.wait()
    return (perf_counter() - start) / calls


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
