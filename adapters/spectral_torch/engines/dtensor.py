"""Run weights that are sharded over processes (`torch.distributed.tensor.DTensor`).

Each process multiplies the shard of a weight that it holds. Only sums of vectors are communicated,
those of all weights together: u and v of each weight once in an iteration. v, sigma and u are whole
and equal on every process. The term is added to the local part of the gradient. That is a job of
its own, without an iteration, for the engine that would run a whole weight like the shard.

The products stay PyTorch's own. The kernels compute both of an iteration in one reading of a
weight, but the sum over all processes belongs between the two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spectral_core import ArgumentError, Layout, penalty, slope
from spectral_core.engine import (
    Bound,
    Engine,
    Job,
    Plan,
    ReferenceEngine,
    Result,
    Shard,
    Traits,
    Triplet,
    clipped,
    conj,
    dispatch,
    fresh_direction,
    from_memory_order,
    last_of,
    left_rows,
    matrix_in_memory_order,
    ordered,
    right_rows,
    shards_of,
    to_memory_order,
    traits,
)

from . import blocks
from .precision import in_full_float32


def is_sharded(x: Tensor) -> bool:
    """Return True if ``x`` is a DTensor."""
    if type(x) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # not loaded: then there is none
    return module is not None and isinstance(x, module.DTensor)


class DTensorEngine:
    """Run jobs whose weights are DTensors.

    All processes of a weight's mesh must call it, with the same jobs.

    Parameters
    ----------
    engines : sequence of Engine
        Faster ways to change what this process holds, in order of preference.

    Examples
    --------
    >>> DTensorEngine().run([], 1)
    Result(grads=[], triplets=[])
    """

    in_place = True

    def __init__(self, engines: Sequence[Engine] = ()) -> None:
        self._engines = *engines, ReferenceEngine(in_place=True)

    def __reduce__(self) -> tuple[type[DTensorEngine], tuple[Sequence[Engine]]]:
        return DTensorEngine, (self._engines[:-1],)

    def accepts(self, job: Job) -> bool:
        """Return True for a DTensor."""
        return is_sharded(job.weight) and job.wave is None

    @in_full_float32
    @torch.no_grad()
    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, with two messages for each mesh in an iteration."""
        # Every gradient is checked before the first one changes.
        adds = [job.grad is not None and _adds_here(job.grad, job.name) for job in jobs]
        triplets = _iterate(jobs, n_iter) if n_iter else [last_of(job) for job in jobs]
        local: list[Job] = []
        for i, (job, here) in enumerate(zip(jobs, adds, strict=True)):
            if here:
                local += _local_jobs(job, triplets[i])
            if isinstance(job.rule, Bound):
                sigma = triplets[i].sigma
                triplets[i] = triplets[i]._replace(sigma=job.rule.scale(sigma) * sigma)
        dispatch(local, 0, self._engines)
        return Result([job.grad for job in jobs], triplets)


def penalty_at(
    weight: Tensor,
    triplet: Triplet,
    plan: Plan,
    xp: Any,
    *,
    factor: float | Tensor,
    target: float | Tensor,
    power: int,
) -> Tensor:
    """Return the differentiable penalty of a DTensor: the value is that of the whole weight.

    ``triplet`` belongs to the weight as it is now. It satisfies Wᴴu = σv, so nothing is sent. In
    each process, the gradient reaches the local part of the weight.
    """
    value = penalty(triplet.sigma, factor=factor, target=target, power=power)
    local = _local_weight(weight, plan, xp)
    partial = local.adjoint_times(triplet.u[..., None, :])[..., 0, :]
    if not local.shards:
        partial = (
            partial + local.tensor.sum()
        )  # an empty sum, so that there is a graph as elsewhere
    # Each process sees only its own summand of Wᴴu. This linear term has the gradient of the value.
    force = slope(triplet.sigma, target=target, power=power)
    pull = force[..., None] * triplet.V[..., 0, :]
    linear = factor * xp.sum(xp.real(conj(pull, xp) * partial))
    return value + (linear - linear.detach())


class _LocalWeight(NamedTuple):
    """The part of a weight that this process holds."""

    tensor: Tensor
    shards: tuple[Shard, ...]
    plan: Plan  # the whole weight's
    kind: Traits
    xp: Any
    mesh: Any
    divided: tuple[int, ...]  # the axes of the mesh that divide the weight

    def times(self, V: Tensor) -> Tensor:
        """Return this process's summand of the rows Wv, (*stack, k, m)."""
        plan = self.plan
        rows = _spread(V, plan.right_broadcast)
        found = V.new_zeros((V.shape[-2], *plan.left_broadcast))
        for shard in self.shards:
            v = _rows(rows[_at(shard, plan, plan.right_broadcast)], shard.plan.right)
            y = blocks.times(self._matrix(shard), to_memory_order(v, shard.plan, self.xp))
            found[_at(shard, plan, plan.left_broadcast)] += _spread(y, shard.plan.left_broadcast)
        return _rows(found, plan.matrix[:-1])

    def adjoint_times(self, U: Tensor) -> Tensor:
        """Return this process's summand of the rows Wᴴu, (*stack, k, n)."""
        plan = self.plan
        rows = _spread(conj(U, self.xp), plan.left_broadcast)
        found = U.new_zeros((U.shape[-2], *plan.right_broadcast))
        for shard in self.shards:
            u = _rows(rows[_at(shard, plan, plan.left_broadcast)], shard.plan.matrix[:-1])
            z = blocks.adjoint_times(self._matrix(shard), u)
            z = from_memory_order(z, shard.plan, self.xp)
            found[_at(shard, plan, plan.right_broadcast)] += _spread(z, shard.plan.right_broadcast)
        return conj(_rows(found, plan.right), self.xp)

    def _matrix(self, shard: Shard) -> Tensor:
        return matrix_in_memory_order(self.tensor[shard.inside], shard.plan, self.xp)


def _spread(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape rows (*stack, k, n) to (k, *shape): the axes of the matrix or of a shard."""
    return rows.movedim(-2, 0).reshape(rows.shape[-2], *shape)


def _rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Invert `_spread`; ``shape`` is (*stack, n)."""
    return x.reshape(x.shape[0], *shape).movedim(0, -2)


def _at(shard: Shard, plan: Plan, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return (slice(None), *clipped(ordered(shard.ranges, plan), shape))


def _local_weight(weight: Any, plan: Plan, xp: Any) -> _LocalWeight:
    # Not is_shard(): it is False for the placement that FSDP makes of a dimension that is divided
    # already.
    divided = tuple(i for i, placed in enumerate(weight.placements) if not placed.is_replicate())
    shards = _shards_of(weight, plan)
    kind = traits(weight, xp, "weight")
    return _LocalWeight(weight.to_local(), shards, plan, kind, xp, weight.device_mesh, divided)


def _shards_of(x: Any, plan: Plan) -> tuple[Shard, ...]:
    """Return the shards of a DTensor that this process holds."""
    return _shards(
        Layout(plan.axes, plan.groups), tuple(x.shape), x.device_mesh, tuple(x.placements)
    )


@lru_cache(maxsize=4096)
def _shards(
    layout: Layout, shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]
) -> tuple[Shard, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    block, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return shards_of(layout, shape, tuple(offset), tuple(block))


def _iterate(jobs: Sequence[Job], n_iter: int) -> list[Triplet]:
    """Return the triplet of each job; all weights iterate together, to share messages."""
    weights = [_local_weight(job.weight, job.plan, job.xp) for job in jobs]
    starts = [job.V + fresh_direction(job.V, job.xp) for job in jobs]
    Vs = [job.V for job in jobs]
    triplets: list[Triplet] = []
    for _ in range(n_iter):
        Ys = _summed(weights, [w.times(V) for w, V in zip(weights, starts, strict=True)])
        Qs = [left_rows(Y, w.kind, w.xp) for w, Y in zip(weights, Ys, strict=True)]
        Zs = _summed(weights, [w.adjoint_times(Q) for w, Q in zip(weights, Qs, strict=True)])
        triplets = [
            right_rows(Z, Q, V, w.kind, w.xp)
            for w, Z, Q, V in zip(weights, Zs, Qs, Vs, strict=True)
        ]
        starts = Vs = [triplet.V for triplet in triplets]
    return triplets


def _summed(weights: Sequence[_LocalWeight], partials: Sequence[Tensor]) -> list[Tensor]:
    """Sum each of ``partials`` over the processes, those of one mesh in one message."""
    together: dict[Any, list[int]] = {}
    for i, (weight, partial) in enumerate(zip(weights, partials, strict=True)):
        together.setdefault((weight.mesh, weight.divided, partial.dtype), []).append(i)
    found = list(partials)
    for (mesh, divided, dtype), share in together.items():
        flat = torch.cat([partials[i].reshape(-1) for i in share])
        for axis in divided:
            message = torch.view_as_real(flat) if dtype.is_complex else flat
            dist.all_reduce(message, group=mesh.get_group(axis))
        sizes = [partials[i].numel() for i in share]
        for i, piece in zip(share, torch.split_with_sizes(flat, sizes), strict=True):
            found[i] = piece.reshape(partials[i].shape)
    return found


def _local_jobs(job: Job, triplet: Triplet) -> list[Job]:
    """Return a job for each shard of the gradient that this process holds.

    Without an iteration, nobody reads the weight: the gradient stands for it.
    """
    grad, plan, (sigma, u, V) = job.grad, job.plan, triplet
    stack = (*plan.stack, *(1,) * (len(plan.order) - len(plan.stack)))
    rows = (
        (_spread(sigma[..., None, None], stack), stack),
        (_spread(u[..., None, :], plan.left_broadcast), plan.left_broadcast),
        (_spread(V[..., :1, :], plan.right_broadcast), plan.right_broadcast),
    )
    local, jobs = grad.to_local(), []
    for shard in _shards_of(grad, plan):
        here, mine = local[shard.inside], shard.plan
        found = [x[_at(shard, plan, shape)].contiguous() for x, shape in rows]
        last = Triplet(
            # An engine may write into sigma, which is the whole weight's where it is not a part.
            found[0].reshape(mine.stack).clone(),
            found[1].reshape(mine.left),
            found[2].reshape(mine.rows(1)),
        )
        jobs.append(Job(job.name, here, here, last.V, job.factor, job.rule, mine, job.xp, last))
    return jobs


def _adds_here(grad: Any, name: str) -> bool:
    """Return True if this process adds the term: one process does where a sum is pending."""
    if not is_sharded(grad):
        raise ArgumentError(
            f"weight {name!r} is a DTensor but its gradient is not: give it one of the same mesh"
        )
    mesh, adds = grad.device_mesh, True
    for axis, placed in enumerate(grad.placements):
        if placed.is_partial("sum"):
            adds &= mesh.get_local_rank(axis) == 0
        elif placed.is_partial() and not placed.is_partial("avg"):
            raise ArgumentError(f"the gradient of {name!r} is {placed}: a term cannot be added")
    return adds
