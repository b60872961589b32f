"""Bound the Lipschitz constant of a JAX function, from above and below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import spectral_core as sc
from spectral_core.engine import Value
from spectral_core.errors import check_int, listed, shown

from ._control import CONTROLS
from ._gains import HANDLERS
from ._known import recognize
from ._regularize import is_traced
from ._walk import NoBound, Operand, Walk


def lipschitz_bound(
    fn: Callable[..., Any],
    *example: Any,
    gains: Mapping[str, float] | None = None,
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
    gains : mapping of name to float, optional
        Lipschitz constants that you know of functions under ``jax.jit``, by the names of the
        functions: the walk does not look into these.
    eclipse : bool
        Whether to compute the bound by quadratic forms too, for a chain of layers of at most 2048
        elements of a sample: see `spectral_core.chain_bound`.
    max_iter : int
        Products with the Jacobian at the example for the lower bound. With 0 there is none.
    tol : float
        Relative distance of a convolution's bounds.

    Returns
    -------
    spectral_core.NetworkBound
        What has no bound is in ``unbounded`` with the reason and the line: products of two values
        that depend on the input, as in attention and layer normalization, branches and loops that
        depend on it, and every primitive that the walk does not know. The bound is then infinite.

    Raises
    ------
    spectral_core.DTypeError
        If an input is not floating-point.
    spectral_core.ArgumentError
        If the function is called in a trace or returns no array, or an option is out of its range.
    spectral_core.NamesError
        If ``gains`` names no function under ``jax.jit`` that depends on the input.

    Notes
    -----
    The bound holds for exact arithmetic on the stored numbers, and its own rounding is accounted
    for. The activations of ``jax.nn`` are known by their equations. The body of a loop is followed
    once for each step, up to 1000: its number of steps must not depend on the input.

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
    max_iter, given = check_int(max_iter, "max_iter", 0), _checked(gains)
    closed = jax.make_jaxpr(fn)(*example)
    first = np.shape(leaves[0])
    if not closed.out_avals:
        raise sc.ArgumentError("fn returns no array")
    batch = first[0] if first else 0
    walk = Walk(HANDLERS, CONTROLS, recognize, given, batch=batch, tol=tol)
    inputs = [Operand(np.shape(x), Value(0.0, is_input=True)) for x in leaves]
    values = [_output(walk, x) for x in walk.run(closed.jaxpr, closed.consts, inputs)]
    if unknown := sorted(set(given) - walk.used):
        raise sc.NamesError(
            f"gains names {listed(unknown)}, but fn calls no function of such a name under jax.jit"
        )
    if walk.ledger.unbounded and len(example) > 1:
        walk.ledger.notes.append(
            "All arguments of fn count as inputs. Close over parameters: lambda x: fn(params, x)."
        )
    lower = None
    if max_iter:
        try:
            lower = _jacobian(fn, example, max_iter)
        except (TypeError, ValueError, NotImplementedError, sc.SpectralError) as error:
            reason = str(error).partition("\n")[0]
            walk.ledger.notes.append(f"No Jacobian: {reason}")
    return walk.ledger.result(values, lower=lower, eclipse=eclipse)


def _output(walk: Walk, x: Operand) -> Value:
    try:
        return walk.settled(x)
    except NoBound as reason:
        return walk.ledger.refuse("output", str(reason))


def _checked(gains: Mapping[str, float] | None) -> dict[str, float]:
    """Return the gains as numbers."""
    given = {name: float(value) for name, value in (gains or {}).items()}
    for name, value in given.items():
        if not 0 <= value < inf:
            raise sc.ArgumentError(f"gains[{name!r}] must be a number ≥ 0, not {shown(value)}")
    return given


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
