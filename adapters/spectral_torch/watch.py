"""σ on its way from the device to a log, without a wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import spectral_core as sc
from spectral_core.watch import Log, Look

from .estimator import check_hooks
from .regularizer import SpectralNormRegularizer


class Watch(sc.Watch):
    """Log σ of each weight, log₁₀ Πσ and the penalty every n-th step, without a wait.

    After a step, σ is copied into pinned memory by the device itself; a later step finds that it
    has arrived, and logs it with the number of the step that it belongs to, counted from 0. They
    are the σ of the weights that the step's loss was computed from. `spectral_core.Watch` says
    what is logged, and which loggers fit.

    Parameters
    ----------
    log : callable or writer
        ``log(values, step)``, with a dict of name to float; or what has
        ``add_scalar(name, value, step)``, such as TensorBoard's ``SummaryWriter``.
    every_n_steps : int
        Steps that it divides are logged, from 0 on.
    prefix : str
        What the names begin with.

    Attributes
    ----------
    step : int
        The number of the next step. Set it if a run is resumed.

    Notes
    -----
    λ, target and power are the regularizer's own. In distributed training, make a watch on the
    first rank only: it sends nothing to the others. A step that a CUDA graph replays runs no hook:
    call ``watch(reg)`` after it.

    Examples
    --------
    >>> import torch, spectral_torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[6.0, 8.0]]))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    >>> reg = spectral_torch.SpectralNormRegularizer(model, factor=0.01).attach(optimizer)
    >>> with spectral_torch.Watch(print, every_n_steps=2, prefix="").attach(reg, optimizer):
    ...     for _ in range(4):
    ...         model(torch.ones(1, 2)).sum().backward()
    ...         optimizer.step()
    {'sigma/weight': 10.0, 'log10_sigma_product': 1.0, 'penalty': 0.5} 0
    {'sigma/weight': 10.0, 'log10_sigma_product': 1.0, 'penalty': 0.5} 2
    """

    def __init__(
        self, log: Log | Any, *, every_n_steps: int = 100, prefix: str = "spectral/"
    ) -> None:
        super().__init__(log, every_n_steps=every_n_steps, prefix=prefix, read=OnItsWay.of)
        self._handle: RemovableHandle | None = None

    def attach(self, reg: SpectralNormRegularizer, optimizer: Optimizer) -> Self:
        """Look at ``reg`` after each step of ``optimizer``; of several optimizers, take one.

        Parameters
        ----------
        reg : SpectralNormRegularizer
        optimizer : torch.optim.Optimizer

        Returns
        -------
        Watch
            Itself.

        Raises
        ------
        spectral_core.ArgumentError
            If a step of ``optimizer`` would run no hooks, or run them twice, or the watch is
            attached already.
        """
        check_hooks(optimizer, "call watch(reg) after its step")
        if self._handle is not None:
            raise sc.ArgumentError(
                "this watch is attached already, to the optimizer whose steps it counts: close() "
                "it first, or make another"
            )

        def after_step(*_: object) -> None:
            self(reg)

        self._handle = optimizer.register_step_post_hook(after_step)
        return self

    def __call__(self, state: SpectralNormRegularizer, step: int | None = None) -> None:
        """Copy σ, if the step is due, and log what has arrived: for a loop without `attach`.

        Parameters
        ----------
        state : SpectralNormRegularizer
        step : int, optional
            By default one more than in the call before.
        """
        if torch.compiler.is_compiling():
            outside = torch.compiler.disable(super().__call__)  # type: ignore[no-untyped-call]
            outside(state, step)
        elif not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            super().__call__(state, step)

    def close(self) -> None:
        """Detach from the optimizer, and log what is still on its way."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        super().close()

    def _look(self, state: SpectralNormRegularizer) -> Look:
        # Those in use, to copy all at once: `sigmas` would copy one by one.
        return Look(state._state.sigma, state.factor, state.target, state.power)


class OnItsWay(NamedTuple):
    """The `Reading` of tensors: of each device one flat copy, and what says that it is there."""

    sizes: list[int]
    copies: list[tuple[list[int], Tensor, Any]]  # places, elements, an event of CUDA or None

    @classmethod
    @torch.no_grad()
    def of(cls, tensors: Sequence[Tensor]) -> OnItsWay:
        """Send them to the host."""
        places: dict[torch.device, list[int]] = {}
        for place, tensor in enumerate(tensors):
            places.setdefault(tensor.device, []).append(place)
        copies = []
        for device, those in places.items():
            flat = torch.cat([tensors[place].reshape(-1) for place in those])
            host = flat.to("cpu", non_blocking=True)  # pinned, and so without a wait
            event = torch.cuda.current_stream(device).record_event() if flat.is_cuda else None
            copies.append((those, host, event))
        return cls([tensor.numel() for tensor in tensors], copies)

    def ready(self) -> bool:
        """Whether all copies are on the host."""
        return all(event is None or event.query() for _, _, event in self.copies)

    def values(self) -> np.ndarray[Any, Any]:
        """The elements in the order in which the tensors were given."""
        parts: dict[int, Tensor] = {}
        for places, host, event in self.copies:
            if event is not None:
                event.synchronize()
            parts.update(
                zip(places, torch.split(host, [self.sizes[i] for i in places]), strict=True)
            )
        return torch.cat([parts[i] for i in range(len(self.sizes))]).numpy()
