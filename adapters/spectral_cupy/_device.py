"""What the step of all matrices at once needs of CuPy."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from importlib.resources import files
from typing import Any

import cupy

from .fused import THREADS, Kernels, Shape, Table


class CuPyRuntime:
    """The `Runtime` of CuPy arrays."""

    def owns(self, x: Any) -> bool:
        """Whether ``x`` is a CuPy array."""
        return isinstance(x, cupy.ndarray)

    def place(self, x: cupy.ndarray) -> tuple[int, int]:
        """The device of ``x``, and its current stream: a table is sent in that one's order."""
        device = x.data.device_id
        return device, cupy.cuda.get_current_stream(device).ptr

    def at(self, place: tuple[int, int]) -> AbstractContextManager[Any]:
        """The device is the current one; its stream is so anyway."""
        device: AbstractContextManager[Any] = cupy.cuda.Device(place[0])
        return device

    def address(self, x: cupy.ndarray) -> int:
        """The address of the first element."""
        return int(x.data.ptr)

    def upload(self, table: Table) -> cupy.ndarray:
        """A copy of ``table``, by way of pinned memory of CuPy's: without waiting."""
        return cupy.asarray(table)

    def empty(self, size: int, dtype: str) -> cupy.ndarray:
        """A new array of one axis."""
        return cupy.empty(size, dtype=dtype)

    def view(self, x: cupy.ndarray, start: int, shape: Shape) -> cupy.ndarray:
        """The elements from ``start`` on: faster than a slice and a new shape."""
        return cupy.ndarray(shape, x.dtype, memptr=x.data + start * x.dtype.itemsize)

    def launch(self, kernels: Kernels, name: str, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Launch on the current stream of the current device."""
        _kernel(kernels, name)((blocks,), (THREADS,), arguments)


@cache
def _module(kernels: Kernels) -> cupy.RawModule:
    return cupy.RawModule(code=source(), options=kernels.options)


@cache
def _kernel(kernels: Kernels, name: str) -> cupy.RawKernel:
    return _module(kernels).get_function(name)  # compiled once for each device, when first called


@cache
def source() -> str:
    """The text of the kernels."""
    return files(__package__).joinpath("kernels.cu").read_text(encoding="utf-8")
