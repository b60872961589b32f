"""Repeat a step on NumPy arrays with the jobs of the step before.

To check some thousands of small weights costs more than to regularize them. Nothing needs to be
checked anew where each array has the type, shape, strides, dtype and flags that it had in the step
before, and the vectors are those that this step returned. The arrays themselves may be others.

The jobs are kept by the `Checks` of a state, without the arrays. Who repeats a step removes them
until it is over: a second thread with the same state finds none, and makes its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ._arrays import Array
from ._penalty import Rule, same_rule, slope_of
from ._power import Triplet
from ._state_dict import Arrays, SpectralState
from ._validate import Factor, check_factors
from .engine import Engine, Job, JobList, address_of

Numbers: TypeAlias = tuple[Factor, Factor, int]
"""Factor, target and power of a step."""

# Memory of its own makes no difference to a step.
_FLAGS = ~4


class Repetition:
    """The jobs of a step, and everything that the next step must have in common with it.

    Parameters
    ----------
    jobs : sequence of Job
    engines : sequence of Engine
        The engines of the step, the last of which is a reference.
    state : SpectralState
        The state before the step.
    asked : tuple
        What chose the engines: the engines of the caller, if any, and whether they work in place.
    numbers : tuple
        Factor, target and power of the step.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        engines: Sequence[Engine],
        state: SpectralState,
        asked: tuple[Any, ...],
        numbers: Numbers,
    ) -> None:
        self.jobs = JobList(jobs)
        self.jobs.moves = True
        self.engines = engines
        self._asked = asked
        self._numbers = numbers
        by_name = {job.name: job for job in jobs}
        self._names = list(state.v)
        self._jobs = [by_name.get(name) for name in self._names]
        self._layouts = [state.layouts[name] for name in self._names]
        self._kinds = [
            None if job is None else (_kind(job.weight), _kind(job.grad)) for job in self._jobs
        ]

    @staticmethod
    def suits(jobs: Sequence[Job]) -> bool:
        """Return True if these jobs can be kept: plain arrays, and a state that keeps u."""
        return all(
            type(job.weight) is type(job.grad) is type(job.V) is np.ndarray
            and job.last is not None
            and job.wave is None
            for job in jobs
        )

    def fits(
        self,
        weights: Arrays,
        grads: Mapping[str, Array | None],
        state: SpectralState,
        asked: tuple[Any, ...],
        numbers: Numbers,
    ) -> bool:
        """Give the jobs the arrays of this step; return False if one is of another kind."""
        same = len(asked) == len(self._asked) and all(map(_is, asked, self._asked))
        return (
            same
            and self._names == list(state.v)
            # What is no mapping, or has other names, gets its error where new jobs are made.
            and isinstance(weights, Mapping)
            and isinstance(grads, Mapping)
            and weights.keys() == state.v.keys()
            and self._has_arrays(weights, grads, state)
            and self._has_numbers(numbers)
        )

    def _has_arrays(
        self, weights: Arrays, grads: Mapping[str, Array | None], state: SpectralState
    ) -> bool:
        addresses: list[int] = []
        us, sigmas, layouts = state.u, state.sigma, state.layouts
        for i, (name, V) in enumerate(state.v.items()):
            job, kinds = self._jobs[i], self._kinds[i]
            grad = grads.get(name)
            if job is None or kinds is None or grad is None:
                if job is None and grad is None and name in grads:
                    continue
                return False
            last, weight = job.last, weights.get(name)
            assert last is not None
            if (
                layouts[name] is not self._layouts[i]
                or V is not last.V
                or us.get(name) is not last.u
                or sigmas.get(name) is not last.sigma
                or not _has_kind(weight, kinds[0])
                or not _has_kind(grad, kinds[1])
            ):
                return False
            job.weight, job.grad = weight, grad
            addresses.append(address_of(grad) or 0)
        self.jobs.addresses = addresses
        return True

    def _has_numbers(self, numbers: Numbers) -> bool:
        """Give each job its factor and rule; return False for another kind of rule."""
        # The entries of a mapping and the value of an array can change unseen.
        constant = all(isinstance(x, (int, float)) for x in numbers)
        if constant and numbers == self._numbers and [*map(type, numbers)] == self._types:
            return True
        (factor, target, power), names = numbers, dict.fromkeys(self._names)
        factors, rules = check_factors(factor, names), slope_of(target, power, names)
        for job in self.jobs:
            rule: Rule | None = rules[job.name]
            if (job.rule and job.rule.code) != (rule and rule.code):
                return False
        changed = False
        for job in self.jobs:
            rule = rules[job.name]
            changed |= job.factor != factors[job.name] or not same_rule(job.rule, rule)
            job.factor, job.rule = factors[job.name], rule
        if changed:
            self.jobs.renew()
        self._numbers = numbers
        return True

    @property
    def _types(self) -> list[type]:
        return [*map(type, self._numbers)]

    def release(self, triplets: Sequence[Triplet]) -> None:
        """Keep the results of the step, and no array of the caller."""
        for job in self.jobs:
            job.weight = job.grad = None
        self.jobs.start_from(triplets)


def _is(one: object, other: object) -> bool:
    return one is other


def _kind(x: Any) -> tuple[Any, ...]:
    return x.shape, x.strides, x.dtype, x.flags.num & _FLAGS


def _has_kind(x: Any, kind: tuple[Any, ...]) -> bool:
    return type(x) is np.ndarray and (x.shape, x.strides, x.dtype, x.flags.num & _FLAGS) == kind


class Step(NamedTuple):
    """The jobs of a step, and the engines that run them."""

    jobs: Sequence[Job]
    engines: Sequence[Engine]
    repetition: Repetition | None


def repeated(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    asked: tuple[Any, ...],
    numbers: Numbers,
) -> Step | None:
    """Return the step before with the arrays of this one, or None where they do not fit."""
    kept: Repetition | None = state.checks.take_repetition()
    if kept is None or not kept.fits(weights, grads, state, asked, numbers):
        return None
    return Step(kept.jobs, kept.engines, kept)


def first_step(
    jobs: Sequence[Job],
    engines: Sequence[Engine],
    state: SpectralState,
    asked: tuple[Any, ...],
    numbers: Numbers,
) -> Step:
    """Return a step with new jobs."""
    if not jobs or not Repetition.suits(jobs):
        return Step(jobs, engines, None)
    kept = Repetition(jobs, engines, state, asked, numbers)
    return Step(kept.jobs, engines, kept)


def keep(step: Step, state: SpectralState, triplets: Sequence[Triplet]) -> None:
    """Keep a step that is over for the next one, unless its vectors have another dtype now."""
    same = all(t.V.dtype == job.V.dtype for job, t in zip(step.jobs, triplets, strict=True))
    if step.repetition is not None and same:
        step.repetition.release(triplets)
        state.checks.keep_repetition(step.repetition)
