"""Take the terms of a step out of the gradients again when the step ends.

After a step the gradients are what the backward pass left. So a weight that two optimizers hold, or
that several steps update on one backward pass, gets each step's term once. The last triplet is
still in the state, so the weight is not read: the term is added once more, with −λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from spectral_core.engine import Engine, Job, JobList, Number, dispatch

from ._jobs import release

_UNDO = "undo"  # the key of the jobs with −λ, in the memo of the jobs that added the terms


class Added(NamedTuple):
    """Terms in gradients: the jobs that added them, and each gradient with its version."""

    jobs: JobList
    grads: list[Tensor]
    versions: list[int]

    @classmethod
    def by(cls, jobs: JobList) -> Added:
        """Return the terms that these jobs have just added."""
        grads = [job.grad for job in jobs]
        return cls(jobs, grads, [grad._version for grad in grads])


class AddedTensors(NamedTuple):
    """Terms that were added as tensors: those of pruned parameters."""

    names: list[str]
    terms: list[Tensor]
    factors: list[Number]
    grads: list[Tensor]
    versions: list[int]

    @classmethod
    def of(
        cls,
        parameters: Mapping[str, Tensor],
        terms: Mapping[str, Tensor],
        factors: Mapping[str, Number],
    ) -> AddedTensors:
        """Return the terms that have just been added to the gradients."""
        grads: list[Any] = [parameters[name].grad for name in terms]
        versions = [grad._version for grad in grads]
        used = [factors[name] for name in terms]
        return cls(list(terms), list(terms.values()), used, grads, versions)

    def take_out(
        self,
        parameters: Mapping[str, Tensor],
        factors: Mapping[str, Number] | None,
        *,
        rewritten: bool,
    ) -> None:
        """Subtract the terms; see the function `take_out`."""
        for name, term, factor, grad, version in zip(*self, strict=True):
            if _holds(parameters[name], grad, version, rewritten=rewritten):
                grad.sub_(term if factors is None else term * (factors[name] / factor))


@dataclass
class OpenStep:
    """A step that has begun: what was added to the gradients, and the steps within it."""

    added: list[Added | AddedTensors]
    inner: int = 0


def take_out(
    added: Added,
    parameters: Mapping[str, Tensor],
    engines: Sequence[Engine],
    *,
    factors: Mapping[str, Number] | None = None,
    rewritten: bool = False,
) -> None:
    """Subtract the terms from the gradients that nobody has replaced or changed since.

    Parameters
    ----------
    added : Added
    parameters : mapping of name to tensor
    engines : sequence of Engine
    factors : mapping of name to number, optional
        λ of each term, where it is no longer that of the jobs: an optimizer has unscaled the
        gradients within its step.
    rewritten : bool
        True if a fused optimizer has counted a new version of gradients that it only reads.
    """
    undo = _undo(added.jobs, factors)
    present = [
        _holds(parameters[job.name], grad, version, rewritten=rewritten)
        for job, grad, version in zip(added.jobs, added.grads, added.versions, strict=True)
    ]
    for job, grad in zip(undo, added.grads, strict=True):
        job.grad = grad
    undo.addresses = added.jobs.addresses
    if not all(present):
        undo = JobList(job for job, here in zip(undo, present, strict=True) if here)
    try:
        dispatch(undo, 0, engines)
    finally:
        release(undo)


def _holds(parameter: Tensor, grad: Tensor, version: int, *, rewritten: bool) -> bool:
    """Return True if nobody has replaced or changed the gradient since it got the term."""
    return parameter.grad is grad and (rewritten or grad._version == version)


def _undo(jobs: JobList, factors: Mapping[str, Number] | None) -> JobList:
    """Return jobs with −λ; they are kept with ``jobs`` while its numbers are the same."""
    numbers, undo = jobs.memo.get(_UNDO, (None, None))
    if undo is None:
        undo = JobList(_negated(job) for job in jobs)
    elif numbers is jobs.numbers and factors is None and not _written(jobs):
        return undo
    for job, given in zip(undo, jobs, strict=True):
        job.factor = -(given.factor if factors is None else factors[given.name])
        job.rule = given.rule
    undo.renew()
    jobs.memo[_UNDO] = None if factors is not None else jobs.numbers, undo
    return undo


def _written(jobs: JobList) -> bool:
    """Return True if a λ is a tensor, whose value can change unseen."""
    return any(isinstance(job.factor, Tensor) for job in jobs)


def _negated(job: Job) -> Job:
    return replace(job, factor=0.0)
