"""Keep small tables on the device, which a captured CUDA graph can go on reading.

What a CUDA graph may rely on:

- A graph refers to tensors by address. So a step writes its results into the existing V, u, sigma
  and gradient tensors, and a replay finds them there.
- A graph also refers to the tables by address, and repeats the copy that filled them. So whatever
  a capture has used is never written again. Steps outside of the graph get other tables.
- A factor or target that is a number was copied into a table. Every replay uses the number of the
  capture.
- A factor or target that is a tensor is read anew in every replay, at the tensor's address.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# A capture cannot allocate pinned memory: so many tables are kept ready for captures.
_SPARE_TABLES = 4


class _Filled(NamedTuple):
    """Hold a table on the device, the pinned memory it is copied from, and what belongs to it."""

    device: Tensor
    host: Tensor
    more: Any


class GraphTable:
    """Keep a small table on the device, filled from the host without waiting.

    A captured copy is repeated by each replay. So what a capture has used is never written again:
    neither the pinned memory that it copies from, nor the table. Later steps use another table.

    Parameters
    ----------
    shape : tuple of int
    dtype : torch.dtype
    device : torch.device
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._key: Hashable = None
        self._filled: _Filled | None = None
        self._frozen = False  # True if a capture reads the table that steps outside of it use
        self._captured: dict[Hashable, _Filled] = {}
        self._kept: list[_Filled] = []
        self._spare: list[tuple[Tensor, Tensor]] = []

    @property
    def captured(self) -> bool:
        """True if a CUDA graph reads one of the tables."""
        return self._frozen or bool(self._captured) or bool(self._kept)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The table that steps outside of a capture use, once there is one."""
        return () if self._filled is None else (self._filled.device,)

    def get(
        self, key: Hashable, make: Callable[[Any], tuple[np.ndarray, Any]]
    ) -> tuple[Tensor, Any]:
        """Return the table of ``make(key)[0]``, and ``make(key)[1]``.

        The table is filled again only where ``key`` differs from that of the step before.

        Raises
        ------
        RuntimeError
            If too many steps were captured since the last step outside of a capture.
        """
        in_capture = capturing(self._device)
        if self._filled is not None and key == self._key:
            self._frozen |= in_capture
            return self._filled.device, self._filled.more
        filled = self._fill_captured(key, make) if in_capture else self._fill(key, make)
        return filled.device, filled.more

    def _fill(self, key: Hashable, make: Callable[[Any], tuple[np.ndarray, Any]]) -> _Filled:
        values, more = make(key)
        host, pinned = torch.from_numpy(values), self._device.type == "cuda"
        while len(self._spare) < _SPARE_TABLES:
            self._spare.append((self._empty(), torch.empty_like(host, pin_memory=pinned)))
        if pinned:
            # New memory each time: PyTorch keeps it until the copy from it is complete.
            host = host.pin_memory()
        if self._filled is None or self._frozen:
            if self._filled is not None:
                self._kept.append(self._filled)
            self._filled = _Filled(self._empty(), host, more)
        self._filled.device.copy_(host, non_blocking=True)
        self._filled = _Filled(self._filled.device, host, more)
        self._key, self._frozen = key, False
        return self._filled

    def _fill_captured(
        self, key: Hashable, make: Callable[[Any], tuple[np.ndarray, Any]]
    ) -> _Filled:
        filled = self._captured.get(key)
        if filled is None:
            if not self._spare:
                raise RuntimeError(
                    f"{_SPARE_TABLES} steps with other tensors were captured in CUDA graphs since "
                    "the last step outside of one: run one between them"
                )
            values, more = make(key)
            device, host = self._spare.pop()
            host.copy_(torch.from_numpy(values))
            filled = self._captured[key] = _Filled(device, host, more)
        filled.device.copy_(filled.host, non_blocking=True)
        return filled

    def _empty(self) -> Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device=self._device)


def current(device: torch.device) -> Any:
    """Return a context in which ``device`` is the current one: Triton launches there."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def capturing(device: torch.device) -> bool:
    """Return True if a CUDA graph is being captured on the current stream of ``device``."""
    if device.type != "cuda":
        return False
    with current(device):  # PyTorch answers for the current device
        return torch.cuda.is_current_stream_capturing()
