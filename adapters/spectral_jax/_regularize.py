"""Algorithm 1 as an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import spectral_core as sc
from spectral_core.engine import (
    Choice,
    Engine,
    at_step,
    check_power,
    check_weights,
    merge,
    select,
)
from spectral_core.errors import check_int

from ._engine import XlaEngine
from ._foreign import ENGINES
from ._select import Selector, updates_of

# The core knows no pytrees. Registered here, its state can be an argument of a jitted function.
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
    """State of the transformations: the step's number, and v, σ and u of each weight by path.

    v has shape ``(*stack, n_vectors, n)``, σ ``(*stack,)`` and u ``(*stack, m)``. With
    ``norm="operator"`` the rows of v are waves, and u is complex. A v that version 0.1.0 saved
    without its axis of vectors gets the axis in the first ``update``.
    """

    count: jax.Array  # type: ignore[assignment]
    v: Any  # dict of path to array; a scalar where there are no parameters
    sigma: Any
    u: Any  # empty unless a step can have no iteration of its own


class SpectralBoundState(SpectralNormState):
    """State of `constrain_spectral_norm`. The fields are those of a `SpectralNormState`."""

    __slots__ = ()


def add_spectral_norm_regularization(
    factor: Any = 0.01,
    *,
    target: Any = 0.0,
    power: int = 2,
    n_iter: int = 1,
    n_vectors: int = 1,
    norm: str = "flattened",
    every_n_steps: int = 1,
    include: Choice | None = None,
    exclude: Choice | None = None,
    mask: Any | Callable[[Any], Any] | None = None,
    layouts: Mapping[Any, sc.Layout | str] | None = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Add λσuvᴴ to the update of every weight matrix.

    .. math:: g ← g + λ\,σ\,u v^H, \quad
              \text{the gradient of } \frac{λ}{2} \sum_ℓ σ(W^ℓ)^2

    This is Algorithm 1 of `Yoshida & Miyato, 2017 <https://arxiv.org/abs/1705.10941>`_. Each step
    runs a power iteration from the v of the step before.

    Put the transformation where `optax.add_decayed_weights` would stand: before anything that
    rescales gradients, such as `optax.sgd` or `optax.adam`. It adds to gradients. After
    `optax.adam` the updates carry the negative learning rate already: the term would have the
    wrong sign, and σ would grow.

    Parameters
    ----------
    factor : float, array of shape (), schedule, or mapping of name or pattern to these
        λ. A schedule is called with the number of the step.
    target : float, array of shape (), schedule, or mapping of name or pattern to these
        The σ below which a matrix is left alone. The penalty is then the hinge
        (λ/2)·Σ max(0, σ − target)².
    power : int
        2, or 1 for the penalty λ·Σ max(0, σ − target).
    n_iter : int
        Power iterations in a step.
    n_vectors : int
        Number of vectors to iterate with for each matrix. Two or more keep track of σ where σ₂
        comes close to it or overtakes it: see `spectral_core.block_iteration`. With
        ``norm="operator"``, a convolution follows the waves of its layout instead.
    norm : str
        "flattened", the norm of each weight's matrix, as in the paper, or "operator": the norm of a
        convolution as a map of images. The stride and dilation are those of the module, if the tree
        holds it, as Equinox's do. Otherwise give layouts that are a `spectral_core.Convolution`.
    every_n_steps : int
        σ, u and v are refreshed in steps that are multiples of this number, from 0 on. The steps
        between add the term of the last refresh with their own λ, and read no weight. They are
        cheaper, but the term lags behind weights that move fast. The state then holds u too.
    include : names, patterns, classes of layers or predicates, optional
        What to regularize instead of the default: a path, a shell pattern, the path of a module or
        its end, a compiled pattern, ``include(name, weight)``, or a list of these. Classes need a
        tree that holds its modules, as Equinox's do. The default is every weight of a dense,
        convolution, attention or recurrent layer of Flax (NNX and Linen), Haiku and Equinox, and
        every other matrix. Embeddings, norms, scales and biases are left out.
    exclude : names, patterns, classes of layers or predicates, optional
        Leaves to skip, in the same forms.
    mask : pytree of bool or callable, optional
        As in `optax.masked`: exactly the marked leaves are regularized. Give either a mask, or
        ``include`` and ``exclude``.
    layouts : mapping of name, pattern or class to `spectral_core.Layout` or str, optional
        The meaning of a weight's axes, where the tree does not tell it. The kernel of a grouped
        Flax convolution is ``Layout("hwi(go)", groups)``. Paths look like
        ``"encoder/layers/0/kernel"``. Leaves named here are regularized even where the default
        would leave them out.
    seed : int
        Seed of the random start vectors. They depend only on the seed and the paths.

    Returns
    -------
    optax.GradientTransformation
        Its state is a `SpectralNormState`, or with a mask an `optax.MaskedState` of one.

    Raises
    ------
    spectral_core.SpectralError
        At once if ``power``, ``n_iter`` or ``every_n_steps`` is out of its range. From ``init`` or
        ``update`` if a leaf has no matrix, a layout is needed or does not fit, or a factor is out
        of its range. From ``update`` also if it gets no params, or updates with other paths.

    Warns
    -----
    spectral_core.SpectralWarning
        From ``init``, if only a name told what a leaf is. It lists what was taken and left out.
        Also if the stride of a convolution is taken to be one.

    Notes
    -----
    Donate the buffers that a step replaces, ``@partial(jax.jit, donate_argnums=(0, 1))`` for
    ``step(params, state, batch)``, as with any optax optimizer: XLA then reuses their memory.

    `optax.inject_hyperparams` turns numbers into traced arrays, and calls a mask or a predicate as
    if it were a schedule. ``factor``, ``target``, ``power``, ``n_iter`` and ``every_n_steps`` work
    as traced arrays, unchecked. Pass
    ``static_args=("mask", "include", "exclude", "n_vectors", "seed")`` if one of these is given or
    ``init`` is jitted. Any further option listed in ``static_args`` is checked, and compiles to
    less: ``"target"``, ``"power"``, ``"n_iter"``, ``"every_n_steps"``.

    For complex weights the term is ∂/∂Re + i·∂/∂Im, the direction of steepest ascent that optax
    expects. Conjugate the gradients of ``jax.grad`` before ``update``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax, spectral_jax
    >>> params = {"dense": {"kernel": jnp.array([[3.0, 0.0], [3.0, 3.0]]), "bias": jnp.zeros(2)}}
    >>> tx = optax.chain(
    ...     spectral_jax.add_spectral_norm_regularization(factor=0.01),
    ...     optax.sgd(0.1, 0.9, nesterov=True),
    ... )
    >>> state = tx.init(params)
    >>> grads = jax.tree.map(jnp.zeros_like, params)
    >>> for _ in range(10):
    ...     updates, state = tx.update(grads, state, params)
    >>> {name: round(float(sigma), 3) for name, sigma in spectral_jax.sigmas(state).items()}
    {'dense/kernel': 4.854}
    """
    chosen_of = Selector(include, exclude, layouts, mask is not None, norm)
    for name, value in (("n_iter", n_iter), ("every_n_steps", every_n_steps)):
        if not is_traced(value):
            check_int(value, name)
    if not is_traced(power):
        check_power(power)

    def init(params: Any, *, whole: Any = None) -> SpectralNormState:
        # A traced number can turn out to be more than 1.
        keeps_u = is_traced(every_n_steps) or every_n_steps > 1
        state = initial_state(params, chosen_of, seed, n_vectors, whole)
        return state if keeps_u or not isinstance(state.u, dict) else state._replace(u={})

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
        weights = chosen.weights
        grads, leaves, structure = updates_of(updates, chosen)
        before = to_core(state, chosen.layouts)
        check_weights(weights, before.v)
        engines = _engines(n_iter, power)
        here = 1 if is_traced(n_iter) else n_iter  # a traced number is the engine's
        if before.u:
            moved = {name: weights[name] for name in grads}
            refresh = partial(sc.iterate, moved, n_iter=here, engines=engines)
            due, older = step % every_n_steps == 0, select(before, grads)
            if is_traced(due):
                newer = jax.lax.cond(due, refresh, lambda state: state, older)
            else:  # `cond` would compile its branches anew in each step that is not compiled
                newer = refresh(older) if due else older
            before, here = merge(before, newer), 0
        elif not is_traced(every_n_steps) and every_n_steps > 1:
            raise sc.ArgumentError(
                f"every_n_steps is {every_n_steps}, but the state holds no u: it comes from a "
                "transformation with every_n_steps=1. Call init again, and copy its v"
            )
        new, after = sc.add_gradient(
            weights,
            {**dict.fromkeys(weights), **grads},
            before,
            factor=at_step(factor, step),
            target=at_step(target, step),
            power=2 if is_traced(power) else power,
            n_iter=here,
            engines=engines,
        )
        new_leaves = [new[name] if name in grads else leaf for name, _, leaf in leaves]
        return jax.tree.unflatten(structure, new_leaves), from_core(state, count, after)

    return transformation(init, update, mask)


def transformation(
    init: Callable[..., SpectralNormState],
    update: Callable[..., tuple[Any, SpectralNormState]],
    mask: Any | Callable[[Any], Any] | None,
) -> optax.GradientTransformation:
    """Return a transformation of all leaves, or of those that a mask marks.

    `optax.masked` hides the other leaves, which tell more about a weight: its bias, the layers
    beside it. ``init`` and ``update`` get them as ``whole``.
    """
    if mask is None:
        return optax.GradientTransformation(init, update)

    def masked_init(params: Any) -> Any:
        inner = optax.GradientTransformation(partial(init, whole=params), update)
        return optax.masked(inner, mask).init(params)

    def masked_update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        inner = optax.GradientTransformation(init, partial(update, whole=params))
        return optax.masked(inner, mask).update(updates, state, params)

    return optax.GradientTransformation(masked_init, masked_update)


def initial_state(
    params: Any, chosen_of: Selector, seed: Any, n_vectors: Any, whole: Any
) -> SpectralNormState:
    """Return the state to start from.

    Raises
    ------
    spectral_core.SpectralError
        If a leaf has no matrix, a layout does not fit, or ``seed`` or ``n_vectors`` is traced.
    """
    count = jnp.zeros([], jnp.int32)
    if not jax.tree.leaves(params):
        # All leaves are masked, or this is the placeholder of `optax.tree_map_params`. That maps a
        # leaf of this state over whatever is in its place in a real one.
        return SpectralNormState(count, jnp.zeros([]), jnp.zeros([]), jnp.zeros([]))
    chosen = chosen_of(params, whole, warn=True)
    for value, what in ((seed, "seed"), (n_vectors, "n_vectors")):
        if is_traced(value):
            raise sc.ArgumentError(
                f"{what} is traced, but the start vectors are drawn on the host: give "
                'optax.inject_hyperparams static_args=("seed", "n_vectors"), or do not jit init'
            )
    state = sc.init(
        chosen.weights,
        seed=seed,
        layouts=chosen.layouts,
        n_vectors=n_vectors,
        engines=ENGINES,
    )
    return from_core(SpectralNormState(count, None, None, None), count, state)


def to_core(state: SpectralNormState, layouts: Mapping[str, sc.Layout]) -> sc.SpectralState:
    """Return the core's state. The optimizer's may hold NumPy arrays, or be saved by 0.1.0."""
    v, sigma, u = jax.tree.map(jnp.asarray, (state.v, state.sigma, state.u))
    v = {
        name: rows if rows.ndim > sigma[name].ndim + 1 else rows[..., None, :]
        for name, rows in v.items()
    }
    return sc.SpectralState(v, sigma, layouts, u)


def from_core(
    before: SpectralNormState, count: jax.Array, state: sc.SpectralState
) -> SpectralNormState:
    """Return the optimizer's state, of the class of the one before."""
    return type(before)(count, dict(state.v), dict(state.sigma), dict(state.u))


def sigmas(state: Any) -> dict[str, jax.Array]:
    """Return the newest estimate of each weight's largest singular value.

    Parameters
    ----------
    state : pytree
        The state of an optimizer that contains `add_spectral_norm_regularization` or
        `constrain_spectral_norm`.

    Returns
    -------
    dict of path to array, shape (*stack,)

    Raises
    ------
    spectral_core.NamesError
        If it contains neither.

    Examples
    --------
    >>> import jax.numpy as jnp, spectral_jax
    >>> tx = spectral_jax.add_spectral_norm_regularization(factor=0.01)
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
    """Return the states of our transformations within the state of an optimizer.

    Raises
    ------
    spectral_core.NamesError
        If there is none.
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, SpectralNormState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if not found:
        raise sc.NamesError("this optimizer state holds no SpectralNormState")
    return found


def is_traced(value: Any) -> bool:
    """Return True if the value is known on the device alone."""
    return isinstance(value, jax.core.Tracer)


def _engines(n_iter: Any, power: Any) -> Sequence[Engine]:
    """Return the engines, with the options that `optax.inject_hyperparams` has traced."""
    if not (is_traced(n_iter) or is_traced(power)):
        return ENGINES
    return [
        XlaEngine(
            n_iter=n_iter if is_traced(n_iter) else None, power=power if is_traced(power) else None
        )
    ]
