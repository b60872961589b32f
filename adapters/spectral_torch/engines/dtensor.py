"""Run weights that are sharded over processes (`torch.distributed.tensor.DTensor`).

Each process multiplies the shard of a weight that it holds. Only sums of vectors are communicated,
those of all weights together: u and v of each weight once in an iteration. v, sigma and u are whole
and equal on every process.

What a step does to a shard is a job of its own, for the engine that would run a whole weight like
it (`Shards`): to add the term to the local part of the gradient and, where no row of a matrix is
divided, to iterate. Where rows are divided, the sum over all processes belongs between the two
products of an iteration, and they are PyTorch's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
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
    conj,
    fresh_direction,
    from_memory_order,
    last_of,
    left_rows,
    matrix_in_memory_order,
    right_rows,
    shards_of,
    to_memory_order,
    traits,
)

from . import blocks
from .precision import in_full_float32
from .recent import keep_recent
from .shards import Part, Shards, key_of, place_of

# Sets of weights whose shards are kept. Optimizers take turns. Where they run in the backward pass,
# there is one for each weight, and each has two sets.
_SETS = 1024


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
        self._kept: dict[tuple[Any, ...], Shards] = {}

    def __reduce__(self) -> tuple[type[DTensorEngine], tuple[Sequence[Engine]]]:
        return DTensorEngine, (self._engines[:-1],)

    def accepts(self, job: Job) -> bool:
        """Return True for a DTensor."""
        return is_sharded(job.weight) and job.wave is None

    @in_full_float32
    @torch.no_grad()
    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, with a few messages for each mesh in an iteration.

        Weights whose rows are whole need one message together, all others two.
        """
        # Every gradient is checked before the first one changes.
        adds = [job.grad is not None and _adds_here(job.grad, job.name) for job in jobs]
        triplets = self._iterate(jobs, n_iter) if n_iter else [last_of(job) for job in jobs]
        changed = [i for i, here in enumerate(adds) if here]
        parts = {i: _part(jobs[i].grad, jobs[i].plan) for i in changed}
        for places in _alike(changed, lambda i: (jobs[i].V.dtype, jobs[i].V.device)):
            mine, theirs = [jobs[i] for i in places], [parts[i] for i in places]
            shards = self._shards(mine, theirs, iterated=False)
            shards.change_(mine, theirs, [triplets[i] for i in places], self._engines)
        for i in changed:
            if isinstance(rule := jobs[i].rule, Bound):
                sigma = triplets[i].sigma
                triplets[i] = triplets[i]._replace(sigma=rule.scale(sigma) * sigma)
        return Result([job.grad for job in jobs], triplets)

    def _iterate(self, jobs: Sequence[Job], n_iter: int) -> list[Triplet]:
        """Return the triplet of each job; weights iterate together, to share messages."""
        weights = [_local_weight(job.weight, job.plan, job.xp) for job in jobs]
        triplets: list[Any] = [None] * len(jobs)
        # Every process must find the same answer here, because the messages depend on it. Several
        # vectors must be made orthogonal between the two products.
        by_rows = [
            weight.has_whole_rows and job.V.shape[-2] == 1 and not job.V.is_complex()
            for job, weight in zip(jobs, weights, strict=True)
        ]
        others = [i for i, answer in enumerate(by_rows) if not answer]
        found = _iterate([jobs[i] for i in others], [weights[i] for i in others], n_iter)
        for i, triplet in zip(others, found, strict=True):
            triplets[i] = triplet

        def kind(i: int) -> tuple[Any, ...]:
            return weights[i].mesh, weights[i].divided, jobs[i].V.dtype, jobs[i].V.device

        for places in _alike([i for i, answer in enumerate(by_rows) if answer], kind):
            mine, first = [jobs[i] for i in places], weights[places[0]]
            parts = [Part(weights[i].tensor, weights[i].shards) for i in places]
            shards = self._shards(mine, parts, iterated=True)
            total = partial(_sum_, mesh=first.mesh, axes=first.divided)
            found = shards.iterate(mine, parts, n_iter, self._engines, total)
            for i, triplet in zip(places, found, strict=True):
                triplets[i] = triplet
        return triplets

    def _shards(self, jobs: Sequence[Job], parts: Sequence[Part], *, iterated: bool) -> Shards:
        """Return the shards of a set of weights: those of the step before, if they fit."""
        key = key_of(jobs, parts, iterated=iterated)
        found = self._kept.get(key) or Shards(jobs, parts)
        keep_recent(self._kept, key, found, _SETS)
        return found


def _alike(places: Sequence[int], kind: Callable[[int], Any]) -> list[list[int]]:
    """Return the places of each kind."""
    found: dict[Any, list[int]] = {}
    for place in places:
        found.setdefault(kind(place), []).append(place)
    return list(found.values())


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
    placements: tuple[Any, ...]  # one for each axis of the mesh

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

    @property
    def divided(self) -> tuple[int, ...]:
        """The axes of the mesh that divide the weight."""
        # Not is_shard(): it is False for the placement that FSDP makes of a dimension that is
        # divided already.
        placements = enumerate(self.placements)
        return tuple([i for i, placed in placements if not placed.is_replicate()])

    @property
    def has_whole_rows(self) -> bool:
        """True if no process holds a part of a row: the same answer on every process."""
        return _has_whole_rows(self.plan, self.placements)

    def _matrix(self, shard: Shard) -> Tensor:
        return matrix_in_memory_order(self.tensor[shard.inside], shard.plan, self.xp)


def _spread(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshape rows (*stack, k, n) to (k, *shape): the axes of the matrix or of a shard."""
    return rows.movedim(-2, 0).reshape(rows.shape[-2], *shape)


def _rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Invert `_spread`; ``shape`` is (*stack, n)."""
    return x.reshape(x.shape[0], *shape).movedim(0, -2)


def _at(shard: Shard, plan: Plan, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return slice(None), *place_of(shard, plan, shape)


@lru_cache(maxsize=4096)
def _has_whole_rows(plan: Plan, placements: tuple[Any, ...]) -> bool:
    return all(
        placed.is_replicate() or (hasattr(placed, "dim") and not plan.divides_rows(placed.dim))
        for placed in placements
    )


def _local_weight(weight: Any, plan: Plan, xp: Any) -> _LocalWeight:
    kind, placements = traits(weight, xp, "weight"), tuple(weight.placements)
    local, shards = _part(weight, plan)
    return _LocalWeight(local, shards, plan, kind, xp, weight.device_mesh, placements)


def _part(x: Any, plan: Plan) -> Part:
    """Return what this process holds of a DTensor."""
    return Part(x.to_local(), _shards_of(x, plan))


def _shards_of(x: Any, plan: Plan) -> tuple[Shard, ...]:
    """Return the shards of a DTensor that this process holds."""
    return _shards(plan, tuple(x.shape), x.device_mesh, tuple(x.placements))


@lru_cache(maxsize=4096)
def _shards(
    plan: Plan, shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]
) -> tuple[Shard, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    block, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return shards_of(Layout(plan.axes, plan.groups), shape, tuple(offset), tuple(block))


def _iterate(jobs: Sequence[Job], weights: Sequence[_LocalWeight], n_iter: int) -> list[Triplet]:
    """Return the triplet of each job, by two messages an iteration, however weights are divided."""
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
    for i, (weight, x) in enumerate(zip(weights, partials, strict=True)):
        together.setdefault((weight.mesh, weight.divided, x.dtype), []).append(i)
    found = list(partials)
    for (mesh, divided, dtype), share in together.items():
        flat = torch.cat([partials[i].reshape(-1) for i in share])
        _sum_(torch.view_as_real(flat) if dtype.is_complex else flat, mesh=mesh, axes=divided)
        sizes = [partials[i].numel() for i in share]
        for i, piece in zip(share, torch.split_with_sizes(flat, sizes), strict=True):
            found[i] = piece.reshape(partials[i].shape)
    return found


def _sum_(x: Tensor, *, mesh: Any, axes: Sequence[int]) -> None:
    """Sum a tensor over some axes of a mesh, in place."""
    for axis in axes:
        dist.all_reduce(x, group=mesh.get_group(axis))


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
