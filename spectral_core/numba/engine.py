"""An engine compiled by Numba, for arrays in the memory of the CPU.

It reads a weight once where the reference reads it twice, and runs all weights of a model in one
call. NumPy and PyTorch cannot do that: their matrix–vector products fall short of the memory's
speed, and a small layer costs a dozen of their calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import prod
from os import getpid
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from .._arrays import PROCESS, Array, Namespace
from .._power import Triplet
from ..engine import Job, JobList, MemoryForm, Result, last_of
from .division import GRAIN, PLAIN, VECTORS, Division, Form, Stacks, is_small_stack

# The threads of NumPy's BLAS spin for some 10 ms after a product. A thread of Numba waits for their
# processor: longer than a second thread saves with fewer elements than this.
_BESIDE_BLAS = 1 << 21

# Number of sets of shapes that are kept: several optimizers take turns.
_DIVISIONS = 16

# The kernels of a launch.
_ONE_VECTOR, _IN_ORDER, _IN_ANY_ORDER, _SMALL_STACKS = range(4)


class Memory(NamedTuple):
    """Functions that find the arrays of a library in memory."""

    address: Callable[[Array], int]
    # 1 if the elements are contiguous, and stored as they are; the number of kernel positions of a
    # channels-last convolution; otherwise 0.
    window: Callable[[Array], int]
    # NumPy's name of a dtype; uint16 stands for bfloat16, and int16 for float16.
    dtypes: Mapping[Any, str]
    threads: Callable[[], int | None]  # largest number of threads; None: Numba's own setting
    writeable: Callable[[Array], bool] = lambda _: True
    # Return a contiguous copy: the u of a stack may be a view of several vectors.
    copy: Callable[[Array, Namespace], Array] = lambda x, xp: xp.reshape(
        xp.reshape(xp.asarray(x, copy=True), (-1,)), x.shape
    )
    # Fewer elements than this run in one thread.
    worth_threads: Callable[[], int] = lambda: 2 * GRAIN


def _window(x: Any) -> int:
    # A scalar has no memory of its own: what is written there is lost.
    if not isinstance(x, np.ndarray) or not x.flags.aligned:
        return 0
    if x.flags.c_contiguous:
        return 1
    last = x.ndim > 2 and np.moveaxis(x, 1, -1).flags.c_contiguous
    return prod(x.shape[2:]) if last else 0


NUMPY = Memory(
    address=lambda x: x.__array_interface__["data"][0],
    window=_window,
    dtypes={
        np.dtype("float32"): "float32",
        np.dtype("float64"): "float64",
        np.dtype("float16"): "int16",
    },
    threads=lambda: None,
    writeable=lambda x: x.flags.writeable,
    copy=lambda x, _: np.array(x, order="C"),
    worth_threads=lambda: _BESIDE_BLAS,
)


class NumbaEngine:
    """Run jobs in place, in one compiled call for all weights of a dtype and number of vectors.

    The engine accepts real weights. Weight and gradient are both contiguous or both channels-last.
    The kernel axes may come before the inputs, and the outputs may come last, as in Flax, or
    between inputs and kernel, as in a transposed convolution of PyTorch. Groups come first, or are
    between the inputs and the outputs, as in Flax.

    Parameters
    ----------
    memory : Memory
        How to find the library's arrays in memory.
    owned : bool
        True if V, and the last sigma and u of every job, may be written into. Otherwise they stay
        as they are, and the engine makes new arrays.

    Raises
    ------
    ImportError
        If Numba is not installed.

    Notes
    -----
    Several threads may call the engine. Its calls then run one after the other. A forked child runs
    in one thread, since Numba's threads end a process that was forked after they started. With
    ``NUMBA_DISABLE_JIT=1`` the engine accepts no job: the reference runs them all.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> from spectral_core.numba import NumbaEngine
    >>> weights, grads = {"w": np.array([[3.0, 4.0]])}, {"w": np.zeros((1, 2))}
    >>> state, engines = sc.init(weights), [NumbaEngine()]
    >>> state = sc.add_gradient_(weights, grads, state, factor=0.1, engines=engines)
    >>> np.round(grads["w"], 4)
    array([[0.3, 0.4]])
    """

    in_place = True

    def __init__(self, memory: Memory = NUMPY, *, owned: bool = False) -> None:
        self._kernels = _kernels()
        self._memory = memory
        self._owned = owned
        self._division_of = lru_cache(_DIVISIONS)(Division)
        self._stacks_of = lru_cache(_DIVISIONS)(Stacks)
        # For tables and scratch: the kernel lets other threads run. A lock of each process, since a
        # thread of the parent may hold its lock in the moment of a fork.
        self._locks: dict[int, Lock] = {}

    def accepts(self, job: Job) -> bool:
        """Return True for a real job whose elements are in memory in an order that is known."""
        return self._kernels is not None and job.wave is None and self._kind(job) is not None

    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, those of one dtype and one kind of kernels in one call."""
        if n_iter == 0:
            for job in jobs:
                last_of(job)  # or the error that names the weight without one
        triplets = self._targets(jobs)
        with self._locks.setdefault(getpid(), Lock()):
            for launch in self._launches(jobs):
                launch.place(jobs, triplets, self._memory, self._stays(jobs))
                step, arguments = self._call(launch, launch.numbers(jobs))
                step(*arguments, n_iter)
        return Result([job.grad for job in jobs], triplets)

    def _call(
        self, launch: _Launch, numbers: np.ndarray[Any, Any]
    ) -> tuple[Callable[..., None], tuple[Any, ...]]:
        """Return the kernels of a launch, and their arguments but for the iterations."""
        division = launch.division
        if isinstance(division, Stacks):
            return _lane_kernels().run, (launch.matrices, numbers, *division.room)
        tables = launch.matrices, division.chunks, division.parts
        room = division.like, division.scratch, division.starts
        if division.block:
            step = _block_kernels(in_order=division.in_order).run
            return step, (division.threads, tables, numbers, room, division.block)
        return self._kernels.run, (division.threads, *tables, numbers, *room)

    def _targets(self, jobs: Sequence[Job]) -> list[Triplet]:
        """Return the arrays that the results are written into: v, and the last sigma and u."""
        if not self._owned:
            return [_own_triplet(job, self._memory) for job in jobs]
        lasts: Any = jobs.lasts if isinstance(jobs, JobList) else list(map(last_of, jobs))
        return lasts

    def _stays(self, jobs: Sequence[Job]) -> bool:
        """Return True if all but the gradients is where it was in the step before."""
        return self._owned and isinstance(jobs, JobList) and not jobs.moves

    def _launches(self, jobs: Sequence[Job]) -> list[_Launch]:
        """Return the launches of these jobs: of a `JobList`, those of the step before."""
        most = 1 if getpid() != PROCESS else self._memory.threads()
        if isinstance(jobs, JobList):
            known = jobs.memo.get(self)
            if known is not None and known[0] == most:
                launches: list[_Launch] = known[1]
                return launches
        launches = self._divided(jobs, most)
        if isinstance(jobs, JobList):
            jobs.memo[self] = most, launches
        return launches

    def _divided(self, jobs: Sequence[Job], most: int | None) -> list[_Launch]:
        """Return one launch for each dtype, number of vectors and kind of kernels."""
        kinds: dict[tuple[str, int, int], list[int]] = {}
        forms = [self._form(job) or PLAIN for job in jobs]
        for place, (job, form) in enumerate(zip(jobs, forms, strict=True)):
            kind = self._memory.dtypes[job.weight.dtype], job.V.shape[-2], _kernel_of(job, form)
            kinds.setdefault(kind, []).append(place)
        return [self._launch(kind, jobs, places, forms, most) for kind, places in kinds.items()]

    def _launch(
        self,
        kind: tuple[str, int, int],
        jobs: Sequence[Job],
        places: list[int],
        forms: Sequence[Form],
        most: int | None,
    ) -> _Launch:
        dtype, rows, kernel = kind
        shapes = tuple(jobs[place].plan.matrix for place in places)
        mine = tuple(forms[place] for place in places)
        division: Division | Stacks
        if kernel == _SMALL_STACKS:
            division = self._stacks_of(dtype, shapes, mine)
        else:
            # Asking Numba for its number of threads starts them: a step for one thread does not.
            few = sum(map(prod, shapes)) < self._memory.worth_threads()
            threads = 1 if few else self._kernels.threads(most)
            division = self._division_of(dtype, shapes, threads, rows, mine)
        return _Launch(places, division, len(jobs) == len(places))

    def _form(self, job: Job) -> Form | None:
        """Return the form of the weight in memory, or None where the kernels do not know it."""
        return _numbers_of(job.plan.form(self._memory.window(job.weight)))

    def _kind(self, job: Job) -> str | None:
        """Return the name of the job's dtype, or None for a job that the engine cannot run."""
        weight, grad, memory = job.weight, job.grad, self._memory
        kind = memory.dtypes.get(weight.dtype)
        form = None if kind is None else self._form(job)
        if kind is None or form is None:
            return None
        same = grad is None or (
            grad.dtype == weight.dtype and memory.window(grad) == memory.window(weight)
        )
        if not same:
            return None
        vectors = (job.V,) if job.last is None else (job.V, job.last.u, job.last.sigma)
        for x in vectors:
            if memory.dtypes.get(x.dtype) != VECTORS[kind]:
                return None
            if self._owned and memory.window(x) != 1:
                return None
        written = vectors if self._owned else ()
        if not all(map(memory.writeable, written if grad is None else (grad, *written))):
            return None
        return kind


def _numbers_of(form: MemoryForm | None) -> Form | None:
    """Return the numbers of a form, or None where the kernels do not know it."""
    kinds, window = form or ("", 0)
    if kinds in ("oi", "oik"):
        return PLAIN
    if kinds in ("io", "iko"):
        return Form(1, 1)
    if kinds in ("oki", "kio"):
        return Form(window, int(kinds == "kio"))
    if kinds in ("iso", "kiso"):  # without a kernel, the window is 1
        return Form(window, 1, apart=True)
    return Form(1, 1 + window) if kinds == "iok" else None


def _kernels() -> Any:
    """Return the compiled kernels, or None where Numba was told not to compile."""
    try:
        import numba

        if numba.config.DISABLE_JIT:
            return None
        from . import kernels
    except ImportError as error:
        raise ImportError("NumbaEngine needs Numba: pip install spectral-core[numba]") from error
    return kernels


def _block_kernels(*, in_order: bool) -> Any:
    """Return the compiled kernels for several vectors: whoever has one vector never loads them.

    ``in_order`` is True if all matrices are in memory as they are.
    """
    if in_order:
        from . import block_kernels

        return block_kernels
    from . import turned_block_kernels

    return turned_block_kernels


def _lane_kernels() -> Any:
    """Return the compiled kernels for stacks of small matrices, loaded when a model has some."""
    from . import lane_kernels

    return lane_kernels


def _kernel_of(job: Job, form: Form) -> int:
    """Return which kernels run a job."""
    if job.V.shape[-2] > 1:
        return _IN_ANY_ORDER if form.turned else _IN_ORDER
    # With one vector, the same kernel runs all forms, but for stacks of small matrices.
    return _SMALL_STACKS if is_small_stack(job.plan.matrix, form) else _ONE_VECTOR


class _Launch:
    """One call of the kernels: which jobs, and the table of where their arrays are.

    Parameters
    ----------
    places : list of int
        The places of these jobs among all jobs.
    division : Division or Stacks
    every : bool
        True if the places are those of all jobs.
    """

    def __init__(
        self,
        places: list[int],
        division: Division | Stacks,
        every: bool,
    ) -> None:
        self.places = places
        self.division = division
        self.matrices: Any = None  # the kernel's table of matrices
        self._every = every
        self._numbers: np.ndarray[Any, Any] = np.empty((0, 3))
        self._current: Any = None  # the `JobList.numbers` that `_numbers` belongs to

    def place(
        self, jobs: Sequence[Job], triplets: Sequence[Triplet], memory: Memory, stays: bool
    ) -> None:
        """Write addresses into the table: all of them, unless only the gradients are others."""
        if self.matrices is None or not stays:
            address, found = memory.address, []
            for place in self.places:
                sigma, u, V = triplets[place]
                found.append(
                    (address(jobs[place].weight), 0, address(V), address(u), address(sigma))
                )
            self.matrices = self.division.matrices(found)
        addresses = jobs.addresses if isinstance(jobs, JobList) else None
        if addresses is None:
            addresses = [0 if job.grad is None else memory.address(job.grad) for job in jobs]
        if not self._every:
            addresses = [addresses[place] for place in self.places]
        self.division.place_grads(self.matrices, addresses)

    def numbers(self, jobs: Sequence[Job]) -> np.ndarray[Any, Any]:
        """Return λ, target and code of each matrix; 0 is the code of the paper's penalty.

        They are kept while the numbers of a `JobList` are the same, and none is a tensor.
        """
        current = jobs.numbers if isinstance(jobs, JobList) else None
        if current is not None and self._current is current:
            return self._numbers
        mine = [jobs[place] for place in self.places]
        rows = [
            (float(job.factor), 0.0, 0.0)
            if job.rule is None
            else (float(job.factor), float(job.rule.target), job.rule.code)
            for job in mine
        ]
        self._numbers = self.division.of_each(np.asarray(rows, np.float64))
        constant = all(isinstance(job.factor, float) for job in mine) and all(
            job.rule is None or isinstance(job.rule.target, float) for job in mine
        )
        self._current = current if constant else None
        return self._numbers


def _own_triplet(job: Job, memory: Memory) -> Triplet:
    """Return a V, sigma and u for a job to be written into."""
    xp, plan, last = job.xp, job.plan, job.last
    V = memory.copy(job.V, xp)
    if last is not None:
        return Triplet(memory.copy(last.sigma, xp), memory.copy(last.u, xp), V)
    real = V.dtype
    wide = xp.complex128 if memory.dtypes[real] == "float64" else xp.complex64
    u = xp.zeros(plan.left, dtype=real if job.wave is None else wide, device=V.device)
    return Triplet(xp.zeros(plan.stack, dtype=real, device=V.device), u, V)
