"""Recognize functions of jax.nn that consist of primitives without a bound of their own.

A function is recognized by its whole jaxpr: one of yours with the same name is another one. JAX
traces some of them as one equation, with the function within. Others leave their equations among
those around them, one behind the other: these are compared one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from math import isfinite
from typing import Any

import jax
from jax.extend.core import Literal

from spectral_core.engine import SLOPES, Value

from ._gains import activation, log_softmax, soft
from ._walk import Operand, Walk, inner

Read = Callable[[Any], Operand]

# As one equation.
_NAMED: dict[str, tuple[Callable[..., Any], str]] = {
    "celu": (jax.nn.celu, "celu"),
    "elu": (jax.nn.elu, "elu"),
    "gelu": (jax.nn.gelu, "gelu_tanh"),
    "hard_silu": (jax.nn.hard_silu, "hardswish"),
    "hard_swish": (jax.nn.hard_silu, "hardswish"),
    "hard_tanh": (jax.nn.hard_tanh, "hardtanh"),
    "leaky_relu": (jax.nn.leaky_relu, "relu"),
    "log_sigmoid": (jax.nn.log_sigmoid, "log_sigmoid"),
    "mish": (jax.nn.mish, "mish"),
    "selu": (jax.nn.selu, "selu"),
    "silu": (jax.nn.silu, "silu"),
    "swish": (jax.nn.silu, "silu"),
    "soft_sign": (jax.nn.soft_sign, "softsign"),
    "softplus": (jax.nn.softplus, "softplus"),
}
_OVER_AXES = {"log_softmax": jax.nn.log_softmax, "softmax": jax.nn.softmax}


def recognize(w: Walk, jaxpr: Any, place: int, read: Read) -> tuple[int, Operand] | None:
    """Return how many equations from a place on are a known function, and its result."""
    eqn = jaxpr.eqns[place]
    operands = [read(var) for var in eqn.invars]
    if not eqn.outvars or all(x.value is None for x in operands):
        return None
    found = _named(w, eqn, operands)
    if found is not None:
        return 1, Operand(eqn.outvars[0].aval.shape, found)
    for name, function, how in _spelled_out(eqn):
        x = next(var for var, y in zip(eqn.invars, operands, strict=True) if y.value is not None)
        template = _trace(function, x.aval)
        n = len(template.eqns)
        if template.eqns and _is_at(jaxpr, place, x, template):
            w.name = name
            shape = template.outvars[0].aval.shape
            return n, Operand(shape, how(w, shape, read(x)))
    return None


def _named(w: Walk, eqn: Any, operands: list[Operand]) -> Value | None:
    """Return the value of a function of jax.nn in one equation, or None for another function."""
    name = eqn.params.get("name", "")
    closed = inner(eqn.params)
    x, *others = operands
    if closed is None or len(closed[1]) or any(y.value is not None for y in others):
        return None
    aval = eqn.invars[0].aval
    shape = aval.shape
    if name in _OVER_AXES:
        for axis in range(-1, len(shape) - 1):
            traced = _trace(partial(_OVER_AXES[name], axis=axis), aval)
            if not others and str(closed[0]) in _forms(traced):
                w.name = name
                return soft(w, shape, x) if name == "softmax" else log_softmax(w, shape, x, axis)
    if name not in _NAMED or any(y.size != 1 for y in others):
        return None
    if others and name not in ("leaky_relu", "elu", "celu"):
        return None
    function, slopes = _NAMED[name]
    try:
        traced = jax.make_jaxpr(function)(_argument(aval), *(y.array for y in others)).jaxpr
    except TypeError:
        return None
    if str(closed[0]) not in _forms(traced):
        return None
    low, high = SLOPES[slopes]
    for y in others:  # the slope or the scale of the negative part
        parameter = float(y.exact)
        if not isfinite(parameter):
            return None
        if slopes != "celu":
            low, high = min(low, parameter), max(high, parameter)
        elif parameter <= 0:
            return None
    w.name = name
    return activation(w, eqn.outvars[0].aval.shape, x, low, high)


def _forms(traced: Any) -> set[str]:
    """Return the texts of a jaxpr and of those in its equations."""
    within = [inner(eqn.params) for eqn in traced.eqns]
    return {str(traced)} | {str(one[0]) for one in within if one is not None}


# Equation by equation

How = Callable[[Walk, Any, Operand], Value]


def _spelled_out(eqn: Any) -> list[tuple[str, Callable[..., Any], How]]:
    """Return the functions that can begin with an equation, each with its gain."""
    name, aval = eqn.primitive.name, eqn.outvars[0].aval
    # An array made of Python's numbers has a weak type, and is converted first.
    converts = name == "convert_element_type" and getattr(eqn.invars[0].aval, "weak_type", False)
    found: list[tuple[str, Callable[..., Any], How]] = []
    if converts or name == "integer_pow":
        found.append(("gelu", partial(jax.nn.gelu, approximate=True), _sloped("gelu_tanh")))
    if converts or name in ("mul", "div"):
        found.append(("gelu", partial(jax.nn.gelu, approximate=False), _sloped("gelu")))
    axes = range(aval.ndim) if converts else eqn.params["axes"] if name == "reduce_max" else ()
    for axis in axes if converts or len(axes) == 1 else ():
        lse, log = jax.nn.logsumexp, partial(jax.nn.log_softmax, axis=axis)
        found += [
            ("softmax", partial(jax.nn.softmax, axis=axis), soft),
            ("log_softmax", log, partial(log_softmax, axis=axis)),
            ("logsumexp", partial(lse, axis=axis), _logsumexp),
            ("logsumexp", partial(lse, axis=axis, keepdims=True), _logsumexp),
        ]
    return found


def _logsumexp(w: Walk, _: Any, x: Operand) -> Value:
    """Return a soft maximum: its gradient is a softmax, of norm 1 at most."""
    return Value(w.gain(x))


def _sloped(slopes: str) -> How:
    return lambda w, shape, x: activation(w, shape, x, *SLOPES[slopes])


@cache
def _trace_cached(function: Any, options: Any, aval: Any) -> Any:
    return jax.make_jaxpr(partial(function, **dict(options)))(_argument(aval)).jaxpr


def _trace(function: Any, aval: Any) -> Any:
    """Return the jaxpr of a function of one array."""
    return _trace_cached(function.func, tuple(function.keywords.items()), aval)


def _argument(aval: Any) -> Any:
    """Return an argument to trace a function with. A weak type leaves traces in a jaxpr too."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)  # type: ignore[no-untyped-call]


def _is_at(jaxpr: Any, place: int, x: Any, template: Any) -> bool:
    """Return True if the equations from a place on are those of a function of one variable."""
    eqns = jaxpr.eqns[place : place + len(template.eqns)]
    if len(eqns) < len(template.eqns) or template.constvars:
        return False
    same = {template.invars[0]: x}
    for one, other in zip(template.eqns, eqns, strict=True):
        if _meaning(one) != _meaning(other) or len(one.invars) != len(other.invars):
            return False
        if not all(_agree(a, b, same) for a, b in zip(one.invars, other.invars, strict=True)):
            return False
        same.update(zip(one.outvars, other.outvars, strict=True))
    result = same[template.outvars[0]]
    if eqns[-1].outvars[0] is not result:
        return False
    # What is computed on the way must not be used elsewhere: the walk leaves it out.
    hidden = {id(var) for eqn in eqns for var in eqn.outvars} - {id(result)}
    after = [var for eqn in jaxpr.eqns[place + len(eqns) :] for var in eqn.invars]
    return not any(id(var) in hidden for var in (*after, *jaxpr.outvars))


def _meaning(eqn: Any) -> tuple[str, str]:
    """Return the primitive and its parameters; the rules of derivatives do not matter."""
    left_out = ("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "jvp", "fwd_jaxpr_thunk", "bwd")
    params = {key: x for key, x in eqn.params.items() if key not in left_out}
    return eqn.primitive.name, str(params)


def _agree(one: Any, other: Any, same: dict[Any, Any]) -> bool:
    if isinstance(one, Literal) or isinstance(other, Literal):
        both = isinstance(one, Literal) and isinstance(other, Literal)
        return both and bool(one.val == other.val)
    return same.get(one) is other
