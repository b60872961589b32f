"""The jobs of compiled steps, on a CPU kept from step to step without their tensors.

A graph of `torch.compile` may give its step other tensors each time: copies, or memory that the
graph plans itself. What is kept does not depend on them: plans and rules, which engine runs a job,
and what the engines derive from shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from spectral_core.engine import Engine, Job, JobList, Number, Slope, Triplet

from ._jobs import LISTS, is_cacheable
from .engines.recent import keep_recent

_NO_TENSORS = Triplet(None, None, None)


class Given(NamedTuple):
    """Hold what a step gets, an entry for each weight."""

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    v: Sequence[Tensor]
    sigma: Sequence[Tensor]
    u: Sequence[Tensor]
    factors: Sequence[Number]
    targets: Sequence[Number]
    power: int

    def kinds(self) -> list[Any]:
        """Return everything about the tensors that jobs and the choice of engines depend on.

        PyTorch calls an operation with elements that are neither conjugated nor negated lazily.
        """
        numbers = [x for x in (*self.factors, *self.targets) if isinstance(x, Tensor)]
        return [
            (type(x), x.dtype, x.device, x.shape, x.stride(), x.requires_grad)
            for tensors in (self.weights, self.grads, self.v, self.sigma, self.u, numbers)
            for x in tensors
        ]


class CompiledJobs:
    """Keep the jobs of each operation of a regularizer in graphs of `torch.compile`.

    Parameters
    ----------
    engines : sequence of Engine
        The engines that run the jobs.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self._kept: dict[Hashable, _Kept] = {}  # the one that was used last at the end

    @contextmanager
    def of(
        self, key: Hashable, given: Given, make: Callable[[Given], Sequence[Job]]
    ) -> Iterator[JobList]:
        """Give the jobs of a step: those of the last step with this key, if they fit.

        Parameters
        ----------
        key : hashable
            Names, layouts and numbers of the step.
        given : Given
        make : callable
            ``make(given)`` returns new jobs, validated.
        """
        # Out of the dictionary until the step is over. A second thread finds none, and makes its
        # own; and after an error, nothing keeps the tensors alive.
        kept, kinds = self._kept.pop(key, None), given.kinds()
        if kept is None or kept.kinds != kinds:
            kept = _Kept(make(given), kinds)
        if not kept.cacheable:
            yield kept.jobs
            return
        kept.hold(given)
        yield kept.jobs
        kept.release()
        keep_recent(self._kept, key, kept, LISTS)


class _Kept:
    """Jobs, and the kinds of the tensors that they fit."""

    def __init__(self, jobs: Sequence[Job], kinds: list[Any]) -> None:
        self.jobs = JobList(jobs)
        self.jobs.moves = True
        self.kinds = kinds
        # Not on a GPU: what engines derive can be tensors, and those of a step whose graph is
        # captured are in memory that the graph uses again. A replay needs no jobs.
        self.cacheable = bool(jobs) and all(is_cacheable(job) and job.weight.is_cpu for job in jobs)
        rules = [job.rule for job in jobs]
        # A target that is a tensor may be another one in each step.
        self._ruled_by_tensor = [
            i
            for i, rule in enumerate(rules)
            if rule is not None and isinstance(rule.target, Tensor)
        ]

    def hold(self, given: Given) -> None:
        """Give each job the tensors and the factor of this step."""
        parts = self.jobs, given.weights, given.grads, given.factors
        for job, weight, grad, factor in zip(*parts, strict=True):
            job.weight, job.grad, job.factor = weight, grad, factor
        for i in self._ruled_by_tensor:
            self.jobs[i].rule = Slope(given.targets[i], given.power)
        self.jobs.start_from(list(map(Triplet, given.sigma, given.u, given.v)))
        self.jobs.addresses = [grad.data_ptr() for grad in given.grads]

    def release(self) -> None:
        """Drop all tensors: jobs that are kept must keep no memory until the next step."""
        for job in self.jobs:
            job.weight = job.grad = None
            job.factor = 0.0
        for i in self._ruled_by_tensor:
            self.jobs[i].rule = None
        self.jobs.start_from([_NO_TENSORS] * len(self.jobs))
