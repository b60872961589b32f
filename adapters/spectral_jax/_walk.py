"""Follow a traced function, and say how far each value can move when the input moves.

The equations of a jaxpr are pure, so nothing can bypass the walk. What depends on no input is
computed: a weight that is normalized or masked in the function is the one that it uses. For the
same reason the number of steps of a loop is known, and its body is followed once for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import nan, prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from spectral_core.engine import Dense, Ledger, Stage, Value, in_series, log10_up, side_by_side

from ._linear_maps import Map

Handler = Callable[..., Value]
Control = Callable[["Walk", Any, list["Operand"]], list["Operand"]]
"""Return all results of an equation that has other equations within."""
Recognizer = Callable[["Walk", Any, int, Callable[[Any], "Operand"]], tuple[int, "Operand"] | None]
"""Return how many equations from a place on are a known function, and its result."""

INLINED = frozenset(
    [
        *("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"),
        *("custom_vjp_call_jaxpr", "remat", "remat2", "checkpoint", "custom_lin"),
    ]
)


_NORMALIZES = (
    ": its slope has no limit near zero. A normalization by the statistics of a sample, such as "
    "LayerNorm, uses it; put that behind jax.jit and name it in gains if you know a bound"
)
_JUMPS = ": what depends on its result may jump"
_GROWS = ": its slope grows without limit"
_WHY = {
    **dict.fromkeys(("rsqrt", "sqrt"), _NORMALIZES),
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne", "sign", "floor", "round"), _JUMPS),
    **dict.fromkeys(("exp", "square", "integer_pow", "pow"), _GROWS),
}
"""Why some primitives have no bound."""


class NoBound(Exception):  # noqa: N818, for it is an answer and no error
    """A part of the function has no bound; the message says why."""


class Linear(Value):
    """The result of a linear map. Its norm is computed when more than a scale uses it.

    ``turned`` has parent and stages of its transpose, where that has the samples as its first axis.
    """

    def __init__(
        self, source: Value, map: Map, name: str, stages: Any, turned: Any = (None, ())
    ) -> None:
        super().__init__(nan, *stages)
        self.source, self.map, self.name, self.turned = source, map, name, turned


class Unusable(Value):
    """A value that has no bound if something uses it: the indices that a ``top_k`` gives too."""

    def __init__(self, reason: str) -> None:
        super().__init__(np.inf)
        self.reason = reason


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
        handlers: Mapping[str, Handler],
        controls: Mapping[str, Control],
        recognize: Recognizer,
        gains: Mapping[str, float],
        *,
        batch: int,
        tol: float,
    ) -> None:
        self.ledger = Ledger()
        self.batch, self.tol = batch, tol
        self.name = ""  # of the primitive
        self.used: set[str] = set()  # the names in ``gains`` that the function has
        self._handlers, self._controls, self._recognize = handlers, controls, recognize
        self._gains = gains
        self._scopes: list[str] = []
        self._scope = ""

    @property
    def place(self) -> str:
        """The scopes of modules and of ``jax.named_scope`` that the current equation is in."""
        return "/".join(part for part in (*self._scopes, self._scope) if part)

    @property
    def label(self) -> str:
        """The name of a row: its place, or the primitive of a function without scopes."""
        return self.place or self.name

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
        place = 0
        while place < len(jaxpr.eqns):
            eqn = jaxpr.eqns[place]
            self.name, self._scope = eqn.primitive.name, _scope(eqn)
            known = self._recognize(self, jaxpr, place, read)
            if known is not None:
                n, result = known
                found[jaxpr.eqns[place + n - 1].outvars[0]] = result
                place += n
                continue
            results = self._follow(eqn, [read(var) for var in eqn.invars])
            found.update(zip(eqn.outvars, results, strict=True))
            place += 1
        return [read(var) for var in jaxpr.outvars]

    @contextmanager
    def within(self, part: str = "") -> Iterator[None]:
        """Follow the body of the current equation: its names are behind those of the equation."""
        name, scope = self.name, self._scope
        self._scopes.append("/".join(x for x in (scope, part) if x))
        try:
            yield
        finally:
            self._scopes.pop()
            self.name, self._scope = name, scope

    def gain(self, x: Operand) -> float:
        """Return the gain of an argument; a linear map's norm is computed here."""
        if x.value is None:
            return -np.inf
        if isinstance(x.value, Unusable):
            raise NoBound(x.value.reason)
        if isinstance(x.value, Linear) and x.value.gain != x.value.gain:
            gain = self.ledger.layer(x.value.name, x.value.map.kind, *x.value.map.bounds(self.tol))
            x.value.gain = in_series([x.value.source.gain, gain])
        return x.value.gain

    def settled(self, x: Operand) -> Value:
        """Return the value of an argument with its gain computed."""
        self.gain(x)
        return Value(-np.inf) if x.value is None else x.value

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
        gain = self.ledger.layer(self.label, self.name, *bounds)
        stages = (None, ()) if dense is None else self.chained(x, shape, dense=dense)
        return Value(in_series([before, gain]), *stages)

    def with_map(self, before: Linear, map: Map) -> Linear:
        """Return a linear map together with the scale behind it."""
        parts: Any = [(before.parent, before.stages), before.turned]
        for i, (parent, stages) in enumerate(parts):
            if parent is not None:
                parts[i] = parent, (replace(stages[0], dense=map.dense),)
        return Linear(before.source, map, before.name, *parts)

    def _follow(self, eqn: Any, operands: list[Operand]) -> list[Operand]:
        """Return the results of one equation."""
        if all(x.value is None for x in operands):
            return _computed(eqn, operands)
        if not eqn.outvars:  # a print
            return []
        if self.name in ("device_put", "optimization_barrier"):
            return [Operand(x.shape, x.value, x.array) for x in operands]
        closed = inner(eqn.params) if self.name in INLINED else None
        given = closed is not None and eqn.params.get("name") in self._gains
        if closed is not None and not given:
            with self.within():
                return self.run(*closed, operands)
        handler = self._handlers.get(self.name)
        try:
            if given:
                return self._given(eqn, operands)
            if self.name in self._controls:
                return self._controls[self.name](self, eqn, operands)
            if handler is None:
                why = _WHY.get(self.name, "")
                raise NoBound(f"the walk does not know the primitive {self.name}{why}")
            value = handler(self, eqn.params, eqn.outvars[0].aval.shape, *operands)
        except NoBound as reason:
            value = self._refused(eqn, str(reason))
        return self._results(eqn, value)

    def _refused(self, eqn: Any, reason: str) -> Value:
        name = "/".join(part for part in (self.place, self.name) if part)
        return self.ledger.refuse(name, f"{reason}{_place(eqn)}")

    def _results(self, eqn: Any, value: Value) -> list[Operand]:
        """Return the results of an equation, each of which has this value."""
        results = []
        for var in eqn.outvars:
            one, kind = value, var.aval.dtype
            if value.gain < np.inf and not jnp.issubdtype(kind, jnp.floating):
                one = Unusable(f"uses {kind} that depends on the input{_place(eqn)}")
            results.append(Operand(var.aval.shape, one))
        return results

    def _given(self, eqn: Any, operands: list[Operand]) -> list[Operand]:
        """Return the results of a function whose Lipschitz constant the user knows."""
        name = eqn.params["name"]
        self.used.add(name)
        gains = [self.gain(x) for x in operands if x.value is not None]
        gain = self._gains[name]
        place = f"{self.place}/{name}" if self.place else name
        self.ledger.layer(place, "given", 0.0, gain)
        return self._results(eqn, Value(in_series([side_by_side(gains), log10_up(gain)])))


def _computed(eqn: Any, operands: list[Operand]) -> list[Operand]:
    """Return the results of an equation that depends on no input."""
    options = eqn.primitive.get_bind_params(eqn.params)
    functions, options = options if isinstance(options, tuple) else ((), options)
    found = eqn.primitive.bind(*functions, *(x.array for x in operands), **options)
    results = found if eqn.primitive.multiple_results else [found]
    return [Operand(np.shape(x), None, x) for x in results]


def inner(params: dict[str, Any]) -> tuple[Any, Sequence[Any]] | None:
    """Return the jaxpr that an equation calls, with its constants."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = params.get(key)
        if isinstance(inner, ClosedJaxpr):
            return inner.jaxpr, inner.consts
        if inner is not None:
            return inner, ()
    return None


def _scope(eqn: Any) -> str:
    """Return the names of the modules and scopes that an equation is in."""
    try:
        return str(eqn.source_info.name_stack)
    except Exception:  # no public attribute: the name is a courtesy
        return ""


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
