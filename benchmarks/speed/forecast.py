"""What would take too long or too much memory is left out, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from .timing import Clock, LeftOutError, Step, sample

# A part stays free: for the interpreter, libraries and what a step takes in passing.
USABLE = 0.9

_rates: dict[tuple[str, str, str], float] = {}


def require_memory(needed: int, device: str) -> None:
    """Raise `LeftOutError` unless there are as many bytes free."""
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info()[0]
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    else:
        free = psutil.virtual_memory().available
    if needed > USABLE * free:
        raise LeftOutError(f"needs {needed / 2**30:.0f} GiB more, {free / 2**30:.0f} GiB are free")


def require_patience(
    peer: str,
    device: str,
    dtype: str,
    small: Callable[[], tuple[Step, float]],
    work: float,
    patience: float,
) -> None:
    """Raise `LeftOutError` if a call would take longer: a small one is timed, and scaled."""
    key = (peer, device, dtype)
    if key not in _rates:
        step, small_work = small()
        step()
        _rates[key] = sample(step, 1, Clock()) / small_work
    seconds = work * _rates[key]
    if seconds > patience:
        raise LeftOutError(f"a call would take about {seconds:.0f} s, more than {patience:.0f} s")
