"""Weights held at or below a spectral norm: a hard bound in place of a penalty.

After a step of the optimizer a weight is scaled to σ ≤ bound, the projection of Gouk et al.,
*Regularisation of Neural Networks by Enforcing Lipschitz Continuity* (2021), or to σ = bound, which
is the spectral normalization of Miyato et al. (2018), but of the weights themselves: no layer is
wrapped, and no gradient goes through the division.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

from ._arrays import Array, Namespace, array_namespace, cast, constant, traits
from .layout import Plan, plan_of, reshaped, spread_stack
from .penalty import Factor, check_writeable, factors_of, limit_of
from .regularizer import Arrays, SpectralState, iterate
from .step import Step, plain_step

Scale = Callable[[Array, Array, Plan, Namespace], Array]


def scale_to(sigma: Array, bound: float | Array, *, normalize: bool = False) -> Array:
    """What a matrix is multiplied by so that its spectral norm is the bound, or at most that.

    Parameters
    ----------
    sigma : array, shape (...)
    bound : float or array of shape ()
    normalize : bool
        Whether smaller matrices grow to the bound too.

    Returns
    -------
    array, shape (...)
        bound/σ; one where σ is small enough, zero or not finite.

    Raises
    ------
    ArgumentError
        If ``bound`` is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from spectral_core.constraint import scale_to
    >>> scale_to(np.array([0.0, 0.5, 4.0]), 1.0)
    array([1.  , 1.  , 0.25])
    >>> scale_to(np.array([0.0, 0.5, 4.0]), 1.0, normalize=True)
    array([1.  , 2.  , 0.25])
    """
    xp = array_namespace(sigma)
    limit = limit_of(bound, "bound", sigma.dtype, xp)
    one = xp.ones_like(sigma)
    acts = (sigma > (0.0 if normalize else limit)) & (sigma < inf)
    return xp.where(acts, limit / xp.where(acts, sigma, one), one)


def scaled(weight: Array, scale: Array, plan: Plan, xp: Namespace) -> Array:
    """``weight`` times ``scale`` (it broadcasts to ``plan.split``), in its dtype, rounded once."""
    wide = traits(weight, xp, "weight").iteration_dtype
    product = cast(reshaped(weight, plan.split, xp), wide, xp) * scale
    return reshaped(cast(product, weight.dtype, xp), weight.shape, xp)


def scale_(weight: Array, scale: Array, plan: Plan, xp: Namespace) -> Array:
    """`scaled`, written where ``weight`` lies."""
    if traits(weight, xp, "weight").iteration_dtype != weight.dtype:
        weight[...] = scaled(weight, scale, plan, xp)
        return weight
    here = reshaped(weight, plan.split, xp)  # to split an axis in two never takes a copy
    here *= scale
    return weight


def constrain(
    weights: Arrays,
    state: SpectralState,
    *,
    bound: Factor = 1.0,
    normalize: bool = False,
    n_iter: int = 1,
    step: Step = plain_step,
    scale: Scale = scaled,
) -> tuple[dict[str, Array], SpectralState]:
    r"""Scale each weight to a spectral norm of at most ``bound``: to be called after a step.

    .. math:: W ← W · \min(1, \text{bound}/σ)

    Parameters
    ----------
    weights : mapping of name to array
        The weights that `init` saw, as the optimizer has left them.
    state : SpectralState
    bound : float, array of shape (), or mapping of name or pattern to either
    normalize : bool
        Whether smaller matrices grow to the bound too: W ← W · bound/σ.
    n_iter : int
        Power iterations.
    step : callable
        As for `iterate`.
    scale : callable
        ``scale(weight, scale, plan, xp)``, as `scaled`: a framework's own way.

    Returns
    -------
    weights : dict of name to array
    state : SpectralState
        Its sigma is that of the weights returned.

    Raises
    ------
    NamesError, ShapeError, DTypeError, DeviceError
        If the weights are not those of the state.
    ArgumentError
        If ``bound`` is negative or not finite, or ``n_iter`` less than 1.

    Notes
    -----
    σ is estimated from below, and so the norm may exceed the bound by what the estimate lacks: a
    few steps after the start, or where singular values cross, by some per cent. A weight that is
    zero or not finite is left as it is.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> weights = {"w": np.array([[3.0, 0.0], [0.0, 1.0]])}
    >>> state = sc.iterate(weights, sc.init(weights), n_iter=30)
    >>> weights, state = sc.constrain(weights, state, bound=2.0)
    >>> np.round(np.linalg.norm(weights["w"], 2), 6), np.round(state.sigma["w"], 6)
    (np.float64(2.0), np.float64(2.0))
    """
    bounds = factors_of(bound, state.v, "bound")
    state = iterate(weights, state, n_iter=n_iter, step=step)
    new, sigma = {}, {}
    for name, weight in weights.items():
        s = scale_to(state.sigma[name], bounds[name], normalize=normalize)
        plan = plan_of(state.layouts[name], weight.shape, f"weight {name!r}")
        xp = array_namespace(weight)
        new[name] = scale(constant(weight), spread_stack(s, plan, xp), plan, xp)
        sigma[name] = s * state.sigma[name]
    return new, replace(state, sigma=sigma)


def constrain_(
    weights: Arrays,
    state: SpectralState,
    *,
    bound: Factor = 1.0,
    normalize: bool = False,
    n_iter: int = 1,
    step: Step = plain_step,
    scale: Scale = scale_,
) -> SpectralState:
    """`constrain` in place: the weights are changed where they lie.

    Parameters
    ----------
    weights, state, bound, normalize, n_iter, step
        As for `constrain`; weights must be writeable.
    scale : callable
        As `scale_`.

    Returns
    -------
    SpectralState
        For the next step. It is a new one.

    Raises
    ------
    NamesError, ShapeError, DTypeError, ArgumentError
        As `constrain`, before any weight is changed.
    DeviceError
        Also if a weight is immutable (JAX) or read-only.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> weights = {"w": np.array([[3.0, 4.0]])}
    >>> state = sc.constrain_(weights, sc.init(weights), bound=1.0)
    >>> np.round(weights["w"], 4)
    array([[0.6, 0.8]])
    """
    for name, weight in weights.items():
        check_writeable(weight, f"weight {name!r}", "constrain")
    return constrain(
        weights, state, bound=bound, normalize=normalize, n_iter=n_iter, step=step, scale=scale
    )[1]
