"""Algorithm 1 over named weights: the state, its start, and the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ._arrays import Array, array_namespace, check_same_device, is_complex, traits
from .errors import DTypeError, NamesError, ShapeError
from .layout import Layout, Plan, as_layout, default_layout, lay, lying_matrix, plan_of, unlay
from .patterns import by_name
from .penalty import (
    Factor,
    OuterUpdate,
    add_outer_,
    add_rank_one,
    add_rank_one_,
    check_writeable,
    factors_of,
)
from .power import PowerIteration, check_n_iter, power_iteration, start_vector

Arrays = Mapping[str, Array]
Layouts = Mapping[str, "Layout | str"] | Layout | str


@dataclass(frozen=True)
class SpectralState:
    """All that Algorithm 1 carries from one step to the next.

    Attributes
    ----------
    v : mapping of name to array, shape (*stack, n_in · kernel size)
        The right singular vectors, in the order of `as_matrix`'s columns.
    sigma : mapping of name to array, shape (*stack,)
        The newest estimates. NaN or infinite where the weight was not finite.
    layouts : mapping of name to Layout
        How each weight is viewed. Constant.

    Examples
    --------
    A run goes on bit for bit from the weights, the optimizer's state and v:

    >>> import dataclasses, io
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> weights = {"w": np.array([[3.0, 3.0], [0.0, 3.0]])}
    >>> state = sc.iterate(weights, sc.init(weights))
    >>> file = io.BytesIO()
    >>> np.savez(file, **state.v)
    >>> _ = file.seek(0)
    >>> resumed = dataclasses.replace(sc.init(weights), v=dict(np.load(file)))
    >>> bool(np.all(resumed.v["w"] == state.v["w"]))
    True
    """

    v: Arrays
    sigma: Arrays
    layouts: Mapping[str, Layout]


def init(weights: Arrays, *, seed: int = 0, layouts: Layouts | None = None) -> SpectralState:
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
        array_namespace(weight, name=f"weight {name!r}")
    chosen = choose_layouts({name: len(weight.shape) for name, weight in weights.items()}, layouts)
    v = {}
    for name, layout in chosen.items():
        plan = plan_of(layout, weights[name].shape, f"weight {name!r}")
        v[name] = start_vector(plan.right, weights[name], seed=seed, name=name)
    state = SpectralState(v=v, sigma={}, layouts=chosen)
    sigma = {name: triple_of(name, weights[name], state, n_iter=1).sigma for name in v}
    return replace(state, sigma=sigma)


def iterate(weights: Arrays, state: SpectralState, *, n_iter: int = 1) -> SpectralState:
    """Improve v and sigma without a gradient: a warm-up, or a look at the weights as they are.

    Parameters
    ----------
    weights : mapping of name to array
        The weights that `init` saw.
    state : SpectralState
    n_iter : int
        Power iterations.

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
    triples = {name: triple_of(name, weights[name], state, n_iter) for name in state.v}
    return _advanced(state, triples)


def add_gradient(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    *,
    factor: Factor = 0.01,
    n_iter: int = 1,
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
    n_iter : int
        Power iterations in this step.

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
        If ``factor`` is negative or not finite, or ``n_iter`` is less than 1.

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
    return _step(weights, grads, state, factor, n_iter, add_rank_one)


def add_gradient_(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    *,
    factor: Factor = 0.01,
    n_iter: int = 1,
    add_outer_: OuterUpdate = add_outer_,
) -> SpectralState:
    """`add_gradient` in place: the gradients are changed where they lie.

    Parameters
    ----------
    weights, grads, state, factor, n_iter
        As for `add_gradient`; gradients must be writeable.
    add_outer_ : callable
        ``add_outer_(grad, u, v)`` adds the product ``u * v``, which broadcasts to ``grad``, in
        place. A framework's fused update goes here.

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
    for name in state.v:
        if grads.get(name) is not None:
            check_writeable(grads[name], name)

    def add_(grad: Array, triple: PowerIteration, layout: Layout, factor: Array) -> Array:
        return add_rank_one_(grad, triple, layout, factor, add_outer_)

    return _step(weights, grads, state, factor, n_iter, add_)[1]


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


def triple_of(name: str, weight: Array, state: SpectralState, n_iter: int) -> PowerIteration:
    """(σ, u, v) of one weight from its v in ``state``, checked, v in the canonical order."""
    weight, v = _constant(weight), state.v[name]
    xp = array_namespace(weight, v, name=f"weight {name!r} and its v")
    plan = plan_of(state.layouts[name], weight.shape, f"weight {name!r}")
    _check_v(name, weight, v, plan)
    triple = power_iteration(lying_matrix(weight, plan, xp), lay(v, plan, xp), n_iter=n_iter)
    return triple._replace(v=unlay(triple.v, plan, xp))


Add = Callable[[Array, PowerIteration, Layout, "float | Array"], Array]


def _step(
    weights: Arrays,
    grads: Mapping[str, Array | None],
    state: SpectralState,
    factor: Factor,
    n_iter: int,
    add: Add,
) -> tuple[dict[str, Array | None], SpectralState]:
    _check_names(weights, state)
    missing = [name for name in state.v if name not in grads]
    if missing:
        raise NamesError(f"grads has no entry for {missing}: give None to leave a weight out")
    factors = factors_of(factor, state.v)
    n_iter = check_n_iter(n_iter)
    present = [name for name in state.v if grads[name] is not None]
    for name in present:
        _check_grad(name, weights[name], grads[name], factors[name])
    triples = {name: triple_of(name, weights[name], state, n_iter) for name in present}
    terms = {
        name: add(grads[name], triple, state.layouts[name], factors[name])
        for name, triple in triples.items()
    }
    return {**grads, **terms}, _advanced(state, triples)


def _advanced(state: SpectralState, triples: Mapping[str, PowerIteration]) -> SpectralState:
    return replace(
        state,
        v={**state.v, **{name: triple.v for name, triple in triples.items()}},
        sigma={**state.sigma, **{name: triple.sigma for name, triple in triples.items()}},
    )


def _constant(x: Array) -> Array:
    """Without the autograd graph that PyTorch hangs on a parameter: v would keep it for ever."""
    detach = getattr(x, "detach", None)
    return x if detach is None else detach()


def _check_names(weights: Arrays, state: SpectralState) -> None:
    if weights.keys() != state.v.keys():
        missing = [name for name in state.v if name not in weights]
        unexpected = [name for name in weights if name not in state.v]
        raise NamesError(
            f"the weights are not those of the state: missing {missing}, unexpected {unexpected}; "
            "call init again for other weights"
        )


def _check_v(name: str, weight: Array, v: Array, plan: Plan) -> None:
    if tuple(v.shape) != plan.right:
        raise ShapeError(
            f"weight {name!r} of shape {tuple(weight.shape)} needs a v of shape {plan.right}, but "
            f"the state's has {tuple(v.shape)}: call init again for other weights"
        )
    check_same_device(weight, v, f"weight {name!r}", "its v")


def _check_grad(name: str, weight: Array, grad: Array, factor: float | Array) -> None:
    arrays = (weight, grad) if isinstance(factor, float) else (weight, grad, factor)
    xp = array_namespace(*arrays, name=f"weight {name!r}, its gradient and factor")
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
    check_same_device(weight, grad, f"weight {name!r}", "its gradient")
