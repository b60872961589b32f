"""All that is measured, one part after another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from . import graph, memory, training
from .bars import bars
from .cases import Case, layer_sets, squares
from .device import bandwidth, clock_of, machine
from .timing import Budget, LeftOutError, Step, Timing, interleaved

GROUPS = ("torch", "jax", "numpy", "cupy")
QUICK = (
    *("square-256-float32", "square-1024-float32", "square-1024-bfloat16"),
    *("densenet-40-36-float32", "training-densenet-40", "compilation", "graph"),
)
QUICK_BLOCKS, QUICK_BATCH = (1, 4), 2


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    only: tuple[str, ...] = ("*",)
    quick: bool = False
    budget: Budget = field(default_factory=Budget)
    patience: float = 10.0  # seconds that a single call of a peer may take

    def wanted(self, name: str) -> bool:
        chosen = any(fnmatch(name, pattern) for pattern in self.only)
        return chosen and (not self.quick or name in QUICK)


@dataclass(frozen=True)
class Part:
    """One measurement: its place in the result is ``section``, and ``name`` within it."""

    name: str
    section: str
    measure: Callable[[], Any]


def parts(options: Options, bytes_per_second: float) -> list[Part]:
    cases = [
        Part(case.name, "cases", lambda case=case: case_result(case, options, bytes_per_second))
        for case in [*squares(), *layer_sets()]
    ]
    trained = [
        Part(f"training-{one.name}", "training", lambda one=one: training_result(one, options))
        for one in training.trainings()
    ]
    rest = [Part("compilation", "compilation", lambda: compilation(options))]
    if options.device == "cuda":
        rest.append(Part("graph", "graph", lambda: graph.replayed(options.budget)))
    return [*cases, *trained, *rest]


def names(device: str) -> list[str]:
    return [part.name for part in parts(Options(device), bytes_per_second=1.0)]


def training_result(one: training.Training, options: Options) -> dict[str, Any]:
    """Training steps are slow and steady: few are enough."""
    budget = Budget(3 * options.budget.seconds, options.budget.rounds, least=3)
    one = replace(one, batch=QUICK_BATCH) if options.quick else one
    return {one.name: training.share(one, options.device, budget)}


def run(
    options: Options, progress: Callable[[list[Part]], Iterator[Part]]
) -> Iterator[dict[str, Any]]:
    """The result as it grows, after each part: a run that is cut off loses its last part only."""
    bytes_per_second = bandwidth(options.device)
    result: dict[str, Any] = {
        "machine": machine(options.device),
        "bytes_per_second": bytes_per_second,
        "notes": {"all": {"memory": memory.NOTE[options.device], "training": training.NOTE}},
        "cases": [],
        "training": {},
        "compilation": {},
        "graph": {},
    }
    wanted = [part for part in parts(options, bytes_per_second) if options.wanted(part.name)]
    for part in progress(wanted):
        measured = part.measure()
        if part.section == "cases":
            result["cases"].append(measured)
        else:
            result[part.section].update(measured)
        give_memory_back(options.device)
        result["notes"].update(notes(result["cases"]))
        result["bars"] = [bar.as_json() for bar in bars(result)]
        yield result


def notes(cases: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """What the peers are, of the groups that took part."""
    groups = [g for g in GROUPS if any(case["peers"][g]["steps"] for case in cases)]
    return {group: dict(import_module(f".peers_{group}", __package__).NOTES) for group in groups}


def give_memory_back(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def case_result(case: Case, options: Options, bytes_per_second: float) -> dict[str, Any]:
    floor = case.bytes_moved / bytes_per_second
    result: dict[str, Any] = {
        "name": case.name,
        "title": case.title,
        "weights": len(case.shapes),
        "n": case.n,
        "dtype": case.dtype,
        "bytes_of_weights": case.size,
        "bytes_moved": case.bytes_moved,
        "bytes_over_bandwidth_ms": 1e3 * floor,
        "peers": {},
    }
    for group in GROUPS:
        result["peers"][group] = group_result(group, case, options, floor)
        give_memory_back(options.device)
    return result


def group_result(group: str, case: Case, options: Options, floor: float) -> dict[str, Any]:
    try:
        module = import_module(f".peers_{group}", __package__)
        makers = module.peers(case, options.device, options.patience)
    except (ImportError, LeftOutError) as reason:
        return {"steps": {}, "left_out": {"all": str(reason)}, "memory": {}}
    with made(makers) as (steps, left_out):
        if module.OURS not in steps:
            return {"steps": {}, "left_out": left_out, "memory": {}}
        timings = interleaved(steps, options.budget, clock_of(options.device, group))
        return {
            "steps": compared(timings, timings[module.OURS], floor),
            "left_out": left_out,
            "memory": memory_result(module, group, case, steps, options.device),
        }


@contextmanager
def made(
    makers: dict[str, Callable[[], Step]],
) -> Iterator[tuple[dict[str, Step], dict[str, str]]]:
    """The steps of those who can take part, gone afterwards with their memory."""
    steps: dict[str, Step] = {}
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except LeftOutError as reason:
            left_out[name] = str(reason)
    yield steps, left_out
    steps.clear()
    makers.clear()


def compared(timings: dict[str, Timing], ours: Timing, floor: float) -> dict[str, Any]:
    return {
        name: {
            **timing.as_json(),
            "ratio_to_ours": timing.median_s / ours.median_s,
            "ratio_to_bytes": timing.median_s / floor,
        }
        for name, timing in timings.items()
    }


def memory_result(
    module: ModuleType, group: str, case: Case, steps: dict[str, Step], device: str
) -> dict[str, Any]:
    """Of ours and of the naive formula, where there is an honest way to count."""
    if group == "torch":
        return {
            name: memory.extra(case, steps[name], device) for name in (module.OURS, module.NAIVE)
        }
    if group == "numpy":
        return {
            name: memory.as_json(case, memory.by_tracemalloc(steps[name]), None)
            for name in (module.OURS, module.NAIVE)
        }
    return {}


def compilation(options: Options) -> dict[str, Any]:
    try:
        module = import_module(".compilation", __package__)
    except ImportError as reason:
        return {"left_out": str(reason)}
    counts = QUICK_BLOCKS if options.quick else module.BLOCKS
    return {"times": module.compile_times(counts)}
