"""The power iteration with its products as XLA runs them fast, on one device and on many.

A weight is multiplied as it lies, over all axes of its rows or columns at once. To view it as a
matrix first would join axes, and XLA gathers a weight whole to join one that a mesh divides. Which
factor comes first matters too: XLA's CPU compiler does not fold every transpose away.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from spectral_core.block import iterated_rows
from spectral_core.layout import reshaped
from spectral_core.power import iterated
from spectral_core.step import Advance, Task, plain_step

from spectral_core import PowerIteration
from spectral_core._arrays import cast, conj, traits

Axes = tuple[int, ...]


def step(tasks: Sequence[Task], n_iter: int) -> Advance:
    """`spectral_core.step.plain_step`, each weight multiplied as it lies."""
    if n_iter > 0:
        tasks = [task._replace(last=_iterated(task, n_iter)) for task in tasks]
    return plain_step(tasks, 0)


def refresh(tasks: Sequence[Task], n_iter: int) -> Advance:
    """A `Step` that leaves the gradients as they are: σ, u and v alone."""
    return Advance([task.grad for task in tasks], [_iterated(task, n_iter) for task in tasks])


def _iterated(task: Task, n_iter: int) -> PowerIteration:
    plan, kind = task.plan, traits(task.weight, jnp, task.name)
    W = cast(reshaped(task.weight, plan.split, jnp), kind.iteration_dtype, jnp)
    v = cast(task.v, kind.iteration_dtype, jnp)
    n_stack = len(plan.matrix) - 2
    n_columns = len(plan.columns) - n_stack
    stack, rows = plan.order[:n_stack], plan.order[n_stack:-n_columns]
    columns = plan.order[-n_columns:]

    def times(v: jax.Array) -> jax.Array:
        return _product(W, v, stack, columns, rows)

    def adjoint_times(u: jax.Array) -> jax.Array:
        return conj(_product(W, conj(u, jnp), stack, rows, columns), jnp)

    if v.ndim > len(plan.right):
        return iterated_rows(times, adjoint_times, v, n_iter, kind.tiny, kind, jnp)
    return iterated(times, adjoint_times, v, n_iter, kind.tiny, jnp)


def _product(W: jax.Array, x: jax.Array, stack: Axes, summed: Axes, kept: Axes) -> jax.Array:
    """W times x (*stack, n), or several x (*stack, k, n), over some of the axes of W."""
    s = len(stack)
    several = x.shape[s:-1]  # (k,) or ()
    x = x.reshape(*x.shape[:-1], *(W.shape[axis] for axis in summed))
    of_x = tuple(range(s + len(several), x.ndim))
    # In the order in which W lies: in another, XLA would transpose it.
    summed, of_x = zip(*sorted(zip(summed, of_x, strict=True)), strict=True)
    batch = tuple(range(s))
    if min(summed) < min(kept):
        found = jax.lax.dot_general(x, W, ((of_x, summed), (batch, stack)))
    else:
        found = jax.lax.dot_general(W, x, ((summed, of_x), (stack, batch)))
        if several:
            found = jnp.moveaxis(found, -1, s)
    first = s + len(several)
    lying = sorted(kept)  # the order in which the axes come that are left
    order = (*range(first), *(first + lying.index(axis) for axis in kept))
    return found.transpose(order).reshape(*found.shape[:first], -1)
