"""Log σ during training without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import spectral_core as sc
from spectral_core.engine import Log, Snapshot

from ._attach import unwrapped
from ._regularizer import SpectralNormRegularizer


class Watch(sc.Watch):
    """Log σ of each weight, log₁₀ Πσ and the penalty every n-th step, without waiting.

    After a step, the device itself copies σ into pinned memory. A later step finds the copy
    complete, and logs it with the number of its own step, counted from 0. σ belongs to the weights
    from which the step's loss was computed. A frozen weight takes no part in a step, and is left
    out. `spectral_core.Watch` lists what is logged.

    Parameters
    ----------
    log : callable, path, or object with a method for metrics
        A function ``log(values, step)`` of a dict of name to float, a path that ends in ``.jsonl``,
        TensorBoard's ``SummaryWriter``, a Weights & Biases run, ``mlflow``, or a logger of
        Lightning (see `spectral_core.Watch`).
    every_n_steps : int
        Steps that are multiples of this number are logged, from 0 on.
    prefix : str
        Prefix of the names.

    Attributes
    ----------
    step : int
        Number of the next step. Set it when a run is resumed.

    Notes
    -----
    λ, target and power are those of the regularizer. In distributed training, make a watch on the
    first rank only: it sends nothing to the others. A step that a CUDA graph replays runs no hook:
    call ``watch(reg)`` after the replay.

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
        super().__init__(log, every_n_steps=every_n_steps, prefix=prefix, copy=TensorCopy.of)
        self._handle: RemovableHandle | None = None

    def attach(self, reg: SpectralNormRegularizer, optimizer: Optimizer) -> Self:
        """Log ``reg`` after each step of ``optimizer``; if there are several, choose one.

        Parameters
        ----------
        reg : SpectralNormRegularizer
        optimizer : torch.optim.Optimizer

        Returns
        -------
        Watch
            The object itself.

        Raises
        ------
        spectral_core.ArgumentError
            If a step of ``optimizer`` would run no hooks, or would run them twice, or if the watch
            is attached already.
        """
        optimizer = unwrapped(optimizer, "call watch(reg) after its step")
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
        """Start to copy σ if the step is due, and log every complete copy.

        Call this in a loop without `attach`.

        Parameters
        ----------
        state : SpectralNormRegularizer
        step : int, optional
            The default is one more than in the call before.
        """
        if torch.compiler.is_compiling():
            outside = torch.compiler.disable(super().__call__)  # type: ignore[no-untyped-call]
            outside(state, step)
        elif not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            super().__call__(state, step)

    def close(self) -> None:
        """Detach from the optimizer, and log what is pending."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        super().close()

    def _snapshot(self, state: SpectralNormRegularizer) -> Snapshot:
        # The tensors in use, to copy all at once: `sigmas` would copy one by one.
        state._warn_if_idle()
        sigma, prices = state._state.sigma, state._prices(state._now(None))
        names = state._taking_part()
        return Snapshot(
            {name: sigma[name] for name in names},
            # By their own names: a pattern that only a frozen weight matches is no error here.
            {name: prices[name]["factor"] for name in names},
            {name: prices[name]["target"] for name in names},
            state.power,
        )


class TensorCopy(NamedTuple):
    """An `AsyncCopy` of tensors: for each device one flat copy, and an event that completes."""

    sizes: list[int]
    copies: list[tuple[list[int], Tensor, Any]]  # places, elements, an event of CUDA or None

    @classmethod
    @torch.no_grad()
    def of(cls, tensors: Sequence[Tensor]) -> TensorCopy:
        """Start to copy the tensors to the host."""
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
        """Return True if all copies are on the host."""
        return all(event is None or event.query() for _, _, event in self.copies)

    def values(self) -> np.ndarray[Any, Any]:
        """Return the elements in the order of the tensors."""
        parts: dict[int, Tensor] = {}
        for places, host, event in self.copies:
            if event is not None:
                event.synchronize()
            parts.update(
                zip(places, torch.split(host, [self.sizes[i] for i in places]), strict=True)
            )
        return torch.cat([parts[i] for i in range(len(self.sizes))]).numpy()
