"""Run many matrices at once by PyTorch's own operations: the core's arithmetic in fewer calls.

A step on the small matrices of most networks is bound by the number of operations, not by their
size. Three operations remain for each matrix: its two products and the update of its gradient. The
vectors of all matrices are concatenated in one tensor, and every other operation runs once on that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_core.engine import (
    Bound,
    Job,
    Result,
    Triplet,
    add_outer_,
    broadcast_outer,
    fresh_directions,
    from_memory_order,
    last_of,
    matrix_in_memory_order,
    reshaped,
    same_slope,
    to_memory_order,
)

_PLAIN = (torch.float32, torch.float64)
_SETS = 16


class _Owners(NamedTuple):
    """The matrix of each element of all u, and of all v, as indices on the device."""

    u: Tensor
    v: Tensor


class ForeachEngine:
    """Run real matrices of one device and dtype together, with one vector each.

    Stacks, several vectors for a matrix, half precision and complex numbers are not accepted.

    Examples
    --------
    >>> ForeachEngine().run([], 1)
    Result(grads=[], triplets=[])
    """

    in_place = True

    def __init__(self) -> None:
        # Cached, because building an index tensor copies it to the device. The key is the set of
        # shapes in this step: a step may cover only some weights.
        self._owners = lru_cache(_SETS)(_owners)

    def __reduce__(self) -> tuple[type[ForeachEngine], tuple[()]]:
        return ForeachEngine, ()

    def accepts(self, job: Job) -> bool:
        """Return True for one real matrix with one vector, in float32 or float64."""
        dtype = job.weight.dtype
        return (
            dtype in _PLAIN
            and len(job.plan.matrix) == 2
            and tuple(job.V.shape) == job.plan.rows(1)
            and job.V.dtype is dtype
        )

    @torch.no_grad()
    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, those of one device and dtype together."""
        places: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
        for place, job in enumerate(jobs):
            key = job.weight.device, job.weight.dtype, isinstance(job.slope, Bound)
            places.setdefault(key, []).append(place)
        fresh = fresh_directions(jobs) if n_iter else []
        triplets: dict[int, Triplet] = {}
        for (device, dtype, bounded), mine in places.items():
            group = [jobs[place] for place in mine] if len(places) > 1 else jobs
            owners = self._owners(tuple(job.plan.matrix for job in group), device)
            m, n = ([job.plan.matrix[axis] for job in group] for axis in (0, 1))
            if n_iter:
                mixed_in = torch.cat([fresh[place].view(-1) for place in mine])
                tiny = torch.finfo(dtype).tiny
                sigma, u, v = _iterate(group, n_iter, owners, (m, n), tiny, mixed_in)
                if bounded:
                    sigma = _scale_(group, sigma)
                Vs: Sequence[Tensor] = torch.split_with_sizes(v.view(1, -1), n, dim=1)
                found = [*zip(sigma.unbind(), torch.split_with_sizes(u, m), Vs, strict=True)]
            else:
                found = [last_of(job) for job in group]
                sigma, u = torch.stack([t[0] for t in found]), torch.cat([t[1] for t in found])
            if not bounded:
                _add_terms_(group, [t[2] for t in found], sigma, u, owners, m)
            triplets.update(zip(mine, (Triplet(*t) for t in found), strict=True))
        return Result([job.grad for job in jobs], [triplets[i] for i in range(len(jobs))])


def write_into(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, unless both are the same tensor."""
    changed = [(old, new) for old, new in pairs if old is not new]
    if changed:
        torch._foreach_copy_([old for old, _ in changed], [new for _, new in changed])


def _add_terms_(
    jobs: Sequence[Job],
    Vs: Sequence[Tensor],
    sigma: Tensor,
    u: Tensor,
    owners: _Owners,
    m: list[int],
) -> None:
    force = _forces(jobs, sigma)
    factors = [job.factor for job in jobs]
    if all(factor is factors[0] for factor in factors):
        scaled = force * factors[0]
    else:
        scaled = torch.stack([f * x for f, x in zip(factors, force.unbind(), strict=True)])
    terms = torch.split_with_sizes(u * scaled.index_select(0, owners.u), m)
    for job, term, V in zip(jobs, terms, Vs, strict=True):
        if job.grad is not None:
            grad = reshaped(job.grad, job.plan.split, job.xp)
            add_outer_(grad, *broadcast_outer(term, V[0], job.plan, job.xp))


def _scale_(jobs: Sequence[Job], sigma: Tensor) -> Tensor:
    """Scale each weight to its bound, and return each sigma after that."""
    bounds: list[Any] = [job.slope for job in jobs]
    if all(same_slope(bound, bounds[0]) for bound in bounds):
        scales = bounds[0].scale(sigma)
    else:
        pairs = zip(bounds, sigma.unbind(), strict=True)
        scales = torch.stack([bound.scale(value) for bound, value in pairs])
    torch._foreach_mul_([job.grad for job in jobs], scales.unbind())
    return scales * sigma


def _forces(jobs: Sequence[Job], sigma: Tensor) -> Tensor:
    """Return the slope of each job's penalty, in one call for all where they are equal."""
    slopes: list[Any] = [job.slope for job in jobs]
    if all(slope is None for slope in slopes):
        return sigma
    if all(same_slope(slope, slopes[0]) for slope in slopes):
        return slopes[0].of(sigma)
    forces = [
        value if slope is None else slope.of(value)
        for slope, value in zip(slopes, sigma.unbind(), strict=True)
    ]
    return torch.stack(forces)


def _owners(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> _Owners:
    places = torch.arange(len(shapes))
    m, n = torch.tensor(shapes).T
    u, v = (places.repeat_interleave(sizes).to(device) for sizes in (m, n))
    return _Owners(u, v)


def _iterate(
    jobs: Sequence[Job],
    n_iter: int,
    owners: _Owners,
    sizes: tuple[list[int], list[int]],
    tiny: float,
    fresh: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all sigma, all u and all v, each in one tensor; v in the order of `as_matrix`."""
    Ws = [matrix_in_memory_order(job.weight, job.plan, job.xp) for job in jobs]
    adjoints = [W.t() for W in Ws]
    v = torch.cat([to_memory_order(job.V, job.plan, job.xp) for job in jobs], dim=1).view(-1)
    start = v + fresh
    for _ in range(n_iter):
        u, _, _ = _normalized(_products(Ws, start, sizes[1], sizes[0]), owners.u, sizes[0], tiny)
        w = _products(adjoints, u, sizes[0], sizes[1])
        unit, inverse, sigma = _normalized(w, owners.v, sizes[1], tiny)
        # As in the core, v stays where sigma is zero or not finite.
        start = v = torch.where((inverse > 0).index_select(0, owners.v), unit, v)
    if any(job.plan.order != job.plan.memory_order for job in jobs):
        pieces = torch.split_with_sizes(v.view(1, -1), sizes[1], dim=1)
        ordered = [from_memory_order(V, j.plan, j.xp) for V, j in zip(pieces, jobs, strict=True)]
        v = torch.cat(ordered, dim=1).view(-1)
    return sigma, u, v


def _products(Ws: Sequence[Tensor], x: Tensor, sizes: list[int], out_sizes: list[int]) -> Tensor:
    """Return the product of each matrix with its part of ``x``, all in one tensor."""
    products = x.new_empty(sum(out_sizes))
    parts = torch.split_with_sizes(x, sizes), torch.split_with_sizes(products, out_sizes)
    for W, part, out in zip(Ws, *parts, strict=True):
        torch.mv(W, part, out=out)
    return products


def _normalized(
    x: Tensor, owners: Tensor, sizes: list[int], tiny: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unit vectors of all parts of ``x``, and their inverse lengths and lengths."""
    lengths = torch.stack(torch._foreach_norm(torch.split_with_sizes(x, sizes)))
    inverses = lengths / (lengths.square() + tiny)
    return x * inverses.index_select(0, owners), inverses, lengths
