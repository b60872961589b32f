"""Log spectral norms with the callbacks of Keras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

import spectral_core as sc
from spectral_core.engine import Log, Snapshot
from spectral_core.errors import check_int

from ._constraint import SpectralNormConstraint
from ._optimizer import SpectralNormRegularizer
from ._wrapper import OptimizerWrapper, chain


class SpectralNormLogger(keras.callbacks.Callback):  # type: ignore[misc]
    """Log σ of each weight, log₁₀ Πσ and the penalty at the end of each epoch.

    The numbers are put into the ``logs`` of Keras, under the names that `spectral_core.Watch`
    lists. So they are in the ``History`` that `fit` returns, and in the files of the callbacks that
    come **after** this one: ``CSVLogger``, ``TensorBoard``, ``WandbMetricsLogger``.

    Parameters
    ----------
    log : callable or writer, optional
        Where to log every n-th step too: ``log(values, step)``, or an object with a method
        ``add_scalar(name, value, step)``.
    every_n_steps : int
        Steps that are multiples of this number are given to ``log``, from 0 on. With
        ``steps_per_execution``, it is the last step of the execution that has such a step.
    prefix : str
        Prefix of the names.

    Raises
    ------
    spectral_core.ArgumentError
        When training begins, if the model's optimizer is neither a `SpectralNormRegularizer` nor a
        `SpectralNormConstraint`.

    Notes
    -----
    The penalty is that of the regularizer; a bound has none. Reading the numbers waits for the
    device, once an epoch and in every n-th step. On JAX, each such step also hands the state of the
    training over to the model's variables.

    Examples
    --------
    >>> import keras, numpy as np, spectral_keras
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="out")])
    >>> model.compile(spectral_keras.SpectralNormRegularizer("sgd", model), loss="mse")
    >>> logger = spectral_keras.SpectralNormLogger(prefix="")
    >>> history = model.fit(
    ...     np.ones((8, 4)), np.ones((8, 2)), epochs=2, verbose=0, callbacks=[logger]
    ... )
    >>> len(history.history["penalty"]), len(history.history["log10_sigma_product"])
    (2, 2)
    """

    def __init__(
        self,
        log: Log | Any | None = None,
        *,
        every_n_steps: int = 100,
        prefix: str = "spectral/",
    ) -> None:
        super().__init__()
        self._epoch: dict[str, float] = {}
        self._watch = _Watch(self._take, prefix=prefix)
        self._every = check_int(every_n_steps, "every_n_steps")
        self._next = self._first = 0  # the next step, and the first one of this epoch
        self._steps = None if log is None else _Watch(log, every_n_steps=1, prefix=prefix)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Find the optimizer, and the number of the next step."""
        self._next = _wrapper_of(self.model.optimizer)._own_steps()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Remember the first step of the epoch."""
        self._first = self._next

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Log this step if it is due. With ``steps_per_execution``, it may be a later one."""
        step, before = self._first + batch, self._next - 1
        self._next = step + 1
        if self._steps is not None and step // self._every > before // self._every:
            self._sync()
            self._steps(_wrapper_of(self.model.optimizer), step)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Put the numbers into ``logs``."""
        self._sync()
        self._watch(_wrapper_of(self.model.optimizer), epoch * self._watch.every_n_steps)
        self._watch.flush()
        if logs is not None:
            logs.update(self._epoch)

    def _take(self, values: dict[str, float], step: int) -> None:  # noqa: ARG002
        self._epoch = values

    def _sync(self) -> None:
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()


class _Watch(sc.Watch):
    """A watch over an optimizer of this package."""

    def _snapshot(self, state: OptimizerWrapper) -> Snapshot:
        sigma = {path: variable.value for path, variable in state._sigma.items()}
        if not isinstance(state, SpectralNormRegularizer):
            return Snapshot(sigma, 0.0)
        step = state._inner_steps()
        factors, targets = (state._numbers_at(what, step, sigma) for what in state._numbers)
        return Snapshot(sigma, factors, targets, state.power)


def _wrapper_of(optimizer: Any) -> OptimizerWrapper:
    """Return the regularizer among an optimizer and those within it, or else the bound."""
    found = list(chain(optimizer))
    for kind in (SpectralNormRegularizer, SpectralNormConstraint):
        for one in found:
            if isinstance(one, kind):
                return one
    raise sc.ArgumentError(
        f"the model's optimizer is {type(optimizer).__name__}: compile it with "
        "spectral_keras.SpectralNormRegularizer(optimizer, model)"
    )
