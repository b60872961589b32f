"""Algorithm 1 as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import spectral_core as sc
from spectral_core.errors import checked_int

from .products import refresh, step
from .selection import choose, named_leaves

# The core knows no pytrees; with this, `jax.jit` takes and returns its state.
jax.tree_util.register_pytree_node(
    sc.SpectralState,
    lambda state: (
        (dict(state.v), dict(state.sigma), dict(state.u)),
        tuple(state.layouts.items()),
    ),
    lambda layouts, arrays: sc.SpectralState(
        v=arrays[0], sigma=arrays[1], u=arrays[2], layouts=dict(layouts)
    ),
)


class SpectralNormState(NamedTuple):
    """What the transformation carries: the step's number; v, σ and u of each weight by its path."""

    count: jax.Array  # type: ignore[assignment]
    v: Any  # dict of path to array; a bare scalar where there are no parameters
    sigma: Any
    u: Any  # empty where each step makes its own


def add_spectral_norm_regularization(
    factor: Any = 0.01,
    *,
    n_iter: int = 1,
    n_vectors: int = 1,
    every_n_steps: int = 1,
    mask: Any | Callable[[Any], Any] | None = None,
    layouts: Mapping[str, sc.Layout | str] | None = None,
    seed: int = 0,
    target: Any = None,
    power: int | None = None,
) -> optax.GradientTransformation:
    r"""Add λσuvᴴ to the update of every weight matrix.

    .. math:: g ← g + λ\,σ\,u v^H, \quad
              \text{the gradient of } \frac{λ}{2} \sum_ℓ σ(W^ℓ)^2

    Algorithm 1 of `Yoshida & Miyato, 2017 <https://arxiv.org/abs/1705.10941>`_: a power iteration
    a step, from the v of the step before. Put it where `optax.add_decayed_weights` would stand:
    before what scales by the learning rate.

    Parameters
    ----------
    factor : float, array of shape (), schedule, or mapping of name or pattern to the first two
        λ. A schedule is called with the number of the step.
    n_iter : int
        Power iterations a refresh, of which there is one a step unless ``every_n_steps`` says
        otherwise.
    n_vectors : int
        How many vectors to iterate with for each matrix. More than one keep track of σ where σ₂
        comes close to it or overtakes it (`spectral_core.block_iteration`).
    every_n_steps : int
        σ, u and v are refreshed in the steps whose number it divides, from 0 on. The steps between
        add the term of the last refresh, with the λ of their own, and read no weight: cheaper, but
        the term is as old as that refresh, and so lags behind weights that move fast. With more
        than 1 the state holds u too.
    mask : pytree of bool or callable, optional
        As in `optax.masked`: exactly the leaves that it marks are regularized. By default the
        weights of dense, convolution and recurrent layers of Flax (NNX and Linen), Haiku and
        Equinox, and of hand-written trees the leaves with two axes or more; not embeddings, norms,
        scales and biases.
    layouts : mapping of path or pattern to `spectral_core.Layout` or str, optional
        What the axes of a weight are, where its name and its number of axes do not tell: a Flax
        kernel under ``scan`` is ``"sio"``, one of a grouped convolution
        ``Layout("hwi(go)", groups)``. Paths read ``"encoder/layers/0/kernel"``. A leaf named here
        is regularized if the default would leave it out.
    seed : int
        Of the start vectors, which depend on it and on the paths alone.
    target : float, array of shape (), schedule, or mapping of name or pattern, optional
        The σ below which a matrix is left alone: the penalty is the hinge
        (λ/2)·Σ max(0, σ − target)².
    power : int, optional
        1 for the penalty λ·Σ max(0, σ − target), or 2, the default.

    Returns
    -------
    optax.GradientTransformation
        Its state is a `SpectralNormState`, or with a mask an `optax.MaskedState` of one.

    Raises
    ------
    spectral_core.SpectralError
        From ``init`` or ``update``: a leaf that has no matrix, a layout that does not fit, a
        factor out of its range. Also at once, if ``every_n_steps`` is less than 1.
    ValueError
        From ``update`` if it gets no params.

    Notes
    -----
    Donate the buffers of what a step replaces, ``@partial(jax.jit, donate_argnums=(0, 1))`` for
    ``step(params, state, batch)``, as with any optax optimizer: XLA then writes where they lie.

    `optax.inject_hyperparams` takes a mask for a schedule, and makes arrays of numbers: with a
    mask, or to jit ``init``, pass it
    ``static_args=("mask", "n_iter", "n_vectors", "every_n_steps", "seed", "power")``.

    For complex weights the term is ∂/∂Re + i·∂/∂Im, the direction of steepest ascent, which is
    what optax expects: conjugate what ``jax.grad`` gives before ``update``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax, spectral_jax
    >>> params = {"dense": {"kernel": jnp.array([[3.0, 0.0], [3.0, 3.0]]), "bias": jnp.zeros(2)}}
    >>> tx = optax.chain(
    ...     spectral_jax.add_spectral_norm_regularization(0.01),
    ...     optax.sgd(0.1, 0.9, nesterov=True),
    ... )
    >>> state = tx.init(params)
    >>> grads = jax.tree.map(jnp.zeros_like, params)
    >>> for _ in range(10):
    ...     updates, state = tx.update(grads, state, params)
    >>> {name: round(float(sigma), 3) for name, sigma in spectral_jax.sigmas(state).items()}
    {'dense/kernel': 4.854}
    """
    everything = mask is not None
    if not isinstance(every_n_steps, jax.core.Tracer):
        checked_int(every_n_steps, "every_n_steps")

    def init(params: Any) -> SpectralNormState:
        # Traced by `optax.inject_hyperparams`, the number may be any.
        keeps_u = isinstance(every_n_steps, jax.core.Tracer) or every_n_steps > 1
        return start(params, layouts, everything, seed, n_vectors, keeps_u=keeps_u)

    def update(
        updates: Any, state: SpectralNormState, params: Any = None
    ) -> tuple[Any, SpectralNormState]:
        if isinstance(power, jax.core.Tracer):
            raise sc.ArgumentError(
                'power is traced: give optax.inject_hyperparams static_args=("power",)'
            )
        if params is None:
            raise ValueError("add_spectral_norm_regularization: pass params to update")
        count = optax.safe_increment(state.count)
        if not jax.tree.leaves(params):
            return updates, state._replace(count=count)
        weights, chosen = choose(params, layouts, everything)
        leaves, structure = named_leaves(updates)
        # Gradients may come as NumPy arrays.
        given = {name: jnp.asarray(leaf) for name, _, leaf in leaves if name in weights}
        grads = {**dict.fromkeys(weights), **given}
        before = of_core(state, chosen)
        # float32 means float32: the default on GPU and TPU may round the products' operands.
        with jax.default_matmul_precision("highest"):
            if not (before.u or isinstance(every_n_steps, jax.core.Tracer) or every_n_steps == 1):
                raise sc.ArgumentError(
                    f"every_n_steps is {every_n_steps}, but the state holds no u: it comes from "
                    "one with every_n_steps=1; init anew, and take over its v"
                )
            if before.u:
                due = state.count % every_n_steps == 0
                before, last = _refreshed_if(due, weights, grads, before, n_iter), 0
            else:
                before, last = _all_but_last(weights, grads, before, n_iter)
            grads, after = sc.add_gradient(
                weights,
                grads,
                before,
                factor=at_step(factor, state.count),
                target=0.0 if target is None else at_step(target, state.count),
                power=2 if power is None else power,
                n_iter=last,
                step=step,
            )
        new_state = of_optax(count, after)
        new_leaves = [grads.get(name, leaf) for name, _, leaf in leaves]
        return jax.tree.unflatten(structure, new_leaves), new_state

    transformation = optax.GradientTransformation(init, update)
    return optax.masked(transformation, mask) if everything else transformation


def start(
    params: Any,
    layouts: Mapping[str, sc.Layout | str] | None,
    everything: bool,
    seed: Any,
    n_vectors: Any,
    *,
    keeps_u: bool,
) -> SpectralNormState:
    """The state to begin with; with ``keeps_u``, one that a step without an iteration can use."""
    count = jnp.zeros([], jnp.int32)
    if not jax.tree.leaves(params):
        # Masked out whole, or the placeholder of `optax.tree_map_params`, which maps a leaf
        # of this state over whatever stands in its place in a real one.
        return SpectralNormState(count, jnp.zeros([]), jnp.zeros([]), jnp.zeros([]))
    weights, chosen = choose(params, layouts, everything)
    for value, what in ((seed, "seed"), (n_vectors, "n_vectors")):
        if isinstance(value, jax.core.Tracer):
            raise sc.ArgumentError(
                f"{what} is traced, but decides the start vectors on the host: give "
                'optax.inject_hyperparams static_args=("seed", "n_vectors"), or do not jit init'
            )
    with jax.default_matmul_precision("highest"):
        found = sc.init(weights, seed=seed, layouts=chosen, n_vectors=n_vectors)
    return of_optax(count, found if keeps_u else replace(found, u={}))


def of_core(state: SpectralNormState, layouts: Mapping[str, sc.Layout]) -> sc.SpectralState:
    """The core's state; an optimizer's may come back from a file as NumPy arrays."""
    v, sigma, u = jax.tree.map(jnp.asarray, (state.v, state.sigma, state.u))
    return sc.SpectralState(v, sigma, layouts, u)


def of_optax(count: jax.Array, state: sc.SpectralState) -> SpectralNormState:
    """The optimizer's state."""
    return SpectralNormState(count, dict(state.v), dict(state.sigma), dict(state.u))


def sigmas(state: Any) -> dict[str, jax.Array]:
    """The newest estimate of each weight's largest singular value.

    Parameters
    ----------
    state : pytree
        The state of an optimizer in which `add_spectral_norm_regularization` takes part, or
        `constrain_spectral_norm`.

    Returns
    -------
    dict of path to array, shape (*stack,)

    Raises
    ------
    spectral_core.NamesError
        If there is no such state in it.

    Examples
    --------
    >>> import jax.numpy as jnp, spectral_jax
    >>> tx = spectral_jax.add_spectral_norm_regularization(0.01)
    >>> state = tx.init({"w": jnp.array([[3.0, 4.0]])})
    >>> float(spectral_jax.sigmas(state)["w"])
    5.0
    """
    return {
        name: sigma
        for node in states(state)
        if isinstance(node.sigma, Mapping)
        for name, sigma in node.sigma.items()
    }


def states(state: Any) -> list[SpectralNormState]:
    """The states of `add_spectral_norm_regularization` within that of an optimizer."""

    def is_ours(node: Any) -> bool:
        return isinstance(node, SpectralNormState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if not found:
        raise sc.NamesError("this optimizer state holds no SpectralNormState")
    return found


def at_step(value: Any, count: jax.Array) -> Any:
    """A schedule's value at this step, or what is no schedule itself."""
    return value(count) if callable(value) else value


def _refreshed_if(
    due: jax.Array,
    weights: Mapping[str, jax.Array],
    grads: Mapping[str, Any],
    state: sc.SpectralState,
    n_iter: Any,
) -> sc.SpectralState:
    """``state``, iterated where ``due``; else no weight is read."""

    def refreshed(state: sc.SpectralState) -> sc.SpectralState:
        state, last = _all_but_last(weights, grads, state, n_iter)
        return sc.add_gradient(weights, grads, state, n_iter=last, step=refresh)[1]

    def kept(state: sc.SpectralState) -> sc.SpectralState:
        return state

    return jax.lax.cond(due, refreshed, kept, state)


def _all_but_last(
    weights: Mapping[str, jax.Array],
    grads: Mapping[str, Any],
    state: sc.SpectralState,
    n_iter: Any,
) -> tuple[sc.SpectralState, int]:
    """What `add_gradient` is to do, where `optax.inject_hyperparams` has made ``n_iter`` traced."""
    if not isinstance(n_iter, jax.core.Tracer):
        return state, n_iter

    def one(_: Any, state: sc.SpectralState) -> sc.SpectralState:
        return sc.add_gradient(weights, grads, state, n_iter=1, step=refresh)[1]

    return jax.lax.fori_loop(1, n_iter, one, state), 1
