"""What a step takes in memory beyond weights, gradients and its own state: the peak."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .cases import Case
from .timing import Step

NOTE = {
    "cuda": "peak by torch.cuda.max_memory_allocated",
    "cpu": "peak of PyTorch's allocations by its profiler; beside it, that of Python's and "
    "NumPy's by tracemalloc, a few kB a layer of which are Python's own objects",
}


def extra(case: Case, step: Step, device: str) -> dict[str, Any]:
    """Of a step that has been called before, in bytes and as multiples."""
    step()
    if device == "cuda":
        taken, python = on_gpu(step), None
    else:
        taken, python = by_profiler(step), by_tracemalloc(step)
    return as_json(case, taken, python)


def as_json(case: Case, taken: int, python: int | None) -> dict[str, Any]:
    largest = max(m * n for m, n in case.matrices) * case.size
    largest //= sum(m * n for m, n in case.matrices)
    return {
        "bytes": taken,
        "python_bytes": python,
        "of_vectors": taken / case.vectors_size,
        "of_largest_matrix": taken / largest,
    }


def on_gpu(step: Step) -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def by_profiler(step: Step) -> int:
    """The highest sum of what was allocated and freed since the step began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    results = recorded.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def by_tracemalloc(step: Step) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        step()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
