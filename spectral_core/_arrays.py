"""The few questions about arrays that the Array API standard leaves to its users."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from array_api_compat import array_namespace as _array_namespace
from array_api_compat import is_jax_namespace

from .errors import DeviceError, DTypeError

Array: TypeAlias = Any
Namespace: TypeAlias = Any


def array_namespace(*arrays: Array, name: str = "the arguments") -> Namespace:
    """The one namespace of all these arrays.

    Raises
    ------
    DTypeError
        If one is not an array, or they are of two libraries.
    """
    try:
        return _array_namespace(*arrays)
    except TypeError as error:
        kinds = ", ".join(f"{type(x).__module__}.{type(x).__qualname__}" for x in arrays)
        raise DTypeError(f"{name}: expected arrays of one library, not {kinds} ({error})") from None


class Traits(NamedTuple):
    """What follows from a floating-point dtype."""

    complex: bool
    iteration_dtype: Any  # the same, but float32 for anything narrower
    tiny: float  # the smallest normal number of the iteration
    eps: float


@lru_cache(maxsize=64)
def traits_of(dtype: Any, xp: Namespace) -> Traits | None:
    """The traits of ``dtype``, or None if it is not floating-point, or foreign to ``xp``."""
    try:
        if not xp.isdtype(dtype, ("real floating", "complex floating")):
            return None
    except TypeError:  # such as ml_dtypes.bfloat16 in NumPy
        return None
    is_complex = bool(xp.isdtype(dtype, "complex floating"))
    narrow = xp.complex64 if is_complex else xp.float32
    wide = narrow if xp.finfo(dtype).bits < 32 else dtype
    info = xp.finfo(wide)
    return Traits(is_complex, wide, float(info.smallest_normal), float(info.eps))


def traits(x: Array, xp: Namespace, name: str) -> Traits:
    """The traits of the dtype of ``x``, which errors call ``name``.

    Raises
    ------
    DTypeError
        If ``x`` is not of a floating-point dtype.
    """
    found = traits_of(x.dtype, xp)
    if found is None:
        raise DTypeError(
            f"{name} has dtype {x.dtype}; a singular value needs a floating-point dtype that "
            f"{xp.__name__} knows: convert the array first, or leave it out"
        )
    return found


def is_complex(x: Array, xp: Namespace) -> bool:
    """Whether the elements of ``x`` are complex."""
    found = traits_of(x.dtype, xp)
    return found is not None and found.complex


def conj(x: Array, xp: Namespace) -> Array:
    """Conjugate, without a copy where there is nothing to conjugate."""
    return xp.conj(x) if is_complex(x, xp) else x


def cast(x: Array, dtype: Any, xp: Namespace) -> Array:
    """``x`` in ``dtype``, itself if it is so already."""
    return x if x.dtype == dtype else xp.astype(x, dtype)


def squared(x: Array, xp: Namespace) -> Array:
    """|x|², real."""
    if is_complex(x, xp):
        re, im = xp.real(x), xp.imag(x)
        return re * re + im * im
    return x * x


def norm(x: Array, xp: Namespace) -> Array:
    """Euclidean norm over the last axis, without the optional ``linalg`` extension."""
    return xp.sqrt(xp.sum(squared(x, xp), axis=-1))


def constant(x: Array) -> Array:
    """Without the autograd graph that PyTorch hangs on a parameter: v would keep it for ever."""
    detach = getattr(x, "detach", None)
    return x if detach is None else detach()


def device_of(x: Array, xp: Namespace) -> Any:
    """The device of ``x``, or None where the backend places arrays itself (JAX)."""
    return None if is_jax_namespace(xp) else x.device


def check_same_device(x: Array, y: Array, xp: Namespace, x_name: str, y_name: str) -> None:
    """Raise `DeviceError` if the two arrays do not lie on one device."""
    if is_jax_namespace(xp) or x.device == y.device:
        return
    raise DeviceError(
        f"{x_name} is on {x.device} but {y_name} is on {y.device}: move one to the other"
    )


def to_host(x: Array) -> np.ndarray[Any, Any]:
    """A small vector as a NumPy array: waits for the device."""
    tolist = getattr(x, "tolist", None)
    return np.asarray([complex(e) for e in x] if tolist is None else tolist())
