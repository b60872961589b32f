"""Log σ of each weight, their product and the penalty during training, without waiting."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isfinite, prod
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np

from ._arrays import Array, array_namespace, to_host
from ._penalty import penalty
from ._state_dict import SpectralState
from ._validate import Factor, check_factors, check_power
from .errors import ArgumentError, check_int

if TYPE_CHECKING:
    from pathlib import Path

Log: TypeAlias = Callable[[dict[str, float], int], object]
"""``log(values, step)`` receives numbers by name, and the step they belong to."""

_METRICS_AT_ONCE = 1000  # the most that MLflow takes
_FORBIDDEN = re.compile(r"[^\w./: -]")  # in MLflow's names of metrics


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
    log : callable, path, or object with a method for metrics
        Where the numbers go. The first that fits counts:

        - a path that ends in ``.jsonl``: one JSON object a line, appended and flushed at each step;
        - a writer with ``add_scalar(name, value, step)``: TensorBoard's ``SummaryWriter``;
        - an object with ``log_metrics(values, step=step)``: the module ``mlflow``, Lightning's
          loggers;
        - a run with ``define_metric`` and ``log``: that of Weights & Biases;
        - a function ``log(values, step)`` of a dict of name to float.
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
        If ``log`` is none of these, or a number is out of its range.

    Notes
    -----
    In a file of JSON lines, a number that is not finite is null. A run that is resumed, whose first
    logged step is not 0, replaces the lines of the steps that it repeats at the end of the file. A
    run that starts at 0 is appended.

    Weights & Biases drops values of a step before its newest one. So the step is a value of its
    own, ``spectral/step``, and the x-axis of these numbers. MLflow's names have letters, digits and
    ``_-./: `` alone: other characters become ``_``.

    ``lambda values, step: self.log_dict(values)`` works in a LightningModule, but Lightning records
    the numbers under its current step, and repeats them until there are new ones.

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
        self._log = _as_log(log, prefix)
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
            snapshot = self._snapshot(state)
            if snapshot.sigma:  # else no weight takes part
                self._pending.append(self._start(step, snapshot))
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


class _JsonLines:
    """Append each step to a file, as one JSON object a line, which is on the disk at once."""

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".jsonl", ".ndjson") or path.is_dir():
            raise ArgumentError(
                f"log is the path {str(path)!r}: a file of JSON lines ends in .jsonl or .ndjson; "
                "for TensorBoard pass SummaryWriter(path)"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # an error about the path comes now, not in the middle of a run
        self._path = path
        self._is_tidy = False

    def __call__(self, values: dict[str, float], step: int) -> None:
        if not self._is_tidy:
            self._tidy(step)
        # JSON has no NaN and no infinity.
        finite = {name: value if isfinite(value) else None for name, value in values.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def _tidy(self, step: int) -> None:
        """Cut what a killed run wrote last: half a line, and steps that a resumed run repeats."""
        lines = self._path.read_bytes().splitlines(keepends=True)
        while lines and (not lines[-1].endswith(b"\n") or 0 < step <= _step_in(lines[-1])):
            del lines[-1]
        os.truncate(self._path, sum(map(len, lines)))
        self._is_tidy = True


def _step_in(line: bytes) -> int:
    """Return the step of a line, or -1 for a line of another kind."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return -1


def _as_log(log: Any, prefix: str) -> Log:
    """Return a function of values and step for whatever can be passed as ``log``."""
    if isinstance(log, str | PathLike):
        # Here: with what it imports, it is too much for each import of the library.
        from pathlib import Path

        return _JsonLines(Path(log))
    if hasattr(log, "add_scalar"):
        return _scalar_by_scalar(log.add_scalar)
    if hasattr(log, "log_metrics"):
        return _in_batches(log.log_metrics)
    if hasattr(log, "define_metric") and hasattr(log, "log"):
        return _of_a_run(log, prefix)
    if callable(log):
        return log
    raise ArgumentError(
        "log must be a callable log(values, step), a path that ends in .jsonl, a writer with "
        f"add_scalar, a Weights & Biases run, or mlflow, not {type(log).__name__} {log!r:.60}"
    )


def _scalar_by_scalar(add_scalar: Callable[..., object]) -> Log:
    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            add_scalar(name, value, step)

    return log


def _in_batches(log_metrics: Callable[..., object]) -> Log:
    def log(values: dict[str, float], step: int) -> None:
        items = list(values.items())
        for start in range(0, len(items), _METRICS_AT_ONCE):
            part = items[start : start + _METRICS_AT_ONCE]
            log_metrics({_FORBIDDEN.sub("_", name): value for name, value in part}, step=step)

    return log


def _of_a_run(run: Any, prefix: str) -> Log:
    """Return a log for Weights & Biases, which drops values of a step before its newest one."""
    if getattr(run, "run", run) is None:  # the module, before `init`
        raise ArgumentError("log is wandb, which has no run yet: call wandb.init() first")
    step_name = f"{prefix}step"
    for name in ("sigma/*", "log10_sigma_product", "penalty"):
        run.define_metric(prefix + name, step_metric=step_name)

    def log(values: dict[str, float], step: int) -> None:
        run.log({**values, step_name: step})

    return log
