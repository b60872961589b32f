"""Bound spectral norms after each step, in place of a penalty.

After a step of the optimizer a weight is scaled to σ ≤ bound. That is the projection of Gouk et
al., *Regularisation of Neural Networks by Enforcing Lipschitz Continuity* (2021), applied to the
weight's matrix. Scaling to σ = bound is the spectral normalization of Miyato et al. (2018), but of
the weights themselves: no layer is wrapped, and no gradient passes through the division.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import TypeAlias

from ._algorithm import iterate
from ._arrays import Array, Namespace, array_namespace, constant, plain
from ._layout import plan_of
from ._plan import Plan, broadcast_stack, scale_, scaled
from ._state_dict import Arrays, SpectralState
from ._validate import Factor, Number, check_factors, check_limit, check_weights, check_writeable
from .engine import Engine

Scale: TypeAlias = Callable[[Array, Array, Plan, Namespace], Array]


def scale_to(sigma: Array, bound: Number, *, normalize: bool = False) -> Array:
    """Return the number that scales a matrix to a spectral norm of at most the bound.

    Parameters
    ----------
    sigma : array, shape (...)
    bound : float or array of shape ()
    normalize : bool
        If True, smaller matrices are scaled up to the bound too.

    Returns
    -------
    array, shape (...)
        bound/σ. It is one where σ is small enough, zero or not finite.

    Raises
    ------
    ArgumentError
        If ``bound`` is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from spectral_core._constraint import scale_to
    >>> scale_to(np.array([0.0, 0.5, 4.0]), 1.0)
    array([1.  , 1.  , 0.25])
    >>> scale_to(np.array([0.0, 0.5, 4.0]), 1.0, normalize=True)
    array([1.  , 2.  , 0.25])
    """
    xp = array_namespace(sigma)
    limit = check_limit(bound, "bound", sigma.dtype, xp)
    one = xp.ones_like(sigma)
    acts = (sigma > (0.0 if normalize else limit)) & (sigma < inf)
    return xp.where(acts, limit / xp.where(acts, sigma, one), one)


def constrain(
    weights: Arrays,
    state: SpectralState,
    bound: Factor = 1.0,
    *,
    normalize: bool = False,
    n_iter: int = 1,
    engines: Sequence[Engine] = (),
    scale: Scale = scaled,
) -> tuple[dict[str, Array], SpectralState]:
    r"""Scale each weight to a spectral norm of at most ``bound``, after a step.

    .. math:: W ← W · \min(1, \text{bound}/σ)

    Parameters
    ----------
    weights : mapping of name to array
        The weights that were passed to `init`, after the optimizer has changed them.
    state : SpectralState
        The state from `init` or from the step before.
    bound : float, array of shape (), or mapping of name or pattern to either
        Largest spectral norm of each matrix. The values of arrays are not checked.
    normalize : bool
        If True, smaller matrices are scaled up to the bound too: W ← W · bound/σ.
    n_iter : int
        Power iterations before the scaling.
    engines : sequence of Engine
        Faster ways to iterate (see `add_gradient`).
    scale : callable
        ``scale(weight, scale, plan, xp)`` returns the scaled weight. An adapter passes the function
        of its framework.

    Returns
    -------
    weights : dict of name to array
        New arrays. The arrays that were passed in do not change.
    state : SpectralState
        The state for the next step. Its sigma belongs to the returned weights.

    Raises
    ------
    NamesError, ShapeError, DTypeError, DeviceError
        If the weights are not those of the state.
    ArgumentError
        If ``bound`` is negative or not finite, or ``n_iter`` is less than 1.

    Notes
    -----
    Power iteration underestimates σ, so the true norm can exceed the bound slightly: by a few per
    cent in the first steps, and where singular values cross. A weight that is zero or not finite
    stays as it is. The bound is on the weight's matrix; a convolution as an operator can have a
    larger norm.

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
    bounds = check_factors(bound, state.v, "bound")
    state = iterate(weights, state, n_iter=n_iter, engines=engines)
    new, sigma = {}, {}
    for name, weight in weights.items():
        s = scale_to(state.sigma[name], bounds[name], normalize=normalize)
        plan = plan_of(state.layouts[name], weight.shape, f"weight {name!r}")
        weight, xp = plain(weight, f"weight {name!r}"), array_namespace(weight)
        new[name] = scale(constant(weight), broadcast_stack(s, plan, xp), plan, xp)
        sigma[name] = xp.asarray(s * state.sigma[name])  # NumPy makes a scalar of the product
    return new, replace(state, sigma=sigma)


def constrain_(
    weights: Arrays,
    state: SpectralState,
    bound: Factor = 1.0,
    *,
    normalize: bool = False,
    n_iter: int = 1,
    engines: Sequence[Engine] = (),
    scale: Scale = scale_,
) -> SpectralState:
    """Scale each weight in place, as `constrain` does.

    Parameters
    ----------
    weights, state, bound, normalize, n_iter, engines
        See `constrain`. The weights must be writeable.
    scale : callable
        See `constrain`. It writes into the weight, and returns it.

    Returns
    -------
    SpectralState
        The state for the next step. The state that was passed in does not change.

    Raises
    ------
    NamesError, ShapeError, DTypeError, ArgumentError
        For the same reasons as in `constrain`, before any weight changes.
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
    check_weights(weights, state.v)
    for name, weight in weights.items():
        check_writeable(weight, f"weight {name!r}", "constrain")
    _, state = constrain(
        weights,
        state,
        bound=bound,
        normalize=normalize,
        n_iter=n_iter,
        engines=engines,
        scale=scale,
    )
    return state
