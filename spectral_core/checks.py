"""Whether all that belongs to a weight fits it: asked in every step, and so remembered."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import is_jax_namespace

from ._arrays import Array, Namespace, array_namespace, check_same_device, is_complex, traits
from .errors import DTypeError, ShapeError
from .layout import Layout, Plan, plan_of
from .power import PowerIteration


class _Found(NamedTuple):
    kinds: tuple[Any, ...]
    plan: Plan
    xp: Namespace


class Checks:
    """What was found to fit, for each weight by its name: types, shapes, dtypes and devices.

    A step whose arrays are of the same kinds as those of the step before is not checked again.
    """

    def __init__(self) -> None:
        self._found: dict[str, _Found] = {}

    def __reduce__(self) -> tuple[type[Checks], tuple[()]]:
        return Checks, ()

    def of(
        self,
        name: str,
        weight: Array,
        v: Array,
        grad: Array | None,
        factor: float | Array,
        layout: Layout,
        last: PowerIteration | None,
    ) -> tuple[Plan, Namespace]:
        """The plan and the namespace of a weight that its vectors, gradient and factor fit.

        Raises
        ------
        ShapeError, DTypeError, DeviceError
            If one does not.
        """
        found = self._found.get(name)
        sigma, u = (None, None) if last is None else last[:2]
        others = (v, grad, factor, sigma, u)
        if found is None or found.kinds != _kinds(layout, weight, others):
            plan, xp = _checked(name, weight, v, grad, factor, layout)
            _check_last(name, weight, plan, sigma, u, xp)
            if is_jax_namespace(xp):  # in a trace, arrays have no device
                return plan, xp
            found = _Found(_kinds(layout, weight, others), plan, xp)
            self._found[name] = found
        return found.plan, found.xp


def _kinds(layout: Layout, weight: Array, others: tuple[Any, ...]) -> tuple[Any, ...]:
    kinds = [layout, type(weight)]
    try:
        kinds += (weight.shape, weight.dtype, weight.device)
        for x in others:
            kinds.append(type(x))
            if not (x is None or type(x) is float):
                kinds += (x.shape, x.dtype, x.device)
    except AttributeError:  # no array: what it is instead, the checks say
        return ()
    return tuple(kinds)


def _check_last(
    name: str, weight: Array, plan: Plan, sigma: Array | None, u: Array | None, xp: Namespace
) -> None:
    for what, x, shape in (("sigma", sigma, plan.matrix[:-2]), ("u", u, plan.matrix[:-1])):
        if x is not None:
            if tuple(x.shape) != shape:
                raise ShapeError(
                    f"weight {name!r} of shape {tuple(weight.shape)} needs a {what} of shape "
                    f"{shape}, but the state's has {tuple(x.shape)}: call init again for other "
                    "weights"
                )
            check_same_device(weight, x, xp, f"weight {name!r}", f"its {what}")


def _checked(
    name: str,
    weight: Array,
    v: Array,
    grad: Array | None,
    factor: float | Array,
    layout: Layout,
) -> tuple[Plan, Namespace]:
    arrays = [x for x in (v, grad, factor) if x is not None and not isinstance(x, float)]
    xp = array_namespace(weight, *arrays, name=f"weight {name!r}, its v, its gradient and factor")
    if grad is not None:
        _check_grad(name, weight, grad, xp)
    plan = plan_of(layout, weight.shape, f"weight {name!r}")
    if tuple(v.shape) != plan.right and not _are_several(tuple(v.shape), plan.right):
        raise ShapeError(
            f"weight {name!r} of shape {tuple(weight.shape)} needs a v of shape {plan.right}, but "
            f"the state's has {tuple(v.shape)}: call init again for other weights"
        )
    check_same_device(weight, v, xp, f"weight {name!r}", "its v")
    if not isinstance(factor, float) and not xp.isdtype(factor.dtype, "real floating"):
        raise DTypeError(f"factor of {name!r} has dtype {factor.dtype}: it must be a real float")
    return plan, xp


def _are_several(shape: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether ``shape`` is that of several vectors of shape ``right``."""
    return len(shape) == len(right) + 1 and (*shape[:-2], shape[-1]) == right and shape[-2] > 0


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
