"""Log σ of each weight, their product and the penalty during training, without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np

from ._arrays import Array, array_namespace, to_host
from ._penalty import penalty
from ._state_dict import SpectralState
from ._validate import Factor, check_factors, check_power
from .errors import ArgumentError, check_int

Log: TypeAlias = Callable[[dict[str, float], int], object]
"""``log(values, step)`` receives numbers by name, and the step they belong to."""


class AsyncCopy(Protocol):
    """A copy of arrays from the device to the host, in progress."""

    def ready(self) -> bool:
        """Return True if the copy is complete; does not wait."""

    def values(self) -> np.ndarray[Any, Any]:
        """Return the elements of all arrays, one after the other; waits until they are there."""


Copy: TypeAlias = Callable[[Sequence[Array]], AsyncCopy]
"""Starts to copy arrays to the host as they are now, whatever is written into them later."""


class HostCopy(NamedTuple):
    """An `AsyncCopy` that is complete from the start."""

    elements: np.ndarray[Any, Any]

    def ready(self) -> bool:
        """Return True."""
        return True

    def values(self) -> np.ndarray[Any, Any]:
        """Return the elements."""
        return self.elements


def copy_to_host(arrays: Sequence[Array]) -> AsyncCopy:
    """Copy arrays of any library to the host; waits for the device, if there is one."""
    xp = array_namespace(*arrays)
    return HostCopy(to_host(xp.concat([xp.reshape(x, (-1,)) for x in arrays])).real)


class Snapshot(NamedTuple):
    """The part of a state that is logged, on its device."""

    sigma: Mapping[str, Array]
    factor: Factor
    target: Factor = 0.0
    power: int = 2


class _Pending(NamedTuple):
    step: int
    names: tuple[str, ...]
    factors: tuple[float | int, ...]  # an int is a place among the copied arrays
    targets: tuple[float | int, ...]
    power: int
    sizes: tuple[int, ...]  # of each array: σ of each weight (several in a stack), λ, targets
    copy: AsyncCopy


class Watch:
    """Log σ of each weight, log₁₀ Πσ and the penalty every n-th step, without waiting.

    Call ``watch(state, step)`` after each step. If the step is due, it starts to copy the newest σ
    to the host. It then logs every earlier copy that is complete, with the step it belongs to.
    The numbers are:

    - ``spectral/sigma/<name>``: σ of the weight. For a stack of matrices, such as a grouped
      convolution, the largest one.
    - ``spectral/log10_sigma_product``: over all matrices. The product itself leaves the range of
      a float in a deep network.
    - ``spectral/penalty``: (λ/2)·Σσ² over all matrices (see `penalty`).

    Parameters
    ----------
    log : callable or writer
        ``log(values, step)`` with a dict of name to float, or an object with a method
        ``add_scalar(name, value, step)``, such as TensorBoard's ``SummaryWriter``.
    factor : float, array of shape (), or mapping of name or pattern to either
        λ, for the penalty. It can be changed at any time: ``watch.factor = 0.02``.
    target, power
        As for `add_gradient`, for the penalty.
    every_n_steps : int
        Steps that are multiples of this number are logged, from 0 on.
    prefix : str
        Prefix of the names.
    copy : callable
        Starts to copy arrays to the host: a framework's own way, without waiting. The adapters
        ``spectral_torch``, ``spectral_jax`` and ``spectral_cupy`` have a `Watch` with theirs.

    Attributes
    ----------
    step : int
        Number of the next step, where none is passed. Set it when a run is resumed.

    Raises
    ------
    ArgumentError
        If ``log`` is neither of the two, or a number is out of its range.

    Notes
    -----
    Lightning's ``logger.log_metrics`` and ``mlflow.log_metrics`` can be passed as ``log``. So can
    ``lambda values, step: self.log_dict(values)``, but Lightning records the numbers under its
    current step, and repeats them until there are new ones. Weights & Biases drops values of a step
    before its newest one: pass the step as a value of its own::

        wandb.define_metric("spectral/*", step_metric="spectral/step")
        log = lambda values, step: wandb.log({**values, "spectral/step": step})

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> weights = {"w": np.diag([20.0, 1.0]), "out": np.array([[3.0, 4.0]])}
    >>> state = sc.iterate(weights, sc.init(weights), n_iter=20)
    >>> with sc.Watch(print, factor=0.01, every_n_steps=50, prefix="") as watch:
    ...     for step in range(100):
    ...         watch(state, step)
    {'sigma/w': 20.0, 'sigma/out': 5.0, 'log10_sigma_product': 2.0, 'penalty': 2.125} 0
    {'sigma/w': 20.0, 'sigma/out': 5.0, 'log10_sigma_product': 2.0, 'penalty': 2.125} 50
    """

    def __init__(
        self,
        log: Log | Any,
        *,
        factor: Factor = 0.01,
        target: Factor = 0.0,
        power: int = 2,
        every_n_steps: int = 100,
        prefix: str = "spectral/",
        copy: Copy = copy_to_host,
    ) -> None:
        self._log = _as_log(log)
        self.factor = factor
        self.target = target
        self.power = check_power(power)
        self.every_n_steps = check_int(every_n_steps, "every_n_steps")
        self.prefix = prefix
        self.step = 0
        self._copy = copy
        self._pending: deque[_Pending] = deque()

    def __call__(self, state: Any, step: int | None = None) -> None:
        """Start to copy σ if the step is due, and log every complete copy.

        Parameters
        ----------
        state : SpectralState
            The state after the step.
        step : int, optional
            The default is one more than in the call before.
        """
        step = self.step if step is None else step
        self.step = step + 1
        if step % self.every_n_steps == 0:
            self._pending.append(self._start(step, self._snapshot(state)))
        while self._pending and self._pending[0].copy.ready():
            self._log_next()

    def flush(self) -> None:
        """Wait for every pending copy, and log it."""
        while self._pending:
            self._log_next()

    def close(self) -> None:
        """Log what is pending, at the end of training. A ``with`` block does so too."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _snapshot(self, state: Any) -> Snapshot:
        """Return the part of the state that is logged. An adapter overrides this."""
        if not isinstance(state, SpectralState):
            raise ArgumentError(
                f"state must be a SpectralState, not {type(state)}: for that of a framework's "
                "optimizer or regularizer there is the Watch of its adapter"
            )
        return Snapshot(state.sigma, self.factor, self.target, self.power)

    def _start(self, step: int, snapshot: Snapshot) -> _Pending:
        sigma, arrays = snapshot.sigma, list(snapshot.sigma.values())
        places: dict[int, int] = {}

        def placed(values: Iterable[float | Array]) -> Iterator[float | int]:
            for value in values:
                if not isinstance(value, float):
                    if id(value) not in places:
                        places[id(value)] = len(arrays)
                        arrays.append(value)
                    value = places[id(value)]
                yield value

        factors = tuple(placed(check_factors(snapshot.factor, sigma).values()))
        targets = tuple(placed(check_factors(snapshot.target, sigma, "target").values()))
        sizes = tuple(prod(array.shape) for array in arrays)
        copy = self._copy(arrays)
        return _Pending(step, tuple(sigma), factors, targets, snapshot.power, sizes, copy)

    def _log_next(self) -> None:
        step, names, factors, targets, power, sizes, copy = self._pending.popleft()
        parts = np.split(copy.values().astype(np.float64), np.cumsum(sizes)[:-1])
        sigma = parts[: len(names)]
        found = {f"sigma/{name}": value.max() for name, value in zip(names, sigma, strict=True)}
        with np.errstate(divide="ignore"):  # -inf where a σ is 0
            found["log10_sigma_product"] = np.log10(np.concatenate(sigma)).sum()

        def number(value: float | int) -> float:
            return float(parts[value][0]) if isinstance(value, int) else value

        found["penalty"] = sum(
            penalty(value, factor=number(factor), target=number(target), power=power)
            for value, factor, target in zip(sigma, factors, targets, strict=True)
        )
        self._log({self.prefix + key: float(value) for key, value in found.items()}, step)


def _as_log(log: Any) -> Log:
    add_scalar = getattr(log, "add_scalar", None)
    if add_scalar is None:
        if not callable(log):
            raise ArgumentError(
                f"log must be a callable log(values, step) or a writer with add_scalar, not {log!r}"
            )
        return log

    def add_scalars(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            add_scalar(name, value, step)

    return add_scalars
