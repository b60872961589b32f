"""Tell what an optimizer's state does: a table of its weights, and the penalty as a function."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import spectral_core as sc
from spectral_core.engine import Row, Schedule, at_step, check_factors, fresh_direction, plan_of
from spectral_core.errors import listed

from ._regularize import SpectralBoundState, SpectralNormState, is_traced, states
from ._select import Chosen, Layouts, Selector, meanings, named_leaves


def penalty(
    params: Any,
    state: Any,
    *,
    factor: Schedule = 0.01,
    target: Schedule = 0.0,
    power: int = 2,
    layouts: Layouts | None = None,
) -> jax.Array:
    """Return (factor/2)·Σσ² over the regularized weights, differentiable in the parameters.

    Use it to log the penalty, or in a loss instead of the transformation. Its gradient is the
    term that the transformation adds. In a loss, v must still move: keep the transformation in the
    chain with ``factor=0.0``.

    Parameters
    ----------
    params : pytree
        The parameters. Those that the transformation leaves out do not count.
    state : pytree
        The state of an optimizer that contains `add_spectral_norm_regularization`. Its v are held
        constant.
    factor, target : float, array of shape (), schedule, or mapping of name or pattern to these
        λ, and the σ below which the penalty is zero. A schedule is called with the number of the
        coming step.
    power : int
        2, or 1 for a penalty that is linear in σ.
    layouts : mapping of name, pattern or class to Layout or str, optional
        As passed to the transformation.

    Returns
    -------
    jax.Array, shape ()

    Raises
    ------
    spectral_core.NamesError
        If the state holds no regularizer, or a weight is missing in ``params``.
    spectral_core.ShapeError
        If a layout is not the one that the state was made with.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, spectral_jax
    >>> params = {"w": jnp.array([[3.0, 4.0]]), "b": jnp.zeros(2)}
    >>> state = spectral_jax.add_spectral_norm_regularization(0.0).init(params)
    >>> float(spectral_jax.penalty(params, state, factor=0.01))
    0.125
    >>> grads = jax.grad(spectral_jax.penalty)(params, state, factor=0.1)
    >>> [round(float(x), 4) for x in grads["w"][0]]
    [0.3, 0.4]
    """
    nodes = [node for node in states(state) if not isinstance(node, SpectralBoundState)]
    if not nodes:
        raise sc.NamesError("this optimizer state holds a bound, but no regularizer")
    V = {name: v for node in nodes for name, v in _entries(node.v).items()}
    if not V:
        return jnp.zeros([])
    step: Any = nodes[0].count
    factors = check_factors(at_step(factor, step), V)
    targets = check_factors(at_step(target, step), V, "target")
    chosen = _chosen(params, V, layouts)
    terms: list[jax.Array] = []
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        for name, weight in chosen.weights.items():
            W = sc.as_matrix(weight, chosen.layouts[name], name=f"weight {name!r}")
            v = _row_of(name, jnp.asarray(V[name]), W, chosen.layouts[name])
            start = v + fresh_direction(v[None, :], jnp)  # as in a step
            u = sc.power_iteration(jax.lax.stop_gradient(W), start).u
            one = {"factor": factors[name], "target": targets[name]}
            terms.append(sc.penalty_at(W, jax.lax.stop_gradient(u), **one, power=power))
        return reduce(add, terms)


def summary(
    state: Any,
    params: Any = None,
    *,
    factor: Schedule | None = None,
    layouts: Layouts | None = None,
) -> sc.Summary:
    """Return a table of the weights that an optimizer's state regularizes or bounds.

    It reads the numbers from the device: call it between steps.

    Parameters
    ----------
    state : pytree
        The state of an optimizer that contains `add_spectral_norm_regularization` or
        `constrain_spectral_norm`.
    params : pytree, optional
        The parameters. With them the table has shapes and layouts, and lists what is left out.
    factor : float, array of shape (), schedule, or mapping of name or pattern to these, optional
        λ, as passed to the transformation: the state does not hold it. One that
        `optax.inject_hyperparams` holds is found there.
    layouts : mapping of name, pattern or class to Layout or str, optional
        As passed to the transformation.

    Returns
    -------
    spectral_core.Summary

    Raises
    ------
    spectral_core.NamesError
        If the state holds none of the transformations, or a weight is missing in ``params``.
    spectral_core.ArgumentError
        If the state is traced.

    Examples
    --------
    >>> import jax.numpy as jnp, spectral_jax
    >>> params = {"w": jnp.array([[3.0, 4.0]]), "embed": {"embedding": jnp.ones((7, 2))}}
    >>> state = spectral_jax.add_spectral_norm_regularization(0.1).init(params)
    >>> table = spectral_jax.summary(state, params, factor=0.1)
    >>> [(row.name, row.matrix, row.layout, row.factor, row.sigma) for row in table.rows]
    [('w', (2, 1), 'io', 0.1, 5.0)]
    >>> table.left_out
    {'embed/embedding': 'an embedding'}
    """
    nodes = states(state)
    if any(is_traced(leaf) for node in nodes for leaf in jax.tree.leaves(node)):
        raise sc.ArgumentError("state is traced: call summary between jitted steps, not in one")
    V = {name: v for node in nodes for name, v in _entries(node.v).items()}
    chosen = None if params is None or not V else _chosen(params, V, layouts)
    rows = []
    for node in nodes:
        given = _injected(state, node) if factor is None else factor
        rows += _rows(node, given, chosen)
    left_out = {} if params is None else _left_out(params, V)
    bounded = sum(isinstance(node, SpectralBoundState) for node in nodes)
    title = f"{len(V)} weights: {len(nodes) - bounded} regularizer, {bounded} bound in the chain"
    notes = [] if any(int(node.count) for node in nodes) else ["No step was made yet."]
    return sc.Summary(title, rows, left_out, notes=notes)


def _rows(node: SpectralNormState, factor: Any, chosen: Chosen | None) -> list[Row]:
    """Return the rows of one transformation."""
    bound = isinstance(node, SpectralBoundState)
    count = int(node.count)
    V = _entries(node.v)
    factors: Mapping[str, Any] = {}
    if factor is not None and not bound and V:
        factors = check_factors(at_step(factor, max(count - 1, 0)), V)
    rows = []
    for name, v in V.items():
        weight = None if chosen is None else chosen.weights[name]
        matrix: tuple[int, ...] = ()
        if weight is not None:
            stack, n = v.shape[: len(node.sigma[name].shape)], v.shape[-1]
            matrix = (*stack, weight.size // (int(np.prod(stack)) * n), n)
        rows.append(
            Row(
                name,
                () if weight is None else tuple(weight.shape),
                matrix,
                "" if chosen is None else _axes(name, chosen, matrix),
                float(factors[name]) if name in factors else None,
                float(np.max(node.sigma[name])),
                "",
                count - 1 if count else None,
                "bound" if bound else "",
            )
        )
    return rows


def _axes(name: str, chosen: Chosen, matrix: tuple[int, ...]) -> str:
    """Return the axes of a layout, or a question mark if the state was made with another."""
    layout = chosen.layouts[name]
    fits = plan_of(layout, chosen.weights[name].shape, name).matrix == matrix
    return layout.axes if fits else "?"


def _left_out(params: Any, V: Mapping[str, Any]) -> dict[str, str]:
    """Return why the other leaves with two axes or more are left out."""
    other = "not chosen: by include, exclude or a mask"
    return {
        name: meaning if isinstance(meaning, str) else other
        for name, meaning in meanings(params).items()
        if name not in V
    }


def _injected(state: Any, node: SpectralNormState) -> Any:
    """Return the λ that `optax.inject_hyperparams` holds around a state, or None."""

    def is_injected(x: Any) -> bool:
        return hasattr(x, "hyperparams") and hasattr(x, "inner_state")

    for outer in jax.tree.leaves(state, is_leaf=is_injected):
        if is_injected(outer) and any(inner is node for inner in states(outer.inner_state)):
            return outer.hyperparams.get("factor")
    return None


def _chosen(params: Any, V: Mapping[str, Any], layouts: Layouts | None) -> Chosen:
    """Return the weights of a state, with their layouts."""
    missing = set(V) - {leaf.name for leaf in named_leaves(params)[0]}
    if missing:
        raise sc.NamesError(
            f"params has no {listed(sorted(missing))}: pass the parameters that init was given"
        )
    return Selector(include=lambda name, _: name in V, layouts=layouts)(params)


def _entries(arrays: Any) -> Mapping[str, Any]:
    """Return the arrays of a state by name: none where all leaves are masked."""
    return arrays if isinstance(arrays, Mapping) else {}


def _row_of(name: str, V: jax.Array, W: jax.Array, layout: sc.Layout) -> jax.Array:
    """Return the first vector of a state, checked to fit its matrix."""
    v = V[..., 0, :] if V.ndim == W.ndim else V
    if v.shape != (*W.shape[:-2], W.shape[-1]):
        raise sc.ShapeError(
            f"weight {name!r} in layout {layout.axes!r} is a matrix of shape {W.shape}, but the "
            f"state's v has shape {V.shape}: pass the layouts of the transformation"
        )
    return v
