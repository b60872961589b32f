"""σ on its way from the device to a log, without a wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from spectral_core.penalty import Factor
from spectral_core.watch import Log, Look

import spectral_core as sc

from .transformation import sigmas, states


class Watch(sc.Watch):
    """Log σ of each weight, log₁₀ Πσ and the penalty every n-th step, without a wait.

    ``watch(state, step)`` between two jitted steps copies the newest σ, if the step is due, and
    logs what was copied in earlier steps and has arrived. The buffers of the state may be donated
    to the next step. `spectral_core.Watch` says what is logged, and which loggers fit.

    Parameters
    ----------
    log : callable or writer
        ``log(values, step)``, with a dict of name to float; or what has
        ``add_scalar(name, value, step)``, such as TensorBoard's ``SummaryWriter``.
    factor : float, array of shape (), schedule, or mapping of name or pattern to the first two
        λ, as the transformation has it. May be set anew at any time:
        ``watch.factor = state.hyperparams["factor"]``.
    every_n_steps : int
        Steps that it divides are logged, from 0 on.
    prefix : str
        What the names begin with.
    target, power
        As the transformation has them.

    Attributes
    ----------
    step : int
        The number of the next step, where none is given. Set it if a run is resumed.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax, spectral_jax
    >>> params = {"w": jnp.array([[6.0, 8.0]])}
    >>> tx = optax.chain(spectral_jax.add_spectral_norm_regularization(0.01), optax.sgd(0.0))
    >>> state = tx.init(params)
    >>> with spectral_jax.Watch(print, factor=0.01, every_n_steps=2, prefix="") as watch:
    ...     for step in range(4):
    ...         _, state = tx.update(params, state, params)
    ...         watch(state, step)
    {'sigma/w': 10.0, 'log10_sigma_product': 1.0, 'penalty': 0.5} 0
    {'sigma/w': 10.0, 'log10_sigma_product': 1.0, 'penalty': 0.5} 2
    """

    def __init__(
        self,
        log: Log | Any,
        *,
        factor: Factor | Callable[[Any], Any] = 0.01,
        every_n_steps: int = 100,
        prefix: str = "spectral/",
        target: Factor | Callable[[Any], Any] = 0.0,
        power: int = 2,
    ) -> None:
        super().__init__(
            log, every_n_steps=every_n_steps, prefix=prefix, power=power, read=OnItsWay.of
        )
        self.factor = factor
        self.target = target

    def _look(self, state: Any) -> Look:
        found = sigmas(state)
        if any(isinstance(sigma, jax.core.Tracer) for sigma in found.values()):
            raise sc.ArgumentError("state is traced: call watch between jitted steps, not in one")
        # The count is that of the next step.
        step = jnp.maximum(states(state)[0].count - 1, 0)
        factor, target = (
            jax.jit(value)(step) if callable(value) else value
            for value in (self.factor, self.target)
        )
        return Look(found, factor, target, self.power)


class OnItsWay(NamedTuple):
    """The `Reading` of arrays that their devices may not have computed yet."""

    flat: Any  # a jax.Array, whose stub knows no is_ready

    @classmethod
    def of(cls, arrays: Sequence[jax.Array]) -> OnItsWay:
        """Send them to the host."""
        flat = _flat(list(arrays))
        flat.copy_to_host_async()
        return cls(flat)

    def ready(self) -> bool:
        """Whether they are computed."""
        return bool(self.flat.is_ready())

    def values(self) -> np.ndarray[Any, Any]:
        """The elements of all."""
        found: np.ndarray[Any, Any] = jax.device_get(self.flat)
        return found


@jax.jit
def _flat(arrays: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([jnp.ravel(array) for array in arrays])
