"""The step as one operation of PyTorch, which `torch.compile` puts into its graph as it is.

The kernels are compiled already: there is nothing in them for it to trace. All that an operation
may be given is tensors, numbers and text: so the names and layouts of the weights are text, and the
`Steps` to make is found by a number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from math import isnan, nan
from weakref import WeakValueDictionary

import torch
from torch import Tensor

import spectral_core as sc
from spectral_core.checks import Checks
from spectral_core.patterns import matches

from .sharded import is_sharded
from .steps import Steps

# `torch.compile` cannot trace how fnmatch finds its answer, but it is the same for the same text.
# This is what `torch.compiler.assume_constant_result` does, after a second of importing.
matches._dynamo_marked_constant = True  # type: ignore[attr-defined]

_SETS = 64  # of weights that take part together

Value = float | Tensor

# Kept alive by the regularizers that they belong to, with the memory that captured graphs read.
_steps: WeakValueDictionary[int, Steps] = WeakValueDictionary()
_numbers = count()


def number_of(step: Steps) -> int:
    """A number by which `run` finds ``step``."""
    number = next(_numbers)
    _steps[number] = step
    return number


def described(name: str, layout: sc.Layout) -> str:
    """A weight as one line of text."""
    return json.dumps([name, layout.axes, layout.groups])


def takes(parameter: Tensor, v: Tensor) -> bool:
    """Whether `run` can do this weight: it is whole, and v is where and in what it is iterated."""
    dtype, half = parameter.dtype, parameter.dtype in (torch.float16, torch.bfloat16)
    iterated = v.dtype == (torch.float32 if half else dtype)
    return iterated and v.device == parameter.device and not is_sharded(parameter)


def run(
    lines: Sequence[str],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    vectors: Sequence[sc.PowerIteration],
    factors: Sequence[Value],
    targets: Sequence[Value],
    *,
    power: int,
    n_iter: int,
    step: int,
) -> None:
    """`spectral_core.add_gradient_` of these weights: v, σ and u are written into, too."""
    numbers, tensors = _divided(factors)
    target_numbers, target_tensors = _divided(targets)
    _step_(
        *(list(weights), list(grads)),
        *([t.v for t in vectors], [t.sigma for t in vectors], [t.u for t in vectors]),
        *(numbers, tensors, target_numbers, target_tensors),
        *("\n".join(lines), power, n_iter, step),
    )


@lru_cache(_SETS)
def _read(text: str) -> tuple[dict[str, sc.Layout], Checks]:
    rows = map(json.loads, text.splitlines())
    return {name: sc.Layout(axes, groups) for name, axes, groups in rows}, Checks()


@torch.library.custom_op(
    "spectral_torch::step_",
    mutates_args=("grads", "v", "sigma", "u"),
    schema="(Tensor[] weights, Tensor(a!)[] grads, Tensor(b!)[] v, Tensor(c!)[] sigma, "
    "Tensor(d!)[] u, float[] factors, Tensor[] factor_tensors, float[] targets, "
    "Tensor[] target_tensors, str text, int power, int n_iter, int step) -> ()",
)
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
    step: int,
) -> None:
    layouts, checks = _read(text)

    def named(values: Sequence[Value]) -> dict[str, Value]:
        return dict(zip(layouts, values, strict=True))

    state = sc.SpectralState(named(v), named(sigma), layouts, named(u), checks)
    sc.add_gradient_(
        *(named(weights), named(grads), state),
        factor=named(_joined(factors, factor_tensors)),
        target=named(_joined(targets, target_tensors)),
        power=power,
        n_iter=n_iter,
        step=_steps[step],
    )


def _divided(values: Sequence[Value]) -> tuple[list[float], list[Tensor]]:
    """Numbers, NaN where there is a tensor, and the tensors."""
    numbers = [nan if isinstance(value, Tensor) else value for value in values]
    return numbers, [value for value in values if isinstance(value, Tensor)]


def _joined(numbers: Sequence[float], tensors: Sequence[Tensor]) -> list[Value]:
    rest = iter(tensors)
    return [next(rest) if isnan(number) else number for number in numbers]
