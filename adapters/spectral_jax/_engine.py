"""An engine whose products XLA runs fast, on one device and on many.

A weight is multiplied as it is in memory, over all axes of its rows or columns at once. A reshape
to a matrix would join axes, and XLA gathers a sharded weight to join an axis that the mesh divides.
The order of the two factors matters too: XLA's CPU compiler does not remove every transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from spectral_core.engine import (
    Job,
    Number,
    Plan,
    Result,
    Slope,
    Traits,
    Triplet,
    add_outer,
    cast,
    conj,
    finish,
    fresh_direction,
    last_of,
    left_rows,
    reshaped,
    right_rows,
    scaled,
    traits,
    wave_iterations,
)

Axes: TypeAlias = tuple[int, ...]


class XlaEngine:
    """Run jobs on JAX arrays, each weight multiplied as it is in memory.

    Parameters
    ----------
    n_iter : traced int, optional
        Number of iterations in place of the ``n_iter`` of `run`, where the number is part of a
        trace. Values below 1 count as 1.
    power : traced int, optional
        Power of the penalty in place of that of each job's slope, where the power is part of a
        trace.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import spectral_core as sc
    >>> from spectral_jax import XlaEngine
    >>> weights, grads = {"w": jnp.array([[3.0, 4.0]])}, {"w": jnp.zeros((1, 2))}
    >>> engines = [XlaEngine()]
    >>> state = sc.init(weights, engines=engines)
    >>> grads, state = sc.add_gradient(weights, grads, state, factor=0.1, engines=engines)
    >>> float(state.sigma["w"])
    5.0
    """

    in_place = False

    def __init__(self, *, n_iter: jax.Array | None = None, power: jax.Array | None = None) -> None:
        self._n_iter = None if n_iter is None else jnp.maximum(n_iter, 1)
        self._power = power

    def accepts(self, job: Job) -> bool:
        """Return True for every job on JAX arrays."""
        return job.xp is jnp

    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Iterate each weight, then add each term."""
        triplets = []
        # float32 means float32: by default, a GPU or TPU may round the factors of a product. The
        # iteration of a bfloat16 weight is in float32: strict promotion would refuse their sum.
        with (
            jax.default_matmul_precision("highest"),
            jax.numpy_dtype_promotion("standard"),
        ):
            for job in jobs:
                if n_iter == 0:
                    triplets.append(last_of(job))
                    continue
                if job.wave is not None:
                    triplets.append(self._waves(job, n_iter))
                    continue
                iterate, triplet = _iteration(job)
                before = triplet.V
                triplet = triplet._replace(V=before + fresh_direction(before, jnp))
                traced = any(isinstance(x, jax.core.Tracer) for x in (job.weight, job.V))
                if self._n_iter is not None:
                    triplet = jax.lax.fori_loop(0, self._n_iter, iterate, triplet)
                elif n_iter > 1 and traced:
                    # Unrolled, the time to compile would grow with the number of iterations.
                    triplet = jax.lax.fori_loop(0, n_iter, iterate, triplet)
                else:
                    for i in range(n_iter):
                        triplet = iterate(i, triplet)
                # As in the core, V stays where sigma is zero or not finite.
                usable = (triplet.sigma > 0) & (triplet.sigma < jnp.inf)
                V = jnp.where(usable[..., None, None], triplet.V, before)
                triplets.append(triplet._replace(V=V))
            if self._power is not None:
                jobs = [replace(job, rule=_slope(job, self._power)) for job in jobs]
            return finish(jobs, triplets, add_outer, scaled)

    def _waves(self, job: Job, n_iter: int) -> Triplet:
        """Return the triplet of a job with waves."""

        def again(_: Any, last: Triplet) -> Triplet:
            return wave_iterations([replace(job, V=last.V)], 1, [0.0])[0]

        (triplet,) = wave_iterations([job], 1, [fresh_direction(job.V, jnp)])
        if self._n_iter is not None or isinstance(job.weight, jax.core.Tracer):
            count = n_iter if self._n_iter is None else self._n_iter
            return jax.lax.fori_loop(1, count, again, triplet)
        for i in range(1, n_iter):
            triplet = again(i, triplet)
        return triplet


class _Product(NamedTuple):
    """The product of a weight with rows of vectors, over some of the weight's axes.

    The product itself is ``lax.dot_general(*operands(W, V))``, and `rows` puts its axes in order.
    """

    stack: Axes
    summed: Axes  # the axes of a vector, in its order
    kept: Axes  # the axes of a vector of the product, in its order

    @property
    def vectors_first(self) -> bool:
        """True if the vectors are the first factor."""
        return min(self.summed) < min(self.kept)

    def operands(self, W: jax.Array, V: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        """Return the factors and the dimension numbers of the product with V (*stack, k, n)."""
        # One row is multiplied as a vector: XLA's product of two matrices is slower there.
        X = V[..., 0, :] if V.shape[-2] == 1 else V
        X = X.reshape(*X.shape[:-1], *(W.shape[axis] for axis in self.summed))
        axes = range(X.ndim - len(self.summed), X.ndim)
        # In the order of the weight's memory: in another, XLA would transpose the weight.
        summed, places = zip(*sorted(zip(self.summed, axes, strict=True)), strict=True)
        batch = tuple(range(len(self.stack)))
        if self.vectors_first:
            return X, W, ((places, summed), (batch, self.stack))
        return W, X, ((summed, places), (self.stack, batch))

    def rows(self, Y: jax.Array, k: int) -> jax.Array:
        """Return the product as k rows (*stack, k, m), in the order of ``kept``."""
        s = len(self.stack)
        if k > 1 and not self.vectors_first:
            Y = jnp.moveaxis(Y, -1, s)
        first = s + (k > 1)
        in_memory = sorted(self.kept)
        order = (*range(first), *(first + in_memory.index(axis) for axis in self.kept))
        return Y.transpose(order).reshape(*Y.shape[:s], k, -1)


def _iteration(job: Job) -> tuple[partial[Triplet], Triplet]:
    """Return one iteration of a job as a function (i, triplet), and the triplet to start from."""
    plan, kind = job.plan, traits(job.weight, jnp, f"weight {job.name!r}")
    W = cast(reshaped(job.weight, plan.split, jnp), kind.iteration_dtype, jnp)
    V = cast(job.V, kind.iteration_dtype, jnp)
    sigma = jnp.zeros(plan.stack, jnp.real(V).dtype)
    start = Triplet(sigma, jnp.zeros(plan.left, V.dtype), V)
    return partial(_iterate, W, *_products(plan), kind), start


def _products(plan: Plan) -> tuple[_Product, _Product]:
    """Return the products W·v and Wᵀ·u of a plan."""
    n_stack = len(plan.stack)
    n_columns = len(plan.columns) - n_stack
    stack, rows = plan.order[:n_stack], plan.order[n_stack:-n_columns]
    columns = plan.order[-n_columns:]
    return _Product(stack, columns, rows), _Product(stack, rows, columns)


def _iterate(
    W: jax.Array, times: _Product, transposed: _Product, kind: Traits, _: Any, last: Triplet
) -> Triplet:
    """Return the triplet after one iteration from the rows of the last one."""
    V, k = last.V, last.V.shape[-2]
    Y = times.rows(jax.lax.dot_general(*times.operands(W, V)), k)
    Q = left_rows(Y, kind, jnp)
    Z = transposed.rows(jax.lax.dot_general(*transposed.operands(W, conj(Q, jnp))), k)
    return right_rows(conj(Z, jnp), Q, V, kind, jnp)


def _slope(job: Job, power: jax.Array) -> Slope:
    return _TracedSlope(0.0 if job.rule is None else job.rule.target, power)  # type: ignore[arg-type]


class _TracedSlope(Slope):
    """A slope whose power is part of a trace: 1 or 2, which only the device knows."""

    def of(self, sigma: jax.Array) -> jax.Array:
        """Return the derivative of the penalty by sigma, for λ = 1."""
        target: Number = self.target
        linear, squared = Slope(target, 1).of(sigma), Slope(target, 2).of(sigma)
        return jnp.where(self.power == 1, linear, squared)
