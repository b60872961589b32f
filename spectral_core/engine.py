"""One step of Algorithm 1 over many weights: the boundary between the core and its adapters.

A `Job` is one weight with all that belongs to it, checked to fit. An `Engine` runs jobs.
`dispatch` gives each job to the first engine that accepts it. `ReferenceEngine` accepts every job:
it is the arithmetic, written once, and every other engine is tested to be equal to it.

An adapter imports from the core its public names, this module, `spectral_core.errors` and
`spectral_core.numba`, and nothing else. ``__all__`` lists what this module offers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

from ._arrays import (
    Array,
    Namespace,
    Traits,
    address_of,
    array_namespace,
    cast,
    conj,
    constant,
    traits,
    traits_of,
)
from ._bound import AT_MOST, EXACTLY, Bound, bounds_of
from ._chain import Inexact, log10_up
from ._geometry import (
    FLATTENED,
    OPERATOR,
    Geometry,
    Wave,
    check_norm,
    tell_assumed,
    wave_of,
    with_operator_norm,
)
from ._layout import as_layout, default_layout, plan_of
from ._logging import AsyncCopy, Log, Snapshot
from ._network import (
    SLOPES,
    Dense,
    Ledger,
    Stage,
    Value,
    in_parallel,
    in_series,
    largest_scale,
    side_by_side,
    widened,
)
from ._penalty import Rule, Slope, add_outer, add_outer_, outer_factors, same_rule, slope_of
from ._plan import (
    MemoryForm,
    Plan,
    Shape,
    broadcast_outer,
    broadcast_stack,
    from_memory_order,
    matrix_in_memory_order,
    reshaped,
    scale_,
    scaled,
    to_memory_order,
)
from ._power import (
    FRESH,
    FRESH_64,
    Triplet,
    adjoint_times_rows,
    fresh_direction,
    iterate_rows,
    left_rows,
    right_rows,
    times_rows,
)
from ._select import Choice, Selection, by_name, choose, first_matches, matching, numbered
from ._shard import Shard, clipped, ordered, shards_of
from ._state_dict import SpectralState, loaded_arrays, merge, select
from ._summary import Row, Summary
from ._validate import (
    Checks,
    Factor,
    Fitting,
    Number,
    Schedule,
    at_step,
    check_factor,
    check_factors,
    check_power,
    check_weights,
)
from ._wave import (
    Products,
    iterate_waves,
    parts_of,
    rows_of,
    spread_of,
    taps_of,
    wave_rows,
)
from .errors import ArgumentError, ShapeError

__all__ = [
    "AT_MOST",
    "EXACTLY",
    "FLATTENED",
    "FRESH",
    "FRESH_64",
    "OPERATOR",
    "SLOPES",
    "Add",
    "Array",
    "AsyncCopy",
    "Bound",
    "Checks",
    "Choice",
    "Dense",
    "Engine",
    "Factor",
    "Geometry",
    "Inexact",
    "Job",
    "JobList",
    "Ledger",
    "Log",
    "MemoryForm",
    "Namespace",
    "Number",
    "Plan",
    "ReferenceEngine",
    "Result",
    "Row",
    "Rule",
    "Schedule",
    "Selection",
    "Shape",
    "Shard",
    "Share",
    "Slope",
    "Snapshot",
    "SpectralState",
    "Stage",
    "Summary",
    "Traits",
    "Triplet",
    "Value",
    "Wave",
    "add_outer",
    "add_outer_",
    "address_of",
    "adjoint_times_rows",
    "array_namespace",
    "as_layout",
    "at_step",
    "bounds_of",
    "broadcast_outer",
    "by_name",
    "cast",
    "check_factor",
    "check_factors",
    "check_norm",
    "check_power",
    "check_weights",
    "choose",
    "clipped",
    "conj",
    "constant",
    "default_layout",
    "dispatch",
    "finish",
    "first_matches",
    "fresh_direction",
    "fresh_directions",
    "from_memory_order",
    "in_parallel",
    "in_series",
    "iterate_rows",
    "iteration_arrays",
    "largest_scale",
    "last_of",
    "left_rows",
    "loaded_arrays",
    "log10_up",
    "make_jobs",
    "matching",
    "matrix_in_memory_order",
    "merge",
    "numbered",
    "ordered",
    "outer_factors",
    "parts_of",
    "plan_of",
    "reshaped",
    "right_rows",
    "rows_of",
    "same_rule",
    "scale_",
    "scaled",
    "select",
    "shards_of",
    "side_by_side",
    "slope_of",
    "spread_of",
    "taps_of",
    "tell_assumed",
    "times_rows",
    "to_memory_order",
    "traits",
    "traits_of",
    "wave_iterations",
    "wave_of",
    "wave_rows",
    "widened",
    "with_operator_norm",
]


Add: TypeAlias = Callable[[Array, Array, Array], Array]
"""``add(grad, u, v)`` returns ``grad + u * v``; u and v broadcast to grad."""

Scale: TypeAlias = Callable[[Array, Array, Plan, Namespace], Array]
"""``scale(weight, factor, plan, xp)`` returns the weight times a factor for each matrix."""


@dataclass(slots=True, eq=False)
class Job:
    """One weight in one step, and all that belongs to it, checked to fit.

    Attributes
    ----------
    name : str
    weight : array
    grad : array or None
        The array that the step changes: the gradient, or with a `Bound` the weight itself. None
        where there is nothing to change. The only field that changes from step to step.
    V : array, shape (*stack, k, n)
        The rows to start from, in the order of `as_matrix`'s columns. The first row is v.
    factor : float or array of shape ()
        λ.
    rule : Slope, Bound or None
        What the step does with sigma. A `Slope` is the penalty's target and power. With a `Bound`,
        the step scales the weight in place of adding a term. None is the paper's penalty, whose
        slope is sigma.
    plan : Plan
        How the weight becomes a matrix.
    xp : namespace
    last : Triplet or None
        The result of the step before. None if the state does not keep u.
    wave : Wave or None
        None for the norm of the matrix. With a `Wave`, the step is one of `iterate_waves`, each row
        of V is a wave, and u is complex. An engine that does not know waves must refuse the job.
    """

    name: str
    weight: Array
    grad: Array  # or None
    V: Array
    factor: Number
    rule: Rule | None
    plan: Plan
    xp: Namespace
    last: Triplet | None
    wave: Wave | None = None


class Result(NamedTuple):
    """Result of an engine: one entry for each job, in the order of the jobs.

    An entry of ``grads`` is the gradient with its term, or with a `Bound` the scaled weight, whose
    spectral norm is the triplet's sigma.
    """

    grads: list[Array | None]
    triplets: list[Triplet]


class Engine(Protocol):
    """A way to run jobs."""

    @property
    def in_place(self) -> bool:
        """True if the engine writes into the gradients."""

    def accepts(self, job: Job) -> bool:
        """Return True if the engine can run this job."""

    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run lines 5–9 of Algorithm 1 for jobs that the engine accepts.

        With ``n_iter=0`` the term is that of each job's ``last``.
        """


class Share(NamedTuple):
    """Jobs of one engine, and their places among all jobs: empty where the engine has them all."""

    engine: Engine
    jobs: Sequence[Job]
    places: list[int]


class JobList(list[Job]):
    """Jobs that are validated once and used in many steps: only their gradients change.

    Attributes
    ----------
    addresses : list of int, or None
        Addresses of the gradients in this step. The owner of the list sets them.
    memo : dict
        Results that an engine derived from everything but the gradients. The key is the engine.
    numbers : object
        A new object whenever a factor or a rule has changed.
    lasts : list of Triplet or None
        Each job's ``last``. An engine that writes results there returns this very list.
    moves : bool
        True if weights, V, sigma and u may be at other addresses in each step: no engine keeps
        these.
    """

    def __init__(self, jobs: Iterable[Job] = ()) -> None:
        super().__init__(jobs)
        self.addresses: list[int] | None = None
        self.memo: dict[Any, Any] = {}
        self.numbers = object()
        self.moves = False
        self.lasts: list[Triplet | None] = [job.last for job in self]
        self._shares: list[Share] = []
        self._overlaps: set[int] = set()
        self._divided_at: list[int] | None = None  # the addresses that `_overlaps` belongs to

    def renew(self) -> None:
        """Announce that factors or rules have changed."""
        self.numbers = object()
        for share in self._shares:
            if isinstance(share.jobs, JobList):
                share.jobs.numbers = self.numbers

    def start_from(self, lasts: Sequence[Triplet]) -> None:
        """Give each job its V, sigma and u: those of the step before."""
        self.lasts = list(lasts)
        for job, last in zip(self, lasts, strict=True):
            job.V, job.last = last.V, last
        for share in self._shares:
            if isinstance(share.jobs, JobList):
                share.jobs.lasts = [lasts[place] for place in share.places]

    def shares(self, engines: Sequence[Engine]) -> list[Share]:
        """Return the division among engines; divide again only where overlaps have changed."""
        if not self._shares or self.addresses != self._divided_at:
            overlaps = _overlaps(self, self.addresses)
            if not self._shares or overlaps != self._overlaps:
                self._shares = _divide(self, engines, overlaps)
                self._overlaps = overlaps
                for share in self._shares:
                    if isinstance(share.jobs, JobList):
                        share.jobs.moves = self.moves
            self._divided_at = self.addresses
        if len(self._shares) > 1 and self.addresses is not None:
            for share in self._shares:
                share.jobs.addresses = [self.addresses[i] for i in share.places]  # type: ignore[attr-defined]
        return self._shares


def dispatch(jobs: Sequence[Job], n_iter: int, engines: Sequence[Engine]) -> Result:
    """Run each job by the first engine that accepts it.

    A job whose gradient shares memory with the gradient of a job before it, as tied weights can
    have it, goes to the last engine, the reference. An engine that writes many gradients at once
    would lose one of the two sums.

    Parameters
    ----------
    jobs : sequence of Job, or JobList
    n_iter : int
        Power iterations. With 0 the term is that of each job's ``last``.
    engines : sequence of Engine
        In order of preference. The last one must accept every job.

    Returns
    -------
    Result
        In the order of ``jobs``.

    Raises
    ------
    ArgumentError
        If ``n_iter`` is 0 and a job has no ``last``, before any gradient changes.

    Examples
    --------
    >>> dispatch([], 1, [ReferenceEngine()])
    Result(grads=[], triplets=[])
    """
    if n_iter == 0:
        for job in jobs:  # before the first engine writes into a gradient
            last_of(job)
    if isinstance(jobs, JobList):
        shares = jobs.shares(engines)
    else:
        in_place = len(jobs) > 1 and any(engine.in_place for engine in engines[:-1])
        shares = _divide(jobs, engines, _overlaps(jobs, None) if in_place else set())
    if len(shares) == 1:
        return shares[0].engine.run(jobs, n_iter)
    grads: list[Array | None] = [None] * len(jobs)
    triplets: list[Any] = [None] * len(jobs)
    for engine, share, places in shares:
        result = engine.run(share, n_iter)
        for place, grad, triplet in zip(places, *result, strict=True):
            grads[place], triplets[place] = grad, triplet
    return Result(grads, triplets)


class ReferenceEngine:
    """Lines 5–9 of Algorithm 1, one weight after the other: the arithmetic, written once.

    Parameters
    ----------
    in_place : bool
        If True, the engine writes into the gradients. Otherwise they do not change.
    add : callable, optional
        ``add(grad, u, v)`` returns ``grad + u * v``: a framework's own way to add the term.

    Examples
    --------
    >>> ReferenceEngine(in_place=True).in_place
    True
    """

    def __init__(self, *, in_place: bool = False, add: Add | None = None) -> None:
        self.in_place = in_place
        self._add = add or (add_outer_ if in_place else add_outer)
        self._scale = scale_ if in_place else scaled

    def accepts(self, job: Job) -> bool:  # noqa: ARG002
        """Return True: every job can be run."""
        return True

    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Iterate each weight, then add each term."""
        triplets = []
        fresh = fresh_directions(jobs) if n_iter else ()
        for i, job in enumerate(jobs):  # each comprehension is a frame between the user and W @ v
            if n_iter == 0:
                triplets.append(last_of(job))
                continue
            if job.wave is not None:
                triplets += wave_iterations([job], n_iter, [fresh[i]])
                continue
            W, V, kind = iteration_arrays(job)
            products = partial(times_rows, W, xp=job.xp), partial(adjoint_times_rows, W, xp=job.xp)
            sigma, u, V = iterate_rows(*products, V, n_iter, kind, job.xp, fresh[i])
            triplets.append(Triplet(sigma, u, from_memory_order(V, job.plan, job.xp)))
        return finish(jobs, triplets, self._add, self._scale)


def iteration_arrays(job: Job) -> tuple[Array, Array, Traits]:
    """Return W and V of a job in memory order and in the dtype of the iteration."""
    W, kind = _iteration_matrix(job)
    V = to_memory_order(job.V, job.plan, job.xp)
    return W, cast(V, kind.iteration_dtype, job.xp), kind


def _iteration_matrix(job: Job) -> tuple[Array, Traits]:
    """Return W of a job in memory order, in the dtype of the iteration, and its traits."""
    kind = traits(job.weight, job.xp, f"weight {job.name!r}")
    W = matrix_in_memory_order(job.weight, job.plan, job.xp)
    return cast(W, kind.iteration_dtype, job.xp), kind


def wave_iterations(
    jobs: Sequence[Job], n_iter: int, fresh: Sequence[Array | float]
) -> list[Triplet]:
    """Iterate jobs with the same `Wave` and kind of arrays, and return their triplets."""
    kinds, products, Vs = [], [], []
    for job in jobs:
        W, kind = _iteration_matrix(job)
        kinds.append(kind)
        products.append(_products(W, job.plan, job.xp))
        Vs.append(cast(job.V, kind.iteration_dtype, job.xp))
    wave, xp = jobs[0].wave, jobs[0].xp
    assert wave is not None
    return iterate_waves(products, Vs, wave, n_iter, kinds[0], xp, fresh)


def _products(W: Array, plan: Plan, xp: Namespace) -> Products:
    """Return both products of a matrix in memory order, on rows in the order of `as_matrix`."""
    if plan.order == plan.memory_order:
        return partial(times_rows, W, xp=xp), partial(adjoint_times_rows, W, xp=xp)

    def times(V: Array) -> Array:
        return times_rows(W, to_memory_order(V, plan, xp), xp)

    def adjoint_times(Q: Array) -> Array:
        return from_memory_order(adjoint_times_rows(W, Q, xp), plan, xp)

    return times, adjoint_times


def fresh_directions(jobs: Sequence[Job]) -> Sequence[Array]:
    """Return the `fresh_direction` of each job; a `JobList` keeps them.

    It is in memory order, but in that of `as_matrix` for waves.
    """
    kept = jobs.memo.get(fresh_directions) if isinstance(jobs, JobList) else None
    if kept is None:
        kept = [_fresh_in_memory_order(job) for job in jobs]
        if isinstance(jobs, JobList):
            jobs.memo[fresh_directions] = kept
    return kept


def _fresh_in_memory_order(job: Job) -> Array:
    fresh, plan, xp = fresh_direction(job.V, job.xp), job.plan, job.xp
    if plan.order != plan.memory_order and job.wave is None:
        fresh = to_memory_order(xp.broadcast_to(fresh, job.V.shape), plan, xp)
    return cast(fresh, traits(job.weight, xp, f"weight {job.name!r}").iteration_dtype, xp)


def finish(jobs: Sequence[Job], triplets: Sequence[Triplet], add: Add, scale: Scale) -> Result:
    """Add each job's term to its gradient, or scale its weight to its bound."""
    # Everything is computed before the first array changes: an error leaves every one whole.
    changes: list[list[tuple[Array, ...]]] = []
    found: list[Triplet] = []
    for job, triplet in zip(jobs, triplets, strict=True):
        if isinstance(job.rule, Bound):
            s = job.rule.scale(triplet.sigma)
            changes.append([(broadcast_stack(s, job.plan, job.xp),)])
            # NumPy makes a scalar of the product.
            triplet = triplet._replace(sigma=job.xp.asarray(s * triplet.sigma))
        elif job.grad is None:
            changes.append([])
        else:
            price = job.plan, job.factor, job.rule, job.xp
            changes.append([outer_factors(t, *price) for t in parts_of(triplet, job.wave, job.xp)])
        found.append(triplet)
    grads: list[Array | None] = []
    for job, change in zip(jobs, changes, strict=True):
        if job.grad is None or not change:
            grads.append(None)
        elif isinstance(job.rule, Bound):
            grads.append(scale(job.grad, change[0][0], job.plan, job.xp))
        else:
            # Splitting an axis in two never copies: in place, this is the caller's memory.
            total = reshaped(job.grad, job.plan.split, job.xp)
            for u, v in change:
                total = add(total, u, v)
            grads.append(reshaped(total, job.weight.shape, job.xp))
    return Result(grads, found)


def last_of(job: Job) -> Triplet:
    """Return the result of the step before; raise `ArgumentError` if the state does not keep it."""
    if job.last is None:
        raise ArgumentError(
            f"n_iter is 0, but the state holds no u of {job.name!r}: iterate at least once"
        )
    return job.last


def make_jobs(
    names: Iterable[str],
    weights: Mapping[str, Array],
    state: SpectralState,
    *,
    grads: Mapping[str, Array | None] | None = None,
    factors: Mapping[str, Number] | None = None,
    rules: Mapping[str, Rule | None] | None = None,
) -> list[Job]:
    """Return the jobs of these weights, checked to fit their state and gradients.

    Raises
    ------
    ShapeError
        If shapes do not fit: one message names every weight concerned.
    DTypeError, DeviceError
        If a dtype or a device does not fit.
    """
    jobs, misfits = [], []
    for name in names:
        grad = None if grads is None else grads[name]
        factor = 0.0 if factors is None else factors[name]
        rule = None if rules is None else rules[name]
        weight, V, u = weights[name], state.v[name], state.u.get(name)
        last = None if u is None else Triplet(state.sigma[name], u, V)
        fitting = Fitting(V, grad, factor, None if last is None else last.sigma, u)
        try:
            plan, xp = state.checks.fit(name, weight, state.layouts[name], fitting)
        except ShapeError as error:
            misfits.append(str(error))
            continue
        wave = wave_of(state.layouts[name], tuple(weight.shape))
        jobs.append(Job(name, constant(weight), grad, V, factor, rule, plan, xp, last, wave))
    if misfits:
        raise ShapeError("\n".join(misfits))
    return jobs


def _divide(jobs: Sequence[Job], engines: Sequence[Engine], overlaps: set[int]) -> list[Share]:
    places: dict[int, list[int]] = {}
    for place, job in enumerate(jobs):
        first = len(engines) - 1
        if place not in overlaps:
            first = next((i for i, engine in enumerate(engines) if engine.accepts(job)), first)
        places.setdefault(first, []).append(place)
    if len(places) <= 1:
        # Without the jobs: a list that holds itself would keep its tensors until a collection.
        return [Share(engines[next(iter(places), -1)], (), [])]
    return [
        Share(engines[i], JobList(jobs[place] for place in mine), mine)
        for i, mine in places.items()
    ]


def _overlaps(jobs: Sequence[Job], addresses: Sequence[int] | None) -> set[int]:
    """Return the places of jobs whose gradient shares memory with that of a job before it."""
    ranges = []
    for place, job in enumerate(jobs):
        if job.grad is not None:
            start = address_of(job.grad) if addresses is None else addresses[place]
            if start is not None:
                ranges.append((start, place, job.grad.nbytes))
    shared, end = set(), 0
    for start, place, size in sorted(ranges):
        if start < end:
            shared.add(place)
        end = max(end, start + size)
    return shared
