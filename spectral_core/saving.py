"""The state as a flat dict of arrays, for any file format, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from ._arrays import Array, array_namespace, cast, device_of
from .errors import NamesError
from .regularizer import SpectralState


def state_dict(state: SpectralState) -> dict[str, Array]:
    """All that a training run needs to go on, as a flat dict of arrays.

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
    {'w.v': (2,), 'w.sigma': (), 'w.u': (3,)}
    """
    fields = {"v": state.v, "sigma": state.sigma, "u": state.u}
    return {
        f"{name}.{field}": arrays[name]
        for name in state.v
        for field, arrays in fields.items()
        if name in arrays
    }


def load_state_dict(state: SpectralState, arrays: Mapping[str, Array]) -> SpectralState:
    """Take over what `state_dict` gave: a run goes on bit for bit.

    Parameters
    ----------
    state : SpectralState
        Of the model that is to go on, as `init` gives it.
    arrays : mapping of str to array
        What a file gave back, as NumPy arrays too: they are copied to where those of ``state``
        lie, in their dtype. If they have no u, the new state has none.

    Returns
    -------
    SpectralState

    Raises
    ------
    NamesError
        If they are of another model: the message lists what is missing, unexpected and of another
        shape.

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

    def taken(field: str, fields: Mapping[str, Array]) -> dict[str, Array]:
        return {name: _like(arrays[f"{name}.{field}"], value) for name, value in fields.items()}

    return replace(
        state, v=taken("v", state.v), sigma=taken("sigma", state.sigma), u=taken("u", state.u)
    )


def check_fits(
    own: Mapping[str, Array], given: Mapping[str, Array], optional: Collection[str] = ()
) -> None:
    """Raise `NamesError` unless ``given`` has an array of the same shape for each one of ``own``.

    It may have others too whose names are ``optional``.
    """
    missing = [key for key in own if key not in given]
    unexpected = [key for key in given if key not in own and key not in optional]
    misfits = [
        f"{key} ({tuple(given[key].shape)}, not {tuple(value.shape)})"
        for key, value in own.items()
        if key in given and tuple(given[key].shape) != tuple(value.shape)
    ]
    if missing or unexpected or misfits:
        raise NamesError(
            f"the state is of another model: missing {missing}, unexpected {unexpected}, "
            f"of another shape {misfits}"
        )


def _like(value: Array, own: Array) -> Array:
    xp = array_namespace(own)
    return cast(xp.asarray(value, device=device_of(own, xp), copy=True), own.dtype, xp)
