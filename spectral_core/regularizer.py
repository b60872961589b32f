"""Algorithm 1 over named weights: the state, its start, and the step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ._arrays import Array, array_namespace, constant
from .checks import Checks
from .errors import ArgumentError, NamesError, ShapeError, checked_int
from .layout import Layout, as_layout, default_layout, plan_of
from .patterns import by_name
from .penalty import Factor, check_writeable, factors_of, is_plain, slope
from .power import PowerIteration, start_vector
from .step import Step, Task, plain_step, plain_step_, sloped

Arrays = Mapping[str, Array]
Layouts = Mapping[str, "Layout | str"] | Layout | str


@dataclass(frozen=True, eq=False)
class SpectralState:
    """All that Algorithm 1 carries from one step to the next.

    Attributes
    ----------
    v : mapping of name to array, shape (*stack, n_in · kernel size)
        The right singular vectors, in the order of `as_matrix`'s columns. With several vectors
        each, (*stack, n_vectors, n_in · kernel size), of which the first is the singular one.
    sigma : mapping of name to array, shape (*stack,)
        The newest estimates. NaN or infinite where the weight was not finite.
    layouts : mapping of name to Layout
        How each weight is viewed. Constant.
    u : mapping of name to array, shape (*stack, n_out)
        The left singular vectors that belong to sigma. A step with ``n_iter=0`` needs them; one
        that iterates does not, and keeps none where there were none.
    checks : Checks
        What has been found to fit. No part of the computation.

    Notes
    -----
    A run goes on bit for bit from the weights, the optimizer's state and this: `state_dict` and
    `load_state_dict`.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> state = sc.init({"w": np.array([[3.0, 4.0]])})
    >>> state.v["w"].shape, state.u["w"].shape, float(state.sigma["w"])
    ((2,), (1,), 5.0)
    """

    v: Arrays
    sigma: Arrays
    layouts: Mapping[str, Layout]
    u: Arrays = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks, repr=False)


def init(
    weights: Arrays,
    *,
    seed: int = 0,
    layouts: Layouts | None = None,
    n_vectors: int = 1,
    step: Step = plain_step,
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
    step : callable
        As for `add_gradient`: what finds the first sigma.

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
    {'conv': (75,), 'out': (8,)}
    """
    if not isinstance(weights, Mapping) or not weights:
        raise NamesError("weights must be a mapping of at least one name to an array")
    for name, weight in weights.items():
        if not isinstance(name, str):
            raise NamesError(f"a weight's name must be a string, not {name!r}")
        array_namespace(weight, name=f"weight {name!r}")
    n_vectors = checked_int(n_vectors, "n_vectors")
    chosen = choose_layouts({name: len(weight.shape) for name, weight in weights.items()}, layouts)
    v = {}
    for name, layout in chosen.items():
        plan = plan_of(layout, weights[name].shape, f"weight {name!r}")
        shape = plan.right if n_vectors == 1 else (*plan.right[:-1], n_vectors, plan.right[-1])
        v[name] = start_vector(shape, weights[name], seed=seed, name=name)
    state = SpectralState(v=v, sigma={}, layouts=chosen)
    found = step(_tasks(weights, state, v), 1).triples
    triples = dict(zip(v, found, strict=True))
    sigma = {name: triple.sigma for name, triple in triples.items()}
    return replace(state, sigma=sigma, u={name: triple.u for name, triple in triples.items()})


def iterate(
    weights: Arrays, state: SpectralState, *, n_iter: int = 1, step: Step = plain_step
) -> SpectralState:
    """Improve v and sigma without a gradient: a warm-up, or a look at the weights as they are.

    Parameters
    ----------
    weights : mapping of name to array
        The weights that `init` saw.
    state : SpectralState
    n_iter : int
        Power iterations.
    step : callable
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
    _check_names(weights, state)
    tasks = _tasks(weights, state, weights)
    return _advanced(state, tasks, step(tasks, checked_int(n_iter, "n_iter")).triples)


def add_gradient(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    *,
    factor: Factor = 0.01,
    target: Factor = 0.0,
    power: int = 2,
    n_iter: int = 1,
    step: Step = plain_step,
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
    step : callable
        The arithmetic: a framework's faster way goes here (`spectral_core.step`). None that
        writes into the gradients.

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
        ``n_iter`` is negative, or it is 0 and the state holds no u; if ``step`` works in place.

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
    if getattr(step, "in_place", False):
        raise ArgumentError("this step writes into the gradients: give it to add_gradient_")
    step = _with_penalty(step, target, power, state)
    return _step(weights, grads, state, factor, n_iter, step)


def add_gradient_(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    *,
    factor: Factor = 0.01,
    target: Factor = 0.0,
    power: int = 2,
    n_iter: int = 1,
    step: Step = plain_step_,
) -> SpectralState:
    """`add_gradient` in place: the gradients are changed where they lie.

    Parameters
    ----------
    weights, grads, state, factor, target, power, n_iter
        As for `add_gradient`; gradients must be writeable.
    step : callable
        The arithmetic, which writes into the gradients: a framework's faster way goes here
        (`spectral_core.step`).

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
    _check_grads(grads, state)
    for name in state.v:
        if grads[name] is not None:
            check_writeable(grads[name], f"the gradient of {name!r}", "add_gradient")
    step = _with_penalty(step, target, power, state)
    return _step(weights, grads, state, factor, n_iter, step)[1]


def choose_layouts(ndims: Mapping[str, int], layouts: Layouts | None) -> dict[str, Layout]:
    """The layout of each name: its own, that of a pattern, or the default for its axes."""
    for name, ndim in ndims.items():
        if ndim < 2:
            raise ShapeError(
                f"weight {name!r} has {ndim} axes: only a matrix, or a tensor viewed as one, has a "
                "spectral norm — leave biases and scales out"
            )
    if layouts is None:
        given: Mapping[str, Layout | str] = {}
    elif isinstance(layouts, Mapping):
        given = by_name(layouts, ndims, "layouts")
    else:
        given = dict.fromkeys(ndims, layouts)
    return {
        name: as_layout(given[name]) if name in given else default_layout(ndim)
        for name, ndim in ndims.items()
    }


def part_of(state: SpectralState, names: Collection[str]) -> SpectralState:
    """The state of these weights alone."""

    def part(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values[name] for name in names if name in values}

    return replace(
        state,
        v=part(state.v),
        sigma=part(state.sigma),
        u=part(state.u),
        layouts=part(state.layouts),
    )


def with_part(state: SpectralState, part: SpectralState) -> SpectralState:
    """``state``, where ``part`` is newer."""
    return replace(
        state,
        v={**state.v, **part.v},
        sigma={**state.sigma, **part.sigma},
        u={**state.u, **part.u},
    )


def _with_penalty(step: Step, target: Factor, power: int, state: SpectralState) -> Step:
    if is_plain(target, power):
        return step
    targets = factors_of(target, state.v, "target")
    return sloped(step, lambda name, sigma: slope(sigma, target=targets[name], power=power))


def _step(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    factor: Factor,
    n_iter: int,
    step: Step,
) -> tuple[dict[str, Array | None], SpectralState]:
    _check_names(weights, state)
    _check_grads(grads, state)
    factors = factors_of(factor, state.v)
    taken = [name for name in state.v if grads[name] is not None]
    tasks = _tasks(weights, state, taken, grads, factors)
    new_grads, triples = step(tasks, checked_int(n_iter, "n_iter", least=0))
    added = zip(tasks, new_grads, strict=True)
    return {**grads, **{task.name: grad for task, grad in added}}, _advanced(state, tasks, triples)


def _advanced(
    state: SpectralState, tasks: list[Task], triples: list[PowerIteration]
) -> SpectralState:
    pairs = [(task.name, triple) for task, triple in zip(tasks, triples, strict=True)]
    return replace(
        state,
        v={**state.v, **{name: triple.v for name, triple in pairs}},
        sigma={**state.sigma, **{name: triple.sigma for name, triple in pairs}},
        u={**state.u, **{name: triple.u for name, triple in pairs}} if state.u else {},
    )


def _check_names(weights: Arrays, state: SpectralState) -> None:
    if not isinstance(weights, Mapping):
        raise NamesError(f"weights must be a mapping of name to array, not {type(weights)}")
    if weights.keys() != state.v.keys():
        missing = [name for name in state.v if name not in weights]
        unexpected = [name for name in weights if name not in state.v]
        raise NamesError(
            f"the weights are not those of the state: missing {missing}, unexpected {unexpected}; "
            "call init again for other weights"
        )


def _check_grads(grads: Mapping[str, Array | None], state: SpectralState) -> None:
    if not isinstance(grads, Mapping):
        raise NamesError(f"grads must be a mapping of name to array, not {type(grads)}")
    missing = [name for name in state.v if name not in grads]
    if missing:
        raise NamesError(f"grads has no entry for {missing}: give None to leave a weight out")


def _tasks(
    weights: Arrays,
    state: SpectralState,
    names: Iterable[str],
    grads: Mapping[str, Array | None] | None = None,
    factors: Mapping[str, float | Array] | None = None,
) -> list[Task]:
    """The tasks of these weights; an error tells of all whose shape does not fit."""
    tasks, misfits = [], []
    for name in names:
        grad = None if grads is None else grads[name]
        factor = 0.0 if factors is None else factors[name]
        try:
            tasks.append(_task(name, weights[name], state, grad, factor))
        except ShapeError as error:
            misfits.append(str(error))
    if misfits:
        raise ShapeError("\n".join(misfits))
    return tasks


def _task(
    name: str,
    weight: Array,
    state: SpectralState,
    grad: Array | None,
    factor: float | Array,
) -> Task:
    v = state.v[name]
    u = state.u.get(name)
    last = None if u is None else PowerIteration(state.sigma[name], u, v)
    plan, xp = state.checks.of(name, weight, v, grad, factor, state.layouts[name], last)
    return Task(name, constant(weight), grad, v, factor, plan, xp, last)
