"""The penalty (λ/2)·Σσ² of the paper's equation (1), and its gradient λ·σ·u·vᴴ."""

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


def penalty(sigma: Array | Mapping[str, Array], *, factor: Factor = 0.01) -> Array:
    """(factor/2)·Σσ², the term that the regularizer adds to the loss (paper, equation 1).

    Parameters
    ----------
    sigma : array or mapping of name to array
        Singular values; every entry counts.
    factor : float, array or mapping of name or pattern to either
        λ. A mapping needs a mapping of sigma.

    Returns
    -------
    array, shape ()

    Raises
    ------
    ArgumentError
        If ``factor`` is negative or not finite.
    NamesError
        If a mapping of factors does not cover the names, or there is none.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> round(float(sc.penalty({"a": np.array(2.0), "b": np.array([1.0, 3.0])}, factor=0.1)), 4)
    0.7
    """
    if not isinstance(sigma, Mapping):
        xp = array_namespace(sigma)
        return check_factor(factor) * xp.sum(sigma * sigma) / 2
    if not sigma:
        raise NamesError("sigma is a mapping of nothing")
    factors = factors_of(factor, sigma)
    return sum(penalty(value, factor=factors[name]) for name, value in sigma.items())


def penalty_at(W: Array, u: Array, *, factor: float | Array = 0.01) -> Array:
    """(factor/2)·Σ‖Wᴴu‖²: the penalty as a function of W, to differentiate.

    With u from `power_iteration` and held constant, its gradient in W is exactly `rank_one` (of a
    complex W, ∂/∂Re + i·∂/∂Im, as PyTorch has it; ``jax.grad`` gives the conjugate). It is smooth
    at W = 0 too, where σ itself is not.

    Parameters
    ----------
    W : array, shape (..., m, n)
    u : array, shape (..., m)
        Unit vector, in the dtype of the iteration.
    factor : float or array of shape ()
        λ.

    Returns
    -------
    array, shape ()

    Raises
    ------
    ArgumentError
        If ``factor`` is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> float(sc.penalty_at(np.array([[3.0, 4.0]]), np.array([1.0]), factor=2.0))
    25.0
    """
    xp = array_namespace(W, u)
    WHu = rmatvec(cast(W, u.dtype, xp), u, xp)
    return check_factor(factor) * xp.sum(squared(WHu, xp)) / 2


def rank_one(sigma: Array, u: Array, v: Array, *, factor: float | Array = 0.01) -> Array:
    """factor·σ·u·vᴴ, the gradient of the penalty (paper, equation 3).

    Parameters
    ----------
    sigma : array, shape (...)
    u : array, shape (..., m)
        Unit vector.
    v : array, shape (..., n)
        Unit vector.
    factor : float or array of shape ()
        λ.

    Returns
    -------
    array, shape (..., m, n)

    Raises
    ------
    ArgumentError
        If ``factor`` is negative or not finite.

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
    return _scaled(sigma, u, check_factor(factor))[..., None] * conj(v, xp)[..., None, :]


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


def factors_of(factor: Factor, names: Mapping[str, Array]) -> dict[str, float | Array]:
    """The factor of each name, checked."""
    if not isinstance(factor, Mapping):
        return dict.fromkeys(names, check_factor(factor))
    found = by_name(factor, names, "factor")
    missing = [name for name in names if name not in found]
    if missing:
        raise NamesError(f"factor has no entry for {missing}: add one, or a '*' for all others")
    return {name: check_factor(value, f"factor[{name!r}]") for name, value in found.items()}


def check_writeable(grad: Array, name: str) -> None:
    """Raise `DeviceError` if ``grad`` cannot be written to."""
    if not is_writeable_array(grad):
        raise DeviceError(
            f"the gradient of {name!r} cannot be written in place ({type(grad).__name__}): "
            "use add_gradient, which returns new arrays"
        )


def _scaled(sigma: Array, u: Array, factor: float | Array) -> Array:
    weight = factor * sigma
    return u * (weight[..., None] if weight.ndim else weight)
