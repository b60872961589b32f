"""Engines for PyTorch tensors, in order of preference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from spectral_core.engine import Engine, Job, ReferenceEngine, Result, Triplet
from spectral_core.numba import Memory, NumbaEngine, NumbaWaveEngine

from .dtensor import DTensorEngine
from .foreach import ForeachEngine
from .memory_format import window
from .precision import in_full_float32
from .triton import TritonEngine
from .waves import WaveEngine

__all__ = [
    "CpuEngine",
    "CpuWaveEngine",
    "DTensorEngine",
    "ForeachEngine",
    "TensorEngine",
    "TritonEngine",
    "Unmeasured",
    "WaveEngine",
    "engines",
]

MEMORY = Memory(
    address=Tensor.data_ptr,
    # A subclass of Tensor may have no memory of its own.
    window=lambda x: (
        window(x) if type(x) in (Tensor, Parameter) and x.is_cpu and not x.is_neg() else 0
    ),
    dtypes={
        torch.float32: "float32",
        torch.float64: "float64",
        torch.bfloat16: "uint16",
        torch.float16: "int16",
    },
    threads=torch.get_num_threads,
)


class CpuEngine(NumbaEngine):
    """`NumbaEngine` for tensors. It writes v, sigma and u where the state keeps them."""

    def __init__(self) -> None:
        super().__init__(MEMORY, owned=True)

    def accepts(self, job: Job) -> bool:
        """Return True for a job of CPU tensors whose gradient needs no graph."""
        # Autograd must see what is written into a gradient that requires a gradient itself.
        return not (job.grad is not None and job.grad.requires_grad) and super().accepts(job)


class CpuWaveEngine(NumbaWaveEngine):
    """`NumbaWaveEngine` for tensors. It writes v, sigma and u where the state keeps them."""

    def __init__(self) -> None:
        super().__init__(MEMORY, owned=True)

    def accepts(self, job: Job) -> bool:
        """Return True for a job of CPU tensors whose gradient needs no graph."""
        return not (job.grad is not None and job.grad.requires_grad) and super().accepts(job)


class TensorEngine(ReferenceEngine):
    """The reference in full float32, outside of autograd, which only counts versions then."""

    run = in_full_float32(torch.no_grad()(ReferenceEngine.run))


class Unmeasured:
    """Leave sigma and u zero: for a state that is iterated before anyone reads them.

    One iteration of the reference for each of thousands of weights would cost more than all other
    work on a new state.
    """

    in_place = False

    def accepts(self, job: Job) -> bool:  # noqa: ARG002
        """Return True: every job can be left as it is."""
        return True

    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:  # noqa: ARG002
        """Return zeros beside each V."""
        triplets = []
        for job in jobs:
            dtype = job.V.dtype if job.wave is None else job.V.dtype.to_complex()
            u = job.V.new_zeros(job.plan.left, dtype=dtype)
            triplets.append(Triplet(job.V.new_zeros(job.plan.stack).real, u, job.V))
        return Result([None] * len(jobs), triplets)


def engines(*, kernels: bool = True) -> tuple[Engine, ...]:
    """Return new engines in order of preference; the last one accepts every job.

    Parameters
    ----------
    kernels : bool
        Whether to use the kernels that Numba and Triton compile, where they are installed.
    """
    foreach = ForeachEngine()
    compiled = [*_cpu_engine(), TritonEngine(fallback=foreach)] if kernels else []
    whole = (*compiled, foreach)
    return DTensorEngine(whole), *whole, WaveEngine(), TensorEngine(in_place=True)


def _cpu_engine() -> list[Engine]:
    try:
        return [CpuEngine(), CpuWaveEngine()]
    except ImportError:  # Numba is not installed
        return []
