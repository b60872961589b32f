"""A bound on spectral norms as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import spectral_core as sc
from spectral_core.engine import Choice, at_step, check_factors, merge, select
from spectral_core.errors import check_int

from ._foreign import ENGINES
from ._regularize import (
    SpectralBoundState,
    SpectralNormState,
    from_core,
    initial_state,
    is_traced,
    to_core,
    transformation,
)
from ._select import Selector, updates_of


def constrain_spectral_norm(
    bound: Any = 1.0,
    *,
    normalize: bool = False,
    n_iter: int = 1,
    n_vectors: int = 1,
    norm: str = "flattened",
    include: Choice | None = None,
    exclude: Choice | None = None,
    mask: Any | Callable[[Any], Any] | None = None,
    layouts: Mapping[Any, sc.Layout | str] | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Scale every weight matrix to a spectral norm of at most ``bound`` after each step.

    .. math:: W ← W · \min(1, \text{bound}/σ)

    This is the hard bound of `spectral_core.constrain`. With ``normalize`` it is spectral
    normalization of the weights themselves. Unlike `flax.nnx.SpectralNorm` it wraps no layer. Put
    it last in a chain: it changes the updates so that the result of `optax.apply_updates` obeys
    the bound.

    Parameters
    ----------
    bound : float, array of shape (), schedule, or mapping of name or pattern to these
        A schedule is called with the number of the step.
    normalize : bool
        If True, smaller matrices grow to the bound too.
    n_iter : int
        Power iterations in a step.
    n_vectors, norm, include, exclude, mask, layouts, seed
        As for `add_spectral_norm_regularization`.

    Returns
    -------
    optax.GradientTransformation
        Its state is a `SpectralBoundState`, or with a mask an `optax.MaskedState` of one.

    Raises
    ------
    spectral_core.SpectralError
        As `add_spectral_norm_regularization`.

    Notes
    -----
    Nothing changes before the first step. Power iteration underestimates σ, so the true norm can
    exceed the bound slightly: see `spectral_core.constrain`. A float16 or bfloat16 weight misses
    the bound by its rounding.

    `optax.inject_hyperparams` turns numbers into traced arrays. Pass it
    ``static_args=("n_iter", "normalize", "n_vectors", "seed", "mask", "include", "exclude")``.

    Examples
    --------
    >>> import jax.numpy as jnp, optax, spectral_jax
    >>> params = {"dense": {"kernel": jnp.array([[3.0, 0.0], [3.0, 3.0]]), "bias": jnp.zeros(2)}}
    >>> cap = spectral_jax.constrain_spectral_norm(bound=1.0, n_iter=20)
    >>> tx = optax.chain(optax.sgd(0.1), cap)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> round(float(jnp.linalg.norm(params["dense"]["kernel"], 2)), 3)
    1.0
    """
    chosen_of = Selector(include, exclude, layouts, mask is not None, norm)
    if is_traced(n_iter) or is_traced(normalize):
        raise sc.ArgumentError(
            "n_iter and normalize must not be traced: give optax.inject_hyperparams "
            'static_args=("n_iter", "normalize", "n_vectors", "seed", "mask")'
        )
    check_int(n_iter, "n_iter")

    def init(params: Any, *, whole: Any = None) -> SpectralNormState:
        state = initial_state(params, chosen_of, seed, n_vectors, whole)
        return SpectralBoundState(*state[:3], {} if isinstance(state.u, dict) else state.u)

    def update(
        updates: Any, state: SpectralNormState, params: Any = None, *, whole: Any = None
    ) -> tuple[Any, SpectralNormState]:
        if params is None:
            raise sc.ArgumentError("params is None: pass params to update(updates, state, params)")
        step: Any = state.count
        count = optax.safe_increment(step)
        if not jax.tree.leaves(params):
            return updates, state._replace(count=count)
        chosen = chosen_of(params, whole)
        before = chosen.weights
        changes, leaves, structure = updates_of(updates, chosen)
        # A weight without an update stays as it is.
        moved = {name: before[name] + change for name, change in changes.items()}
        moved = {name: weight.astype(before[name].dtype) for name, weight in moved.items()}
        whole_state = to_core(state, chosen.layouts)
        bounds = check_factors(at_step(bound, step), before, "bound")
        weights, after = sc.constrain(
            moved,
            select(whole_state, moved),
            bound={name: bounds[name] for name in moved},
            normalize=normalize,
            n_iter=n_iter,
            engines=ENGINES,
        )
        new = [
            weights[name] - before[name] if name in weights else leaf for name, _, leaf in leaves
        ]
        after = merge(whole_state, after)
        return jax.tree.unflatten(structure, new), from_core(state, count, after)

    return transformation(init, update, mask)
