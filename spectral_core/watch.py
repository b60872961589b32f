"""σ of each weight, their product and the penalty, logged as training goes, without a wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np

from ._arrays import Array, array_namespace, to_host
from .errors import ArgumentError, checked_int
from .penalty import Factor, check_power, factors_of, penalty
from .regularizer import SpectralState

Log: TypeAlias = Callable[[dict[str, float], int], object]
"""Takes numbers by name, and the step they belong to."""


class Reading(Protocol):
    """Numbers on their way from the device to the host."""

    def ready(self) -> bool:
        """Whether they have arrived; does not wait."""

    def values(self) -> np.ndarray[Any, Any]:
        """The elements of all arrays, one after the other; waits for them where it must."""


Read: TypeAlias = Callable[[Sequence[Array]], Reading]
"""Sends arrays to the host as they are now, whatever is written into them later."""


class Arrived(NamedTuple):
    """A `Reading` that is on the host already."""

    elements: np.ndarray[Any, Any]

    def ready(self) -> bool:
        """True."""
        return True

    def values(self) -> np.ndarray[Any, Any]:
        """The elements."""
        return self.elements


def read(arrays: Sequence[Array]) -> Reading:
    """The `Read` of NumPy, and of any array library: waits for the device, if there is one."""
    xp = array_namespace(*arrays)
    return Arrived(to_host(xp.concat([xp.reshape(x, (-1,)) for x in arrays])).real)


class Look(NamedTuple):
    """What there is to log of a state, where it lies."""

    sigma: Mapping[str, Array]
    factor: Factor
    target: Factor = 0.0
    power: int = 2


class _Taken(NamedTuple):
    step: int
    names: tuple[str, ...]
    factors: tuple[float | int, ...]  # an int is a place among the arrays that are read
    targets: tuple[float | int, ...]
    power: int
    sizes: tuple[int, ...]  # of the arrays: σ of each weight, more than one in a stack; λ; targets
    reading: Reading


class Watch:
    """Log σ of each weight, log₁₀ Πσ and the penalty every n-th step, without a wait.

    ``watch(state, step)`` after each step copies the newest σ, where the step is due, and logs
    what was copied in earlier steps and has arrived: late, and with the step it belongs to. That
    is

    - ``spectral/sigma/<name>``, of a stack of matrices (a grouped convolution) the largest;
    - ``spectral/log10_sigma_product``, over all matrices: the product itself leaves the range of
      a float in a deep network;
    - ``spectral/penalty``, (λ/2)·Σσ² over all matrices (see `penalty`).

    Parameters
    ----------
    log : callable or writer
        ``log(values, step)``, with a dict of name to float; or what has
        ``add_scalar(name, value, step)``, such as TensorBoard's ``SummaryWriter``.
    factor : float, array of shape (), or mapping of name or pattern to either
        λ, for the penalty. May be set anew at any time: ``watch.factor = 0.02``.
    every_n_steps : int
        Steps that it divides are logged, from 0 on.
    prefix : str
        What the names begin with.
    target, power
        As for `add_gradient`, for the penalty.
    read : callable
        How arrays get to the host: a framework's way that does not wait goes here (`Read`). The
        adapters ``spectral_torch``, ``spectral_jax`` and ``spectral_cupy`` have a `Watch` with
        theirs.

    Attributes
    ----------
    step : int
        The number of the next step, where none is given. Set it if a run is resumed.

    Raises
    ------
    ArgumentError
        If ``log`` is neither, or a number is out of its range.

    Notes
    -----
    Lightning's ``logger.log_metrics`` and ``mlflow.log_metrics`` are such a ``log`` as they are.
    ``lambda values, step: self.log_dict(values)`` is one too, but Lightning files the numbers under
    the step of the moment, and again under each until there are new ones. Weights & Biases drops
    what belongs to a step before its newest: give it the step as a number of its own::

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
        every_n_steps: int = 100,
        prefix: str = "spectral/",
        target: Factor = 0.0,
        power: int = 2,
        read: Read = read,
    ) -> None:
        self._log = _as_log(log)
        self.factor = factor
        self.target = target
        self.power = check_power(power)
        self.every_n_steps = checked_int(every_n_steps, "every_n_steps")
        self.prefix = prefix
        self.step = 0
        self._read = read
        self._pending: deque[_Taken] = deque()

    def __call__(self, state: Any, step: int | None = None) -> None:
        """Copy σ, if the step is due, and log what has arrived.

        Parameters
        ----------
        state : SpectralState
            As the step left it.
        step : int, optional
            By default one more than in the call before.
        """
        step = self.step if step is None else step
        self.step = step + 1
        if step % self.every_n_steps == 0:
            self._pending.append(self._taken(step, self._look(state)))
        while self._pending and self._pending[0].reading.ready():
            self._log_next()

    def flush(self) -> None:
        """Log what is still on its way: waits for it."""
        while self._pending:
            self._log_next()

    def close(self) -> None:
        """`flush`, at the end of training. ``with`` does so too."""
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _look(self, state: Any) -> Look:
        """What an adapter says of its own state."""
        if not isinstance(state, SpectralState):
            raise ArgumentError(
                f"state must be a SpectralState, not {type(state)}: for that of a framework's "
                "optimizer or regularizer there is the Watch of its adapter"
            )
        return Look(state.sigma, self.factor, self.target, self.power)

    def _taken(self, step: int, look: Look) -> _Taken:
        sigma, arrays = look.sigma, list(look.sigma.values())
        places: dict[int, int] = {}

        def placed(values: Iterable[float | Array]) -> Iterator[float | int]:
            for value in values:
                if not isinstance(value, float):
                    if id(value) not in places:
                        places[id(value)] = len(arrays)
                        arrays.append(value)
                    value = places[id(value)]
                yield value

        factors = tuple(placed(factors_of(look.factor, sigma).values()))
        targets = tuple(placed(factors_of(look.target, sigma, "target").values()))
        sizes = tuple(prod(array.shape) for array in arrays)
        reading = self._read(arrays)
        return _Taken(step, tuple(sigma), factors, targets, look.power, sizes, reading)

    def _log_next(self) -> None:
        step, names, factors, targets, power, sizes, reading = self._pending.popleft()
        parts = np.split(reading.values().astype(np.float64), np.cumsum(sizes)[:-1])
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
