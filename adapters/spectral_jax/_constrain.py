"""A bound on spectral norms as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import spectral_core as sc
from spectral_core.engine import check_factors, merge, select
from spectral_core.errors import check_int

from ._engine import XlaEngine
from ._regularize import (
    SpectralNormState,
    at_step,
    from_core,
    initial_state,
    is_traced,
    to_core,
)
from ._select import choose, named_leaves


def constrain_spectral_norm(
    bound: Any = 1.0,
    *,
    normalize: bool = False,
    n_iter: int = 1,
    n_vectors: int = 1,
    mask: Any | Callable[[Any], Any] | None = None,
    layouts: Mapping[str, sc.Layout | str] | None = None,
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
    bound : float, array of shape (), schedule, or mapping of name or pattern to the first two
        A schedule is called with the number of the step.
    normalize : bool
        Whether smaller matrices grow to the bound too.
    n_iter : int
        Power iterations in a step.
    n_vectors, mask, layouts, seed
        As for `add_spectral_norm_regularization`.

    Returns
    -------
    optax.GradientTransformation
        Its state is a `SpectralNormState`, or with a mask an `optax.MaskedState` of one.

    Raises
    ------
    spectral_core.SpectralError
        As `add_spectral_norm_regularization`.
    ValueError
        From ``update`` if it gets no params.

    Notes
    -----
    Nothing changes before the first step. Power iteration underestimates σ, so the true norm can
    exceed the bound slightly: see `spectral_core.constrain`. A float16 or bfloat16 weight misses
    the bound by its rounding.

    `optax.inject_hyperparams` turns numbers into traced arrays. Pass it
    ``static_args=("n_iter", "normalize", "n_vectors", "seed", "mask")``.

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
    masked = mask is not None
    if is_traced(n_iter) or is_traced(normalize):
        raise sc.ArgumentError(
            "n_iter and normalize must not be traced: give optax.inject_hyperparams "
            'static_args=("n_iter", "normalize", "n_vectors", "seed", "mask")'
        )
    check_int(n_iter, "n_iter")

    def init(params: Any) -> SpectralNormState:
        return initial_state(params, layouts, masked, seed, n_vectors, keeps_u=False)

    def update(
        updates: Any, state: SpectralNormState, params: Any = None
    ) -> tuple[Any, SpectralNormState]:
        if params is None:
            raise ValueError("constrain_spectral_norm: pass params to update")
        count = optax.safe_increment(state.count)
        if not jax.tree.leaves(params):
            return updates, state._replace(count=count)
        before, chosen = choose(params, layouts, masked)
        leaves, structure = named_leaves(updates)
        # A weight without an update stays as it is.
        moved = {name: before[name] + leaf for name, _, leaf in leaves if name in before}
        moved = {name: weight.astype(before[name].dtype) for name, weight in moved.items()}
        whole = to_core(state, chosen)
        bounds = check_factors(at_step(bound, state.count), before, "bound")
        weights, after = sc.constrain(
            moved,
            select(whole, moved),
            bound={name: bounds[name] for name in moved},
            normalize=normalize,
            n_iter=n_iter,
            engines=[XlaEngine()],
        )
        new = [
            weights[name] - before[name] if name in weights else leaf for name, _, leaf in leaves
        ]
        return jax.tree.unflatten(structure, new), from_core(count, merge(whole, after))

    transformation = optax.GradientTransformation(init, update)
    return optax.masked(transformation, mask) if masked else transformation
