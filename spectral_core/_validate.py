"""Check every input once: numbers, names, shapes, dtypes and devices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from decimal import Decimal
from math import inf
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from array_api_compat import is_jax_namespace, is_writeable_array

from ._arrays import (
    Array,
    Namespace,
    Traits,
    array_namespace,
    cast,
    check_dense,
    check_same_device,
    is_complex,
    traits,
)
from ._geometry import wave_of
from ._layout import Layout, plan_of
from ._plan import Plan
from ._select import by_name
from .errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    NamesError,
    ShapeError,
    listed,
    shown,
)

Number: TypeAlias = "float | Array"
Factor: TypeAlias = "Number | Mapping[str, Number]"
Schedule: TypeAlias = (
    "Factor | Callable[[int], Number] | Mapping[str, Number | Callable[[int], Number]]"
)
"""A `Factor`, or one that is a function of the step, counted from 0."""


def at_step(schedule: Schedule, step: int) -> Factor:
    """Return the numbers of a schedule at a step; what holds no function is returned as it is.

    Examples
    --------
    >>> at_step({"a": lambda step: 0.1 * step, "b": 0.5}, 2)
    {'a': 0.2, 'b': 0.5}
    """
    if callable(schedule):
        return schedule(step)
    if isinstance(schedule, Mapping) and any(map(callable, schedule.values())):
        return {name: x(step) if callable(x) else x for name, x in schedule.items()}
    return schedule


def check_factor(factor: Factor, name: str = "factor") -> Number:
    """Return ``factor`` if it is a finite number ≥ 0 or an array of shape ().

    The value of an array is not read: that would wait for the device, or fail in a trace. A NumPy
    scalar is a number like any other.

    Raises
    ------
    ArgumentError
        If ``factor`` is anything else.
    """
    number: Any = factor
    on_host = isinstance(number, (np.ndarray, np.generic))
    if on_host:
        check_dense(number, name)
        number = number.item() if number.shape == () else number
    value = _finite(number)
    if value is not None:
        return value
    if not on_host and getattr(number, "shape", None) == () and hasattr(number, "dtype"):
        return number
    raise ArgumentError(
        f"{name} must be a finite number ≥ 0 or an array of shape (), not {shown(number)}"
    )


def check_number(value: object, name: str) -> float:
    """Return ``value`` as a float; raise `ArgumentError` unless it is a finite number ≥ 0."""
    number = _finite(value)
    if number is None:
        raise ArgumentError(f"{name} must be a finite number ≥ 0, not {shown(value)}")
    return number


def _finite(value: object) -> float | None:
    """Return a real number as a float, or None if it is not one, is negative or not finite."""
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError, TypeError):  # 10**400; a signaling NaN; a duration
        return None
    return number if 0 <= number < inf else None


def check_factors(
    factor: Factor, names: Collection[str], what: str = "factor"
) -> dict[str, Number]:
    """Return the factor of each name, checked. Errors call the factor ``what``.

    Raises
    ------
    ArgumentError
        If a factor is negative or not finite.
    NamesError
        If a mapping does not cover the names, or an entry matches none of them.
    """
    if not isinstance(factor, Mapping):
        return dict.fromkeys(names, check_factor(factor, what))
    own = by_name(factor, names, what)
    missing = [name for name in names if name not in own]
    if missing:
        raise NamesError(
            f"{what} has no entry for {listed(missing)}: add one, or a '*' for all others"
        )
    return {name: check_factor(value, f"{what}[{name!r}]") for name, value in own.items()}


def check_limit(value: Factor, what: str, dtype: Any, xp: Namespace) -> Number:
    """Return a checked number to compare sigma with; an array is cast to the dtype of sigma."""
    limit = check_factor(value, what)
    return limit if isinstance(limit, float) else cast(limit, dtype, xp)


def check_power(power: int) -> int:
    """Return ``power`` if it is 1 or 2, else raise `ArgumentError`."""
    if isinstance(power, bool) or power not in (1, 2):
        raise ArgumentError(f"power must be 1 or 2, not {power!r}")
    return power


def check_writeable(x: Array, what: str, instead: str) -> None:
    """Raise `DeviceError` unless ``x`` can be written in place."""
    if not is_writeable_array(x):
        raise DeviceError(
            f"{what} cannot be written in place ({type(x).__name__}): use {instead}, which returns "
            "new arrays"
        )


def check_weights(weights: Mapping[str, Array], names: Collection[str]) -> None:
    """Raise `NamesError` unless ``weights`` is a mapping with exactly these names."""
    if not isinstance(weights, Mapping):
        raise NamesError(f"weights must be a mapping of name to array, not {type(weights)}")
    if weights.keys() != set(names):
        missing = [name for name in names if name not in weights]
        unexpected = [name for name in weights if name not in names]
        raise NamesError(
            f"the weights are not those of the state: missing {listed(missing)}, unexpected "
            f"{listed(unexpected)}; call init again for other weights"
        )


def check_grads(grads: Mapping[str, Array | None], names: Collection[str]) -> None:
    """Raise `NamesError` unless ``grads`` is a mapping with an entry for each of these names."""
    if not isinstance(grads, Mapping):
        raise NamesError(f"grads must be a mapping of name to array, not {type(grads)}")
    missing = [name for name in names if name not in grads]
    if missing:
        raise NamesError(
            f"grads has no entry for {listed(missing)}: give None to leave a weight out"
        )


def check_matrix(W: Array, V: Array, xp: Namespace, *, rows: bool) -> Traits:
    """Return the traits of a matrix, or a stack of matrices, that its vectors fit.

    Parameters
    ----------
    W : array, shape (..., m, n)
    V : array, shape (..., n), or (..., k, n) with ``rows``

    Raises
    ------
    ShapeError
        If W has fewer than two axes or an empty one, or V does not fit.
    DTypeError
        If W or V is not floating-point, or V is complex and W real.
    """
    shape, given, what = tuple(W.shape), tuple(V.shape), "V" if rows else "v"
    if len(shape) < 2 or 0 in shape:
        raise ShapeError(
            f"W has shape {shape}: it must be a matrix or a stack of matrices with no empty axis "
            "(as_matrix makes one of a weight tensor)"
        )
    k = given[-2:-1] if rows else ()
    if given != (*shape[:-2], *k, shape[-1]) or 0 in k or len(k) < rows:
        expected = str((*shape[:-2], shape[-1]))
        if rows:
            sizes = ", ".join(map(str, (*shape[:-2], "k", shape[-1])))
            expected = f"({sizes}) with k ≥ 1: one vector a row"
        raise ShapeError(f"{what} has shape {given}, but W of shape {shape} needs {expected}")
    kind = traits(W, xp, "W")
    if traits(V, xp, what).complex and not kind.complex:
        raise DTypeError(
            f"{what} has dtype {V.dtype}, but W is real ({W.dtype}): start from a real {what}"
        )
    return kind


def check_vector(W: Array, u: Array, xp: Namespace) -> None:
    """Raise `ShapeError` or `DTypeError` unless u (..., m) fits the matrices W (..., m, n)."""
    traits(W, xp, "W"), traits(u, xp, "u")
    shape, given = tuple(W.shape), tuple(u.shape)
    if len(shape) < 2 or given != shape[:-1]:
        raise ShapeError(f"u has shape {given}, but W of shape {shape} needs {shape[:-1]}")


def check_triplet(sigma: Array, u: Array, v: Array, xp: Namespace) -> None:
    """Raise `ShapeError` or `DTypeError` unless the arrays are singular triplets."""
    for name, x in (("sigma", sigma), ("u", u), ("v", v)):
        traits(x, xp, name)
    stack = tuple(sigma.shape)
    for name, x in (("u", u), ("v", v)):
        if x.ndim != len(stack) + 1 or tuple(x.shape[:-1]) != stack:
            raise ShapeError(
                f"{name} has shape {tuple(x.shape)}, but sigma of shape {stack} needs one vector "
                "for each number"
            )


class Fitting(NamedTuple):
    """Everything that must fit one weight."""

    V: Array
    grad: Array | None
    factor: Number
    sigma: Array | None
    u: Array | None


class _Checked(NamedTuple):
    kinds: tuple[Any, ...]
    last_kinds: tuple[Any, ...]
    plan: Plan
    xp: Namespace


class Checks:
    """Remember what was checked to fit each weight: types, shapes, dtypes and devices.

    A step whose arrays have the same types, shapes, dtypes and devices as in the step before is
    not checked again.
    """

    def __init__(self) -> None:
        self._checked: dict[str, _Checked] = {}
        self._repetitions: list[Any] = []

    def take_repetition(self) -> Any:
        """Remove the jobs of the last step and return them, or None: see `Repetition`."""
        try:
            return self._repetitions.pop()
        except IndexError:
            return None

    def keep_repetition(self, repetition: Any) -> None:
        """Keep the jobs of a step for the next one, in place of any others."""
        self._repetitions = [repetition]

    def __reduce__(self) -> tuple[type[Checks], tuple[()]]:
        return Checks, ()

    def fit(
        self, name: str, weight: Array, layout: Layout, fitting: Fitting
    ) -> tuple[Plan, Namespace]:
        """Return the plan and the namespace of a weight, after checking that all fits it.

        Raises
        ------
        ShapeError, DTypeError, DeviceError
            If an array does not fit.
        """
        known = self._checked.get(name)
        *others, sigma, u = fitting
        if known is None or known.kinds != (_kinds(layout, weight, *others) or None):
            plan, xp = _check_fit(name, weight, layout, *others)
            known = None
        else:
            plan, xp = known.plan, known.xp
        # Checked apart: a new state has none yet, and its thousands of weights fit already.
        if known is None or known.last_kinds != (_kinds(sigma, u) or None):
            _check_last(name, weight, sigma, u, plan, xp)
            # In a trace, arrays have no device: asking for it costs more than all checks.
            if not is_jax_namespace(xp):
                kinds, last_kinds = _kinds(layout, weight, *others), _kinds(sigma, u)
                self._checked[name] = _Checked(kinds, last_kinds, plan, xp)
        return plan, xp


def _kinds(*things: Any) -> tuple[Any, ...]:
    """Return what decides whether arrays fit, or nothing where one of them is no array."""
    kinds: list[Any] = []
    try:
        for x in things:
            kinds.append(x if isinstance(x, Layout) else type(x))
            if not (x is None or isinstance(x, (float, Layout))):
                kinds += (x.shape, x.dtype, x.device)
    except AttributeError:  # not an array: the full check explains what it is instead
        return ()
    return tuple(kinds)


def _check_fit(
    name: str, weight: Array, layout: Layout, V: Array, grad: Array | None, factor: Number
) -> tuple[Plan, Namespace]:
    arrays = [V] if grad is None else [V, grad]
    if not isinstance(factor, float):
        arrays.append(factor)
    xp = array_namespace(weight, *arrays, name=_together(name))
    if grad is not None:
        _check_grad(name, weight, grad, xp)
    plan = plan_of(layout, weight.shape, f"weight {name!r}")
    traits(weight, xp, f"weight {name!r}")
    k = V.shape[-2] if V.ndim > 1 else 0
    wave = wave_of(layout, tuple(weight.shape))
    if wave is None:
        expected = ", ".join(map(str, plan.rows("k")))  # type: ignore[arg-type]
        _check_shape(name, weight, "v", V, plan.rows(k) if k else None, f"({expected})")
    else:
        _check_shape(name, weight, "v", V, wave.rows(plan), str(wave.rows(plan)))
    if traits(V, xp, f"weight {name!r}: v").complex and not is_complex(weight, xp):
        raise DTypeError(
            f"weight {name!r}: v has dtype {V.dtype}, but the weight is real ({weight.dtype})"
        )
    check_same_device(weight, V, xp, f"weight {name!r}", "its v")
    if not isinstance(factor, float) and not xp.isdtype(factor.dtype, "real floating"):
        raise DTypeError(f"factor of {name!r} has dtype {factor.dtype}: it must be a real float")
    return plan, xp


def _check_last(
    name: str, weight: Array, sigma: Array | None, u: Array | None, plan: Plan, xp: Namespace
) -> None:
    for what, x, shape in (("sigma", sigma, plan.stack), ("u", u, plan.left)):
        if x is not None:
            array_namespace(weight, x, name=_together(name))
            _check_shape(name, weight, what, x, shape, str(shape))
            check_same_device(weight, x, xp, f"weight {name!r}", f"its {what}")


def _together(name: str) -> str:
    return f"weight {name!r}, its state, its gradient and factor"


def _check_shape(
    name: str, weight: Array, what: str, x: Array, shape: tuple[int, ...] | None, expected: str
) -> None:
    if tuple(x.shape) != shape:
        raise ShapeError(
            f"weight {name!r} of shape {tuple(weight.shape)} needs a {what} of shape {expected}, "
            f"but the state's has {tuple(x.shape)}: call init again for other weights"
        )


def _check_grad(name: str, weight: Array, grad: Array, xp: Namespace) -> None:
    if tuple(grad.shape) != tuple(weight.shape):
        raise ShapeError(
            f"the gradient of {name!r} has shape {tuple(grad.shape)}, the weight "
            f"{tuple(weight.shape)}"
        )
    if traits(grad, xp, f"the gradient of {name!r}").complex != is_complex(weight, xp):
        raise DTypeError(
            f"the gradient of {name!r} has dtype {grad.dtype}, the weight {weight.dtype}: both "
            "must be real or both complex"
        )
    check_same_device(weight, grad, xp, f"weight {name!r}", "its gradient")
