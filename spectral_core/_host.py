"""Run matrices in NumPy: the reference's arithmetic in fewer calls.

A call of NumPy costs about a microsecond, and the reference makes some thirty of them for a matrix.
Here they are ten. The length of a vector is an inner product, and numbers are Python's own, which
calculates with them ten times as fast as NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, TypeAlias

import numpy as np

from ._bound import Bound
from ._penalty import add_outer_
from ._plan import (
    broadcast_outer,
    from_memory_order,
    matrix_in_memory_order,
    reshaped,
    to_memory_order,
)
from ._power import Triplet
from .engine import Job, Result, fresh_directions, last_of

Vector: TypeAlias = np.ndarray[Any, Any]

# The dtypes that it accepts, and what is added to a squared norm before it divides.
_GUARDS = {np.dtype(name): float(np.finfo(name).smallest_normal) for name in ("f4", "f8")}


class HostEngine:
    """Run real matrices in the memory of the CPU, with one vector each, by NumPy's own operations.

    Stacks, several vectors for a matrix, half precision and complex numbers are not accepted.

    Examples
    --------
    >>> HostEngine().run([], 1)
    Result(grads=[], triplets=[])
    """

    in_place = True

    def accepts(self, job: Job) -> bool:
        """Return True for one real matrix with one vector, in float32 or float64."""
        dtype = job.weight.dtype
        return (
            isinstance(job.weight, np.ndarray)
            and job.wave is None
            and dtype in _GUARDS
            and len(job.plan.matrix) == 2
            and job.V.dtype == dtype
            and job.V.shape == job.plan.rows(1)
        )

    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, one after the other."""
        if n_iter:
            fresh = fresh_directions(jobs)
            triplets = [_iterate(job, r, n_iter) for job, r in zip(jobs, fresh, strict=True)]
        else:
            triplets = [last_of(job) for job in jobs]
        for i, (job, triplet) in enumerate(zip(jobs, triplets, strict=True)):
            if isinstance(job.rule, Bound):
                triplets[i] = _scale_(job, job.rule.scale(triplet.sigma), triplet)
            elif job.grad is not None:
                _add_(job, triplet)
        return Result([job.grad for job in jobs], triplets)


def _iterate(job: Job, fresh: Vector, n_iter: int) -> Triplet:
    plan, xp = job.plan, job.xp
    # The usual matrix is the tensor reshaped: to ask NumPy for that at once is three times as fast.
    if plan.reshapes:
        W = job.weight.reshape(plan.matrix)
    else:
        W = matrix_in_memory_order(job.weight, plan, xp)
    V = to_memory_order(job.V, plan, xp)
    v, guard = V[0], _GUARDS[V.dtype]
    start = (v + fresh).reshape(-1)  # in another order, the fresh direction is a row
    for _ in range(n_iter):
        u = W @ start
        u *= _inverse(u, guard)[0]
        w = u @ W
        inverse, sigma = _inverse(w, guard)
        if inverse > 0:  # as in the core, v stays where sigma is zero or not finite
            w *= inverse
            v = w
        start = v
    V = from_memory_order(v[None, :], plan, xp)
    return Triplet(np.asarray(sigma, v.dtype), u, V)


def _inverse(x: Vector, guard: float) -> tuple[float, float]:
    """Return the inverse length and the length of x: see `_normalized` of the core."""
    square = float(x @ x)
    length = sqrt(square)
    return length / (square + guard), length


def _add_(job: Job, triplet: Triplet) -> None:
    grad, plan, (sigma, u, V) = job.grad, job.plan, triplet
    force = sigma if job.rule is None else job.rule.of(sigma)  # type: ignore[union-attr]
    u, v = u * (force * job.factor), V[0]
    if plan.reshapes and grad.dtype == u.dtype and grad.flags.c_contiguous:
        add_outer_(grad.reshape(plan.matrix), u[:, None], v[None, :])
    else:
        outer = broadcast_outer(u, v, plan, job.xp)
        add_outer_(reshaped(grad, plan.split, job.xp), *outer)


def _scale_(job: Job, scale: Any, triplet: Triplet) -> Triplet:
    """Scale a weight to its bound, and return its triplet with the sigma after that."""
    if job.grad is not None:
        np.multiply(job.grad, scale, out=job.grad)
    return triplet._replace(sigma=np.asarray(scale * triplet.sigma))
