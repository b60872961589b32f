"""Launch the Triton kernels on the matrices of one kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from spectral_core import ArgumentError
from spectral_core.engine import Bound, Job, JobList

from . import triton_device
from .graph_tables import GraphTable, capturing, current
from .triton_tables import SUMS_WIDTH, UPDATE_WARPS, Addresses, Kind, Shape, Slots, Tables

_COLUMNS_HEIGHT = 32
_PRODUCT_REGISTERS = 128
# Triton 3.9 warns where this is left open, and a later version may choose otherwise: other bits.
_OPTIONS = {"enable_fp_fusion": True}

# The table of penalties, the tensors it refers to, and whether any is sloped, and any a bound.
_Penalties: TypeAlias = tuple[Tensor, Tensor | None, tuple[bool, bool]]


class Group(Tables):
    """Launch the kernels on the matrices of one kind, with their tables and scratch memory."""

    def __init__(self, kind: Kind, jobs: Sequence[Shape]) -> None:
        if capturing(kind.device):
            raise RuntimeError(
                "a step is captured in a CUDA graph before one was run with weights of these "
                "shapes: run one first, so that its kernels and tables are there"
            )
        super().__init__(kind, jobs)
        self._stream = torch.cuda.current_stream() if self.device.type == "cuda" else None
        self.addresses = GraphTable((len(self.n), 7), torch.int64, self.device)
        self.penalties = GraphTable((len(self.n), 5), torch.float64, self.device)
        # Compiled kernels on their grids, and their constants, by name and case.
        self._bound: dict[tuple[str, tuple[Any, ...]], tuple[Any, tuple[Any, ...]]] = {}
        self._numbers: tuple[Any, _Penalties] | None = None  # of a list whose numbers are the same

    @property
    def _memory(self) -> tuple[Tensor, ...]:
        """The tables of work, and the scratch memory."""
        return self.work

    @property
    def _kernels(self) -> Any:
        """The module of the kernels."""
        return triton_device.kernels()

    @property
    def _numbers_of_update(self) -> Tensor:
        """What `update` needs of each matrix: 1/‖t‖."""
        return self.work.inverses

    @property
    def captured(self) -> bool:
        """True if a CUDA graph reads the tables."""
        return self.addresses.captured or self.penalties.captured

    def run(self, addresses: Addresses, jobs: Sequence[Job], n_iter: int) -> None:
        """Launch all kernels of a step.

        Parameters
        ----------
        addresses : tuple
            As `_addresses_of`, those of the gradients (0 is no gradient), and the places of the
            jobs in this group. A matrix without a job is left out.
        jobs : sequence of Job
            Their factors and rules are those of this step.
        n_iter : int
        """
        pointers, classes = self.addresses.get(addresses, self._make_pointers)
        penalties, gathered, kinds = self._penalties(jobs, addresses[2])
        with current(self.device):
            self._use_on_this_stream()
            for i in range(n_iter):
                self._iterate(pointers, classes[0], first=i == 0, keep=i + 1 < n_iter)
            self._update(pointers, classes[1], penalties, gathered, (n_iter > 0, *kinds))

    def _use_on_this_stream(self) -> None:
        """Keep the memory of the tables until the work of another stream on them is complete.

        A capture needs no such note: the engine keeps what a graph reads.
        """
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream()
        if stream != self._stream and not capturing(self.device):
            for tensor in (*self._memory, *self.addresses.tensors, *self.penalties.tensors):
                tensor.record_stream(stream)
            self._stream = stream

    def _iterate(self, pointers: Tensor, classes: int, *, first: bool, keep: bool) -> None:
        work = self.work
        self._launch(
            *("products", (classes, first), len(work.items), self._products_constants),
            *(pointers, work.shapes, work.items, work.sums, work.ts, work.squares),
        )
        self._add_sums(pointers)
        self._launch(
            *("columns", (), len(work.blocks), self._columns_constants),
            *(pointers, work.shapes, work.blocks, work.sums, work.squares),
            *(work.zs, work.z_squares, work.inverses),
        )
        if keep:
            self._launch(
                *("directions", (), len(work.blocks), self._directions_constants),
                *(pointers, work.shapes, work.blocks, work.zs, work.z_squares),
            )

    def _add_sums(self, pointers: Tensor) -> None:
        work = self.work
        if len(work.parts):
            self._launch(
                *("add_sums", (), len(work.parts), self._add_sums_constants),
                *(pointers, work.shapes, work.parts, work.sums, work.squares),
            )

    def _update(
        self,
        pointers: Tensor,
        classes: int,
        penalties: Tensor,
        gathered: Tensor | None,
        kinds: tuple[bool, ...],
    ) -> None:
        work = self.work
        numbers = penalties if gathered is None else gathered
        self._launch(
            *("update", (classes, gathered is not None, numbers.dtype, *kinds), len(work.tiles)),
            self._update_constants,
            *(pointers, work.shapes, work.tiles, penalties, numbers),
            *(work.zs, work.z_squares, self._numbers_of_update, work.ts),
        )

    def _launch(
        self,
        name: str,
        case: tuple[Any, ...],
        programs: int,
        constants_of: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
        *tensors: Tensor,
    ) -> None:
        """Launch a kernel: the first time of a case by Triton, and then as it was compiled.

        Triton's own launch binds the arguments, looks the kernel up by the value of each constant
        and by the alignment of each tensor, and so needs 16 µs. The constants of a case are always
        the same. So are the dtype and the alignment of the tensors, which this group has allocated:
        the compiled kernel is launched with them at once. Only ``gathered`` comes from elsewhere;
        its dtype is part of the case, and Triton does not specialize on it.
        """
        bound = self._bound.get((name, case))
        if bound is not None:
            launch, constants = bound
            launch(*tensors, *constants)
            return
        arguments, options = constants_of(*case)
        kernel = getattr(self._kernels, name)
        compiled = kernel[(programs,)](*tensors, **arguments, **options, **_OPTIONS)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._bound[name, case] = compiled[(programs, 1, 1)], tuple(arguments.values())

    def _products_constants(
        self, classes: int, first: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {
            "DTYPE": triton_device.language(self.weight_dtype),
            "ACC": triton_device.language(self.dtype),
            "TILE": self.product_tile,
            "VECTOR": 16 // self.weight_dtype.itemsize,
            "CLASSES": classes,
            "STAGES": triton_device.stages(self.weight_dtype, self.n_vectors),
            "FIRST": first,
            "PERMUTED": self.permuted,
            "TRANSPOSED": self.transposed,
        }
        return constants, {"num_warps": self.n_warps, "maxnreg": _PRODUCT_REGISTERS}

    def _add_sums_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {
            "ACC": triton_device.language(self.dtype),
            "HEIGHT": 16,
            "WIDTH": SUMS_WIDTH,
            "STAGES": 3,
            "K": self.n_vectors,
        }
        return constants, {"num_warps": 4}

    def _columns_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {
            "ACC": triton_device.language(self.dtype),
            "TINY": torch.finfo(self.dtype).tiny,
            "HEIGHT": _COLUMNS_HEIGHT,
            "STAGES": 3,
            "BLOCK": self.block,
        }
        return constants, {"num_warps": 4}

    def _directions_constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {
            "ACC": triton_device.language(self.dtype),
            "TINY": torch.finfo(self.dtype).tiny,
            "PERMUTED": self.permuted,
            "BLOCK": self.block,
        }
        return constants, {"num_warps": 4}

    def _update_constants(
        self,
        classes: int,
        from_tensors: bool,
        _: torch.dtype,
        iterated: bool,
        sloped: bool,
        bounded: bool,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        constants = {
            "DTYPE": triton_device.language(self.grad_dtype),
            "ACC": triton_device.language(self.dtype),
            "SUM": triton_device.language(self.sum_dtype),
            "TINY": torch.finfo(self.dtype).tiny,
            "TILE": self.update_tile,
            "VECTOR": 16 // self.grad_dtype.itemsize,
            "CLASSES": classes,
            "ITERATED": iterated and self.n_vectors == 1,
            "GATHERED": from_tensors,
            "SLOPED": sloped,
            "BOUNDED": bounded,
            "PERMUTED": self.permuted,
            "TRANSPOSED": self.transposed,
            "SORTED": iterated and self.n_vectors > 1,
        }
        return constants, {"num_warps": UPDATE_WARPS}

    def _penalties(self, jobs: Sequence[Job], slots: Slots) -> _Penalties:
        """Return the table of penalties, the tensors it refers to, and (SLOPED, BOUNDED).

        A row is (factor, slot, target, slot, code). A slot is a place among the tensors, or -1.
        Code 0 is the paper's penalty.
        """
        numbers = jobs.numbers if isinstance(jobs, JobList) else None
        if (
            self._numbers is not None
            and numbers is self._numbers[0]
            and not self.penalties.captured
            # A graph that is captured now must be known to read the table.
            and not capturing(self.device)
        ):
            return self._numbers[1]
        self._numbers = None
        factors = [job.factor for job in jobs]
        rules = [job.rule for job in jobs]
        sloped = rules.count(None) < len(rules)
        kinds = sloped, sloped and any(isinstance(rule, Bound) for rule in rules)
        if not sloped and {float}.issuperset(map(type, factors)):
            table = self.penalties.get((slots, *factors), self._make_penalties)[0]
            found: _Penalties = table, None, kinds
        else:
            found = self._penalties_of(factors, rules, kinds, slots)
        constant = {float, int}.issuperset(map(type, factors)) and all(
            rule is None or type(rule.target) in (float, int) for rule in rules
        )
        if numbers is not None and constant:
            self._numbers = numbers, found
        return found

    def _is_on_device(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.device == self.device

    def _penalties_of(
        self, factors: list[Any], rules: list[Any], kinds: tuple[bool, bool], slots: Slots
    ) -> _Penalties:
        targets = [0.0 if rule is None else rule.target for rule in rules]
        codes = [0 if rule is None else rule.code for rule in rules]
        tensors = {id(x): x for x in (*factors, *targets) if self._is_on_device(x)}
        nth = {key: place for place, key in enumerate(tensors)}

        def entry(x: Any) -> tuple[float, int]:
            if id(x) in nth:
                return 1.0, nth[id(x)]
            if isinstance(x, Tensor) and capturing(self.device):
                raise ArgumentError(
                    "a factor, target or bound is a tensor on the CPU, which the replays of a CUDA "
                    "graph cannot read: move it to the device of the weights, or give a number"
                )
            return float(x), -1

        key = [
            (*entry(factor), *entry(target), code)
            for factor, target, code in zip(factors, targets, codes, strict=True)
        ]
        table, _ = self.penalties.get((slots, *key), self._make_penalties)
        return table, _gathered(list(tensors.values())) if tensors else None, kinds

    def _make_penalties(self, key: tuple[Any, ...]) -> tuple[np.ndarray, None]:
        slots, *numbers = key
        rows = [row if isinstance(row, tuple) else (row, -1, 0.0, -1, 0) for row in numbers]
        table = np.zeros((len(self.counts), 5))
        table[slice(None) if slots is None else list(slots)] = rows
        return np.repeat(table, self.counts, axis=0), None


def _gathered(tensors: list[Tensor]) -> Tensor:
    """Return all of them in one tensor: without a launch if there is one, else in one or a few."""
    if len(tensors) == 1:
        return tensors[0]
    if len({x.dtype for x in tensors}) > 1:
        tensors = [x.to(torch.float64) for x in tensors]
    return torch.stack(tensors)
