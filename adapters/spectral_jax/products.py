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
from spectral_core._arrays import cast, conj, traits
from spectral_core.layout import lay, lying_matrix, reshaped, unlay
from spectral_core.power import iterated, matvec, vecmat
from spectral_core.step import Advance, Task, plain_step, triples_of


def step(tasks: Sequence[Task], n_iter: int) -> Advance:
    """`spectral_core.step.plain_step`, each weight multiplied as it lies."""
    if n_iter > 0:
        tasks = [task._replace(last=_iterated(task, n_iter)) for task in tasks]
    return plain_step(tasks, 0)


def refresh(tasks: Sequence[Task], n_iter: int) -> Advance:
    """A `Step` that leaves the gradients as they are: σ, u and v alone."""
    return Advance([task.grad for task in tasks], [_iterated(task, n_iter) for task in tasks])


def _iterated(task: Task, n_iter: int) -> PowerIteration:
    if task.v.ndim > len(task.plan.right):  # several vectors: products of matrices are fast anyway
        return triples_of([task], n_iter)[0]
    kind = traits(task.weight, jnp, task.name)
    stored, transposed = _stored(task)
    W = cast(stored, kind.iteration_dtype, jnp)
    v = lay(cast(task.v, kind.iteration_dtype, jnp), task.plan, jnp)

    def times(v: jax.Array) -> jax.Array:
        return vecmat(v, W) if transposed else matvec(W, v)

    def adjoint_times(u: jax.Array) -> jax.Array:
        u = conj(u, jnp)
        return conj(matvec(W, u) if transposed else vecmat(u, W), jnp)

    triple = iterated(times, adjoint_times, v, n_iter, kind.tiny, jnp)
    return triple._replace(v=unlay(triple.v, task.plan, jnp))


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
