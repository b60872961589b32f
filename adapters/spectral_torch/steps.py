"""Which arithmetic takes which weight: a compiled kernel where there is one, else the core's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from spectral_core import PowerIteration
from spectral_core.numba_step import Memory, NumbaStep
from spectral_core.step import (
    Advance,
    Step,
    Task,
    divided_step,
    last_of,
    plain_step_,
    sharing_memory,
)

from .multi_tensor import MultiTensorStep
from .sharded import is_sharded, sharded_step_
from .triton_step import TritonStep, takes

MEMORY = Memory(
    address=Tensor.data_ptr,
    plain=lambda x: x.is_contiguous() and not x.is_neg(),
    dtypes={torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "uint16"},
    threads=torch.get_num_threads,
)

_Kind: TypeAlias = tuple[torch.device, torch.dtype, torch.dtype]


class Steps:
    """The step of a regularizer: v, σ and u of its tasks are its own, and written into.

    So they lie where a captured CUDA graph, and whoever holds the state's tensors, finds them.

    Parameters
    ----------
    kernels : bool
        Whether to use kernels compiled by Numba and Triton, where these are installed.
    """

    in_place = True

    def __init__(self, kernels: bool) -> None:
        self._kernels = kernels
        self._plain = MultiTensorStep()
        self._cpu = _numba_step(self._plain) if kernels else self._plain
        self._gpu: TritonStep | None = TritonStep() if kernels else None
        self._gpu_steps: dict[_Kind, Step] = {}
        self._gpu_has_run: set[_Kind] = set()

    def __reduce__(self) -> tuple[type[Steps], tuple[bool]]:
        # What it has compiled and measured is not copied, but found anew.
        return Steps, (self._kernels,)

    def __call__(self, tasks: Sequence[Task], n_iter: int) -> Advance:
        """Advance all tasks, in place."""
        advance = divided_step(tasks, n_iter, self._step_of)
        buffers = [last_of(task) for task in tasks]
        _write(buffers, advance.triples)
        return Advance(advance.grads, buffers)

    def repeated(
        self, tasks: Sequence[Task], n_iter: int
    ) -> Callable[[Sequence[Tensor]], bool] | None:
        """The same step with other gradients, where one compiled call does all of it."""
        if not isinstance(self._cpu, NumbaStep):
            return None
        if not all(self._step_of(task) is self._cpu for task in tasks):
            return None
        return self._cpu.repeated(tasks, n_iter)

    def _step_of(self, task: Task) -> Step:
        weight, grad = task.weight, task.grad
        if is_sharded(weight):
            return sharded_step_
        if grad is not None and grad.requires_grad:
            return self._plain  # autograd must see what is written
        if weight.is_cpu and type(weight) is Tensor:
            return self._cpu
        if self._gpu is None or not takes(task):
            return self._plain
        kind = weight.device, weight.dtype, grad.dtype
        if kind not in self._gpu_steps:
            self._gpu_steps[kind] = partial(self._on_gpu, kind)
        return self._gpu_steps[kind]

    def _on_gpu(self, kind: _Kind, tasks: Sequence[Task], n_iter: int) -> Advance:
        if self._gpu is None:
            return self._plain(tasks, n_iter)
        if shared := sharing_memory(tasks, Tensor.data_ptr):
            rest = partial(self._on_gpu, kind)
            return divided_step(
                tasks, n_iter, lambda task: self._plain if task.name in shared else rest
            )
        try:
            advance = self._gpu(tasks, n_iter)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            # Before its kernels have run once, no gradient of a kind has changed: Triton may find
            # no C compiler, say.
            if kind in self._gpu_has_run or torch.cuda.is_current_stream_capturing():
                raise
            warnings.warn(
                f"Triton's kernels cannot be used here, and so PyTorch's operations are, which are "
                f"slower (kernels=False says so without a warning): {error!r}",
                RuntimeWarning,
                stacklevel=2,
            )
            self._gpu = None
            return self._plain(tasks, n_iter)
        self._gpu_has_run.add(kind)
        return advance


def looked_at(tasks: Sequence[Task], n_iter: int) -> Advance:
    """The step that leaves the state's tensors alone: σ and vectors are new ones."""
    return divided_step(
        tasks, n_iter, lambda task: sharded_step_ if is_sharded(task.weight) else plain_step_
    )


def _numba_step(other: Step) -> Step:
    try:
        return NumbaStep(MEMORY, owned=True, other=other)
    except ImportError:
        return other


def _write(buffers: list[PowerIteration], triples: list[PowerIteration]) -> None:
    pairs = [
        (old, new)
        for buffer, triple in zip(buffers, triples, strict=True)
        if buffer is not triple
        for old, new in zip(buffer, triple, strict=True)
        if old is not new
    ]
    if pairs:
        torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])
