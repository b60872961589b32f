"""Which arithmetic takes which weight: a compiled kernel where there is one, else the core's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectral_core import PowerIteration
from spectral_core.numba_step import Memory, NumbaStep
from spectral_core.step import Advance, Step, Task, divided_step, last_of

from .multi_tensor import MultiTensorStep
from .triton_step import TritonStep, takes

MEMORY = Memory(
    address=Tensor.data_ptr,
    plain=lambda x: x.is_contiguous() and not x.is_neg(),
    dtypes={torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "uint16"},
    threads=torch.get_num_threads,
)


class Steps:
    """The step of a regularizer: v, σ and u of its tasks are its own, and written into.

    So they lie where a captured CUDA graph, and whoever holds the state's tensors, finds them.

    Parameters
    ----------
    kernels : bool
        Whether to use kernels compiled by Numba and Triton, where these are installed.
    """

    def __init__(self, kernels: bool) -> None:
        self._kernels = kernels
        self._plain = MultiTensorStep()
        self._cpu = _numba_step(self._plain) if kernels else self._plain
        self._gpu = TritonStep() if kernels else None
        self._gpu_has_run = False

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
        if not isinstance(self._cpu, NumbaStep) or not all(task.weight.is_cpu for task in tasks):
            return None
        return self._cpu.repeated(tasks, n_iter)

    def _step_of(self, task: Task) -> Step:
        weight = task.weight
        if weight.is_cpu and type(weight) is Tensor:
            return self._cpu
        return self._on_gpu if self._gpu is not None and takes(task) else self._plain

    def _on_gpu(self, tasks: Sequence[Task], n_iter: int) -> Advance:
        assert self._gpu is not None
        try:
            advance = self._gpu(tasks, n_iter)
        except Exception as error:
            # Before it has run once, no gradient has changed: Triton may lack a C compiler, say.
            if self._gpu_has_run or torch.cuda.is_current_stream_capturing():
                raise
            warnings.warn(
                f"Triton's kernels cannot be used here, and so PyTorch's operations are, which are "
                f"slower (kernels=False says so without a warning): {error!r}",
                RuntimeWarning,
                stacklevel=2,
            )
            self._gpu = None
            return self._plain(tasks, n_iter)
        self._gpu_has_run = True
        return advance


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
