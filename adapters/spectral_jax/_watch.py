"""Log σ during training, without a wait for the device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import spectral_core as sc
from spectral_core.engine import Factor, Log, Schedule, Snapshot, at_step, check_factors

from ._regularize import SpectralBoundState, is_traced, sigmas, states


class Watch(sc.Watch):
    """Log σ of each weight, log₁₀ Πσ and the penalty every n-th step, without waiting.

    Call ``watch(state, step)`` between two jitted steps. If the step is due, the call starts to
    copy the newest σ to the host. It then logs every earlier copy that is complete. The buffers of
    the state may be donated to the next step. Weights that are only bounded have no penalty.
    `spectral_core.Watch` describes the numbers and the loggers.

    Parameters
    ----------
    log : callable, path, or object with a method for metrics
        A function ``log(values, step)`` of a dict of name to float, a path that ends in ``.jsonl``,
        TensorBoard's ``SummaryWriter``, a Weights & Biases run, or ``mlflow`` (see
        `spectral_core.Watch`).
    factor : float, array of shape (), schedule, or mapping of name or pattern to these
        λ, as passed to the transformation. It can be changed at any time:
        ``watch.factor = state.hyperparams["factor"]``.
    target, power
        As passed to the transformation.
    every_n_steps : int
        Steps that are multiples of this number are logged, from 0 on.
    prefix : str
        Prefix of the names.

    Attributes
    ----------
    step : int
        Number of the next step, where none is passed. Set it when a run is resumed.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax, spectral_jax
    >>> params = {"w": jnp.array([[6.0, 8.0]])}
    >>> tx = spectral_jax.add_spectral_norm_regularization(factor=0.01)
    >>> tx = optax.chain(tx, optax.sgd(0.0))
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
        factor: Schedule = 0.01,
        target: Schedule = 0.0,
        power: int = 2,
        every_n_steps: int = 100,
        prefix: str = "spectral/",
    ) -> None:
        super().__init__(
            log, every_n_steps=every_n_steps, prefix=prefix, power=power, copy=ArrayCopy.start
        )
        self.factor = factor
        self.target = target

    def _snapshot(self, state: Any) -> Snapshot:
        found = sigmas(state)
        if any(map(is_traced, found.values())):
            raise sc.ArgumentError("state is traced: call watch between jitted steps, not in one")
        nodes = states(state)
        step: Any = jnp.maximum(nodes[0].count - 1, 0)  # the count is that of the next step
        factor, target = (at_step(_compiled(x), step) for x in (self.factor, self.target))
        regularized = {
            name
            for node in nodes
            if not isinstance(node, SpectralBoundState) and isinstance(node.sigma, Mapping)
            for name in node.sigma
        }
        if len(regularized) < len(found):
            factor = _only(factor, regularized, found, "factor")
            target = _only(target, regularized, found, "target")
        return Snapshot(found, factor, target, self.power)


def _compiled(schedule: Schedule) -> Schedule:
    """Return the schedules compiled: each is one call to the device."""
    if isinstance(schedule, Mapping):
        return {name: jax.jit(x) if callable(x) else x for name, x in schedule.items()}
    return jax.jit(schedule) if callable(schedule) else schedule


def _only(
    numbers: Factor, regularized: Collection[str], names: Collection[str], what: str
) -> Factor:
    """Return the numbers of the regularized weights, and zero for those that are only bounded."""
    own = check_factors(numbers, regularized, what) if regularized else {}
    return {name: own.get(name, 0.0) for name in names}


class ArrayCopy(NamedTuple):
    """An `AsyncCopy` of arrays that their devices may not have computed yet."""

    flat: Any  # a jax.Array, whose stub has no is_ready

    @classmethod
    def start(cls, arrays: Sequence[jax.Array]) -> ArrayCopy:
        """Start to copy the arrays to the host."""
        flat = _concatenated(list(arrays))
        flat.copy_to_host_async()
        return cls(flat)

    def ready(self) -> bool:
        """Return True if the arrays are computed."""
        return bool(self.flat.is_ready())

    def values(self) -> np.ndarray[Any, Any]:
        """Return the elements of all arrays, one after the other."""
        elements: np.ndarray[Any, Any] = jax.device_get(self.flat)
        return elements


@jax.jit
def _concatenated(arrays: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([jnp.ravel(array) for array in arrays])
