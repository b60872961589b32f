"""The power iteration with its products as XLA runs them fast.

JAX's kernels lie with the outputs last, so the core's matrix is a transpose. XLA's CPU compiler
does not fold it away in every product: ``transpose(W) @ v`` then takes 10 times as long as
``v @ W``. A weight is therefore multiplied as it lies, from the left or from the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp

from spectral_core import PowerIteration
from spectral_core._arrays import cast, conj, squared, traits
from spectral_core.layout import lay, lying_matrix, reshaped, unlay
from spectral_core.step import Advance, Task, plain_step


def step(tasks: Sequence[Task], n_iter: int) -> Advance:
    """`spectral_core.step.plain_step`, each weight multiplied as it lies."""
    if n_iter > 0:
        tasks = [task._replace(last=_iterated(task, n_iter)) for task in tasks]
    return plain_step(tasks, 0)


def refresh(tasks: Sequence[Task], n_iter: int) -> Advance:
    """A `Step` that leaves the gradients as they are: σ, u and v alone."""
    return Advance([task.grad for task in tasks], [_iterated(task, n_iter) for task in tasks])


def _iterated(task: Task, n_iter: int) -> PowerIteration:
    kind = traits(task.weight, jnp, task.name)
    stored, transposed = _stored(task)
    W = cast(stored, kind.iteration_dtype, jnp)
    v = lay(cast(task.v, kind.iteration_dtype, jnp), task.plan, jnp)
    to_u, to_v = (_left, _right) if transposed else (_right, _left)
    for _ in range(n_iter):
        u, _, _ = _normalized(to_u(W, v), kind.tiny)
        unit, inverse, sigma = _normalized(conj(to_v(W, conj(u, jnp)), jnp), kind.tiny)
        v = jnp.where(inverse > 0, unit, v)
    return PowerIteration(sigma[..., 0], u, unlay(v, task.plan, jnp))


def _stored(task: Task) -> tuple[jax.Array, bool]:
    """The matrix, or its transpose where that is how the weight lies; and whether it is that."""
    plan = task.plan
    *stack, m, n = plan.matrix
    lead, rest = plan.lying[: len(stack)], plan.lying[len(stack) :]
    for rows in range(1, len(rest)):
        is_cut = prod(plan.split[axis] for axis in rest[:rows]) == m
        columns_first = lead + rest[rows:] + rest[:rows]
        if is_cut and columns_first == tuple(range(len(columns_first))):
            return reshaped(task.weight, (*stack, n, m), jnp), True
    return lying_matrix(task.weight, plan, jnp), False


def _right(W: jax.Array, x: jax.Array) -> jax.Array:
    """``W @ x``, stacked."""
    return W @ x if W.ndim == 2 else (W @ x[..., None])[..., 0]


def _left(W: jax.Array, x: jax.Array) -> jax.Array:
    """``x @ W``, stacked."""
    return x @ W if W.ndim == 2 else (x[..., None, :] @ W)[..., 0, :]


def _normalized(x: jax.Array, tiny: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x/‖x‖, 1/‖x‖, ‖x‖) as in the core: an inverse of zero is a zero vector's alone."""
    square = jnp.sum(squared(x, jnp), axis=-1, keepdims=True)
    length = jnp.sqrt(square)
    inverse = length / (square + tiny)
    return x * inverse, inverse, length
