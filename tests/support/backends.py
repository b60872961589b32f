"""One table of array backends for all tests: what each can do, and why it is skipped here.

A test takes the ``backend`` fixture and runs once for each entry; ``@on(...)`` narrows the choice.
Nothing is imported before a test needs it, so a missing framework costs nothing but a skip.
The environment variable ``SPECTRAL_BACKENDS`` (names, comma between) restricts the run to some.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

# Read when JAX is first imported: float64 at all, and room for other frameworks on its GPU.
os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Most of a run is XLA's compiler. The session `integrations` runs JAX with all optimizations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

STANDARD = frozenset({"float32", "float64", "complex64", "complex128"})
HALF = frozenset({"float16", "bfloat16"})


@dataclass(frozen=True)
class Backend:
    """An array library on a device."""

    name: str
    module: str
    make: Callable[[np.ndarray, str], Any]
    back: Callable[[Any], np.ndarray] = np.array
    dtypes: frozenset[str] = STANDARD
    in_place: bool = True
    probe: Callable[[], str | None] = lambda: None
    flags: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __str__(self):
        return self.name

    def skip_reason(self):
        """Why this backend cannot be tested here, or None."""
        return _skip_reason(self)

    def asarray(self, x, dtype=None):
        """A new array on the backend's device, of the dtype of ``x`` or the one named."""
        x = np.asarray(x)
        return self.make(x.copy(), dtype or x.dtype.name)

    def to_numpy(self, x):
        """A NumPy array of the same dtype, but float32 for bfloat16."""
        return self.back(x)

    def tree(self, arrays, dtype=None):
        """``asarray`` of each value of a mapping."""
        return {name: self.asarray(x, dtype) for name, x in arrays.items()}

    def tree_to_numpy(self, arrays):
        """``to_numpy`` of each value of a mapping."""
        return {name: self.to_numpy(x) for name, x in arrays.items()}

    def dtype_name(self, x):
        """The dtype of ``x`` as a word: ``"float32"``."""
        return str(x.dtype).rpartition(".")[2]


@cache
def _skip_reason(backend):
    chosen = os.environ.get("SPECTRAL_BACKENDS")
    if chosen and backend.name not in _names(chosen):
        return f"left out by SPECTRAL_BACKENDS={chosen}"
    if find_spec(backend.module) is None:
        return f"{backend.module} is not installed"
    return backend.probe()


def _names(chosen):
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    unknown = set(names) - {backend.name for backend in BACKENDS}
    if unknown:  # a slip of the pen would else skip everything, and look green
        raise ValueError(f"SPECTRAL_BACKENDS: no such backend: {', '.join(sorted(unknown))}")
    return names


# NumPy


def _numpy(x, dtype):
    return x.astype(dtype, copy=False)


def _numpy_readonly(x, dtype):
    x = _numpy(x, dtype)
    x.flags.writeable = False
    return x


# array-api-strict


def _strict(x, dtype):
    return import_module("array_api_strict").asarray(x.astype(dtype, copy=False))


def _strictest():
    return import_module("array_api_strict").ArrayAPIStrictFlags(
        boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
    )


# PyTorch


def _torch(device):
    def make(x, dtype):
        torch = import_module("torch")
        return torch.from_numpy(x).to(device=device, dtype=getattr(torch, dtype))

    return make


def _torch_back(x):
    torch = import_module("torch")
    x = x.detach().cpu().resolve_conj()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy().copy()


def _torch_cuda():
    torch = import_module("torch")
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


# JAX


def _jax_devices(platform):
    jax = import_module("jax")
    jax.config.update("jax_enable_x64", True)  # if it was imported before this module
    try:
        return jax.devices(platform)
    except RuntimeError:
        return []


def _jax(platform):
    def make(x, dtype):
        jax = import_module("jax")
        return jax.device_put(x.astype(jax.numpy.dtype(dtype)), _jax_devices(platform)[0])

    return make


def _jax_back(x):
    return np.array(x, dtype="float32" if x.dtype.name == "bfloat16" else None)


def _jax_probe(platform):
    return lambda: None if _jax_devices(platform) else f"JAX finds no {platform} device"


# CuPy


def _cupy(x, dtype):
    return import_module("cupy").asarray(x.astype(dtype, copy=False))


def _cupy_back(x):
    return import_module("cupy").asnumpy(x)


def _cupy_probe():
    cupy = import_module("cupy")
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no CUDA device ({error})"
    return None if count else "CuPy finds no CUDA device"


_TORCH = {"module": "torch", "back": _torch_back, "dtypes": STANDARD | HALF}
_JAX = {"module": "jax", "back": _jax_back, "dtypes": STANDARD | HALF, "in_place": False}
_STRICT = {"module": "array_api_strict", "make": _strict}

BACKENDS = (
    Backend("numpy", "numpy", _numpy, dtypes=STANDARD | {"float16"}),
    Backend(
        "numpy-readonly", "numpy", _numpy_readonly, dtypes=STANDARD | {"float16"}, in_place=False
    ),
    Backend("array-api-strict", **_STRICT),
    Backend("array-api-strictest", **_STRICT, flags=_strictest),
    Backend("torch-cpu", make=_torch("cpu"), **_TORCH),
    Backend("torch-cuda", make=_torch("cuda"), probe=_torch_cuda, **_TORCH),
    Backend("jax-cpu", make=_jax("cpu"), probe=_jax_probe("cpu"), **_JAX),
    Backend("jax-gpu", make=_jax("gpu"), probe=_jax_probe("gpu"), **_JAX),
    Backend("cupy", "cupy", _cupy, _cupy_back, dtypes=STANDARD | {"float16"}, probe=_cupy_probe),
)


def on(*names, module=None, dtype=None, in_place=None):
    """Mark a test to take these backends only: by name, library, dtype or writeable arrays."""
    chosen = [
        backend
        for backend in BACKENDS
        if (not names or backend.name in names)
        and (module is None or backend.module == module)
        and (dtype is None or dtype in backend.dtypes)
        and (in_place is None or backend.in_place == in_place)
    ]
    return pytest.mark.parametrize("backend", chosen, ids=str, indirect=True)


# JAX compiles for each new shape and dtype; array-api-strict checks each operation in Python.
SLOW = pytest.mark.thorough("jax-cpu", "array-api-strict", "array-api-strictest")


def slow(*values):
    """Leave these values to the thorough profile on the backends that are slow."""
    return [pytest.param(value, marks=SLOW) for value in values]


def get(name):
    """The backend of this name, or a skip of the test that asks."""
    (backend,) = (backend for backend in BACKENDS if backend.name == name)
    if reason := backend.skip_reason():
        pytest.skip(f"{name}: {reason}")
    return backend


# Matrices to test with

KINDS = {
    "gaussian": None,
    "orthogonal": lambda k: np.ones(k),
    "rank one": lambda k: np.eye(k)[0],
    "close pair": lambda k: np.r_[1 + 1e-6, np.linspace(1, 0.5, k - 1)],
    "close cluster": lambda k: np.r_[1 + 1e-6, np.ones(k - 1)],
    "decaying": lambda k: 0.5 ** np.arange(k),
    "repeated": lambda k: np.r_[np.ones(k - k // 2), np.full(k // 2, 0.5)],
}


def gaussian(rng, *shape, dtype="float64"):
    """Standard normal entries, complex ones where the dtype is."""
    x = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        x = x + 1j * rng.standard_normal(shape)
    return x.astype(dtype)


def orthogonal(rng, m, n, dtype="float64"):
    """An m × n matrix with orthonormal columns, or rows."""
    Q = np.linalg.qr(gaussian(rng, max(m, n), min(m, n), dtype=dtype))[0]
    return Q if m >= n else Q.conj().T


def matrix(rng, kind, m, n, dtype="float64"):
    """An m × n matrix with the singular values of ``KINDS``."""
    if KINDS[kind] is None:
        return gaussian(rng, m, n, dtype=dtype)
    k = min(m, n)
    return orthogonal(rng, m, k, dtype) * KINDS[kind](k) @ orthogonal(rng, k, n, dtype)


def unit(rng, *shape, dtype="float64"):
    """Unit vectors along the last axis."""
    x = gaussian(rng, *shape, dtype=dtype)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def svd_norm(W):
    """The largest singular value of each matrix, by SVD."""
    return np.linalg.svd(W, compute_uv=False)[..., 0]


def outer(sigma, u, v):
    """σ·u·vᴴ of NumPy arrays, stacked."""
    return np.asarray(sigma)[..., None, None] * u[..., :, None] * np.conj(v)[..., None, :]
