"""The step of weights that are divided among processes (`torch.distributed.tensor.DTensor`).

Each process multiplies the part of a weight that it holds; sums of vectors, of all weights
together, are all that is communicated: u and v of each weight once an iteration. v, σ and u are
whole on every process, and the same. The term is added to what a process holds of the gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spectral_core import ArgumentError, Layout, PowerIteration, constraint, penalty, slope
from spectral_core._arrays import Traits, cast, conj, traits
from spectral_core.block import left_rows, right_rows
from spectral_core.layout import Plan, first_of, lay, lying_matrix, reshaped, unlay
from spectral_core.parts import Part, clipped, ordered, parts_of
from spectral_core.penalty import add_outer_, outer_factors
from spectral_core.power import left_of, right_of
from spectral_core.step import Advance, Task, last_of


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor."""
    if type(x) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # not loaded: then there is none
    return module is not None and isinstance(x, module.DTensor)


def sharded_step_(tasks: Sequence[Task], n_iter: int) -> Advance:
    """`spectral_core.step.plain_step_` for tasks whose weights are DTensors.

    All processes of a weight's mesh must call it, with the same tasks.

    Examples
    --------
    >>> sharded_step_([], 1)
    Advance(grads=[], triples=[])
    """
    # Asked of all before the first gradient changes.
    adds = [task.grad is not None and _adds_here(task.grad, task.name) for task in tasks]
    triples = _iterated(tasks, n_iter) if n_iter else [last_of(task) for task in tasks]
    for task, triple, here in zip(tasks, triples, adds, strict=True):
        if here:
            _add_(task, triple)
    return Advance([task.grad for task in tasks], triples)


def penalty_at(
    weight: Tensor,
    triple: PowerIteration,
    plan: Plan,
    xp: Any,
    *,
    factor: float | Tensor,
    target: float | Tensor,
    power: int,
) -> Tensor:
    """`spectral_core.penalty_at` of a DTensor: the value is that of the whole weight.

    ``triple`` is of the weight as it is now: it has Wᴴu = σv, and so nothing is sent. The gradient
    reaches, in each process, the part that this process holds.
    """
    value = penalty(triple.sigma, factor=factor, target=target, power=power)
    shard = _shard_of(weight, plan, xp)
    partial = shard.adjoint_times(triple.u[..., None, :])[..., 0, :]
    if not shard.parts:
        partial = partial + shard.local.sum()  # of nothing: for the graph, as elsewhere
    # Of the same gradient as the value, though each process sees its own summand of Wᴴu alone.
    force = slope(triple.sigma, target=target, power=power)
    pull = force[..., None] * first_of(triple.v, plan)
    linear = factor * xp.sum(xp.real(conj(pull, xp) * partial))
    return value + (linear - linear.detach())


class _Shard(NamedTuple):
    """What this process holds of a weight."""

    local: Tensor
    parts: tuple[Part, ...]
    plan: Plan  # of the whole weight
    kind: Traits
    xp: Any
    mesh: Any
    divided: tuple[int, ...]  # the axes of the mesh over which it is

    def times(self, V: Tensor) -> Tensor:
        """The summand of this process to the rows Wv, of rows v: (*stack, k, …) both."""
        plan = self.plan
        rows = _spread(V, plan.right_spread)
        found = V.new_zeros((V.shape[-2], *plan.left_spread))
        for part in self.parts:
            v = _rows(rows[_at(part, plan, plan.right_spread)], part.plan.right)
            y = lay(v, part.plan, self.xp) @ self._matrix(part).mT
            found[_at(part, plan, plan.left_spread)] += _spread(y, part.plan.left_spread)
        return _rows(found, plan.matrix[:-1])

    def adjoint_times(self, U: Tensor) -> Tensor:
        """The summand of this process to the rows Wᴴu."""
        plan = self.plan
        rows = _spread(conj(U, self.xp), plan.left_spread)
        found = U.new_zeros((U.shape[-2], *plan.right_spread))
        for part in self.parts:
            u = _rows(rows[_at(part, plan, plan.left_spread)], part.plan.matrix[:-1])
            z = unlay(u @ self._matrix(part), part.plan, self.xp)
            found[_at(part, plan, plan.right_spread)] += _spread(z, part.plan.right_spread)
        return conj(_rows(found, plan.right), self.xp)

    def _matrix(self, part: Part) -> Tensor:
        W = lying_matrix(self.local[part.inside], part.plan, self.xp)
        return cast(W, self.kind.iteration_dtype, self.xp)


def _spread(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows (*stack, k, n) as (k, *shape), the axes of the weight's matrix or one of its parts."""
    return rows.movedim(-2, 0).reshape(rows.shape[-2], *shape)


def _rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `_spread`; ``shape`` is (*stack, n)."""
    return x.reshape(x.shape[0], *shape).movedim(0, -2)


def _at(part: Part, plan: Plan, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return (slice(None), *clipped(ordered(part.ranges, plan), shape))


def _shard_of(weight: Any, plan: Plan, xp: Any) -> _Shard:
    # Not is_shard(): what FSDP makes of a dimension that is divided already says no to that.
    divided = tuple(i for i, placed in enumerate(weight.placements) if not placed.is_replicate())
    parts = _parts_of(weight, plan)
    kind = traits(weight, xp, "weight")
    return _Shard(weight.to_local(), parts, plan, kind, xp, weight.device_mesh, divided)


def _parts_of(x: Any, plan: Plan) -> tuple[Part, ...]:
    """The parts that this process holds of a DTensor."""
    return _parts(plan.layout, tuple(x.shape), x.device_mesh, tuple(x.placements))


@lru_cache(maxsize=4096)
def _parts(
    layout: Layout, shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]
) -> tuple[Part, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    block, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    return parts_of(layout, shape, tuple(offset), tuple(block))


def _iterated(tasks: Sequence[Task], n_iter: int) -> list[PowerIteration]:
    shards = [_shard_of(task.weight, task.plan, task.xp) for task in tasks]
    several = [task.v.ndim > len(task.plan.right) for task in tasks]
    vs = [task.v for task in tasks]
    triples: list[PowerIteration] = []
    for _ in range(n_iter):
        rows = [v if k else v[..., None, :] for v, k in zip(vs, several, strict=True)]
        Ys = _summed(shards, [shard.times(V) for shard, V in zip(shards, rows, strict=True)])
        Us = [
            left_rows(Y, shard.kind.tiny, shard.kind, shard.xp)
            if k
            else left_of(Y, shard.kind.tiny, shard.xp)
            for shard, Y, k in zip(shards, Ys, several, strict=True)
        ]
        Zs = _summed(shards, [shard.adjoint_times(U) for shard, U in zip(shards, Us, strict=True)])
        triples = [
            right_rows(Z, U, v, shard.kind.tiny, shard.kind, shard.xp)
            if k
            else right_of(Z[..., 0, :], U[..., 0, :], v, shard.kind.tiny, shard.xp)
            for shard, Z, U, v, k in zip(shards, Zs, Us, vs, several, strict=True)
        ]
        vs = [triple.v for triple in triples]
    return triples


def _summed(shards: Sequence[_Shard], partials: Sequence[Tensor]) -> list[Tensor]:
    """The sum over processes of each: of those of one mesh, all in one message."""
    together: dict[Any, list[int]] = {}
    for i, (shard, partial) in enumerate(zip(shards, partials, strict=True)):
        together.setdefault((shard.mesh, shard.divided, partial.dtype), []).append(i)
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


def _add_(task: Task, triple: PowerIteration) -> None:
    grad, plan, xp = task.grad, task.plan, task.xp
    u, v = outer_factors(triple, plan, task.factor, xp)
    local = grad.to_local()
    for part in _parts_of(grad, plan):
        here = reshaped(local[part.inside], part.plan.split, xp)
        u_here, v_here = (x[clipped(part.ranges, tuple(x.shape))] for x in (u, v))
        add_outer_(here, u_here, v_here)


def scale_(weight: Any, scale: Tensor, plan: Plan, xp: Any) -> Tensor:
    """`spectral_core.constraint.scale_` of a DTensor: each process scales what it holds."""
    local = weight.to_local()
    for part in _parts_of(weight, plan):
        s = scale[clipped(part.ranges, tuple(scale.shape))] if scale.ndim else scale
        constraint.scale_(local[part.inside], s, part.plan, xp)
    return weight


def _adds_here(grad: Any, name: str) -> bool:
    """Whether this process adds, where a gradient is a sum that has not been taken yet."""
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
