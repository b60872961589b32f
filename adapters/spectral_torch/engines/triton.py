"""Run one step of Algorithm 1 on all weights of a model in three launches an iteration.

Nothing waits for the device, and nothing is read from it. Results are written into the existing
V, u, sigma and gradient tensors, because a captured CUDA graph refers to them by address
(`graph_tables` says what a graph may rely on).

The kernels (`triton_kernels`) find the matrices by tables on the device. The tables that depend on
shapes alone are made once (`triton_tables`). The table of addresses and the one of factors and
targets are uploaded when one of their entries has changed (`GraphTable`).

On an H100 a step is bound by memory: it must read W once, and read and write G. A tile of rows of W
is used for both products while it is in registers, so W is not read twice.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from spectral_core import ArgumentError
from spectral_core.engine import (
    Engine,
    Job,
    JobList,
    ReferenceEngine,
    Result,
    Triplet,
    dispatch,
    last_of,
)

from .foreach import write_into
from .graph_tables import capturing
from .triton_accepts import accepts, window_of
from .triton_group import Group
from .triton_tables import Kind, Shape, Slots

_SETS = 64  # sets of jobs whose tables and scratch memory are kept: optimizers take turns
# A step of a part of these jobs uses their tables, if it has more than one in so many of them. A
# program whose matrix is absent costs a few ns, but new tables cost allocations and uploads.
_WORTH_A_PART = 8

_REFERENCE = ReferenceEngine(in_place=True)


@dataclass(slots=True)
class _Share:
    """Hold the jobs of one kind, and everything that does not change from step to step."""

    kind: Kind
    places: list[int]  # among all jobs
    addresses: tuple[int, ...]  # of weights, V, u and sigma
    group: Group | None = None
    slots: Slots = None

    def of_step(self, jobs: Sequence[Job]) -> tuple[Sequence[Job], tuple[int, ...]]:
        """Return the jobs of this share, and the addresses of their gradients: 0 is no gradient."""
        grads = jobs.addresses if isinstance(jobs, JobList) else None
        if len(self.places) < len(jobs):
            jobs = [jobs[i] for i in self.places]
            grads = None if grads is None else [grads[i] for i in self.places]
        if grads is None:
            grads = [0 if job.grad is None else job.grad.data_ptr() for job in jobs]
        return jobs, tuple(grads)


class _Prepared(NamedTuple):
    """Hold everything about a step that does not depend on gradients and factors."""

    triplets: list[Triplet]  # the tensors that the results are written into
    shares: list[_Share]


class TritonEngine:
    """Run jobs on an NVIDIA GPU, all matrices of a model at once.

    Results are written into each job's V, last u and last sigma, and these tensors are returned. If
    a job has no ``last``, its u and sigma are new. Keep one engine for each set of weights: it
    holds their tables and scratch memory, for all sets of shapes that it has met.

    Parameters
    ----------
    fallback : Engine, optional
        An engine that works in place. If the kernels fail before they have run once for a device
        and pair of dtypes (Triton may find no C compiler), the engine warns, and accepts no further
        jobs. The fallback runs those that have failed, and the reference those that the fallback
        does not accept. Without a fallback the error is raised.

    Raises
    ------
    spectral_core.ArgumentError
        If ``fallback`` does not work in place.

    Notes
    -----
    In a CUDA graph: run one step with tensors of the same shapes and dtypes before the capture, and
    keep the engine as long as the graph. Factors and targets that are numbers are those of the
    capture at every replay. Tensors are read anew. Steps may go on beside replays, on the same
    stream or ordered after it.

    Examples
    --------
    >>> from spectral_torch.engines.triton import TritonEngine
    >>> TritonEngine().run([], n_iter=1)
    Result(grads=[], triplets=[])
    """

    in_place = True

    def __init__(self, fallback: Engine | None = None) -> None:
        if fallback is not None and not fallback.in_place:
            raise ArgumentError("the fallback of TritonEngine must work in place")
        self._fallback = fallback
        self._failed = False
        self._has_run: set[Kind] = set()
        self._groups: dict[tuple[Kind, tuple[Shape, ...]], Group] = {}
        self._captured: set[Group] = set()

    def __reduce__(self) -> tuple[type[TritonEngine], tuple[Engine | None]]:
        # A copy has none of the memory that graphs of this engine write to.
        return TritonEngine, (self._fallback,)

    def accepts(self, job: Job) -> bool:
        """Return True if the kernels can run this job.

        They need a real weight and gradient on a GPU, both contiguous or both in the channels-last
        format of convolutions, whose matrix is the tensor reshaped. A layer that has its inputs
        before its outputs, such as a transposed convolution, needs contiguous ones. V and the last
        triplet must be contiguous, in the dtype of the iteration, with at most `MOST_VECTORS` for
        each matrix.
        """
        return job.wave is None and not self._failed and accepts(job)

    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, those of one device and pair of dtypes in the same launches.

        Parameters
        ----------
        jobs : sequence of Job, or JobList
            For a `JobList`, the work that does not depend on gradients is done in its first step.
        n_iter : int
            Power iterations. With 0 the term is that of each job's ``last``.

        Returns
        -------
        Result

        Raises
        ------
        spectral_core.ArgumentError
            If ``n_iter`` is 0 and a job has no ``last``.
        RuntimeError
            If a graph is captured, and no step was run before with such jobs.
        """
        prepared = self._prepare(jobs, n_iter)
        for share in prepared.shares:
            mine, grads = share.of_step(jobs)
            if not self._failed:
                try:
                    if share.group is None:
                        share.group, share.slots = self._group_of(share.kind, mine)
                    share.group.run((share.addresses, grads, share.slots), mine, n_iter)
                    self._has_run.add(share.kind)
                    if share.group.captured:
                        # As long as the graph, which reads its tables at every replay.
                        self._captured.add(share.group)
                    continue
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    self._give_up(share.kind, error)
            self._fall_back(mine, [prepared.triplets[i] for i in share.places], n_iter)
        return Result([job.grad for job in jobs], prepared.triplets)

    def _prepare(self, jobs: Sequence[Job], n_iter: int) -> _Prepared:
        """Divide the jobs by kind: for a `JobList`, as in its first step."""
        kept = jobs.memo if isinstance(jobs, JobList) and not jobs.moves else {}
        if (known := kept.get(self)) is not None:
            return known
        triplets = [_target(job) for job in jobs] if n_iter else [last_of(job) for job in jobs]
        places: dict[Kind, list[int]] = {}
        for place, job in enumerate(jobs):
            grad = job.weight if job.grad is None else job.grad
            dtypes = job.weight.dtype, grad.dtype
            kind = Kind(job.weight.device, *dtypes, job.V.shape[-2], not job.plan.reshapes)
            places.setdefault(kind, []).append(place)
        shares = [
            _Share(kind, mine, _addresses_of(jobs, triplets, mine)) for kind, mine in places.items()
        ]
        prepared = _Prepared(triplets, shares)
        # Only where the results go to the same tensors in each step, with iterations or without.
        if all(job.last is not None and job.last.V is job.V for job in jobs):
            kept[self] = prepared
        return prepared

    def _give_up(self, kind: Kind, error: Exception) -> None:
        """Use the fallback from now on, or raise the error if that is not safe.

        Before the kernels of a kind have run once, no gradient of that kind has changed.
        """
        if self._fallback is None or kind in self._has_run or capturing(kind.device):
            raise error
        self._failed = True
        warnings.warn(
            "Triton's kernels cannot be used here. PyTorch's operations are used instead, which "
            f"are slower; kernels=False avoids this warning: {error!r}",
            RuntimeWarning,
            stacklevel=3,
        )

    def _fall_back(self, jobs: Sequence[Job], triplets: Sequence[Triplet], n_iter: int) -> None:
        """Run jobs by the fallback, and write what it finds into the tensors of ``triplets``."""
        assert self._fallback is not None
        # A list of its own: a `JobList` would remember a division that has this engine in it.
        found = dispatch(list(jobs), n_iter, (self._fallback, _REFERENCE)).triplets
        write_into(
            pair
            for triplet, result in zip(triplets, found, strict=True)
            for pair in zip(triplet, result, strict=True)
        )

    def _group_of(self, kind: Kind, jobs: Sequence[Job]) -> tuple[Group, Slots]:
        """Return a group with tables for these jobs, and their places in it.

        Experts, LayerDrop and layers that are frozen by turns give other sets of jobs in each step.
        A part of a known set uses its tables. Sets that overlap are joined: after a few steps, all
        of them are parts of one.
        """
        shapes = tuple([Shape(job.plan, window_of(job)) for job in jobs])
        if (group := self._groups.get((kind, shapes))) is not None:
            return group, None
        worth = [
            (known, group)
            for (kind_, known), group in self._groups.items()
            if kind_ == kind and len(jobs) * _WORTH_A_PART >= len(known)
        ]
        for known, group in sorted(worth, key=lambda pair: len(pair[0])):
            if (slots := _places_in(known, shapes)) is not None:
                return group, slots
        old = max((known for known, _ in worth if {*known} & {*shapes}), key=len, default=())
        joined = *old, *(Counter(shapes) - Counter(old)).elements()
        group = _group_class(kind)(kind, joined)
        self._forget(*[(kind, old)] * bool(old))
        self._groups[kind, joined] = group
        return group, _places_in(joined, shapes) if old else None

    def _forget(self, *keys: tuple[Kind, tuple[Shape, ...]]) -> None:
        """Drop these groups and the oldest ones; `_captured` keeps those that a graph may read."""
        for key in [*keys, *list(self._groups)[: max(0, len(self._groups) + 1 - _SETS)]]:
            self._groups.pop(key, None)


def _places_in(known: tuple[Shape, ...], shapes: tuple[Shape, ...]) -> Slots:
    """Return a place in ``known`` for each of ``shapes``, or None if there are too few."""
    free: dict[Shape, list[int]] = {}
    for place in reversed(range(len(known))):
        free.setdefault(known[place], []).append(place)
    try:
        return tuple([free[shape].pop() for shape in shapes])
    except (KeyError, IndexError):
        return None


def _group_class(kind: Kind) -> type[Group]:
    """Return the class that iterates so many vectors."""
    if kind.n_vectors == 1:
        return Group
    from .triton_rows import RowsGroup  # it imports Triton

    return RowsGroup


def _target(job: Job) -> Triplet:
    """Return the tensors that the results are written into."""
    last, V = job.last, job.V
    if last is None:
        return Triplet(V.new_empty(job.plan.stack), V.new_empty(job.plan.left), V)
    return last if last.V is V else Triplet(last.sigma, last.u, V)


def _addresses_of(
    jobs: Sequence[Job], triplets: Sequence[Triplet], places: Sequence[int]
) -> tuple[int, ...]:
    """Return the addresses of all weights, then of all V, u and sigma."""
    return (
        *[jobs[i].weight.data_ptr() for i in places],
        *[triplets[i].V.data_ptr() for i in places],
        *[triplets[i].u.data_ptr() for i in places],
        *[triplets[i].sigma.data_ptr() for i in places],
    )
