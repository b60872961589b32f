"""Run the kernels of `CudaEngine` by CuPy, and add a term by one kernel of CuPy's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from importlib.resources import files
from typing import Any

import cupy

from ._engine import THREADS, Kernels, Shape, Table

# The term is computed in the dtype of the vectors, and the sum is rounded once.
_outer_kernel = cupy.ElementwiseKernel(
    "S u, S v", "T grad", "grad = T(S(grad) + u * v)", "spectral_core_add_outer"
)


def add_outer_(grad: cupy.ndarray, u: cupy.ndarray, v: cupy.ndarray) -> cupy.ndarray:
    """Add ``u * v`` to ``grad`` in place by one kernel, and return ``grad``."""
    wide = cupy.result_type(grad.dtype, u.dtype, v.dtype)  # a wider gradient keeps its digits
    return _outer_kernel(u.astype(wide, copy=False), v.astype(wide, copy=False), grad)


class CuPyRuntime:
    """Run the engine on CuPy arrays: the default `Runtime`."""

    def owns(self, x: Any) -> bool:
        """Return True for a CuPy array."""
        return isinstance(x, cupy.ndarray)

    def place(self, x: cupy.ndarray) -> tuple[int, int]:
        """Return the device of ``x`` and its current stream.

        The stream decides in which order a table is sent.
        """
        device = x.data.device_id
        return device, cupy.cuda.get_current_stream(device).ptr

    def at(self, place: tuple[int, int]) -> AbstractContextManager[Any]:
        """Make the device the current one; its stream already is."""
        device: AbstractContextManager[Any] = cupy.cuda.Device(place[0])
        return device

    def address(self, x: cupy.ndarray) -> int:
        """Return the address of the first element."""
        return int(x.data.ptr)

    def upload(self, table: Table) -> cupy.ndarray:
        """Return a copy of ``table``; CuPy copies from pinned memory, without waiting."""
        return cupy.asarray(table)

    def empty(self, size: int, dtype: str) -> cupy.ndarray:
        """Return a new array of one axis."""
        return cupy.empty(size, dtype=dtype)

    def view(self, x: cupy.ndarray, start: int, shape: Shape) -> cupy.ndarray:
        """Return the elements from ``start`` on: faster than a slice and a reshape."""
        return cupy.ndarray(shape, x.dtype, memptr=x.data + start * x.dtype.itemsize)

    def multiprocessors(self, place: tuple[int, int]) -> int:
        """Return how many multiprocessors the device has; CuPy asks the driver."""
        return int(cupy.cuda.Device(place[0]).attributes["MultiProcessorCount"])

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
    """Return the text of the kernels."""
    return files(__package__).joinpath("kernels.cu").read_text(encoding="utf-8")
