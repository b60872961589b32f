"""Bound spectral norms after each step, in place of a penalty.

After a step of the optimizer a weight is scaled to σ ≤ bound. That is the projection of Gouk et
al., *Regularisation of Neural Networks by Enforcing Lipschitz Continuity* (2021), applied to the
weight's matrix. Scaling to σ = bound is the spectral normalization of Miyato et al. (2018), but of
the weights themselves: no layer is wrapped, and no gradient passes through the division.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ._algorithm import advanced, fitting_engines, plain_arrays, with_reference
from ._arrays import Array, constant
from ._bound import Bound, bounds_of
from ._state_dict import Arrays, SpectralState
from ._validate import Factor, check_weights, check_writeable
from .engine import Engine, dispatch, make_jobs
from .errors import ArgumentError, check_int


def constrain(
    weights: Arrays,
    state: SpectralState,
    bound: Factor = 1.0,
    *,
    normalize: bool = False,
    n_iter: int = 1,
    engines: Sequence[Engine] = (),
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
        Faster ways to run a step (see `add_gradient`). No engine may write into the weights.

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
    if any(engine.in_place for engine in engines):
        raise ArgumentError("an engine writes into the weights: pass it to constrain_")
    bounds = bounds_of(bound, normalize, state.v)
    check_weights(weights, state.v)
    return _constrained(weights, state, bounds, n_iter, with_reference(engines))


def constrain_(
    weights: Arrays,
    state: SpectralState,
    bound: Factor = 1.0,
    *,
    normalize: bool = False,
    n_iter: int = 1,
    engines: Sequence[Engine] | None = None,
) -> SpectralState:
    """Scale each weight in place, as `constrain` does.

    Parameters
    ----------
    weights, state, bound, normalize, n_iter
        See `constrain`. The weights must be writeable.
    engines : sequence of Engine, optional
        See `add_gradient_`.

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
    bounds = bounds_of(bound, normalize, state.v)
    engines = fitting_engines(engines, weights.values())
    return _constrained(weights, state, bounds, n_iter, engines)[1]


def _constrained(
    weights: Arrays,
    state: SpectralState,
    bounds: Mapping[str, Bound],
    n_iter: int,
    engines: Sequence[Engine],
) -> tuple[dict[str, Array], SpectralState]:
    weights = plain_arrays(weights, "weight")
    # What a step changes is its job's gradient; here that is the weight itself.
    jobs = make_jobs(
        weights,
        weights,
        state,
        grads={name: constant(weight) for name, weight in weights.items()},
        rules=bounds,
    )
    scaled, triplets = dispatch(jobs, check_int(n_iter, "n_iter"), engines)
    named = {job.name: weight for job, weight in zip(jobs, scaled, strict=True)}
    return named, advanced(state, jobs, triplets)
