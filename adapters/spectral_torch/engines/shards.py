"""Run the shards of many divided weights together, as jobs of this process.

The vectors of all weights are concatenated, and so are those of all shards. Indices say where each
element of the shards' vectors is among those of the whole weights. Beside the engines' own work, a
step needs some thirty operations, however many weights there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from spectral_core.engine import (
    Engine,
    Job,
    JobList,
    Plan,
    Shard,
    Triplet,
    clipped,
    dispatch,
    fresh_direction,
    ordered,
)

from .foreach import left_vectors, owners_of, right_vectors, write_into

_Flat: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""All sigma, all u and all v."""


class Part(NamedTuple):
    """What this process holds of a weight or of its gradient."""

    tensor: Tensor
    shards: tuple[Shard, ...]


def place_of(shard: Shard, plan: Plan, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return the place of a shard in an array with the axes of the plan's order, or ones."""
    return clipped(ordered(shard.ranges, plan), shape)


class Shards:
    """Hold a job for each shard of a set of weights, and memory for the vectors of these jobs.

    Parameters
    ----------
    jobs : sequence of Job
        The jobs of the whole weights, whose V have one dtype and device.
    parts : sequence of Part
        What this process holds of each of them.
    """

    def __init__(self, jobs: Sequence[Job], parts: Sequence[Part]) -> None:
        plans, like = [job.plan for job in jobs], jobs[0].V
        self.kept = [part.shards for part in parts]  # so that `key_of` stays true
        mine = [shard.plan for shards in self.kept for shard in shards]
        self._sizes, my_sizes = _sizes(plans), _sizes(mine)
        self._matrices, my_matrices = _matrices(plans), _matrices(mine)
        self._owners = owners_of(self._matrices, like.device)
        self._my_owners = owners_of(my_matrices, like.device)
        self._my_lengths = torch.tensor([n for _, n in my_matrices], device=like.device)
        self._places = _places(plans, self.kept, like.device)
        self._last: _Flat = (
            like.new_empty(sum(my_sizes[0])).real,
            like.new_empty(sum(my_sizes[1])),
            like.new_empty(sum(my_sizes[2])),
        )
        fresh = [fresh_direction(job.V, job.xp).expand(job.plan.right) for job in jobs]
        self._fresh = torch.cat([x.reshape(-1) for x in fresh])
        lasts = _split(self._last, my_sizes, mine)
        names = [job.name for job, shards in zip(jobs, self.kept, strict=True) for _ in shards]
        self.jobs = JobList(
            Job(name, None, None, last.V, 0.0, None, plan, jobs[0].xp, last)
            for name, last, plan in zip(names, lasts, mine, strict=True)
        )

    def iterate(
        self,
        jobs: Sequence[Job],
        parts: Sequence[Part],
        n_iter: int,
        engines: Sequence[Engine],
        total: Callable[[Tensor], None],
    ) -> list[Triplet]:
        """Return the triplets of the whole weights, of which no row is divided.

        The rows R of W that a process holds yield t = Rv and Rᵀt without any other process. The sum
        of all Rᵀt is Wᵀ(Wv). So Wv is divided by its length only after both products: each shard is
        read once, and one message in an iteration sums all.

        Parameters
        ----------
        total : callable
            Sum a tensor over the processes that divide the weights, in place.
        """
        v = torch.cat([job.V.reshape(-1) for job in jobs])
        (m, n), tiny = zip(*self._matrices, strict=True), torch.finfo(v.dtype).tiny
        before, start = v, v + self._fresh
        self._hold(parts)
        for _ in range(n_iter):
            y, w = self._products(before, start, engines, total)
            u, w = left_vectors(y, w, self._owners, [*m], tiny)
            sigma, v = right_vectors(w, v, self._owners, [*n], tiny)
            # An engine adds the fresh direction, which belongs to the first iteration alone.
            before, start = v - self._fresh, v
        self._release()
        return _split((sigma, u, v), self._sizes, [job.plan for job in jobs])

    def _products(
        self,
        before: Tensor,
        start: Tensor,
        engines: Sequence[Engine],
        total: Callable[[Tensor], None],
    ) -> tuple[Tensor, Tensor]:
        """Return all t = Wv and all Wᵀt for the v of ``start``, summed over the processes.

        An engine divides t by its length. Its u, sigma and v obey Rv₀ = ‖t‖u and Rᵀu = σv, where v₀
        is the vector that it started from. The length comes back as ‖t‖ = uᵀRv₀ = σ·vᵀv₀.
        """
        _, us, vs = self._places
        both = start.new_zeros(sum(self._sizes[1]) + len(start))
        y, w = both.split_with_sizes((len(both) - len(start), len(start)))
        if self.jobs:
            sigma, u, v = self._last
            torch.index_select(before, 0, vs, out=v)
            self._run(1, engines)
            dots = v * start.index_select(0, vs)
            lengths = sigma * torch.segment_reduce(
                dots, "sum", lengths=self._my_lengths, unsafe=True
            )
            y.index_copy_(0, us, u * lengths.index_select(0, self._my_owners.u))
            w.index_copy_(0, vs, v * (lengths * sigma).index_select(0, self._my_owners.v))
        total(both)
        return y, w

    def change_(
        self,
        jobs: Sequence[Job],
        parts: Sequence[Part],
        triplets: Sequence[Triplet],
        engines: Sequence[Engine],
    ) -> None:
        """Add the term to what this process holds of each gradient, or scale it to its bound.

        Without an iteration, nobody reads a weight: the gradient stands for it.
        """
        if not self.jobs:
            return
        flat = zip(*((t.sigma, t.u, t.V[..., 0, :]) for t in triplets), strict=True)
        for parts_of_all, places, room in zip(flat, self._places, self._last, strict=True):
            whole = torch.cat([x.reshape(-1) for x in parts_of_all])
            torch.index_select(whole, 0, places, out=room)
        self._hold(parts)
        owners = [job for job, shards in zip(jobs, self.kept, strict=True) for _ in shards]
        for job, owner in zip(self.jobs, owners, strict=True):
            job.grad = job.weight
            job.factor, job.rule = owner.factor, owner.rule
        self.jobs.renew()
        self.jobs.addresses = [job.grad.data_ptr() for job in self.jobs]
        self._run(0, engines)
        self._release()

    def _run(self, n_iter: int, engines: Sequence[Engine]) -> None:
        """Run the jobs of the shards; their results are in `_last` then."""
        found = dispatch(self.jobs, n_iter, engines).triplets
        if found is not self.jobs.lasts:
            write_into(
                pair
                for last, triplet in zip(self.jobs.lasts, found, strict=True)
                if last is not None
                for pair in zip(last, triplet, strict=True)
            )

    def _hold(self, parts: Sequence[Part]) -> None:
        """Give each job its shard."""
        held = (part.tensor[shard.inside] for part in parts for shard in part.shards)
        for job, tensor in zip(self.jobs, held, strict=True):
            job.weight = tensor

    def _release(self) -> None:
        """Keep no tensor of the model until the next step."""
        for job in self.jobs:
            job.weight = job.grad = None


def key_of(jobs: Sequence[Job], parts: Sequence[Part], *, iterated: bool) -> tuple[Any, ...]:
    """Return what a set of jobs must have in common with `Shards` that can run it.

    Engines keep the addresses of weights, but not those of gradients.
    """
    return iterated, *(
        (
            job.plan,
            job.V.dtype,
            type(job.factor),
            type(job.rule),
            type(job.rule.target) if job.rule else None,
            id(part.shards),
            part.tensor.dtype,
            part.tensor.device,
            part.tensor.stride(),
            part.tensor.data_ptr() if iterated else 0,
        )
        for job, part in zip(jobs, parts, strict=True)
    )


def _sizes(plans: Sequence[Plan]) -> tuple[list[int], list[int], list[int]]:
    """Return the numbers of elements of sigma, of u and of v of each plan."""
    return (
        [prod(plan.stack) for plan in plans],
        [prod(plan.left) for plan in plans],
        [prod(plan.right) for plan in plans],
    )


def _matrices(plans: Sequence[Plan]) -> list[tuple[int, int]]:
    """Return the shapes of all matrices."""
    return [(plan.matrix[-2], plan.matrix[-1]) for plan in plans for _ in range(prod(plan.stack))]


def _split(flat: _Flat, sizes: Sequence[Sequence[int]], plans: Sequence[Plan]) -> list[Triplet]:
    """Return the triplet of each plan, whose tensors are parts of the flat ones."""
    pieces = [x.split_with_sizes([*size]) for x, size in zip(flat, sizes, strict=True)]
    return [
        Triplet(sigma.view(plan.stack), u.view(plan.left), v.view(plan.rows(1)))
        for sigma, u, v, plan in zip(*pieces, plans, strict=True)
    ]


def _places(
    plans: Sequence[Plan], shards: Sequence[tuple[Shard, ...]], device: torch.device
) -> _Flat:
    """Return where the elements of the shards' sigma, u and v are among those of the weights."""
    found: tuple[list[Tensor], ...] = [], [], []
    offsets = [0, 0, 0]
    for plan, mine in zip(plans, shards, strict=True):
        ones = (1,) * (len(plan.order) - len(plan.stack))
        shapes = (*plan.stack, *ones), plan.left_broadcast, plan.right_broadcast
        for i, shape in enumerate(shapes):
            whole = torch.arange(offsets[i], offsets[i] + prod(shape)).view(shape)
            found[i].extend(whole[place_of(shard, plan, shape)].reshape(-1) for shard in mine)
            offsets[i] += prod(shape)
    empty = torch.empty(0, dtype=torch.int64)
    sigma, u, v = (torch.cat([empty, *places]).to(device) for places in found)
    return sigma, u, v
