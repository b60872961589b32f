"""Copy sigma from the GPU to a log, without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

import spectral_core as sc
from spectral_core.engine import Factor, Log


class Watch(sc.Watch):
    """Log σ of each weight, log₁₀ Πσ and the penalty every n-th step, without waiting.

    Like `spectral_core.Watch`, which would wait for the GPU. Here the GPU itself copies σ into
    pinned memory.

    Parameters
    ----------
    log, factor, target, power, every_n_steps, prefix
        As for `spectral_core.Watch`.

    Examples
    --------
    >>> import cupy as cp, spectral_cupy
    >>> state = spectral_cupy.init({"w": cp.asarray([[6.0, 8.0]])})
    >>> with spectral_cupy.Watch(print, factor=0.01, prefix="") as watch:
    ...     watch(state, 0)
    {'sigma/w': 10.0, 'log10_sigma_product': 1.0, 'penalty': 0.5} 0
    """

    def __init__(
        self,
        log: Log | Any,
        *,
        factor: Factor = 0.01,
        target: Factor = 0.0,
        power: int = 2,
        every_n_steps: int = 100,
        prefix: str = "spectral/",
    ) -> None:
        super().__init__(
            log,
            factor=factor,
            every_n_steps=every_n_steps,
            prefix=prefix,
            target=target,
            power=power,
            copy=ArrayCopy.of,
        )


class ArrayCopy(NamedTuple):
    """Copy arrays of one GPU to the host without waiting: an `AsyncCopy`."""

    flat: cupy.ndarray  # kept: its memory is in use until the copy is complete
    host: np.ndarray[Any, Any]
    event: cupy.cuda.Event

    @classmethod
    def of(cls, arrays: Sequence[cupy.ndarray]) -> ArrayCopy:
        """Start to copy these arrays to the host."""
        with arrays[0].device:
            flat = cupy.concatenate([array.reshape(-1) for array in arrays])
            pinned = cupy.cuda.alloc_pinned_memory(flat.nbytes)
            host = np.frombuffer(pinned, flat.dtype, flat.size)
            flat.get(out=host, blocking=False)
            event = cupy.cuda.Event(disable_timing=True)
            event.record()
        copy = cls(flat, host, event)
        # A watch that is dropped before its last copy is complete would give the pinned memory back
        # to CuPy's pool, and the GPU would write into another array. So every copy is kept here
        # until its event is done.
        while _on_the_way and _on_the_way[0].ready():
            _on_the_way.popleft()
        _on_the_way.append(copy)
        return copy

    def ready(self) -> bool:
        """Return True if the copy is complete."""
        return bool(self.event.done)

    def values(self) -> np.ndarray[Any, Any]:
        """Wait for the copy, and return the elements of all arrays."""
        self.event.synchronize()
        return self.host


_on_the_way: deque[ArrayCopy] = deque()
