"""Run many matrices at once by PyTorch's own operations: the core's arithmetic in fewer calls.

A step on the small matrices of most networks is bound by the number of operations, not by their
size. Three operations remain for each matrix: its two products and the update of its gradient. The
vectors of all matrices are concatenated in one tensor, and every other operation runs once on that.

One or two matrices have nothing to share: to concatenate and to split costs more than it saves.
They run one after the other, in as few operations as the arithmetic allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

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
    same_rule,
    to_memory_order,
)

from . import blocks

# The dtype of the vectors of each dtype of weights.
_VECTORS = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
_SETS = 16
# With more matrices than this, concatenated vectors need fewer operations.
_FEW = 2


class Owners(NamedTuple):
    """The matrix of each element of all u, and of all v, as indices on the device."""

    u: Tensor
    v: Tensor


class ForeachEngine:
    """Run real matrices of one device and dtype together, with one vector each.

    Stacks, several vectors for a matrix and complex numbers are not accepted. A matrix in half
    precision is multiplied by blocks in float32.

    Examples
    --------
    >>> ForeachEngine().run([], 1)
    Result(grads=[], triplets=[])
    """

    in_place = True

    def __init__(self) -> None:
        # Cached, because building an index tensor copies it to the device. The key is the set of
        # shapes in this step: a step may cover only some weights.
        self._owners = lru_cache(_SETS)(owners_of)

    def __reduce__(self) -> tuple[type[ForeachEngine], tuple[()]]:
        return ForeachEngine, ()

    def accepts(self, job: Job) -> bool:
        """Return True for one real matrix with one vector."""
        dtype = _VECTORS.get(job.weight.dtype)
        return (
            dtype is not None
            and job.wave is None
            and job.V.dtype is dtype
            and len(job.plan.matrix) == 2
            and tuple(job.V.shape) == job.plan.rows(1)
            # Other kinds of tensors may refuse a part of themselves in another dtype.
            and (dtype is job.weight.dtype or type(job.weight) in (Tensor, Parameter))
        )

    @torch.no_grad()
    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, those of one device and dtype together."""
        fresh: Any = fresh_directions(jobs) if n_iter else [None] * len(jobs)
        places: dict[Any, list[int]] = {}
        for place, job in enumerate(jobs):
            key = job.weight.device, job.weight.dtype, isinstance(job.rule, Bound)
            places.setdefault(key, []).append(place)
        triplets: list[Any] = [None] * len(jobs)
        for (device, *_), mine in places.items():
            if len(mine) <= _FEW:
                for place in mine:
                    triplets[place] = _run_alone(jobs[place], fresh[place], n_iter)
                continue
            group = [jobs[place] for place in mine]
            owners = self._owners(tuple(job.plan.matrix for job in group), device)
            directions = [fresh[place] for place in mine]
            found = _iterate(group, directions, n_iter, owners) if n_iter else None
            for place, triplet in zip(mine, _change_together_(group, found, owners), strict=True):
                triplets[place] = triplet
        return Result([job.grad for job in jobs], triplets)


def _change_together_(
    jobs: Sequence[Job], found: tuple[Tensor, Tensor, Tensor] | None, owners: Owners
) -> list[Triplet]:
    """Add all terms or scale all weights, and return the triplets.

    ``found`` is all sigma, all u and all v. None stands for those of the step before.
    """
    m, n = ([job.plan.matrix[axis] for job in jobs] for axis in (0, 1))
    bounded = isinstance(jobs[0].rule, Bound)
    if found is not None:
        sigma, u, v = found
        if bounded:
            sigma = _scale_(jobs, sigma)
        vs: Sequence[Tensor] = torch.split_with_sizes(v, n)
        Vs: Sequence[Tensor] = torch.split_with_sizes(v.view(1, -1), n, dim=1)
        parts = zip(sigma.unbind(), torch.split_with_sizes(u, m), Vs, strict=True)
        triplets = [Triplet(*part) for part in parts]
    else:
        triplets = [last_of(job) for job in jobs]
        vs = [triplet.V[0] for triplet in triplets]
        sigma = torch.stack([triplet.sigma for triplet in triplets])
        u = torch.cat([triplet.u for triplet in triplets])
        if bounded:
            scaled = _scale_(jobs, sigma).unbind()
            triplets = [t._replace(sigma=s) for t, s in zip(triplets, scaled, strict=True)]
    if not bounded:
        _add_terms_(jobs, vs, sigma, u, owners, m)
    return triplets


def _run_alone(job: Job, fresh: Tensor | None, n_iter: int) -> Triplet:
    """Run one job, in fewer operations than any that share."""
    triplet = last_of(job) if fresh is None else _iterate_alone(job, fresh, n_iter)
    if isinstance(job.rule, Bound):
        scale = job.rule.scale(triplet.sigma)
        _multiply_([job.grad], [scale])
        return triplet._replace(sigma=scale * triplet.sigma)
    if job.grad is not None:
        force = triplet.sigma if job.rule is None else job.rule.of(triplet.sigma)
        factor = job.factor
        if isinstance(factor, Tensor):
            force, factor = force * factor, 1.0
        _add_(job, triplet.u * force, triplet.V[0], factor)
    return triplet


def _iterate_alone(job: Job, fresh: Tensor, n_iter: int) -> Triplet:
    W = _matrix(job)
    V = to_memory_order(job.V, job.plan, job.xp)
    start, tiny = (V + fresh)[0], torch.finfo(V.dtype).tiny
    for _ in range(n_iter):
        if W.dtype is V.dtype:
            u, _ = _unit(torch.mv(W, start), tiny)
            w = torch.mv(W.t(), u)
        else:
            y, w = blocks.both_products(W, start)
            u, inverse = _unit(y, tiny)
            w *= inverse
        sigma = torch.linalg.vector_norm(w)
        inverse = sigma / (sigma * sigma + tiny)
        # As in the core, v stays where sigma is zero or not finite.
        V = torch.where(inverse > 0, w * inverse, V)
        start = V[0]
    return Triplet(sigma, u, from_memory_order(V, job.plan, job.xp))


def _unit(y: Tensor, tiny: float) -> tuple[Tensor, Tensor]:
    """Return y as a unit vector, in its own memory, and its inverse length."""
    length = torch.linalg.vector_norm(y)
    inverse = length / (length * length + tiny)
    return y.mul_(inverse), inverse


def write_into(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, unless both are the same tensor."""
    changed = [(old, new) for old, new in pairs if old is not new]
    if changed:
        torch._foreach_copy_([old for old, _ in changed], [new for _, new in changed])


def _add_terms_(
    jobs: Sequence[Job],
    vs: Sequence[Tensor],
    sigma: Tensor,
    u: Tensor,
    owners: Owners,
    m: list[int],
) -> None:
    force = _forces(jobs, sigma)
    factors = [job.factor for job in jobs]
    if all(factor is factors[0] for factor in factors):
        scaled = force * factors[0]
    else:
        scaled = torch.stack([f * x for f, x in zip(factors, force.unbind(), strict=True)])
    terms = torch.split_with_sizes(u * scaled.index_select(0, owners.u), m)
    for job, term, v in zip(jobs, terms, vs, strict=True):
        if job.grad is not None:
            _add_(job, term, v)


def _add_(job: Job, u: Tensor, v: Tensor, factor: float = 1.0) -> None:
    """Add a factor times the outer product to the gradient of a job."""
    grad, plan = job.grad, job.plan
    if (
        plan.reshapes and grad.dtype is u.dtype and grad.is_contiguous()
    ):  # the usual one, in 2 calls
        grad.view(plan.matrix).addr_(u, v, alpha=factor)
    else:
        u, v = broadcast_outer(u * factor, v, plan, job.xp)
        add_outer_(reshaped(grad, plan.split, job.xp), u, v)


def _matrix(job: Job) -> Tensor:
    weight, plan = job.weight, job.plan
    if plan.reshapes and weight.is_contiguous():  # the usual one, in 1 call
        return weight.view(plan.matrix)
    return matrix_in_memory_order(weight, plan, job.xp)


def _scale_(jobs: Sequence[Job], sigma: Tensor) -> Tensor:
    """Scale each weight to its bound, and return each sigma after that."""
    bounds: list[Any] = [job.rule for job in jobs]
    if all(same_rule(bound, bounds[0]) for bound in bounds):
        scales = bounds[0].scale(sigma)
    else:
        pairs = zip(bounds, sigma.unbind(), strict=True)
        scales = torch.stack([bound.scale(value) for bound, value in pairs])
    _multiply_([job.grad for job in jobs], scales.unbind())
    return scales * sigma


def _multiply_(weights: list[Tensor], scales: Sequence[Tensor]) -> None:
    """Multiply each weight by its number."""
    if weights[0].dtype is scales[0].dtype:
        torch._foreach_mul_(weights, list(scales))
        return
    for weight, scale in zip(weights, scales, strict=True):
        blocks.scale_(weight.view(weight.shape[0], -1), scale)


def _forces(jobs: Sequence[Job], sigma: Tensor) -> Tensor:
    """Return the slope of each job's penalty, in one call for all where they are equal."""
    slopes: list[Any] = [job.rule for job in jobs]
    if all(slope is None for slope in slopes):
        return sigma
    if all(same_rule(slope, slopes[0]) for slope in slopes):
        return slopes[0].of(sigma)
    forces = [
        value if slope is None else slope.of(value)
        for slope, value in zip(slopes, sigma.unbind(), strict=True)
    ]
    return torch.stack(forces)


def owners_of(shapes: Sequence[tuple[int, ...]], device: torch.device) -> Owners:
    """Return the owners of the elements of u and v of matrices of these shapes."""
    places = torch.arange(len(shapes))
    m, n = torch.tensor(shapes, dtype=torch.int64).reshape(-1, 2).T
    u, v = (places.repeat_interleave(sizes).to(device) for sizes in (m, n))
    return Owners(u, v)


def _iterate(
    jobs: Sequence[Job], fresh: Sequence[Tensor], n_iter: int, owners: Owners
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all sigma, all u and all v, each in one tensor; v in the order of `as_matrix`."""
    Ws = list(map(_matrix, jobs))
    adjoints = [W.t() for W in Ws]
    v = torch.cat([to_memory_order(job.V, job.plan, job.xp) for job in jobs], dim=1).view(-1)
    start, tiny = v + torch.cat([each.view(-1) for each in fresh]), torch.finfo(v.dtype).tiny
    m, n = ([job.plan.matrix[axis] for job in jobs] for axis in (0, 1))
    for _ in range(n_iter):
        if Ws[0].dtype is v.dtype:
            u, _, _ = _normalized(_products(Ws, start, n, m), owners.u, m, tiny)
            w = _products(adjoints, u, m, n)
        else:
            pairs = map(blocks.both_products, Ws, torch.split_with_sizes(start, n))
            y, w = map(torch.cat, zip(*pairs, strict=True))
            u, w = left_vectors(y, w, owners, m, tiny)
        sigma, v = right_vectors(w, v, owners, n, tiny)
        start = v
    if any(job.plan.order != job.plan.memory_order for job in jobs):
        pieces = torch.split_with_sizes(v.view(1, -1), n, dim=1)
        ordered = [from_memory_order(V, j.plan, j.xp) for V, j in zip(pieces, jobs, strict=True)]
        v = torch.cat(ordered, dim=1).view(-1)
    return sigma, u, v


def left_vectors(
    y: Tensor, w: Tensor, owners: Owners, m: list[int], tiny: float
) -> tuple[Tensor, Tensor]:
    """Return all u and all Wᵀu from all y = Wv and all w = Wᵀy. ``m`` is the length of each u."""
    u, inverse, _ = _normalized(y, owners.u, m, tiny)
    return u, w * inverse.index_select(0, owners.v)


def right_vectors(
    w: Tensor, v: Tensor, owners: Owners, n: list[int], tiny: float
) -> tuple[Tensor, Tensor]:
    """Return all sigma and all v from all w = Wᵀu and all v before."""
    unit, inverse, sigma = _normalized(w, owners.v, n, tiny)
    # As in the core, v stays where sigma is zero or not finite.
    return sigma, torch.where((inverse > 0).index_select(0, owners.v), unit, v)


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
