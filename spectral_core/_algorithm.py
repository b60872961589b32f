"""Algorithm 1 over named weights: its start and its step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ._arrays import Array, array_namespace
from ._layout import plan_of
from ._penalty import slope_of
from ._power import Triplet, start_vector
from ._select import Layouts, choose_layouts
from ._state_dict import Arrays, SpectralState
from ._validate import Factor, check_factors, check_grads, check_weights, check_writeable
from .engine import Engine, Job, ReferenceEngine, dispatch, make_jobs
from .errors import ArgumentError, NamesError, check_int


def init(
    weights: Arrays,
    *,
    seed: int = 0,
    layouts: Layouts | None = None,
    n_vectors: int = 1,
    engines: Sequence[Engine] = (),
) -> SpectralState:
    """Draw the start vectors (Algorithm 1, line 1).

    Parameters
    ----------
    weights : mapping of name to array
        The weights to regularize, and no others: each with two axes or more.
    seed : int
        With a weight's name, it decides that weight's v: the same on every backend, whatever
        the other weights are.
    layouts : mapping of name or pattern to Layout or str, or one for all, optional
        What the axes are. By default, and for names that the mapping leaves out, output, input,
        kernel: `default_layout`.
    n_vectors : int
        How many vectors to iterate with for each matrix: with more than one, `block_iteration`.
    engines : sequence of Engine
        As for `add_gradient`. They find the first sigma.

    Returns
    -------
    SpectralState
        With unit v on each weight's device, in the dtype of its iteration, and sigma as that v
        estimates it.

    Raises
    ------
    ShapeError, DTypeError
        If a weight has fewer than two axes or an empty one, does not fit its layout, or is not
        floating-point.
    NamesError
        If there is no weight, or a layout for none of them.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> weights = {"conv": np.ones((8, 3, 5, 5)), "out": np.ones((10, 8))}
    >>> state = sc.init(weights, seed=0)
    >>> {name: v.shape for name, v in state.v.items()}
    {'conv': (1, 75), 'out': (1, 8)}
    """
    if not isinstance(weights, Mapping) or not weights:
        raise NamesError("weights must be a mapping of at least one name to an array")
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise NamesError(f"a weight's name must be a string, not {name!r}")
        array_namespace(weight, name=f"weight {name!r}")
    n_vectors = check_int(n_vectors, "n_vectors")
    chosen = choose_layouts({name: len(weight.shape) for name, weight in weights.items()}, layouts)
    v = {}
    for name, layout in chosen.items():
        plan = plan_of(layout, weights[name].shape, f"weight {name!r}")
        v[name] = start_vector(plan.rows(n_vectors), weights[name], seed=seed, name=name)
    state = SpectralState(v=v, sigma={}, layouts=chosen)
    jobs = make_jobs(v, weights, state)
    found = dict(zip(v, dispatch(jobs, 1, (*engines, ReferenceEngine())).triplets, strict=True))
    return replace(
        state,
        sigma={name: triplet.sigma for name, triplet in found.items()},
        u={name: triplet.u for name, triplet in found.items()},
    )


def iterate(
    weights: Arrays, state: SpectralState, *, n_iter: int = 1, engines: Sequence[Engine] = ()
) -> SpectralState:
    """Improve v and sigma without a gradient: a warm-up, or a look at the weights as they are.

    Parameters
    ----------
    weights : mapping of name to array
        The weights that `init` saw.
    state : SpectralState
    n_iter : int
        Power iterations.
    engines : sequence of Engine
        As for `add_gradient`.

    Returns
    -------
    SpectralState

    Raises
    ------
    NamesError, ShapeError, DTypeError, DeviceError, ArgumentError
        If the weights are not those of the state, or ``n_iter`` is less than 1.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> weights = {"w": np.array([[3.0, 3.0], [0.0, 3.0]])}
    >>> state = sc.iterate(weights, sc.init(weights), n_iter=15)
    >>> round(float(state.sigma["w"]), 4)
    4.8541
    """
    check_weights(weights, state.v)
    jobs = make_jobs(weights, weights, state)
    found = dispatch(jobs, check_int(n_iter, "n_iter"), (*engines, ReferenceEngine()))
    return _advanced(state, jobs, found.triplets)


def add_gradient(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    *,
    factor: Factor = 0.01,
    target: Factor = 0.0,
    power: int = 2,
    n_iter: int = 1,
    engines: Sequence[Engine] = (),
) -> tuple[dict[str, Array | None], SpectralState]:
    """Add factor·σ·u·vᴴ to each weight's gradient (Algorithm 1, lines 5–9).

    Parameters
    ----------
    weights : mapping of name to array
        The weights that `init` saw, as they are now.
    grads : mapping of name to array or None
        Their gradients. Where one is None, the weight is left out of this step, its v and sigma
        as they were. Other names pass through.
    state : SpectralState
        From `init` or the step before.
    factor : float, array of shape (), or mapping of name or pattern to either
        λ. The value of an array is not checked.
    target : float, array of shape (), or mapping of name or pattern to either
        The σ below which a matrix is left alone: with it the term is factor·(σ − target)·u·vᴴ,
        the gradient of the hinge (factor/2)·max(0, σ − target)².
    power : int
        2, or 1 for the gradient factor·u·vᴴ of factor·max(0, σ − target).
    n_iter : int
        Power iterations in this step. With 0, the term of the step before is added anew.
    engines : sequence of Engine
        Faster ways to run a step, in order of preference. `ReferenceEngine` runs the weights that
        none of them accepts. No engine may write into the gradients.

    Returns
    -------
    grads : dict of name to array or None
        New arrays, each in the dtype of its gradient; those that came in are as they were.
    state : SpectralState
        For the next step.

    Raises
    ------
    NamesError
        If the names of weights, gradients and state do not fit.
    ShapeError, DTypeError, DeviceError
        If a gradient or a v does not fit its weight.
    ArgumentError
        If ``factor`` or ``target`` is negative or not finite, ``power`` neither 1 nor 2,
        ``n_iter`` is negative, or it is 0 and the state holds no u, or an engine works in place.

    Notes
    -----
    A weight that is not finite makes its own term and sigma NaN or infinite, and nothing else.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> weights = {"w": np.array([[2.0, 0.0], [0.0, 1.0]])}
    >>> grads = {"w": np.zeros((2, 2))}
    >>> state = sc.iterate(weights, sc.init(weights), n_iter=30)
    >>> grads, state = sc.add_gradient(weights, grads, state, factor=0.01)
    >>> np.round(grads["w"], 4) + 0.0
    array([[0.02, 0.  ],
           [0.  , 0.  ]])
    """
    if any(engine.in_place for engine in engines):
        raise ArgumentError("an engine writes into the gradients: pass it to add_gradient_")
    jobs = _jobs(weights, grads, state, factor, target, power)
    n_iter = check_int(n_iter, "n_iter", least=0)
    new_grads, triplets = dispatch(jobs, n_iter, (*engines, ReferenceEngine()))
    added = {job.name: grad for job, grad in zip(jobs, new_grads, strict=True)}
    return {**grads, **added}, _advanced(state, jobs, triplets)


def add_gradient_(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    *,
    factor: Factor = 0.01,
    target: Factor = 0.0,
    power: int = 2,
    n_iter: int = 1,
    engines: Sequence[Engine] = (),
) -> SpectralState:
    """`add_gradient` in place: the gradients are changed where they lie.

    Parameters
    ----------
    weights, grads, state, factor, target, power, n_iter
        As for `add_gradient`; gradients must be writeable.
    engines : sequence of Engine
        Faster ways to run a step, in order of preference, such as
        `spectral_core.numba.NumbaEngine`.

    Returns
    -------
    SpectralState
        For the next step. It is a new one: the state that came in is as it was.

    Raises
    ------
    NamesError, ShapeError, DTypeError, ArgumentError
        As `add_gradient`, before any gradient is changed.
    DeviceError
        Also if a gradient is immutable (JAX) or read-only.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> weights, grads = {"w": np.array([[3.0, 4.0]])}, {"w": np.zeros((1, 2))}
    >>> state = sc.add_gradient_(weights, grads, sc.init(weights), factor=0.1)
    >>> np.round(grads["w"], 4)
    array([[0.3, 0.4]])
    """
    jobs = _jobs(weights, grads, state, factor, target, power)
    for job in jobs:
        check_writeable(job.grad, f"the gradient of {job.name!r}", "add_gradient")
    n_iter = check_int(n_iter, "n_iter", least=0)
    result = dispatch(jobs, n_iter, (*engines, ReferenceEngine(in_place=True)))
    return _advanced(state, jobs, result.triplets)


def _jobs(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    factor: Factor,
    target: Factor,
    power: int,
) -> list[Job]:
    """Return the jobs of the weights that have a gradient."""
    check_weights(weights, state.v)
    check_grads(grads, state.v)
    return make_jobs(
        [name for name in state.v if grads[name] is not None],
        weights,
        state,
        grads=grads,
        factors=check_factors(factor, state.v),
        slopes=slope_of(target, power, state.v),
    )


def _advanced(
    state: SpectralState, jobs: Iterable[Job], triplets: Iterable[Triplet]
) -> SpectralState:
    """Return ``state`` with the newest triplet of each job."""
    found = {job.name: triplet for job, triplet in zip(jobs, triplets, strict=True)}
    return replace(
        state,
        v={**state.v, **{name: triplet.V for name, triplet in found.items()}},
        sigma={**state.sigma, **{name: triplet.sigma for name, triplet in found.items()}},
        u={**state.u, **{name: t.u for name, t in found.items()}} if state.u else {},
    )
