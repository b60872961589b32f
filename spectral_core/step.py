"""One step of Algorithm 1 over many weights: the seam at which faster paths plug in.

The regularizer checks what it is given and makes a `Task` of each weight; a `Step` advances all of
them. `plain_step` is the arithmetic, written once. A framework's own way – many matrices a kernel,
one pass over a weight – is another `Step`, which takes the tasks that it can and hands the others
to this one. One that writes into gradients has an attribute ``in_place`` that is true.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from ._arrays import Array, Namespace
from .block import iterations
from .errors import ArgumentError
from .layout import Plan, lay, lying_matrix, reshaped, unlay
from .penalty import add_outer, add_outer_, outer_factors
from .power import PowerIteration


class Task(NamedTuple):
    """A weight that takes part in a step, and what belongs to it: checked to fit."""

    name: str
    weight: Array
    grad: Array  # None where there is nothing to add to
    v: Array  # in the order of `as_matrix`'s columns, as in every triple; or several, (…, k, n)
    factor: float | Array
    plan: Plan
    xp: Namespace
    last: PowerIteration | None  # of the step before; None if that did not keep it


class Advance(NamedTuple):
    """What a `Step` returns, one entry a task."""

    grads: list[Array]
    triples: list[PowerIteration]


Iterations: TypeAlias = Callable[[Sequence[Array], Sequence[Array], int], list[PowerIteration]]
Add: TypeAlias = Callable[[Array, Array, Array], Array]
Step: TypeAlias = Callable[[Sequence[Task], int], Advance]


def plain_step(
    tasks: Sequence[Task],
    n_iter: int,
    *,
    iterations: Iterations = iterations,
    add: Add = add_outer,
) -> Advance:
    """Lines 5–9 of Algorithm 1, one weight after the other.

    Parameters
    ----------
    tasks : sequence of Task
    n_iter : int
        Power iterations. With 0 the term is that of each task's ``last``.
    iterations : callable
        ``iterations(matrices, vectors, n_iter)`` gives for each matrix what
        `spectral_core.block.iterations` does.
    add : callable
        ``add(grad, u, v)`` gives ``grad + u * v``; u and v broadcast to grad.
    """
    triples = triples_of(tasks, n_iter, iterations)
    # All of them before the first gradient changes: an error in the arithmetic leaves it whole.
    terms = [
        None if task.grad is None else outer_factors(triple, task.plan, task.factor, task.xp)
        for task, triple in zip(tasks, triples, strict=True)
    ]
    grads = [
        None if term is None else _added(task, term, add)
        for task, term in zip(tasks, terms, strict=True)
    ]
    return Advance(grads, triples)


def _added(task: Task, term: tuple[Array, Array], add: Add) -> Array:
    # To split an axis in two never takes a copy: in place, this is the caller's memory.
    total = add(reshaped(task.grad, task.plan.split, task.xp), *term)
    return reshaped(total, task.weight.shape, task.xp)


class _PlainStepInPlace:
    """`plain_step`, but that it adds to the gradients where they lie."""

    in_place = True

    def __call__(self, tasks: Sequence[Task], n_iter: int) -> Advance:
        return plain_step(tasks, n_iter, add=add_outer_)


plain_step_ = _PlainStepInPlace()


def divided_step(tasks: Sequence[Task], n_iter: int, step_of: Callable[[Task], Step]) -> Advance:
    """Hand each task to the step that is its own, tasks of one step together."""
    shares: dict[Step, list[int]] = {}
    for i, task in enumerate(tasks):
        shares.setdefault(step_of(task), []).append(i)
    if len(shares) == 1:
        return next(iter(shares))(tasks, n_iter)
    done: dict[int, tuple[Array, PowerIteration]] = {}
    for step, share in shares.items():
        advance = step([tasks[i] for i in share], n_iter)
        done.update(zip(share, zip(*advance, strict=True), strict=True))
    ordered = [done[i] for i in range(len(tasks))]
    return Advance([grad for grad, _ in ordered], [triple for _, triple in ordered])


def sloped(step: Step, slope_of: Callable[[str, Array], Array]) -> Step:
    """``step`` for another penalty: the term is slope(σ)·u·vᴴ in place of σ·u·vᴴ.

    It is two steps: one iterates and leaves the gradients alone, one adds and reads no weight.

    Parameters
    ----------
    step : Step
    slope_of : callable
        ``slope_of(name, sigma)``: the derivative of the penalty by σ.
    """

    def sloped_step(tasks: Sequence[Task], n_iter: int) -> Advance:
        if n_iter > 0:
            triples = step([task._replace(grad=None) for task in tasks], n_iter).triples
        else:
            triples = [last_of(task) for task in tasks]
        forces = [
            triple._replace(sigma=slope_of(task.name, triple.sigma))
            for task, triple in zip(tasks, triples, strict=True)
        ]
        adding = [
            task._replace(v=force.v, last=force) for task, force in zip(tasks, forces, strict=True)
        ]
        return Advance(step(adding, 0).grads, triples)

    return sloped_step


def overlapping(ranges: Iterable[tuple[int, int]]) -> set[int]:
    """Which of these pieces of memory, (address, size), lie in one before: as of tied weights.

    A kernel that writes many gradients at once must leave them out, or lose one of two sums.
    """
    shared, end = set(), 0
    for start, size, i in sorted((*at, i) for i, at in enumerate(ranges)):
        if start < end:
            shared.add(i)
        end = max(end, start + size)
    return shared


def sharing_memory(tasks: Iterable[Task], address: Callable[[Array], int]) -> set[str]:
    """The names of the tasks whose gradient lies in that of one before."""
    there = [task for task in tasks if task.grad is not None]
    shared = overlapping((address(task.grad), task.grad.nbytes) for task in there)
    return {there[i].name for i in shared}


def triples_of(
    tasks: Sequence[Task], n_iter: int, iterations: Iterations = iterations
) -> list[PowerIteration]:
    """(σ, u, v) of each weight after so many iterations; after none, those of the step before."""
    if n_iter == 0:
        return [last_of(task) for task in tasks]
    matrices = [lying_matrix(task.weight, task.plan, task.xp) for task in tasks]
    vectors = [lay(task.v, task.plan, task.xp) for task in tasks]
    triples = iterations(matrices, vectors, n_iter)
    return [
        triple._replace(v=unlay(triple.v, task.plan, task.xp))
        for task, triple in zip(tasks, triples, strict=True)
    ]


def last_of(task: Task) -> PowerIteration:
    """What the step before found, or `ArgumentError` if that is not there."""
    if task.last is None:
        raise ArgumentError(
            f"n_iter is 0, but the state holds no u of {task.name!r}: iterate at least once"
        )
    return task.last
