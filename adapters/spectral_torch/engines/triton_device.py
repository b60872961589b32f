"""Say whether Triton's kernels can run here, and how much of a matrix a program holds."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

# Largest number of columns for which W is read once: a program holds a row of W, v and a sum of
# rows in registers. 16384 float32 are 32 of each in the 512 threads that 128 registers allow.
# float64 needs twice as many, and k vectors k times as many. A wider matrix is read twice.
LIMITS = {torch.float32: 16384, torch.float64: 8192}

ITERATED = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
MOST_VECTORS = 8

# A thread holds at most 128 bytes of a tile: eight 16-byte loads of float32.
ELEMENTS_A_THREAD = {torch.float32: 32, torch.float64: 16}


@cache
def kernels() -> Any:
    """Return the module of kernels, or None if Triton is missing or too old."""
    if find_spec("triton") is None:
        return None
    try:
        from . import triton_kernels
    except Exception:  # an older one lacks a name, a broken one fails in its own way
        return None
    return triton_kernels


@cache
def has_tuples() -> bool:
    """Return True if kernels can hold several vectors, or chunks of wide rows: from Triton 3.3."""
    return hasattr(kernels().tl, "tuple")


@cache
def interpreted() -> bool:
    """Return True if Triton interprets kernels, on CPU tensors: a test without a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # before the import, which needs a second
        return False
    return kernels() is not None and "Interpreted" in type(kernels().products).__name__


@cache
def available() -> bool:
    """Return True if there is Triton, and an NVIDIA GPU that it compiles for."""
    if interpreted():
        return True
    if torch.version.cuda is None or not torch.cuda.is_available() or kernels() is None:
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


@cache
def most_columns(dtype: torch.dtype, device: torch.device, n_vectors: int = 1) -> int:
    """Return the largest number of columns of a matrix that is read once.

    Registers limit it, and the device's shared memory. All but one stage of a tile wait there: 128
    KiB at the limit. The large GPUs have more than that, but workstation cards have 99 KiB.
    """
    most = LIMITS[ITERATED[dtype]] // power_of_two(n_vectors)
    if device.type != "cuda":
        return most
    properties = torch.cuda.get_device_properties(device)
    room = getattr(properties, "shared_memory_per_block_optin", 227 * 1024) - 1024  # for its sums
    while (stages(dtype, n_vectors) - 1) * most * dtype.itemsize > room:
        most //= 2
    return most


def stages(dtype: torch.dtype, n_vectors: int = 1) -> int:
    """Return the number of tiles in flight: more where a tile has fewer bytes."""
    if n_vectors == 1:
        return 4 if dtype.itemsize == 2 else 3
    # At least 64 bytes a thread, and at most five tiles.
    bytes_a_thread = ELEMENTS_A_THREAD[ITERATED[dtype]] // power_of_two(n_vectors)
    return 1 + min(5, max(2, 64 // (bytes_a_thread * dtype.itemsize)))


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@cache
def language(dtype: torch.dtype) -> Any:
    """Return Triton's own dtype."""
    return getattr(kernels().tl, str(dtype).removeprefix("torch."))


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    if device.type != "cuda":
        return 1  # interpreted: the fewer programs, the sooner they are done
    return torch.cuda.get_device_properties(device).multi_processor_count
