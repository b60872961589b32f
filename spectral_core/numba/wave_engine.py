"""The engine for the norm of convolutions, compiled by Numba: see wave_kernels.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from heapq import heappop, heappush
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .._geometry import Wave, host_taps
from ..engine import Job
from .division import VECTORS, Division
from .engine import _DIVISIONS, NUMPY, Memory, NumbaEngine, _Launch

_BLOCK = 256  # as in wave_kernels.py

# An element of a weight costs so many times the work of a step without waves, for each wave.
_WORK = 4


class _Spec(NamedTuple):
    """What the kernels must know of a job."""

    shape: tuple[int, ...]  # (*stack, m, n)
    wave: Wave
    taps_first: bool


class NumbaWaveEngine(NumbaEngine):
    """Run jobs with waves in place, in one compiled call for all weights of a dtype.

    The engine accepts real weights whose rows follow each other in memory, contiguous or
    channels-last. Weight and gradient are both the one or both the other.

    Parameters
    ----------
    memory, owned
        As for `NumbaEngine`.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> from spectral_core.numba import NumbaWaveEngine
    >>> weights = {"w": np.array([[[1.0, -2.0, 1.0]]])}
    >>> state = sc.init(weights, layouts={"w": sc.Convolution("oik")})
    >>> state = sc.iterate(weights, state, n_iter=20, engines=[NumbaWaveEngine()])
    >>> round(float(state.sigma["w"]), 6)
    4.0
    """

    def __init__(self, memory: Memory = NUMPY, *, owned: bool = False) -> None:
        super().__init__(memory, owned=owned)
        self._waves_of = lru_cache(_DIVISIONS)(WaveDivision)

    def accepts(self, job: Job) -> bool:
        """Return True for a real job with waves whose rows follow each other in memory."""
        if self._kernels is None or job.wave is None:
            return False
        last, memory = job.last, self._memory
        if last is not None:
            # u is complex; all else is as for the other kernels.
            size = 2 * job.V.nbytes // prod(job.V.shape)
            if last.u.nbytes != size * prod(job.plan.left):
                return False
            if self._owned and not (memory.window(last.u) == 1 and memory.writeable(last.u)):
                return False
            job = replace(job, last=last._replace(u=last.sigma))
        form = None if self._kind(job) is None else self._form(job)
        return form is not None and not form.turned

    def _call(
        self, launch: _Launch, numbers: np.ndarray[Any, Any]
    ) -> tuple[Callable[..., None], tuple[Any, ...]]:
        """Return the kernels, loaded when a model first has waves, and their arguments."""
        from . import wave_kernels

        division: Any = launch.division
        tables = division.starts, division.members, launch.matrices, *division.taps
        return wave_kernels.run, (division.threads, *tables, numbers, *division.room)

    def _divided(self, jobs: Sequence[Job], most: int | None) -> list[_Launch]:
        """Return one launch for each dtype."""
        kinds: dict[str, list[int]] = {}
        for place, job in enumerate(jobs):
            kinds.setdefault(self._memory.dtypes[job.weight.dtype], []).append(place)
        launches = []
        for kind, places in kinds.items():
            specs = tuple(self._spec(jobs[place]) for place in places)
            work = sum(_WORK * spec.wave.waves * prod(spec.shape) for spec in specs)
            few = work < self._memory.worth_threads()
            threads = 1 if few else self._kernels.threads(most)
            division = self._waves_of(kind, specs, threads)
            launches.append(_Launch(places, division, len(jobs) == len(places)))
        return launches

    def _spec(self, job: Job) -> _Spec:
        assert job.wave is not None
        form = self._form(job)
        return _Spec(job.plan.matrix, job.wave, form is not None and form.window > 1)


class WaveDivision(Division):
    """Give each thread some of the matrices, and room to work in.

    Parameters
    ----------
    kind : str
        Dtype of the elements.
    specs : sequence of _Spec
    threads : int
        Largest number of threads.
    """

    def __init__(self, kind: str, specs: Sequence[_Spec], threads: int) -> None:
        counts = [prod(spec.shape[:-2]) for spec in specs]
        self._job = np.repeat(np.arange(len(specs)), counts)
        self._stacked = len(self._job) > len(specs)
        each = [specs[i] for i in self._job.tolist()]
        taps = _Taps(each)
        self.starts, self.members = _shares([_work(spec) for spec in each], threads)
        self.threads = len(self.starts) - 1
        thread = np.empty(len(each), np.int64)
        thread[self.members] = np.repeat(np.arange(self.threads), np.diff(self.starts))
        sizes = np.asarray([_sizes(spec) for spec in each])
        room, small = sizes.max(axis=0)
        vectors = np.dtype(VECTORS[kind])
        self.room = (
            np.empty(0, kind),
            np.empty(int(self.threads * room), vectors),
            np.empty(int(self.threads * small)),
            np.empty((2 * len(each), max(spec.wave.waves for spec in specs)), np.int64),
        )
        self.taps = taps.numbers, taps.leaps
        self._table = np.zeros((len(each) + 1, 13), np.int64)
        shapes = np.asarray([spec.shape[-2:] for spec in each])
        self._table[:-1, :2] = shapes
        self._table[:-1, 7] = [spec.wave.waves for spec in each]
        self._table[:-1, 8] = taps.places
        self._table[:-1, 9] = [spec.taps_first for spec in each]
        self._table[:-1, 10] = [_inputs(spec) for spec in each]
        self._table[:-1, 11], self._table[:-1, 12] = thread * room, thread * small
        within = np.concatenate([np.arange(count) for count in counts])
        m, n = shapes.T
        element, vector = self.room[0].itemsize, vectors.itemsize
        rows = np.asarray([_row_length(spec) * spec.wave.waves for spec in each])
        strides = [element * m * n, element * m * n, vector * rows, 2 * vector * m, vector + 0 * m]
        self._offsets = within[:, None] * np.stack(strides, axis=1)


class _Taps:
    """The taps of all matrices, those of equal waves once: see `_taps` of the kernels."""

    def __init__(self, specs: Sequence[_Spec]) -> None:
        parts: list[np.ndarray[Any, Any]] = []
        places: dict[Wave, int] = {}
        at = 0
        for spec in specs:
            if spec.wave not in places:
                places[spec.wave] = at
                parts.append(_numbers_of_taps(spec.wave))
                at += len(parts[-1])
        self.numbers = np.concatenate(parts)
        self.places = [places[spec.wave] for spec in specs]
        self.leaps = np.zeros((len(specs), 3))
        for row, spec in zip(self.leaps, specs, strict=True):
            row[: len(spec.wave.sizes)] = host_taps(spec.wave).leap


@lru_cache(maxsize=256)
def _numbers_of_taps(wave: Wave) -> np.ndarray[Any, Any]:
    """Return the numbers of `_taps` of the kernels."""
    taps = host_taps(wave)
    kinds = taps.classes.argmax(axis=0)
    order = np.argsort(kinds, kind="stable")
    first = np.searchsorted(kinds[order], np.arange(len(taps.classes) + 1))
    positive = [tuple(step) for step in taps.steps.tolist() if tuple(step) > (0,) * len(step)]
    steps = [(0,) * len(wave.sizes), *positive]
    numbers = {step: h for h, step in enumerate(steps)}
    numbers.update({tuple(-x for x in step): -h for step, h in numbers.items()})
    places = taps.places[order]
    pairs = [[numbers.get(tuple(q - p), 0) for q in places] for p in places]
    head = len(order), len(wave.sizes), len(taps.classes), len(steps)
    parts = head, order, places, first, steps, pairs
    return np.concatenate([np.asarray(part, np.int64).ravel() for part in parts])


def _inputs(spec: _Spec) -> int:
    return spec.shape[-1] // prod(spec.wave.sizes)


def _row_length(spec: _Spec) -> int:
    """Return the length of a row of the state."""
    return 2 * len(host_taps(spec.wave).classes) * _inputs(spec) + len(spec.wave.sizes)


def _work(spec: _Spec) -> float:
    """Return about how many products and sums an iteration of a matrix needs."""
    (m, n), waves = spec.shape[-2:], spec.wave.waves
    rank = min(m, 2 * waves)
    taps = host_taps(spec.wave)
    grams = rank**2 * len(taps.steps) * waves
    return n * (4 * m * waves + rank * (rank * len(taps.classes.T) / 2 + 2 * waves)) + 8 * grams


def _sizes(spec: _Spec) -> tuple[int, int]:
    """Return the room that a matrix needs: see `_large_of` and `_small_of` of the kernels."""
    (m, n), waves, d = spec.shape[-2:], spec.wave.waves, len(spec.wave.sizes)
    taps, inputs, rank = host_taps(spec.wave), _inputs(spec), min(m, 2 * waves)
    pairs = -(-2 * waves // 4) * 4
    of_class = [-(-int(count) * rank // 4) * 4 for count in taps.classes.sum(axis=1)]
    rows, H = sum(of_class), len(taps.steps) // 2 + 1
    block = pairs * max(_BLOCK, len(taps.classes.T))
    room = pairs * (len(of_class) * inputs + rows + n + m) + rows * inputs + max(of_class) ** 2
    triangle = rank * (rank + 1) // 2
    small = rank * m + 2 * waves * rank + 3 * waves * (d + 2 * rank + 1) + 2 * H * (triangle + 2)
    small += 2 * triangle + 2 * rank * rank + d * (d + 2) + 2 * rank + 2 * waves
    small += 2 * (d * max(spec.wave.sizes) * max(spec.wave.dilation) + len(taps.classes.T))
    return room + block + 16, small + 16


def _shares(works: Sequence[float], threads: int) -> tuple[Any, Any]:
    """Return the matrices of each thread: the largest first, each to the one with the least."""
    threads = max(1, min(threads, len(works)))
    heap: list[tuple[float, int]] = [(0.0, t) for t in range(threads)]
    mine: list[list[int]] = [[] for _ in range(threads)]
    for k in sorted(range(len(works)), key=lambda k: -works[k]):
        load, t = heappop(heap)
        mine[t].append(k)
        heappush(heap, (load + works[k], t))
    starts = np.cumsum([0, *map(len, mine)])
    return starts, np.asarray([k for some in mine for k in some], np.int64)
