"""Run Algorithm 1 over named weights: its start and its step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from warnings import warn

import numpy as np

from ._arrays import Array, array_namespace, plain
from ._geometry import FLATTENED, OPERATOR, check_norm, settled, tell_assumed, with_operator_norm
from ._host import HostEngine
from ._layout import plan_of
from ._penalty import slope_of
from ._power import Triplet, start_vector
from ._repetition import Numbers, Step, first_step, keep, repeated
from ._select import Layouts, choose_layouts
from ._state_dict import Arrays, SpectralState
from ._validate import Factor, check_factors, check_grads, check_weights, check_writeable
from ._wave import first_rows
from .engine import Engine, Job, ReferenceEngine, dispatch, make_jobs
from .errors import ArgumentError, NamesError, SpectralWarning, check_int


def init(
    weights: Arrays,
    *,
    seed: int = 0,
    layouts: Layouts | None = None,
    n_vectors: int = 1,
    norm: str = FLATTENED,
    engines: Sequence[Engine] = (),
) -> SpectralState:
    """Draw the start vectors (Algorithm 1, line 1).

    Parameters
    ----------
    weights : mapping of name to array
        The weights to regularize. Each has two axes or more.
    seed : int
        Seed of the start vectors. Each v depends only on the seed and the weight's name, so all
        backends draw the same one.
    layouts : mapping of name or pattern to Layout or str, or one for all, optional
        The meaning of the axes. The default is output, input, kernel, also for names that the
        mapping does not cover.
    n_vectors : int
        Number of vectors for each matrix. With more than one, a step runs `block_iteration`.
        With ``norm="operator"``, a convolution follows the waves of its layout instead.
    norm : str
        "flattened", the norm of each weight's matrix, or "operator": for a convolution, the norm of
        the map of images at any size with zero or circular padding. Each layout with kernel axes
        then counts as a `Convolution` of stride 1. Give layouts that are a `Convolution` to say the
        stride, or to choose the norm for some weights alone.
    engines : sequence of Engine
        Faster ways to compute the first sigma (see `add_gradient`).

    Returns
    -------
    SpectralState
        A unit v for each matrix, on the weight's device and in the dtype of the iteration. Each
        sigma is the estimate of one iteration from that v.

    Raises
    ------
    ShapeError, DTypeError
        If a weight has fewer than two axes or an empty one, does not fit its layout, or is not
        floating-point.
    NamesError
        If there is no weight, or a layout's name or pattern matches none.
    ArgumentError
        If ``seed``, ``n_vectors``, ``norm`` or a layout is not valid.

    Warns
    -----
    SpectralWarning
        With ``norm="operator"``, if the stride of a convolution is taken to be one.

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
    weights = plain_arrays(weights, "weight")
    n_vectors = check_int(n_vectors, "n_vectors")
    chosen = choose_layouts({name: len(weight.shape) for name, weight in weights.items()}, layouts)
    if check_norm(norm) == OPERATOR:
        chosen, assumed = with_operator_norm(chosen, {})
        tell_assumed(assumed, chosen)
    v = {}
    for name in chosen:
        weight = weights[name]
        chosen[name], wave = settled(chosen[name], weight, f"weight {name!r}")
        plan = plan_of(chosen[name], weight.shape, f"weight {name!r}")
        shape = plan.rows(n_vectors) if wave is None else wave.rows(plan)
        v[name] = start_vector(shape, weight, seed=seed, name=name)
        if wave is not None:
            v[name] = first_rows(v[name], wave, array_namespace(weight))
    state = SpectralState(v=v, sigma={}, layouts=chosen)
    jobs = make_jobs(v, weights, state)
    found = dict(zip(v, dispatch(jobs, 1, with_reference(engines)).triplets, strict=True))
    return replace(
        state,
        sigma={name: triplet.sigma for name, triplet in found.items()},
        u={name: triplet.u for name, triplet in found.items()},
    )


def iterate(
    weights: Arrays, state: SpectralState, *, n_iter: int = 1, engines: Sequence[Engine] = ()
) -> SpectralState:
    """Improve v and sigma without a gradient, to warm up or to measure σ.

    Parameters
    ----------
    weights : mapping of name to array
        The weights that were passed to `init`, with their current values.
    state : SpectralState
        The state from `init` or from the step before.
    n_iter : int
        Power iterations.
    engines : sequence of Engine
        Faster ways to iterate (see `add_gradient`).

    Returns
    -------
    SpectralState
        The state with the new v, sigma and u.

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
    weights = plain_arrays(weights, "weight")
    jobs = make_jobs(weights, weights, state)
    found = dispatch(jobs, check_int(n_iter, "n_iter"), with_reference(engines))
    return advanced(state, jobs, found.triplets)


def add_gradient(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    factor: Factor = 0.01,
    *,
    target: Factor = 0.0,
    power: int = 2,
    n_iter: int = 1,
    engines: Sequence[Engine] = (),
) -> tuple[dict[str, Array | None], SpectralState]:
    """Add factor·σ·u·vᴴ to each weight's gradient (Algorithm 1, lines 5–9).

    Parameters
    ----------
    weights : mapping of name to array
        The weights that were passed to `init`, with their current values.
    grads : mapping of name to array or None
        Gradients of the loss. A weight whose gradient is None is left out of this step: its v and
        sigma do not change. Entries with other names are returned unchanged.
    state : SpectralState
        The state from `init` or from the step before.
    factor : float, array of shape (), or mapping of name or pattern to either
        λ. The values of arrays are not checked, because reading them would wait for the device.
    target : float, array of shape (), or mapping of name or pattern to either
        The σ below which a matrix gets no gradient. The term is then factor·(σ − target)·u·vᴴ,
        the gradient of the hinge (factor/2)·max(0, σ − target)².
    power : int
        2, or 1 for the gradient factor·u·vᴴ of factor·max(0, σ − target).
    n_iter : int
        Power iterations in this step. With 0, the term of the step before is added again.
    engines : sequence of Engine
        Faster ways to run a step, in order of preference. `ReferenceEngine` runs the weights that
        none of them accepts. No engine may write into the gradients.

    Returns
    -------
    grads : dict of name to array or None
        New arrays, each in the dtype of its gradient. The arrays that were passed in do not change.
    state : SpectralState
        The state for the next step.

    Raises
    ------
    NamesError
        If the names of weights, gradients and state do not fit.
    ShapeError, DTypeError, DeviceError
        If a gradient or a v does not fit its weight.
    ArgumentError
        If ``factor`` or ``target`` is negative or not finite, ``power`` is neither 1 nor 2, or
        ``n_iter`` is negative. Also if ``n_iter`` is 0 and the state holds no u, or if an engine
        writes into the gradients.

    Notes
    -----
    A weight that is not finite makes its own term and sigma NaN or infinite. It affects no other
    weight.

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
    step = _step(weights, grads, state, (factor, target, power), engines, in_place=False)
    n_iter = check_int(n_iter, "n_iter", least=0)
    new_grads, triplets = dispatch(step.jobs, n_iter, step.engines)
    keep(step, state, triplets)
    added = {job.name: grad for job, grad in zip(step.jobs, new_grads, strict=True)}
    return {**grads, **added}, advanced(state, step.jobs, triplets)


def add_gradient_(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    factor: Factor = 0.01,
    *,
    target: Factor = 0.0,
    power: int = 2,
    n_iter: int = 1,
    engines: Sequence[Engine] | None = None,
) -> SpectralState:
    """Add the term to the gradients in place, as `add_gradient` does.

    Parameters
    ----------
    weights, grads, state, factor, target, power, n_iter
        See `add_gradient`. The gradients must be writeable.
    engines : sequence of Engine, optional
        Faster ways to run a step, in order of preference. The default for NumPy arrays is
        `spectral_core.numba.NumbaEngine` where Numba is installed, then NumPy's operations on all
        matrices together. With ``()`` the reference runs every weight.

    Returns
    -------
    SpectralState
        The state for the next step. The state that was passed in does not change.

    Raises
    ------
    NamesError, ShapeError, DTypeError, ArgumentError
        For the same reasons as in `add_gradient`, before any gradient changes.
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
    step = _step(weights, grads, state, (factor, target, power), engines, in_place=True)
    n_iter = check_int(n_iter, "n_iter", least=0)
    result = dispatch(step.jobs, n_iter, step.engines)
    keep(step, state, result.triplets)
    return advanced(state, step.jobs, result.triplets)


def fitting_engines(engines: Sequence[Engine] | None, changed: Iterable[Array]) -> Sequence[Engine]:
    """Return the engines for a step in place, by default those that fit the changed arrays."""
    if engines is None:
        on_host = any(isinstance(x, np.ndarray) for x in changed)
        engines = _host_engines() if on_host else ()
    return with_reference(engines, in_place=True)


@cache
def _host_engines() -> tuple[Engine, ...]:
    """Return the engines for NumPy arrays, made at the first step: Numba's first, if there is one.

    They may be shared: they keep nothing but tables of shapes and a lock.
    """
    plain = HostEngine()
    if find_spec("numba") is None:
        return (plain,)
    try:
        from .numba import NumbaEngine, NumbaWaveEngine

        return NumbaEngine(), NumbaWaveEngine(), plain
    except Exception as error:  # such as a Numba that does not know this version of NumPy
        warn(f"Numba does not work here, so the step is not compiled: {error}", SpectralWarning, 3)
        return (plain,)


def with_reference(engines: Sequence[Engine], *, in_place: bool = False) -> Sequence[Engine]:
    """Return the engines, the last of which is a reference: the caller's own, if there is one."""
    last = engines[-1] if engines else None
    if isinstance(last, ReferenceEngine) and last.in_place == in_place:
        return engines
    return (*engines, ReferenceEngine(in_place=in_place))


def _step(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    numbers: Numbers,
    engines: Sequence[Engine] | None,
    *,
    in_place: bool,
) -> Step:
    """Return the jobs and engines of a step: those of the step before, where they still fit."""
    asked = in_place, *(("default",) if engines is None else engines)
    step = repeated(weights, grads, state, asked, numbers)
    if step is not None:
        return step
    jobs = _jobs(weights, grads, state, *numbers)
    if in_place:
        for job in jobs:
            check_writeable(job.grad, f"the gradient of {job.name!r}", "add_gradient")
        chosen = fitting_engines(engines, [job.grad for job in jobs])
    else:
        chosen = with_reference(engines or ())
    return first_step(jobs, chosen, state, asked, numbers)


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
        plain_arrays(weights, "weight"),
        state,
        grads=plain_arrays(grads, "the gradient of"),
        factors=check_factors(factor, state.v),
        rules=slope_of(target, power, state.v),
    )


def plain_arrays(arrays: Mapping[str, Array], what: str) -> dict[str, Array]:
    """Return the arrays without NumPy's subclasses: a view of each on the same memory."""
    return {name: plain(array, f"{what} {name!r}") for name, array in arrays.items()}


def advanced(
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
