"""The state of Algorithm 1, and the state as a flat dict of arrays for any file format."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from ._arrays import (
    Array,
    array_namespace,
    as_numpy,
    cast,
    check_dense,
    constant,
    device_of,
    norm,
    to_host,
)
from ._geometry import FLATTENED, OPERATOR, Convolution
from ._layout import Layout
from ._plan import reshaped
from ._validate import Checks
from .errors import ArgumentError, DeviceError, DTypeError, NamesError, listed

Arrays: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class SpectralState:
    """Everything that Algorithm 1 carries from one step to the next.

    Attributes
    ----------
    v : mapping of name to array, shape (*stack, n_vectors, n_in · kernel size)
        The right singular vectors, one in each row, in the order of `as_matrix`'s columns. The
        first row is v. The other rows are there when ``n_vectors`` is more than 1. With a
        `Convolution`, each row is a wave: its amplitudes, real and imaginary, then its frequency.
    sigma : mapping of name to array, shape (*stack,)
        The newest estimates. NaN or infinite where the weight was not finite.
    layouts : mapping of name to Layout
        How each weight is viewed as a matrix. Constant.
    u : mapping of name to array, shape (*stack, n_out)
        The left singular vectors that belong to sigma, complex with a `Convolution`. A step with
        ``n_iter=0`` needs them. Other steps do not, and keep none where there were none.
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
    >>> state.v["w"].shape, state.u["w"].shape, round(float(state.sigma["w"]), 4)
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
        holds u. With a `Convolution`, ``"<name>.waves"`` instead of v.

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
        _key(state, name, field): arrays[name]
        for name in state.v
        for field, arrays in fields.items()
        if name in arrays
    }


def _key(state: SpectralState, name: str, field: str) -> str:
    """Return the key of an array. Waves are no v: one cannot be loaded as the other."""
    waves = field == "v" and isinstance(state.layouts[name], Convolution)
    return f"{name}.{'waves' if waves else field}"


def load_state_dict(state: SpectralState, arrays: Mapping[str, Array]) -> SpectralState:
    """Return ``state`` with the arrays that `state_dict` returned: a run continues bit for bit.

    Parameters
    ----------
    state : SpectralState
        The state of the same model, as `init` returns it.
    arrays : mapping of str to array
        The saved arrays, of this library or of another one. They are copied to the devices and
        dtypes of the arrays of ``state``. Without u among them, the new state has none. A v that
        was saved without its axis of vectors, by version 0.1.0, gets the axis.

    Returns
    -------
    SpectralState

    Raises
    ------
    NamesError
        If the arrays belong to another model. The message lists what is missing, unexpected and
        of another shape. Also if ``arrays`` is not a mapping.
    DTypeError
        If an entry is not a dense array of floating-point numbers, or is complex where the state is
        real.
    DeviceError
        If an entry is on the device 'meta' and has no values.
    ArgumentError
        If the rows of a v are not unit vectors. A v of zeros, NaN or Inf would never recover.

    Notes
    -----
    Every entry is checked before the first one is used. The check waits for the device.

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
    check_mapping(arrays)
    if not any(f"{name}.u" in arrays for name in state.v):
        state = replace(state, u={})
    loaded = loaded_arrays(state_dict(state), arrays, [f"{name}.u" for name in state.v])

    def of(field: str, own: Mapping[str, Array]) -> dict[str, Array]:
        return {name: loaded[_key(state, name, field)] for name in own}

    return replace(state, v=of("v", state.v), sigma=of("sigma", state.sigma), u=of("u", state.u))


def loaded_arrays(
    own: Mapping[str, Array], arrays: Mapping[str, Array], optional: Collection[str] = ()
) -> dict[str, Array]:
    """Return a copy of each of ``arrays`` on the device and in the dtype and shape of its own.

    Parameters
    ----------
    own : mapping of str to array
        The arrays of the state that is to be loaded.
    arrays : mapping of str to array
        The saved arrays, of any library.
    optional : collection of str
        Names of entries that ``arrays`` may have in addition.

    Raises
    ------
    NamesError, DTypeError, DeviceError, ArgumentError
        See `load_state_dict`.
    """
    check_mapping(arrays)
    given = {key: arrays[key] for key in own if key in arrays}  # a file is read at each access
    missing = [key for key in own if key not in arrays]
    unexpected = [key for key in arrays if key not in own and key not in optional]
    _check_norm(missing, unexpected)
    for key, value in given.items():
        _check_entry(key, value, own[key])
    misfits = [
        f"{key} ({tuple(value.shape)}, not {tuple(own[key].shape)})"
        for key, value in given.items()
        if not _fits(key, tuple(value.shape), tuple(own[key].shape))
    ]
    if missing or unexpected or misfits:
        raise NamesError(
            f"the state is of another model: missing {listed(missing)}, unexpected "
            f"{listed(unexpected)}, of another shape {listed(misfits)}"
        )
    copies = {key: like_own(value, own[key], key) for key, value in given.items()}
    useless = [key for key, x in copies.items() if not _is_useful(key, x)]
    if useless:
        raise ArgumentError(
            f"the state's {listed(useless)} must be unit vectors, one in each row, without NaN: "
            "load an older state, or start from a new one"
        )
    return copies


def check_mapping(arrays: Mapping[str, Array]) -> None:
    """Raise `NamesError` unless the saved arrays are a mapping."""
    if not isinstance(arrays, Mapping):
        raise NamesError(f"a state is a mapping of name to array, not {type(arrays).__name__}")


def _check_entry(key: str, value: Array, own: Array) -> None:
    """Raise `DTypeError` or `DeviceError` unless the entry has numbers of the kind of its own."""
    name = f"the state's {key!r}"
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        raise DTypeError(f"{name} must be an array, not {type(value).__name__}")
    check_dense(value, name)
    if str(getattr(value, "device", "")) == "meta":
        raise DeviceError(f"{name} is on the device 'meta' and has no values")
    wanted, found = _number_kind(own), _number_kind(value)
    if found != wanted and (found, wanted) != ("float", "complex"):
        raise DTypeError(f"{name} has dtype {value.dtype}, but the state has {own.dtype}")


def _number_kind(x: Array) -> str:
    """Return "float", "complex" or the name of another dtype, in any library."""
    name = str(getattr(x.dtype, "name", x.dtype))
    return next((kind for kind in ("complex", "float") if kind in name), name)


def _check_norm(missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise `NamesError` if the state was saved with the other norm."""
    for mine, theirs, saved_norm in (("waves", "v", FLATTENED), ("v", "waves", OPERATOR)):
        saved = {x.removesuffix(f".{theirs}") for x in unexpected if x.endswith(f".{theirs}")}
        names = [name for key in missing if (name := key.removesuffix(f".{mine}")) in saved]
        if names:
            raise NamesError(
                f'the state of {listed(names)} was saved with norm="{saved_norm}": load it with '
                "this norm, or start from a new state, which needs some steps to find σ"
            )


def _is_useful(key: str, x: Array) -> bool:
    """Return False for rows that would never recover: of no length, NaN or infinite."""
    if key.endswith(".waves"):  # amplitudes of at most one, and angles
        return float(array_namespace(x).max(array_namespace(x).abs(x))) < 7
    return not key.endswith(".v") or _is_unit(x)


def _is_unit(V: Array) -> bool:
    """Return True if the first row is a unit vector, up to rounding, and no row is longer.

    The other rows may be zero, and so may all where the vectors are empty.
    """
    xp = array_namespace(V)
    if not float(xp.max(xp.abs(V))) < 2:
        return False
    lengths = to_host(xp.reshape(norm(V, xp), (-1,))).reshape(tuple(V.shape[:-1]))
    return bool(np.all(lengths < 2) and np.all(lengths[..., 0] > 0.5))


def _fits(key: str, shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """Return True for the same shape, and for that of a v that version 0.1.0 saved."""
    old_v = key.endswith(".v") and own[-2:-1] == (1,)
    return shape == own or (old_v and shape == (*own[:-2], own[-1]))


def like_own(value: Array, own: Array, name: str = "an array") -> Array:
    """Return a copy of ``value`` on the device, in the dtype and in the shape of ``own``.

    Raises
    ------
    DTypeError
        If the library of ``own`` cannot take it.
    """
    xp = array_namespace(own)
    value = constant(value)
    if type(value).__module__.partition(".")[0] != type(own).__module__.partition(".")[0]:
        value = as_numpy(value, name)
    try:
        copy = xp.asarray(value, device=device_of(own, xp), copy=True)
    except (TypeError, ValueError):  # PyTorch and NumPy's arrays of another order in memory
        copy = xp.asarray(as_numpy(value, name), device=device_of(own, xp), copy=True)
    return reshaped(cast(copy, own.dtype, xp), tuple(own.shape), xp)
