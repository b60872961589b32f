"""All that is measured, one part after another."""

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from benchmarks.common import machine

from . import timing, training
from .cases import Case, layer_sets, squares
from .report import BY_HAND, OURS, Result
from .timing import Budget, LeftOutError, Step, clock_of, interleaved

GROUPS = {"torch": "peers_torch", "jax": "peers_jax", "numpy": "peers_numpy", "cupy": "peers_numpy"}
QUICK = ["square-256-float32", "square-1024-float32", "square-1024-bfloat16"]
QUICK += ["densenet-40-36-float32", "training-densenet-40", "compilation", "graph"]
QUICK_BLOCKS, QUICK_BATCH = (1, 4), 2


@dataclass(frozen=True)
class Options:
    device: str = "cpu"
    only: tuple[str, ...] = ("*",)
    quick: bool = False
    budget: Budget = field(default_factory=Budget)


class Part(NamedTuple):
    """One measurement, and the section of the result that it belongs to."""

    name: str
    section: str
    measure: Callable[[], Any]


def parts(options: Options, bytes_per_second: float = 1.0) -> list[Part]:
    found = [
        Part(case.name, "cases", partial(case_result, case, options, bytes_per_second))
        for case in [*squares(), *layer_sets()]
    ]
    found += [
        Part(f"training-{one.name}", "training", partial(training_result, one, options))
        for one in training.TRAININGS
    ]
    found.append(Part("compilation", "compilation", partial(compilation, options)))
    if options.device == "cuda":
        found.append(Part("graph", "graph", partial(training.replayed, options.budget)))
    known = [part for part in found if part.name in QUICK or not options.quick]
    return [part for part in known if any(fnmatch(part.name, one) for one in options.only)]


def run(options: Options, progress: Callable[[list[Part]], Iterable[Part]]) -> Iterator[Result]:
    """Yield the result after each part: a run that is cut off loses its last part only."""
    speed = timing.bandwidth(options.device)
    result: Result = {"machine": machine(options.device), "bytes_per_second": speed}
    result |= {"cases": [], "training": {}, "compilation": {}, "graph": {}}
    for part in progress(parts(options, speed)):
        measured = part.measure()
        if part.section == "cases":
            result["cases"].append(measured)
        else:
            result[part.section].update(measured)
        give_memory_back(options.device)
        yield result


def give_memory_back(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def training_result(one: training.Training, options: Options) -> Result:
    # Training steps are slow and steady: few are enough.
    budget = Budget(3 * options.budget.seconds, options.budget.rounds, least=3)
    one = one._replace(batch=QUICK_BATCH) if options.quick else one
    return {one.name: training.share(one, options.device, budget)}


def compilation(options: Options) -> Result:
    try:
        module = import_module(".peers_jax", __package__)
    except ImportError as reason:
        return {"left_out": str(reason)}
    return {"times": module.compile_times(QUICK_BLOCKS if options.quick else module.BLOCKS)}


def case_result(case: Case, options: Options, bytes_per_second: float) -> Result:
    floor_ms = 1e3 * case.bytes_moved / bytes_per_second
    peers = {}
    for group in GROUPS:
        peers[group] = group_result(group, case, options, floor_ms)
        give_memory_back(options.device)
    about = {"name": case.name, "title": case.title, "weights": len(case.shapes), "n": case.n}
    size = {"dtype": case.dtype, "bytes_of_weights": case.size, "bytes_moved": case.bytes_moved}
    return {**about, **size, "bytes_over_bandwidth_ms": floor_ms, "peers": peers}


def group_result(group: str, case: Case, options: Options, floor_ms: float) -> Result:
    try:
        module = import_module(f".{GROUPS[group]}", __package__)
        makers = module.peers(case, options.device, group)
    except (ImportError, LeftOutError) as reason:
        return {"steps": {}, "left_out": {"all": str(reason)}, "memory": {}}
    steps, left_out = {}, {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except LeftOutError as reason:
            left_out[name] = str(reason)
    if (ours := OURS[group]) not in steps:
        return {"steps": {}, "left_out": left_out, "memory": {}}
    timings = interleaved(steps, options.budget, clock_of(options.device, group))
    median = timings[ours]["median_ms"]
    for taken in timings.values():
        taken["ratio_to_ours"] = taken["median_ms"] / median
        taken["ratio_to_bytes"] = taken["median_ms"] / floor_ms
    # JAX and CuPy have no honest way to count.
    counted = (ours, BY_HAND[group]) if group in ("torch", "numpy") else ()
    memory = {name: memory_result(case, steps[name], group, options.device) for name in counted}
    return {"steps": timings, "left_out": left_out, "memory": memory}


def memory_result(case: Case, step: Step, group: str, device: str) -> Result:
    """Return bytes beyond weights, gradients and state, and as multiples."""
    taken, python = timing.peak_by_tracemalloc(step), None
    if group == "torch":
        taken, python = timing.peak_memory(step, device)
    sizes = [m * n for m, n in case.matrices]
    largest = max(sizes) * case.size // sum(sizes)
    return {
        "bytes": taken,
        "python_bytes": python,
        "of_vectors": taken / case.vectors_size,
        "of_largest_matrix": taken / largest,
    }
