"""The penalty (λ/2)·Σσ² of the paper's equation (1), and its gradient λ·σ·u·vᴴ.

It is one of a family, (λ/p)·Σ max(0, σ − target)^p with p = ``power``: the paper's has power 2 and
target 0. A target above 0 is a hinge, which leaves matrices with a smaller σ alone; power 1 pulls
with the same force whatever σ is. The gradient is λ·slope(σ)·u·vᴴ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf, prod
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import is_writeable_array

from ._arrays import Array, Namespace, array_namespace, cast, conj, squared
from .errors import ArgumentError, DeviceError, NamesError
from .layout import Plan, first_of, spread
from .patterns import by_name
from .power import PowerIteration, rmatvec

# So many elements of a gradient are updated at once where a product takes a temporary.
_PART = 1 << 18

Factor: TypeAlias = "float | Array | Mapping[str, float | Array]"


def penalty(
    sigma: Array | Mapping[str, Array],
    *,
    factor: Factor = 0.01,
    target: Factor = 0.0,
    power: int = 2,
) -> Array:
    """(factor/2)·Σσ², the term that the regularizer adds to the loss (paper, equation 1).

    In general, (factor/power)·Σ max(0, σ − target)^power.

    Parameters
    ----------
    sigma : array or mapping of name to array
        Singular values; every entry counts.
    factor, target : float, array or mapping of name or pattern to either
        λ, and the σ below which nothing is paid. A mapping needs a mapping of sigma.
    power : int
        2, or 1 for a penalty in σ itself.

    Returns
    -------
    array, shape ()

    Raises
    ------
    ArgumentError
        If ``factor`` or ``target`` is negative or not finite, or ``power`` neither 1 nor 2.
    NamesError
        If a mapping of factors or targets does not cover the names, or there is none.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> round(float(sc.penalty({"a": np.array(2.0), "b": np.array([1.0, 3.0])}, factor=0.1)), 4)
    0.7
    >>> round(float(sc.penalty(np.array([1.0, 3.0]), factor=0.1, target=2.0)), 4)
    0.05
    """
    if not isinstance(sigma, Mapping):
        xp = array_namespace(sigma)
        factor, limit = check_factor(factor), limit_of(target, "target", sigma.dtype, xp)
        below, power = sigma <= limit, check_power(power)
        return factor * xp.sum(_raised(sigma, limit, power, below, xp))
    if not sigma:
        raise NamesError("sigma is a mapping of nothing")
    factors = factors_of(factor, sigma)
    targets = factors_of(target, sigma, "target")
    return sum(
        penalty(value, factor=factors[name], target=targets[name], power=power)
        for name, value in sigma.items()
    )


def penalty_at(
    W: Array,
    u: Array,
    *,
    factor: float | Array = 0.01,
    target: float | Array = 0.0,
    power: int = 2,
) -> Array:
    """(factor/2)·Σ‖Wᴴu‖²: the penalty as a function of W, to differentiate.

    In general, (factor/power)·Σ max(0, ‖Wᴴu‖ − target)^power.

    With u from `power_iteration` and held constant, its gradient in W is exactly `rank_one` (of a
    complex W, ∂/∂Re + i·∂/∂Im, as PyTorch has it; ``jax.grad`` gives the conjugate). It is smooth
    at W = 0 too, where σ itself is not.

    Parameters
    ----------
    W : array, shape (..., m, n)
    u : array, shape (..., m)
        Unit vector, in the dtype of the iteration.
    factor, target : float or array of shape ()
        λ, and the σ below which nothing is paid.
    power : int
        2 or 1.

    Returns
    -------
    array, shape ()

    Raises
    ------
    ArgumentError
        If ``factor`` or ``target`` is negative or not finite, or ``power`` neither 1 nor 2.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> float(sc.penalty_at(np.array([[3.0, 4.0]]), np.array([1.0]), factor=2.0))
    25.0
    """
    xp = array_namespace(W, u)
    WHu = rmatvec(cast(W, u.dtype, xp), u, xp)
    square, factor = xp.sum(squared(WHu, xp), axis=-1), check_factor(factor)
    if is_plain(target, check_power(power)):
        return factor * xp.sum(square) / 2
    limit = limit_of(target, "target", square.dtype, xp)
    below = square <= limit * limit
    # The root's gradient is infinite at zero, and nothing times infinity is NaN.
    sigma = xp.sqrt(xp.where(below, xp.ones_like(square), square))
    return factor * xp.sum(_raised(sigma, limit, power, below, xp))


def slope(sigma: Array, *, target: float | Array = 0.0, power: int = 2) -> Array:
    """What takes the place of σ in the gradient λσuvᴴ: the derivative of the penalty by σ, for λ 1.

    Parameters
    ----------
    sigma : array, shape (...)
    target : float or array of shape ()
        The σ below which nothing is paid.
    power : int
        2 for max(0, σ − target), or 1 for a slope of one where σ is more than the target.

    Returns
    -------
    array, shape (...)

    Raises
    ------
    ArgumentError
        If ``target`` is negative or not finite, or ``power`` neither 1 nor 2.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> sc.slope(np.array([1.0, 3.0]), target=2.0)
    array([0., 1.])
    """
    xp = array_namespace(sigma)
    limit = limit_of(target, "target", sigma.dtype, xp)
    over = sigma - limit if check_power(power) == 2 else xp.ones_like(sigma)
    return xp.where(sigma <= limit, xp.zeros_like(sigma), over)  # a σ that is NaN stays NaN


def rank_one(
    sigma: Array,
    u: Array,
    v: Array,
    *,
    factor: float | Array = 0.01,
    target: float | Array = 0.0,
    power: int = 2,
) -> Array:
    """factor·σ·u·vᴴ, the gradient of the penalty (paper, equation 3).

    In general, factor·slope(σ)·u·vᴴ.

    Parameters
    ----------
    sigma : array, shape (...)
    u : array, shape (..., m)
        Unit vector.
    v : array, shape (..., n)
        Unit vector.
    factor, target : float or array of shape ()
        λ, and the σ below which nothing is paid.
    power : int
        2 or 1.

    Returns
    -------
    array, shape (..., m, n)

    Raises
    ------
    ArgumentError
        If ``factor`` or ``target`` is negative or not finite, or ``power`` neither 1 nor 2.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> W = np.diag([2.0, 1.0])
    >>> sigma, u, v = sc.power_iteration(W, np.array([1.0, 0.0]))
    >>> sc.rank_one(sigma, u, v, factor=0.5)
    array([[1., 0.],
           [0., 0.]])
    """
    xp = array_namespace(sigma, u, v)
    force = sigma if is_plain(target, power) else slope(sigma, target=target, power=power)
    return _scaled(force, u, check_factor(factor))[..., None] * conj(v, xp)[..., None, :]


def outer_factors(
    triple: PowerIteration, plan: Plan, factor: float | Array, xp: Namespace
) -> tuple[Array, Array]:
    """Two arrays whose product, broadcast, is the term in the axes ``plan.split``."""
    u = _scaled(triple.sigma, triple.u, factor)
    return spread(u, conj(first_of(triple.v, plan), xp), plan, xp)


def add_outer(grad: Array, u: Array, v: Array) -> Array:
    """``grad + u * v``, in the dtype of ``grad``."""
    return cast(grad + u * v, grad.dtype, array_namespace(grad))


def add_outer_(grad: Array, u: Array, v: Array) -> Array:
    """``grad``, after ``grad += u * v`` where it lies."""
    addcmul_ = getattr(grad, "addcmul_", None)
    if addcmul_ is not None:  # PyTorch: one pass over grad, and no temporary of its size
        return addcmul_(u, v)
    axis = max(range(grad.ndim), key=grad.shape.__getitem__)
    for here in _parts(tuple(grad.shape), axis):
        a, b = (x[here] if x.shape[axis] > 1 else x for x in (u, v))
        if grad.dtype == u.dtype:
            grad[here] += a * b
        else:
            grad[here] = add_outer(grad[here], a, b)
    return grad


def _parts(shape: tuple[int, ...], axis: int) -> Iterator[tuple[Any, ...]]:
    """Indices that cut ``axis`` so that a part's product stays in the cache."""
    rows = -(-shape[axis] * _PART // prod(shape))
    for start in range(0, shape[axis], rows):
        yield (*[slice(None)] * axis, slice(start, min(start + rows, shape[axis])), ...)


def check_factor(factor: Factor, name: str = "factor") -> float | Array:
    """``factor`` if it is an array of shape () or a finite number ≥ 0, or `ArgumentError`.

    The value of an array is not looked at: that would wait for the device, or fail in a trace.
    One of NumPy is a number like any other.
    """
    if isinstance(factor, (np.ndarray, np.generic)) and factor.shape == ():
        factor = factor.item()
    if isinstance(factor, Real) and not isinstance(factor, bool):
        if 0 <= (value := float(factor)) < inf:
            return value
    elif getattr(factor, "shape", None) == ():
        return factor
    raise ArgumentError(
        f"{name} must be a finite number ≥ 0 or an array of shape (), not {factor!r}"
    )


def factors_of(
    factor: Factor, names: Mapping[str, Array], what: str = "factor"
) -> dict[str, float | Array]:
    """The factor of each name, checked; or another number of each, which errors call ``what``."""
    if not isinstance(factor, Mapping):
        return dict.fromkeys(names, check_factor(factor, what))
    found = by_name(factor, names, what)
    missing = [name for name in names if name not in found]
    if missing:
        raise NamesError(f"{what} has no entry for {missing}: add one, or a '*' for all others")
    return {name: check_factor(value, f"{what}[{name!r}]") for name, value in found.items()}


def limit_of(value: Factor, what: str, dtype: Any, xp: Namespace) -> float | Array:
    """A number to compare σ with, checked; if it is an array, in the dtype of σ."""
    limit = check_factor(value, what)
    return limit if isinstance(limit, float) else cast(limit, dtype, xp)


def check_power(power: int) -> int:
    """``power`` if it is 1 or 2, or `ArgumentError`."""
    if isinstance(power, bool) or power not in (1, 2):
        raise ArgumentError(f"power must be 1 or 2, not {power!r}")
    return power


def is_plain(target: Factor, power: int) -> bool:
    """Whether the penalty is the paper's: its slope is σ itself."""
    return isinstance(target, (int, float)) and target == 0 and check_power(power) == 2


def check_writeable(x: Array, what: str, instead: str) -> None:
    """Raise `DeviceError` if ``x`` cannot be written to."""
    if not is_writeable_array(x):
        raise DeviceError(
            f"{what} cannot be written in place ({type(x).__name__}): use {instead}, which returns "
            "new arrays"
        )


def _raised(sigma: Array, limit: float | Array, power: int, below: Array, xp: Namespace) -> Array:
    """(1/power)·(σ − limit)^power, and zero ``below``."""
    over = xp.where(below, xp.zeros_like(sigma), sigma - limit)
    return over if power == 1 else over * over / 2


def _scaled(sigma: Array, u: Array, factor: float | Array) -> Array:
    weight = factor * sigma
    return u * (weight[..., None] if weight.ndim else weight)
