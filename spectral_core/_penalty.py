"""The penalty (λ/2)·Σσ² of the paper's equation (1), and its gradient λ·σ·u·vᴴ.

It belongs to the family (λ/p)·Σ max(0, σ − target)^p with p = ``power``. The paper's penalty has
power 2 and target 0. A target above 0 is a hinge: matrices with a smaller σ get no gradient. With
power 1 the force does not depend on σ. The gradient is λ·slope(σ)·u·vᴴ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ._arrays import (
    Array,
    Namespace,
    array_namespace,
    cast,
    conj,
    is_complex,
    plain,
    squared,
    traits,
)
from ._bound import Bound
from ._plan import Plan, broadcast_outer
from ._power import Triplet, rmatvec
from ._validate import (
    Factor,
    Number,
    check_factor,
    check_factors,
    check_limit,
    check_power,
    check_triplet,
    check_vector,
)
from .errors import DTypeError, NamesError

# Where a product needs a temporary, this many elements of a gradient are updated at once. Calls of
# NumPy cost least: there, they are a quarter of the second cache of a core.
_CHUNK, _CHUNK_ON_HOST = 1 << 18, 1 << 16


class Slope(NamedTuple):
    """The penalty's target and power, where they are not the paper's (0 and 2)."""

    target: Number
    power: int

    @property
    def code(self) -> int:
        """The number by which kernels tell penalties apart."""
        return self.power

    def of(self, sigma: Array) -> Array:
        """Return the derivative of the penalty by sigma, for λ = 1."""
        return slope(sigma, target=self.target, power=self.power)


Rule: TypeAlias = Slope | Bound
"""What a step does with sigma: it adds the term of a penalty, or scales the weight to a bound."""


def penalty(
    sigma: Array | Mapping[str, Array],
    factor: Factor = 0.01,
    *,
    target: Factor = 0.0,
    power: int = 2,
) -> Array:
    """Return (factor/2)·Σσ², the penalty that is added to the loss (paper, equation 1).

    In general it is (factor/power)·Σ max(0, σ − target)^power.

    Parameters
    ----------
    sigma : array or mapping of name to array
        Singular values; every entry counts.
    factor, target : float, array or mapping of name or pattern to either
        λ, and the σ below which the penalty is zero. A mapping needs a mapping of sigma.
    power : int
        2, or 1 for a penalty that is linear in σ.

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
        sigma, xp = _sigma(sigma)
        factor, limit = check_factor(factor), check_limit(target, "target", sigma.dtype, xp)
        below, power = sigma <= limit, check_power(power)
        return factor * xp.sum(_raised(sigma, limit, power, below, xp))
    if not sigma:
        raise NamesError("sigma is a mapping of nothing")
    factors = check_factors(factor, sigma)
    targets = check_factors(target, sigma, "target")
    return sum(
        penalty(value, factor=factors[name], target=targets[name], power=power)
        for name, value in sigma.items()
    )


def penalty_at(
    W: Array,
    u: Array,
    factor: Number = 0.01,
    *,
    target: Number = 0.0,
    power: int = 2,
) -> Array:
    """Return (factor/2)·Σ‖Wᴴu‖²: the penalty as a differentiable function of W.

    In general it is (factor/power)·Σ max(0, ‖Wᴴu‖ − target)^power.

    With u from `power_iteration`, held constant, its gradient in W is exactly `rank_one`. For a
    complex W that is ∂/∂Re + i·∂/∂Im, the convention of PyTorch; ``jax.grad`` gives the conjugate.
    The function is smooth at W = 0, where σ itself is not.

    Parameters
    ----------
    W : array, shape (..., m, n)
    u : array, shape (..., m)
        Unit vector, in the dtype of the iteration.
    factor, target : float or array of shape ()
        λ, and the σ below which the penalty is zero.
    power : int
        2 or 1.

    Returns
    -------
    array, shape ()

    Raises
    ------
    ShapeError, DTypeError
        If W or u is not floating-point, or u does not fit W.
    ArgumentError
        If ``factor`` or ``target`` is negative or not finite, or ``power`` neither 1 nor 2.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> float(sc.penalty_at(np.array([[3.0, 4.0]]), np.array([1.0]), factor=2.0))
    25.0
    """
    W, u = plain(W, "W"), plain(u, "u")
    xp = array_namespace(W, u, name="W and u")
    check_vector(W, u, xp)
    if is_complex(W, xp) and not is_complex(u, xp):
        u = cast(u, traits(W, xp, "W").iteration_dtype, xp)
    WHu = rmatvec(cast(W, u.dtype, xp), u, xp)
    square, factor = xp.sum(squared(WHu, xp), axis=-1), check_factor(factor)
    if is_paper(target, check_power(power)):
        return factor * xp.sum(square) / 2
    limit = check_limit(target, "target", square.dtype, xp)
    below = square <= limit * limit
    # The root's gradient is infinite at zero, and nothing times infinity is NaN.
    sigma = xp.sqrt(xp.where(below, xp.ones_like(square), square))
    return factor * xp.sum(_raised(sigma, limit, power, below, xp))


def slope(sigma: Array, *, target: Number = 0.0, power: int = 2) -> Array:
    """Return the derivative of the penalty by σ for λ = 1: it replaces σ in the gradient λσuvᴴ.

    Parameters
    ----------
    sigma : array, shape (...)
    target : float or array of shape ()
        The σ below which the penalty is zero.
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
    sigma, xp = _sigma(sigma)
    limit = check_limit(target, "target", sigma.dtype, xp)
    over = sigma - limit if check_power(power) == 2 else xp.ones_like(sigma)
    return xp.where(sigma <= limit, xp.zeros_like(sigma), over)  # a σ that is NaN stays NaN


def rank_one(
    sigma: Array,
    u: Array,
    v: Array,
    factor: Number = 0.01,
    *,
    target: Number = 0.0,
    power: int = 2,
) -> Array:
    """Return factor·σ·u·vᴴ, the gradient of the penalty (paper, equation 3).

    In general it is factor·slope(σ)·u·vᴴ.

    Parameters
    ----------
    sigma : array, shape (...)
    u : array, shape (..., m)
        Unit vector.
    v : array, shape (..., n)
        Unit vector.
    factor, target : float or array of shape ()
        λ, and the σ below which the penalty is zero.
    power : int
        2 or 1.

    Returns
    -------
    array, shape (..., m, n)

    Raises
    ------
    ShapeError, DTypeError
        If an array is not floating-point, or the shapes do not fit each other.
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
    sigma, u, v = plain(sigma, "sigma"), plain(u, "u"), plain(v, "v")
    xp = array_namespace(sigma, u, v, name="sigma, u and v")
    check_triplet(sigma, u, v, xp)
    force = sigma if is_paper(target, power) else slope(sigma, target=target, power=power)
    return _scaled(force, u, check_factor(factor))[..., None] * conj(v, xp)[..., None, :]


def _sigma(sigma: Array) -> tuple[Array, Namespace]:
    """Return sigma, checked to be an array of real numbers, and its namespace."""
    sigma = plain(sigma, "sigma")
    xp = array_namespace(sigma, name="sigma")
    if traits(sigma, xp, "sigma").complex:
        raise DTypeError(f"sigma has dtype {sigma.dtype}: singular values are real")
    return sigma, xp


def outer_factors(
    triplet: Triplet,
    plan: Plan,
    factor: Number,
    slope: Slope | None,
    xp: Namespace,
) -> tuple[Array, Array]:
    """Return two arrays whose product, broadcast to ``plan.split``, is the term."""
    force = triplet.sigma if slope is None else slope.of(triplet.sigma)
    u = _scaled(force, triplet.u, factor)
    return broadcast_outer(u, conj(triplet.V[..., 0, :], xp), plan, xp)


def add_outer(grad: Array, u: Array, v: Array) -> Array:
    """Return ``grad + u * v`` in the dtype of ``grad``."""
    return cast(grad + u * v, grad.dtype, array_namespace(grad))


def add_outer_(grad: Array, u: Array, v: Array) -> Array:
    """Add ``u * v`` to ``grad`` in place, and return ``grad``."""
    same = grad.dtype == u.dtype
    if same and isinstance(grad, np.ndarray):
        _add_product_(grad, u, v)
        return grad
    addcmul_ = getattr(grad, "addcmul_", None)
    # PyTorch: one pass over grad, and no temporary of its size. But on a CPU, it casts a whole
    # gradient in half precision to the dtype of u first.
    if addcmul_ is not None and (same or not grad.is_cpu):
        return addcmul_(u, v)
    axis = max(range(grad.ndim), key=grad.shape.__getitem__)
    for here in _chunks(grad.shape, axis, _CHUNK):
        a, b = (x[here] if x.shape[axis] > 1 else x for x in (u, v))
        if same:
            grad[here] += a * b
        elif addcmul_ is not None:
            grad[here] = grad[here].to(u.dtype).addcmul_(a, b)
        else:
            grad[here] = add_outer(grad[here], a, b)
    return grad


def _add_product_(grad: Array, u: Array, v: Array) -> None:
    """Add ``u * v`` to an array of NumPy by parts, whose products have the same memory."""
    if grad.size <= _CHUNK_ON_HOST:
        grad += u * v
        return
    room: Any = None
    axis = _slowest_axis(grad)
    for here in _chunks(grad.shape, axis, _CHUNK_ON_HOST):
        part = grad[here]
        if room is None:
            room = np.empty_like(part)
        elif part.shape != room.shape:  # the last one
            room = room[tuple(map(slice, part.shape))]
        a, b = u if u.shape[axis] == 1 else u[here], v if v.shape[axis] == 1 else v[here]
        part += np.multiply(a, b, out=room)


def _slowest_axis(x: Array) -> int:
    """Return the axis of which parts are whole pieces of memory, or the longest of all axes."""
    axes = range(x.ndim)
    for axis in sorted(axes, key=lambda axis: -abs(x.strides[axis])):
        if x.shape[axis] > 1 and x.size <= x.shape[axis] * _CHUNK_ON_HOST:
            return axis
    return max(axes, key=x.shape.__getitem__)


def _chunks(shape: tuple[int, ...], axis: int, most: int) -> Iterator[tuple[Any, ...]]:
    """Yield indices that cut ``axis`` into chunks of about ``most`` elements."""
    rows = max(1, shape[axis] * most // prod(shape))
    before = (slice(None),) * axis
    for start in range(0, shape[axis], rows):
        yield (*before, slice(start, min(start + rows, shape[axis])), ...)


def slope_of(target: Factor, power: int, names: Mapping[str, Any]) -> dict[str, Slope | None]:
    """Return the slope of each name: None where the penalty is the paper's.

    Raises
    ------
    ArgumentError, NamesError
        If a target is negative or not finite, a name has none, or ``power`` is neither 1 nor 2.
    """
    if is_paper(target, power):
        return dict.fromkeys(names)
    check_power(power)
    targets = check_factors(target, names, "target")
    return {
        name: None if is_paper(targets[name], power) else Slope(targets[name], power)
        for name in names
    }


def same_rule(rule: Rule | None, other: Rule | None) -> bool:
    """Return True if two of them are equal; targets that are arrays must be the same array."""
    if rule is None or other is None:
        return rule is other
    numbers = isinstance(rule.target, float) and isinstance(other.target, float)
    return rule.code == other.code and (
        rule.target == other.target if numbers else rule.target is other.target
    )


def is_paper(target: Factor, power: int) -> bool:
    """Return True for the paper's penalty, whose slope is sigma itself."""
    zero = isinstance(target, (int, float)) and not isinstance(target, bool) and target == 0
    return zero and check_power(power) == 2


def _raised(sigma: Array, limit: Number, power: int, below: Array, xp: Namespace) -> Array:
    """Return (1/power)·(σ − limit)^power, and zero where ``below`` is True."""
    over = xp.where(below, xp.zeros_like(sigma), sigma - limit)
    return over if power == 1 else over * over / 2


def _scaled(sigma: Array, u: Array, factor: Number) -> Array:
    weight = factor * sigma
    return u * (weight[..., None] if weight.ndim else weight)
