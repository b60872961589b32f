"""Put a step into a graph of `torch.compile` as one operation.

The kernels are compiled already: there is nothing in them for `torch.compile` to trace. An
operation can receive only tensors, numbers and text. The names and layouts of the weights are
therefore text, and a number finds the engines that run the step.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from functools import partial
from itertools import count
from math import isnan, nan
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import spectral_core as sc
from spectral_core.engine import (
    Checks,
    Job,
    Number,
    Triplet,
    dispatch,
    first_matches,
    make_jobs,
    slope_of,
)

from ._compiled_jobs import CompiledJobs, Given
from ._jobs import write_back
from .engines.dtensor import is_sharded

# `torch.compile` cannot trace patterns, but the same text always gives the same answer. This is
# what `torch.compiler.assume_constant_result` does, after a second of importing.
first_matches._dynamo_marked_constant = True  # type: ignore[attr-defined]

_GRAPHED = ("cuda",)  # the devices whose work `mode="reduce-overhead"` captures

# The regularizers keep these alive, with the memory that captured graphs read.
_by_number: WeakValueDictionary[int, CompiledJobs] = WeakValueDictionary()
_numbers = count()


def number_of(jobs: CompiledJobs) -> int:
    """Return a number by which `run` finds ``jobs``, and their engines."""
    number = next(_numbers)
    _by_number[number] = jobs
    return number


def mark_static(state: sc.SpectralState) -> None:
    """Announce that V, sigma and u stay at their addresses, since steps write into them.

    `mode="reduce-overhead"` captures no CUDA graph of a step that writes into other inputs. An
    address that changes after all is noticed, and captured anew.
    """
    for field in (state.v, state.sigma, state.u):
        for tensor in field.values():
            if tensor.device.type in _GRAPHED:
                # As `torch._dynamo.mark_static_address`, without a second of importing.
                tensor._dynamo_static_input_type = "unguarded"


def described(name: str, layout: sc.Layout) -> str:
    """Return a weight's name and layout as one line of text."""
    return json.dumps([name, layout.axes, layout.groups])


def accepts(parameter: Tensor, V: Tensor) -> bool:
    """Return True if the weight is whole, and V has its device and its dtype of iteration."""
    dtype, half = parameter.dtype, parameter.dtype in (torch.float16, torch.bfloat16)
    iterated = V.dtype == (torch.float32 if half else dtype)
    return iterated and V.device == parameter.device and not is_sharded(parameter)


def run(
    lines: Sequence[str],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    triplets: Sequence[Triplet],
    factors: Sequence[Number],
    targets: Sequence[Number],
    *,
    power: int,
    n_iter: int,
    engines: int,
) -> None:
    """Add the terms to the gradients, and write V, sigma and u in place."""
    numbers, tensors = _divided(factors)
    target_numbers, target_tensors = _divided(targets)
    torch.ops.spectral_torch.step_(
        *(list(weights), list(grads)),
        *([t.V for t in triplets], [t.sigma for t in triplets], [t.u for t in triplets]),
        *(numbers, tensors, target_numbers, target_tensors),
        *("\n".join(lines), power, n_iter, engines),
    )


# Not `torch.library.custom_op`: what it does around each call, tensor by tensor, costs half as much
# as the step of many small weights. `_step_` does the part that is needed.
_library = torch.library.Library("spectral_torch", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "step_(Tensor[] weights, Tensor(a!)[] grads, Tensor(b!)[] v, Tensor(c!)[] sigma, "
    "Tensor(d!)[] u, float[] factors, Tensor[] factor_tensors, float[] targets, "
    "Tensor[] target_tensors, str text, int power, int n_iter, int engines) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake("spectral_torch::step_", lambda *_: None, lib=_library)


@torch.library.impl(_library, "step_", "CompositeExplicitAutograd")
@torch.no_grad()
def _step_(
    weights: list[Tensor],
    grads: list[Tensor],
    v: list[Tensor],
    sigma: list[Tensor],
    u: list[Tensor],
    factors: list[float],
    factor_tensors: list[Tensor],
    targets: list[float],
    target_tensors: list[Tensor],
    text: str,
    power: int,
    n_iter: int,
    engines: int,
) -> None:
    # A kernel writes by address, unseen by autograd.
    increment_version([*grads, *v, *sigma, *u])
    given = Given(
        *(weights, grads, v, sigma, u),
        *(_joined(factors, factor_tensors), _joined(targets, target_tensors), power),
    )
    # Numbers as bytes: NaN stands for a tensor, and differs from itself.
    key = text, power, n_iter, array("d", factors).tobytes(), array("d", targets).tobytes()
    kept = _by_number[engines]
    with kept.of(key, given, partial(_made, text)) as jobs:
        write_back(jobs, dispatch(jobs, n_iter, kept.engines).triplets)


def _made(text: str, given: Given) -> list[Job]:
    rows = map(json.loads, text.splitlines())
    layouts = {name: sc.Layout(axes, groups) for name, axes, groups in rows}

    def named(values: Sequence[Number]) -> dict[str, Number]:
        return dict(zip(layouts, values, strict=True))

    state = sc.SpectralState(named(given.v), named(given.sigma), layouts, named(given.u), Checks())
    return make_jobs(
        layouts,
        named(given.weights),
        state,
        grads=named(given.grads),
        factors=named(given.factors),
        rules=slope_of(named(given.targets), given.power, layouts),
    )


def _divided(values: Sequence[Number]) -> tuple[list[float], list[Tensor]]:
    """Return the numbers, with NaN where there is a tensor, and the tensors."""
    numbers = [nan if isinstance(value, Tensor) else value for value in values]
    return numbers, [value for value in values if isinstance(value, Tensor)]


def _joined(numbers: Sequence[float], tensors: Sequence[Tensor]) -> list[Number]:
    rest = iter(tensors)
    return [next(rest) if isnan(number) else number for number in numbers]
