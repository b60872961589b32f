"""Follow a traced function, and say how far each value can move when the input moves.

The equations of a jaxpr are pure, so nothing can bypass the walk. What depends on no input is
computed: a weight that is normalized or masked in the function is the one that it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import nan, prod
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from spectral_core.engine import Dense, Ledger, Stage, Value, in_series, log10_up

from ._linear_maps import Map

Handler = Callable[..., Value]

INLINED = frozenset(
    [
        *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"),
        *("custom_vjp_call_jaxpr", "remat", "remat2", "checkpoint", "custom_lin"),
    ]
)


class NoBound(Exception):  # noqa: N818, for it is an answer and no error
    """A part of the function has no bound; the message says why."""


class Linear(Value):
    """The result of a linear map. Its norm is computed when more than a scale uses it."""

    def __init__(self, source: Value, map: Map, name: str, stages: Any) -> None:
        super().__init__(nan, *stages)
        self.source, self.map, self.name = source, map, name


class Operand:
    """An argument of an equation: a value that depends on the input, or an array."""

    def __init__(self, shape: Sequence[int], value: Value | None, array: Any = None) -> None:
        self.shape, self.value, self.array = tuple(shape), value, array

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def exact(self) -> np.ndarray[Any, Any]:
        """The array in float64."""
        return np.asarray(self.array).astype(np.float64)


class Walk:
    """The values of a jaxpr, by variable."""

    def __init__(
        self,
        handlers: dict[str, Handler],
        known: Callable[[Walk, Any, list[Operand]], Value | None],
        *,
        batch: int,
        tol: float,
    ) -> None:
        self.ledger = Ledger()
        self.batch, self.tol = batch, tol
        self.name = ""
        self._handlers, self._known = handlers, known

    def run(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Operand]) -> list[Operand]:
        """Follow the equations of a jaxpr; return its outputs."""
        found: dict[Any, Operand] = {}

        def read(var: Any) -> Operand:
            if isinstance(var, Literal):
                return Operand(np.shape(var.val), None, var.val)
            return found[var]

        for var, const in zip(jaxpr.constvars, consts, strict=True):
            found[var] = Operand(var.aval.shape, None, const)
        found.update(zip(jaxpr.invars, inputs, strict=True))
        for eqn in jaxpr.eqns:
            results = self._follow(eqn, [read(var) for var in eqn.invars])
            found.update(zip(eqn.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def gain(self, x: Operand) -> float:
        """Return the gain of an argument; a linear map's norm is computed here."""
        if x.value is None:
            return -np.inf
        if isinstance(x.value, Linear) and x.value.gain != x.value.gain:
            gain = self.ledger.layer(x.value.name, x.value.map.kind, *x.value.map.bounds(self.tol))
            x.value.gain = in_series([x.value.source.gain, gain])
        return x.value.gain

    def settled(self, x: Operand) -> Value:
        """Return the value of an argument with its gain computed."""
        self.gain(x)
        assert x.value is not None
        return x.value

    def chained(
        self, x: Operand, shape: Sequence[int], **how: Any
    ) -> tuple[Value | None, tuple[Stage, ...]]:
        """Return parent and stages of a value that is made of one other, sample by sample."""
        if min(len(x.shape), len(shape)) < 2 or not x.shape[0] == shape[0] == self.batch:
            return None, ()
        sizes = prod(x.shape[1:]), prod(shape[1:])
        return self.settled(x), (Stage(sizes, **how),) if how else ()

    def grown(
        self,
        x: Operand,
        shape: Sequence[int],
        bounds: tuple[float, float],
        dense: Dense | None = None,
    ) -> Value:
        """Return the value of a map with known bounds, written down as a layer."""
        before = self.gain(x)
        gain = self.ledger.layer(self.name, self.name, *bounds)
        stages = (None, ()) if dense is None else self.chained(x, shape, dense=dense)
        return Value(in_series([before, gain]), *stages)

    def scaled(self, before: Linear, map: Map) -> Linear:
        """Return a linear map together with the scale behind it."""
        stages: Any = (None, ())
        if before.parent is not None and before.stages[0].dense is not None:
            stages = before.parent, (replace(before.stages[0], dense=map.dense),)
        return Linear(before.source, map, before.name, stages)

    def _follow(self, eqn: Any, operands: list[Operand]) -> list[Operand]:
        """Return the results of one equation."""
        if all(x.value is None for x in operands):
            return _computed(eqn, operands)
        primitive = self.name = eqn.primitive.name
        if not eqn.outvars:  # a print
            return []
        if primitive == "device_put":
            return [Operand(x.shape, x.value, x.array) for x in operands]
        if primitive in INLINED:
            known = self._known(self, eqn, operands)
            if known is not None:
                return [Operand(eqn.outvars[0].aval.shape, known)]
            closed = _inner(eqn.params)
            if closed is not None:
                jaxpr, consts = closed
                return self.run(jaxpr, consts, operands)
        shape = eqn.outvars[0].aval.shape
        handler = self._handlers.get(primitive)
        try:
            if handler is None:
                raise NoBound(f"the walk does not know the primitive {primitive}")
            value = handler(self, eqn.params, shape, *operands)
        except NoBound as reason:
            value = self.ledger.refuse(primitive, f"{reason}{_place(eqn)}")
        results = []
        for var in eqn.outvars:
            one = value
            if (
                value.gain < np.inf
                and not np.issubdtype(var.aval.dtype, np.floating)
                and str(var.aval.dtype) != "bfloat16"
            ):
                about = f"it gives {var.aval.dtype} that depends on the input"
                one = self.ledger.refuse(primitive, f"{about}{_place(eqn)}")
            results.append(Operand(var.aval.shape, one))
        return results


def _computed(eqn: Any, operands: list[Operand]) -> list[Operand]:
    """Return the results of an equation that depends on no input."""
    options = eqn.primitive.get_bind_params(eqn.params)
    functions, options = options if isinstance(options, tuple) else ((), options)
    found = eqn.primitive.bind(*functions, *(x.array for x in operands), **options)
    results = found if eqn.primitive.multiple_results else [found]
    return [Operand(np.shape(x), None, x) for x in results]


def _inner(params: dict[str, Any]) -> tuple[Any, Sequence[Any]] | None:
    """Return the jaxpr that an equation calls, with its constants."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        if isinstance(inner, ClosedJaxpr):
            return inner.jaxpr, inner.consts
        if inner is not None:
            return inner, ()
    return None


def _place(eqn: Any) -> str:
    """Return the user's line that an equation comes from."""
    try:
        from jax._src import source_info_util

        text = str(source_info_util.summarize(eqn.source_info)).strip()
    except Exception:  # a private function: the line is a courtesy
        return ""
    return f" ({text})" if text else ""


def slope_gain(low: float, high: float) -> float:
    """Return the logarithm of the steepest slope."""
    return log10_up(max(abs(low), abs(high)))
