"""Where it is timed: how to wait for it, its bandwidth, and what timings depend on."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import spectral_core as sc

from .timing import Budget, Clock, interleaved

PACKAGES = ("torch", "numpy", "jax", "jaxlib", "optax", "flax", "scipy", "numba", "cupy-cuda13x")

COPIED = 2**28  # bytes, well beyond the caches


def clock_of(device: str, group: str = "torch") -> Clock:
    """On a GPU steps are launched one after another and waited for once, as a training loop does.

    JAX's steps here wait for themselves. `torch.cuda.synchronize` waits for CuPy's too: it is the
    device that it waits for.
    """
    if device == "cpu" or group == "jax":
        return Clock()
    return Clock(torch.cuda.synchronize, least_seconds=5e-3)


def bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timings = interleaved(
        {"copy": lambda: target.copy_(source)}, Budget(1.0, least=20), clock_of(device)
    )
    return 2 * COPIED / timings["copy"].median_s


def machine(device: str) -> dict[str, Any]:
    """Nothing here names the machine."""
    return {
        "date": date.today().isoformat(),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "spectral_core": sc.__version__,
        **{package: installed(package) for package in PACKAGES if installed(package)},
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """The model, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
