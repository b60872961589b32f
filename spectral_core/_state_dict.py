"""The state of Algorithm 1, and the state as a flat dict of arrays for any file format."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ._arrays import Array, array_namespace, cast, device_of
from ._layout import Layout
from ._plan import reshaped
from ._validate import Checks
from .errors import NamesError

Arrays: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class SpectralState:
    """Everything that Algorithm 1 carries from one step to the next.

    Attributes
    ----------
    v : mapping of name to array, shape (*stack, n_vectors, n_in · kernel size)
        The right singular vectors, one in each row, in the order of `as_matrix`'s columns. The
        first row is v. The other rows are there when ``n_vectors`` is more than 1.
    sigma : mapping of name to array, shape (*stack,)
        The newest estimates. NaN or infinite where the weight was not finite.
    layouts : mapping of name to Layout
        How each weight is viewed as a matrix. Constant.
    u : mapping of name to array, shape (*stack, n_out)
        The left singular vectors that belong to sigma. A step with ``n_iter=0`` needs them. Other
        steps do not, and keep none where there were none.
    checks : Checks
        Record of the checks that passed. Not part of the computation.

    Notes
    -----
    A run continues bit for bit from the weights, the optimizer's state and this state:
    see `state_dict` and `load_state_dict`.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> state = sc.init({"w": np.array([[3.0, 4.0]])})
    >>> state.v["w"].shape, state.u["w"].shape, float(state.sigma["w"])
    ((1, 2), (1,), 5.0)
    """

    v: Arrays
    sigma: Arrays
    layouts: Mapping[str, Layout]
    u: Arrays = field(default_factory=dict)
    checks: Checks = field(default_factory=Checks, repr=False)


def select(state: SpectralState, names: Collection[str]) -> SpectralState:
    """Return the state of these weights alone."""

    def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: values[name] for name in names if name in values}

    return replace(
        state,
        v=chosen(state.v),
        sigma=chosen(state.sigma),
        u=chosen(state.u),
        layouts=chosen(state.layouts),
    )


def merge(state: SpectralState, newer: SpectralState) -> SpectralState:
    """Return ``state`` with the values of ``newer`` where it has them."""
    return replace(
        state,
        v={**state.v, **newer.v},
        sigma={**state.sigma, **newer.sigma},
        u={**state.u, **newer.u},
    )


def state_dict(state: SpectralState) -> dict[str, Array]:
    """Return everything a training run needs to continue, as a flat dict of arrays.

    Parameters
    ----------
    state : SpectralState

    Returns
    -------
    dict of str to array
        ``"<name>.v"`` and ``"<name>.sigma"`` of each weight, and ``"<name>.u"`` where the state
        holds u.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> state = sc.init({"w": np.ones((3, 2))})
    >>> {key: array.shape for key, array in sc.state_dict(state).items()}
    {'w.v': (1, 2), 'w.sigma': (), 'w.u': (3,)}
    """
    fields = {"v": state.v, "sigma": state.sigma, "u": state.u}
    return {
        f"{name}.{field}": arrays[name]
        for name in state.v
        for field, arrays in fields.items()
        if name in arrays
    }


def load_state_dict(state: SpectralState, arrays: Mapping[str, Array]) -> SpectralState:
    """Return ``state`` with the arrays that `state_dict` returned: a run continues bit for bit.

    Parameters
    ----------
    state : SpectralState
        The state of the same model, as `init` returns it.
    arrays : mapping of str to array
        The saved arrays, also as NumPy arrays. They are copied to the devices and dtypes of the
        arrays of ``state``. Without u among them, the new state has none. A v that was saved
        without its axis of vectors, by version 0.1.0, gets the axis.

    Returns
    -------
    SpectralState

    Raises
    ------
    NamesError
        If the arrays belong to another model. The message lists what is missing, unexpected and
        of another shape.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> weights = {"w": np.array([[3.0, 3.0], [0.0, 3.0]])}
    >>> state = sc.iterate(weights, sc.init(weights))
    >>> file = io.BytesIO()
    >>> np.savez(file, **sc.state_dict(state))
    >>> _ = file.seek(0)
    >>> resumed = sc.load_state_dict(sc.init(weights), np.load(file))
    >>> bool(np.all(resumed.v["w"] == state.v["w"]))
    True
    """
    if not any(f"{name}.u" in arrays for name in state.v):
        state = replace(state, u={})
    own = state_dict(state)
    check_fits(own, arrays, optional=[f"{name}.u" for name in state.v])

    def loaded(field: str, own: Mapping[str, Array]) -> dict[str, Array]:
        return {name: like_own(arrays[f"{name}.{field}"], value) for name, value in own.items()}

    return replace(
        state, v=loaded("v", state.v), sigma=loaded("sigma", state.sigma), u=loaded("u", state.u)
    )


def check_fits(
    own: Mapping[str, Array], arrays: Mapping[str, Array], optional: Collection[str] = ()
) -> None:
    """Raise `NamesError` unless ``arrays`` has an array of the same shape for each of ``own``.

    ``arrays`` may have others too whose names are ``optional``.
    """
    missing = [key for key in own if key not in arrays]
    unexpected = [key for key in arrays if key not in own and key not in optional]
    misfits = [
        f"{key} ({tuple(arrays[key].shape)}, not {tuple(value.shape)})"
        for key, value in own.items()
        if key in arrays and not _fits(key, tuple(arrays[key].shape), tuple(value.shape))
    ]
    if missing or unexpected or misfits:
        raise NamesError(
            f"the state is of another model: missing {missing}, unexpected {unexpected}, "
            f"of another shape {misfits}"
        )


def _fits(key: str, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Return True for the same shape, and for that of a v that version 0.1.0 saved."""
    old_v = key.endswith(".v") and own[-2:-1] == (1,)
    return shape == own or (old_v and shape == (*own[:-2], own[-1]))


def like_own(value: Array, own: Array) -> Array:
    """Return a copy of ``value`` on the device, in the dtype and in the shape of ``own``."""
    xp = array_namespace(own)
    copy = xp.asarray(value, device=device_of(own, xp), copy=True)
    return reshaped(cast(copy, own.dtype, xp), tuple(own.shape), xp)
