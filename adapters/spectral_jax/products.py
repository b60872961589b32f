"""The power iteration with its products as XLA runs them fast.

JAX's kernels lie with the outputs last, so the core's matrix W is a transpose that is never made.
XLA's CPU compiler makes a loop over rows or columns of ``vector @ matrix``, whichever way the
matrix lies, but calls a matrix–matrix routine for ``transpose(matrix) @ vector``: 10 to 20 times
slower. The vector therefore stands on the left here. On other platforms both are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from spectral_core import PowerIteration
from spectral_core._arrays import cast, conj, squared, traits
from spectral_core.step import Advance, Step, Task, plain_step, triples_of


def power_iterations(
    matrices: Sequence[jax.Array], vectors: Sequence[jax.Array], n_iter: int
) -> list[PowerIteration]:
    """`spectral_core.power_iteration` of each matrix, from its vector.

    Parameters
    ----------
    matrices : sequence of array, shape (..., m, n)
    vectors : sequence of array, shape (..., n)
    n_iter : int
        At least one.

    Returns
    -------
    list of PowerIteration
    """
    return [_iterated(W, v, n_iter) for W, v in zip(matrices, vectors, strict=True)]


step: Step = partial(plain_step, power_iterations=power_iterations)


def refresh(tasks: Sequence[Task], n_iter: int) -> Advance:
    """A `Step` that leaves the gradients as they are: σ, u and v alone."""
    return Advance(
        [task.grad for task in tasks], triples_of(tasks, n_iter, power_iterations=power_iterations)
    )


def _iterated(W: jax.Array, v: jax.Array, n_iter: int) -> PowerIteration:
    kind = traits(W, jnp, "W")
    W, v = cast(W, kind.iteration_dtype, jnp), cast(v, kind.iteration_dtype, jnp)
    for _ in range(n_iter):
        u, _, _ = _normalized(_times(v, jnp.matrix_transpose(W)), kind.tiny)
        unit, inverse, sigma = _normalized(conj(_times(conj(u, jnp), W), jnp), kind.tiny)
        v = jnp.where(inverse > 0, unit, v)
    return PowerIteration(sigma[..., 0], u, v)


def _times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """``x @ matrix``, stacked."""
    return x @ matrix if matrix.ndim == 2 else (x[..., None, :] @ matrix)[..., 0, :]


def _normalized(x: jax.Array, tiny: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(x/‖x‖, 1/‖x‖, ‖x‖) as in the core: an inverse of zero is a zero vector's alone."""
    square = jnp.sum(squared(x, jnp), axis=-1, keepdims=True)
    length = jnp.sqrt(square)
    inverse = length / (square + tiny)
    return x * inverse, inverse, length
