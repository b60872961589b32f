"""A step like the one before, without its checks.

What fitted once fits again while parameters and gradients are of the same kinds and the parameters
lie where they lay. It is worth asking: on a CPU whose caches are full of a model's layers, the
checks take longer than the step of a small network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_core.step import Task

from .steps import Steps


class Repetition:
    """What a step was made of, less its gradients: they would live on.

    Parameters
    ----------
    tasks : sequence of Task
    n_iter : int
    factor : object
        The very one that the tasks' factors come from.
    step : Steps
    """

    def __init__(self, tasks: Sequence[Task], n_iter: int, factor: Any, step: Steps) -> None:
        # What holds factors may change them unseen, and not all devices tell addresses.
        plain = isinstance(factor, (int, float, Tensor)) and all(
            type(task.weight) is Tensor and task.weight.device.type in ("cpu", "cuda")
            for task in tasks
        )
        self._factor, self._n_iter, self._step = factor, n_iter, step
        self._compiled = step.repeated(tasks, n_iter) if plain else None
        # They also keep alive what the compiled call has the addresses of.
        self._tasks = [task._replace(grad=None) for task in tasks] if plain else []
        self._weights = [
            (task.name, *_place(task.weight), task.grad.dtype) for task in tasks if plain
        ]

    def step(
        self, names: Iterable[str], parameters: Mapping[str, Tensor], factor: Any, n_iter: int
    ) -> bool:
        """Make that step with the gradients of now; False, and nothing done, if it is another."""
        if factor is not self._factor or n_iter != self._n_iter or _autocast_rounds():
            return False
        grads: list[Tensor] = []
        weights = self._weights
        for name in names:
            parameter = parameters[name]
            grad = parameter.grad
            if grad is None or not parameter.requires_grad:
                continue
            if (
                len(grads) == len(weights)
                or (name, *_place(parameter), grad.dtype) != weights[len(grads)]
                or grad.shape != parameter.shape
                or grad.layout is not torch.strided
                or grad.requires_grad  # autograd must see what is written
            ):
                return False
            grads.append(grad)
        if not grads or len(grads) < len(weights):
            return False
        if self._compiled is not None:
            return self._compiled(grads)
        with torch.no_grad():
            tasks = zip(self._tasks, grads, strict=True)
            self._step([task._replace(grad=grad) for task, grad in tasks], n_iter)
        return True


def _place(x: Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def _autocast_rounds() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
