"""Bound the Lipschitz constant of a JAX function, from above and below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import spectral_core as sc
from spectral_core.engine import Value
from spectral_core.errors import check_int

from ._gains import HANDLERS, known
from ._regularize import is_traced
from ._walk import Operand, Walk


def lipschitz_bound(
    fn: Callable[..., Any],
    *example: Any,
    eclipse: bool = True,
    max_iter: int = 100,
    tol: float = 1e-6,
) -> sc.NetworkBound:
    """Bound how far the outputs of a function move when its inputs move, in Euclidean norms.

    The function is traced, and every primitive is followed. Gains multiply along a path, and add
    where paths meet. A convolution counts with its norm as a map of images of any size; a scale of
    its channels, such as that of a batch normalization, is part of it.

    Parameters
    ----------
    fn : callable
        ``fn(x)`` with the parameters inside: ``lambda x: model.apply(params, x)``.
    *example : array or pytree
        Floating-point inputs with an axis of samples. The bound holds for all inputs of these
        shapes.
    eclipse : bool
        Whether to compute the bound by quadratic forms too, for a chain of dense layers of at most
        2048 elements of a sample: see `spectral_core.chain_bound`.
    max_iter : int
        Products with the Jacobian at the example for the lower bound. With 0 there is none.
    tol : float
        Relative distance of a convolution's bounds.

    Returns
    -------
    spectral_core.NetworkBound
        What has no bound is in ``unbounded`` with the reason and the line: products of two values
        that depend on the input, as in attention and layer normalization, and every primitive that
        the walk does not know. The bound is then infinite.

    Raises
    ------
    spectral_core.DTypeError
        If an input is not floating-point.
    spectral_core.ArgumentError
        If the function is called in a trace, or an option is out of its range.

    Notes
    -----
    The bound holds for exact arithmetic on the stored numbers, and its own rounding is accounted
    for. The activations of ``jax.nn`` that JAX compiles as one function are known. ``jax.nn.gelu``
    is not one of them: use ``jax.jit(jax.nn.gelu)``.

    Examples
    --------
    >>> import jax.numpy as jnp, spectral_jax
    >>> W = jnp.diag(jnp.array([3.0, 1.0]))
    >>> bound = spectral_jax.lipschitz_bound(lambda x: jnp.tanh(x @ W) @ W, jnp.ones((1, 2)))
    >>> round(bound.upper, 4)
    9.0
    """
    leaves = jax.tree.leaves(example)
    if any(is_traced(x) for x in leaves):
        raise sc.ArgumentError("example is traced: call lipschitz_bound outside of jax.jit")
    for x in leaves:
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise sc.DTypeError(f"example is {jnp.result_type(x)}: it must be floating-point")
    if not leaves or any(np.size(x) == 0 for x in leaves):
        raise sc.ShapeError("example is empty: give one sample at least")
    max_iter = check_int(max_iter, "max_iter", 0)
    closed = jax.make_jaxpr(fn)(*example)
    first = np.shape(leaves[0])
    walk = Walk(HANDLERS, known, batch=first[0] if first else 0, tol=tol)
    inputs = [Operand(np.shape(x), Value(0.0, is_input=True)) for x in leaves]
    outputs = walk.run(closed.jaxpr, closed.consts, inputs)
    values = [Value(-np.inf) if x.value is None else walk.settled(x) for x in outputs]
    lower = _jacobian(fn, example, max_iter) if max_iter else None
    return walk.ledger.result(values, lower=lower, eclipse=eclipse)


def _jacobian(fn: Callable[..., Any], example: Any, max_iter: int) -> float:
    """Return the largest singular value of the Jacobian at the example."""
    point, restored = ravel_pytree(example)

    def flat(x: jax.Array) -> jax.Array:
        found = jax.tree.leaves(fn(*restored(x)))
        return jnp.concatenate(
            [y.reshape(-1) for y in found if jnp.issubdtype(y.dtype, jnp.floating)]
        )

    out, push = jax.linearize(flat, point)
    pull = jax.linear_transpose(push, point)
    # The iteration itself runs in NumPy: in JAX, each step would compile for its own shapes.
    wide = np.float64 if point.dtype == np.float64 else np.float32
    start = np.random.default_rng(0).standard_normal(point.shape).astype(wide)
    times, adjoint = jax.jit(push), jax.jit(lambda w: pull(w)[0])
    found = sc.operator_norm(
        lambda v: np.asarray(times(jnp.asarray(v, point.dtype))).astype(wide),
        lambda w: np.asarray(adjoint(jnp.asarray(w, out.dtype))).astype(wide),
        start,
        tol=1e-6,
        max_iter=max_iter,
    )
    return float(found.sigma)
