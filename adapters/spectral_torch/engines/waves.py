"""Follow the waves of many convolutions at once: the core's arithmetic, once for equal taps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_core.engine import (
    Bound,
    Job,
    Result,
    Triplet,
    add_outer_,
    finish,
    fresh_directions,
    last_of,
    rows_of,
    scale_,
    spread_of,
    taps_of,
    wave_iterations,
)

from .precision import in_full_float32


class WaveEngine:
    """Run jobs with waves, those with the same taps together.

    Examples
    --------
    >>> WaveEngine().run([], 1)
    Result(grads=[], triplets=[])
    """

    in_place = True

    def accepts(self, job: Job) -> bool:
        """Return True for every job with waves."""
        return job.wave is not None

    @in_full_float32
    @torch.no_grad()
    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, those with the same taps, dtype and number of directions together."""
        if n_iter == 0:
            return _finish(jobs, [last_of(job) for job in jobs])
        fresh = fresh_directions(jobs)
        places: dict[Any, list[int]] = {}
        for place, job in enumerate(jobs):
            k = min(2 * job.V.shape[-2], job.plan.matrix[-2])
            key = job.wave, job.weight.device, job.V.dtype, job.plan.stack, k
            places.setdefault(key, []).append(place)
        triplets: list[Any] = [None] * len(jobs)
        for mine in places.values():
            found = wave_iterations([jobs[i] for i in mine], n_iter, [fresh[i] for i in mine])
            for place, triplet in zip(mine, found, strict=True):
                triplets[place] = triplet
        return _finish(jobs, triplets)


def _finish(jobs: Sequence[Job], triplets: Sequence[Triplet]) -> Result:
    """Add the terms or scale the weights: the usual gradient gets both its parts in one product."""
    # Everything is computed before the first gradient changes, as in the core.
    usual = [_is_usual(job) for job in jobs]
    spreads = _spreads(
        [(job, t) for job, t, here in zip(jobs, triplets, usual, strict=True) if here]
    )
    terms = [
        _term(job, triplet, next(spreads)) if here else None
        for job, triplet, here in zip(jobs, triplets, usual, strict=True)
    ]
    others = [(j, t) for j, t, here in zip(jobs, triplets, usual, strict=True) if not here]
    rest = finish([job for job, _ in others], [t for _, t in others], add_outer_, scale_)
    found = iter(rest.triplets)
    for job, term in zip(jobs, terms, strict=True):
        if term is not None:
            job.grad.view(job.plan.matrix).addmm_(*term)
    triplets = [t if here else next(found) for t, here in zip(triplets, usual, strict=True)]
    return Result([job.grad for job in jobs], triplets)


def _is_usual(job: Job) -> bool:
    """Return True if a job has a gradient that is a matrix reshaped, and gets a term."""
    grad, plan = job.grad, job.plan
    return (
        grad is not None
        and not isinstance(job.rule, Bound)
        and plan.reshapes
        and len(plan.matrix) == 2
        and grad.dtype is job.V.dtype
        and grad.is_contiguous()
    )


def _spreads(pairs: Sequence[tuple[Job, Triplet]]) -> Iterator[Tensor]:
    """Yield `spread_of` of the best wave of each job: one call for all with the same taps."""
    found: dict[int, Tensor] = {}
    places: dict[Any, list[int]] = {}
    for place, (job, triplet) in enumerate(pairs):
        places.setdefault((job.wave, triplet.V.device, triplet.V.dtype), []).append(place)
    for (wave, *_), mine in places.items():
        d, xp = len(wave.sizes), pairs[mine[0]][0].xp
        ω = torch.stack([pairs[place][1].V[..., :1, -d:] for place in mine])
        spreads = spread_of(ω, taps_of(wave, ω, xp), xp)
        found.update(zip(mine, spreads.unbind(), strict=True))
    return (found[place] for place in range(len(pairs)))


def _term(job: Job, triplet: Triplet, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return two thin matrices whose product is the term."""
    slope: Any = job.rule
    force = triplet.sigma if slope is None else slope.of(triplet.sigma)
    assert job.wave is not None
    rows = rows_of(triplet.V[..., :1, :], spread, len(job.wave.sizes), job.xp)
    return torch.view_as_real(triplet.u) * (force * job.factor), rows
