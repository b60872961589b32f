"""Follow loops and branches: the body once for each step, the one branch that is chosen.

A loop is unrolled. That is exact for a scan over stacked layers, whose weights differ from step to
step, and for a loop that counts: what it counts by depends on no input, and so it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from spectral_core.engine import Value, side_by_side

from ._walk import Control, NoBound, Operand, Walk

MAX_STEPS = 1000
"""Steps of a loop that the walk follows."""


def scan(w: Walk, eqn: Any, operands: list[Operand]) -> list[Operand]:
    """Follow each step of a scan."""
    options = eqn.params
    n, length = options["num_consts"], options["length"]
    split = n + options["num_carry"]
    consts, carry, stacked = operands[:n], operands[n:split], operands[split:]
    _check_length(length)
    steps: list[list[Operand]] = [[]] * length
    order = range(length - 1, -1, -1) if options["reverse"] else range(length)
    body = options["jaxpr"]
    depends = [x for x in (*consts, *carry) if x.value is not None]
    for i in order:
        with w.within(f"step {i}"):
            inputs = [*consts, *carry, *(_entry(w, x, i) for x in stacked)]
            outputs = w.run(body.jaxpr, body.consts, inputs)
        carry, steps[i] = outputs[: len(carry)], outputs[len(carry) :]
        depends += [x for x in carry if x.value is not None]
    alone = not depends and sum(x.value is not None for x in stacked) == 1
    outs = eqn.outvars[len(carry) :]
    return [
        *carry,
        *(_stacked(w, var, [step[k] for step in steps], alone) for k, var in enumerate(outs)),
    ]


def _entry(w: Walk, x: Operand, i: int) -> Operand:
    """Return one entry of a stack."""
    if x.value is None:
        return Operand(x.shape[1:], None, x.array[i])
    return Operand(x.shape[1:], Value(w.gain(x)))


def _stacked(w: Walk, var: Any, entries: Sequence[Operand], alone: bool) -> Operand:
    """Return the results of all steps as one array.

    Where a step reads its own entry of one stack and nothing else that depends on the input, the
    squares of what the entries move by add up to that of the stack: the gain is the largest one.
    """
    shape = var.aval.shape
    if all(x.value is None for x in entries):
        if not entries:
            return Operand(shape, None, jnp.zeros(shape, var.aval.dtype))
        return Operand(shape, None, jnp.stack([jnp.asarray(x.array) for x in entries]))
    gains = [w.gain(x) for x in entries]
    return Operand(shape, Value(max(gains) if alone else side_by_side(gains)))


def while_loop(w: Walk, eqn: Any, operands: list[Operand]) -> list[Operand]:
    """Follow each step of a loop whose condition depends on no input."""
    options = eqn.params
    n, m = options["cond_nconsts"], options["body_nconsts"]
    condition, body = options["cond_jaxpr"], options["body_jaxpr"]
    tested, consts, carry = operands[:n], operands[n : n + m], operands[n + m :]
    for i in range(MAX_STEPS + 1):
        if not _holds(condition, [*tested, *carry]):
            return carry
        with w.within(f"step {i}"):
            carry = w.run(body.jaxpr, body.consts, [*consts, *carry])
    raise NoBound(f"a loop of more than {MAX_STEPS} steps: the walk follows no more")


def _holds(condition: Any, operands: list[Operand]) -> bool:
    """Return the condition of a loop, from what it reads alone."""
    needed = _read_by(condition.jaxpr)
    if any(x.value is not None for x, used in zip(operands, needed, strict=True) if used):
        raise NoBound("a loop whose number of steps depends on the input: it may jump")
    arrays = [
        jnp.zeros(aval.shape, aval.dtype) if x.value is not None else _as(x.array, aval)
        for x, aval in zip(operands, condition.in_avals, strict=True)
    ]
    return bool(np.all(jaxpr_as_fun(condition)(*arrays)[0]))


def _as(array: Any, aval: Any) -> Any:
    """Return an array of the dtype that a jaxpr wants; a random key has it already."""
    same = getattr(array, "dtype", None) == aval.dtype
    return array if same else jnp.asarray(array, aval.dtype)


def _read_by(jaxpr: Any) -> list[bool]:
    """Return which inputs the outputs of a jaxpr are made of."""
    needed = {id(var) for var in jaxpr.outvars}
    for eqn in reversed(jaxpr.eqns):
        if any(id(var) in needed for var in eqn.outvars) or eqn.effects:
            needed |= {id(var) for var in eqn.invars}
    return [id(var) in needed for var in jaxpr.invars]


def branches(w: Walk, eqn: Any, operands: list[Operand]) -> list[Operand]:
    """Follow the branch that a constant chooses."""
    which, *inputs = operands
    if which.value is not None:
        raise NoBound("chooses a branch by a value that depends on the input: it may jump")
    several = eqn.params["branches"]
    chosen = several[int(np.clip(int(which.array), 0, len(several) - 1))]
    with w.within():
        return w.run(chosen.jaxpr, chosen.consts, inputs)


def _check_length(length: int) -> None:
    if length > MAX_STEPS:
        raise NoBound(
            f"a loop of {length} steps: the walk follows {MAX_STEPS} at most. Name it with "
            "gains={…}, behind jax.jit, if you know a bound"
        )


CONTROLS: dict[str, Control] = {"scan": scan, "while": while_loop, "cond": branches}
