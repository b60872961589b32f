"""Questions about arrays that the Array API standard leaves to its users."""

from __future__ import annotations

import sys
from functools import lru_cache
from os import getpid
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from array_api_compat import array_namespace as _array_namespace
from array_api_compat import is_jax_namespace, is_torch_array

from .errors import DeviceError, DTypeError

Array: TypeAlias = Any
Namespace: TypeAlias = Any

PROCESS = getpid()
"""The process that imported the library. In a forked child, `os.getpid` returns another number."""


def array_namespace(*arrays: Array, name: str = "the arguments") -> Namespace:
    """Return the one namespace of all these arrays.

    Raises
    ------
    DTypeError
        If one is not an array, is sparse or masked, or two arrays come from different libraries.
    """
    for x in arrays:
        if type(x) is not np.ndarray:
            check_dense(x, name)
    try:
        return _array_namespace(*arrays)
    except TypeError:
        kinds = ", ".join(_kind(x) for x in arrays)
        raise DTypeError(f"{name}: expected arrays of one library, not {kinds}") from None


def check_dense(x: Array, name: str) -> None:
    """Raise `DTypeError` unless ``x`` is an array that stores each of its elements.

    Python's numbers, sequences, sparse arrays and masked arrays are refused, with the remedy.
    """
    if isinstance(x, (np.ndarray, np.generic)):
        if not _is_masked(x):
            return
        remedy = "np.ma.filled(W, 0) is the matrix with zeros for the masked elements"
    elif is_torch_array(x):
        if x.layout is sys.modules["torch"].strided:
            return
        remedy = "call its to_dense() first, or leave it out"
    elif x is None or isinstance(x, (bool, int, float, complex, list, tuple)):
        remedy = "make an array of it first, as numpy.asarray does"
    else:
        dense = next((m for m in ("toarray", "todense", "to_numpy") if hasattr(x, m)), None)
        if dense is None or hasattr(x, "__array_namespace__"):
            return  # the search for its namespace decides
        remedy = f"call its {dense}() first, or leave it out"
    raise DTypeError(f"{name}: expected arrays of one library, not {_kind(x)}: {remedy}")


def plain(x: Array, name: str) -> Array:
    """Return a subclass of NumPy's array as a plain array on the same memory; others unchanged.

    `numpy.matrix` multiplies in another way and keeps two axes whatever happens to it. A memory map
    is an array.

    Raises
    ------
    DTypeError
        If ``x`` is a masked array: its mask would be lost.
    """
    if type(x) is np.ndarray or not isinstance(x, np.ndarray):
        return x
    check_dense(x, name)
    return np.asarray(x)


def _is_masked(x: Any) -> bool:
    masked = sys.modules.get("numpy.ma")  # without it, there is no masked array
    return masked is not None and isinstance(x, masked.MaskedArray)


def _kind(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"


class Traits(NamedTuple):
    """The properties of a floating-point dtype that an iteration needs."""

    complex: bool
    iteration_dtype: Any  # the same dtype, or float32 (complex64) for a narrower one
    tiny: float  # the smallest normal number of the iteration
    eps: float
    guard: float  # added to a squared norm before it divides: `tiny`, unless the caller sets it


@lru_cache(maxsize=64)
def traits_of(dtype: Any, xp: Namespace) -> Traits | None:
    """Return the traits of ``dtype``, or None if it is not floating-point or foreign to ``xp``."""
    try:
        if not xp.isdtype(dtype, ("real floating", "complex floating")):
            return None
    except TypeError:  # such as ml_dtypes.bfloat16 in NumPy
        return None
    is_complex = bool(xp.isdtype(dtype, "complex floating"))
    narrow = xp.complex64 if is_complex else xp.float32
    wide = narrow if xp.finfo(dtype).bits < 32 else dtype
    if isinstance(wide, np.dtype):
        wide = wide.newbyteorder("=")  # products of big-endian arrays are in the machine's order
    info = xp.finfo(wide)
    # The smallest longdouble is zero as a float, and then zero by zero would be divided.
    tiny = max(float(info.smallest_normal), sys.float_info.min)
    return Traits(is_complex, wide, tiny, float(info.eps), guard=tiny)


def traits(x: Array, xp: Namespace, name: str) -> Traits:
    """Return the traits of the dtype of ``x``; errors call the array ``name``.

    Raises
    ------
    DTypeError
        If the dtype of ``x`` is not floating-point.
    """
    found = traits_of(x.dtype, xp)
    if found is None:
        raise DTypeError(
            f"{name} has dtype {x.dtype}; a singular value needs a floating-point dtype that "
            f"{xp.__name__} knows: convert the array first, or leave it out"
        )
    return found


def is_complex(x: Array, xp: Namespace) -> bool:
    """Return True if the elements of ``x`` are complex."""
    found = traits_of(x.dtype, xp)
    return found is not None and found.complex


def is_integral(x: Array, xp: Namespace) -> bool:
    """Return True if the elements of ``x`` are integers or booleans."""
    try:
        return bool(xp.isdtype(x.dtype, ("bool", "integral")))
    except TypeError:  # such as ml_dtypes.bfloat16 in NumPy
        return False


def conj(x: Array, xp: Namespace) -> Array:
    """Conjugate ``x``; a real array is returned as it is, without a copy."""
    return xp.conj(x) if is_complex(x, xp) else x


def cast(x: Array, dtype: Any, xp: Namespace) -> Array:
    """Return ``x`` in ``dtype``, or ``x`` itself if it has that dtype already."""
    return x if x.dtype == dtype else xp.astype(x, dtype)


def squared(x: Array, xp: Namespace) -> Array:
    """Return |x|², real."""
    if is_complex(x, xp):
        re, im = xp.real(x), xp.imag(x)
        return re * re + im * im
    return x * x


def norm(x: Array, xp: Namespace) -> Array:
    """Return the Euclidean norm over the last axis, without the optional ``linalg`` extension."""
    return xp.sqrt(xp.sum(squared(x, xp), axis=-1))


def constant(x: Array) -> Array:
    """Detach ``x`` from PyTorch's autograd graph: v would keep the graph alive for ever."""
    detach = getattr(x, "detach", None)
    return x if detach is None else detach()


def device_of(x: Array, xp: Namespace) -> Any:
    """Return the device of ``x``, or None where the backend places arrays itself (JAX)."""
    return None if is_jax_namespace(xp) else _device(x)


def _device(x: Array) -> Any:
    return getattr(x, "device", "cpu")  # before NumPy 2.1, its scalars have none


def check_same_device(x: Array, y: Array, xp: Namespace, x_name: str, y_name: str) -> None:
    """Raise `DeviceError` unless the two arrays are on one device."""
    if is_jax_namespace(xp) or _device(x) == _device(y):
        return
    raise DeviceError(
        f"{x_name} is on {_device(x)} but {y_name} is on {_device(y)}: move one to the other"
    )


def to_host(x: Array) -> np.ndarray[Any, Any]:
    """Return a small vector as a NumPy array; waits for the device."""
    tolist = getattr(x, "tolist", None)
    return np.asarray([complex(e) for e in x] if tolist is None else tolist())


def as_numpy(value: Array, name: str = "an array") -> np.ndarray[Any, Any]:
    """Return an array of any library as a new NumPy array in the machine's order of bytes.

    It waits for the device. Libraries refuse what NumPy cannot view by errors of many types: memory
    of a GPU, bfloat16.

    Raises
    ------
    DTypeError
        If it does not hold floating-point numbers that can be read.
    """
    for convert in (lambda x: x.numpy(), lambda x: x.get(), np.asarray, lambda x: x.tolist()):
        try:
            found = np.asarray(convert(value))
        except Exception:
            continue
        if found.dtype.kind in "fc":
            return found.astype(found.dtype.newbyteorder("="), order="C", copy=True)
    raise DTypeError(f"{name}: cannot read a {type(value).__name__} of dtype {value.dtype}")


def address_of(x: Array) -> int | None:
    """Return the address of the first element of ``x``, or None if it has no memory of its own.

    That is so for JAX on the CPU and in a trace, and for subclasses of a tensor that wrap others,
    such as a sharded tensor.
    """
    data_ptr = getattr(x, "data_ptr", None)  # PyTorch
    if data_ptr is not None:
        try:
            # A wrapper has a storage without memory, and may have an offset into it.
            return int(data_ptr()) if x.untyped_storage().data_ptr() else None
        except (RuntimeError, NotImplementedError):
            return None
    for protocol in ("__array_interface__", "__cuda_array_interface__"):  # NumPy; CuPy
        interface = getattr(x, protocol, None)
        if interface is not None:
            return int(interface["data"][0]) or None
    return None
