"""A step like the one before, without its checks.

PyTorch lets no gradient be of another shape, dtype or device than its parameter, so what fitted
once fits again while the parameters lie where they lay. It is worth asking: on a CPU whose caches
are full of a model's layers, the checks take longer than the step of a small network.
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
        # A mapping of factors may change its entries unseen, and not all devices tell addresses.
        plain = not isinstance(factor, Mapping) and all(
            type(task.weight) is Tensor and task.weight.device.type in ("cpu", "cuda")
            for task in tasks
        )
        self._factor, self._n_iter, self._step = factor, n_iter, step
        self._compiled = step.repeated(tasks, n_iter) if plain else None
        self._tasks = [task._replace(grad=None) for task in tasks] if plain else []
        self._weights = [
            (task.name, task.weight.data_ptr(), task.weight.dtype) for task in self._tasks
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
                or (name, parameter.data_ptr(), parameter.dtype) != weights[len(grads)]
                or grad.layout is not torch.strided
            ):
                return False
            grads.append(grad)
        if not grads or len(grads) < len(weights):
            return False
        if self._compiled is None or not self._compiled(grads):
            with torch.no_grad():
                tasks = zip(self._tasks, grads, strict=True)
                self._step([task._replace(grad=grad) for task, grad in tasks], n_iter)
        return True


def _autocast_rounds() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
