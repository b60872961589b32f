"""Spectral norm regularization for hand-written CuPy loops.

CuPy arrays run through `spectral_core` as NumPy's do. What this adds is the update of the gradient
in one kernel, without a temporary of its size.
"""

from __future__ import annotations

try:
    import cupy
except ImportError as error:
    raise ImportError(
        "spectral_cupy needs CuPy for your CUDA version, such as: pip install cupy-cuda13x"
    ) from error

from collections.abc import Mapping
from functools import partial

import spectral_core as sc
from spectral_core import SpectralState, init, iterate
from spectral_core.penalty import Factor
from spectral_core.step import plain_step

__all__ = ["SpectralState", "add_gradient_", "init", "iterate"]

# In the dtype of the vectors, and rounded once: float16 gradients take float32 terms.
_outer_kernel = cupy.ElementwiseKernel(
    "S u, S v", "T grad", "grad = T(S(grad) + u * v)", "spectral_core_add_outer"
)


def _add_outer_(grad: cupy.ndarray, u: cupy.ndarray, v: cupy.ndarray) -> cupy.ndarray:
    return _outer_kernel(u, v, grad)


_step = partial(plain_step, add=_add_outer_)


def add_gradient_(
    weights: Mapping[str, cupy.ndarray],
    grads: Mapping[str, cupy.ndarray | None],
    state: SpectralState,
    *,
    factor: Factor = 0.01,
    n_iter: int = 1,
) -> SpectralState:
    """Add factor·σ·u·vᴴ to each gradient in place, by one kernel a gradient.

    Parameters
    ----------
    weights, grads, state, factor, n_iter
        As for `spectral_core.add_gradient_`.

    Returns
    -------
    spectral_core.SpectralState
        For the next step.

    Raises
    ------
    spectral_core.SpectralError
        As `spectral_core.add_gradient_`.

    Examples
    --------
    >>> import cupy as cp, spectral_cupy
    >>> weights, grads = {"w": cp.asarray([[3.0, 4.0]])}, {"w": cp.zeros((1, 2))}
    >>> state = spectral_cupy.init(weights)
    >>> state = spectral_cupy.add_gradient_(weights, grads, state, factor=0.1)
    >>> cp.round(grads["w"], 4)
    array([[0.3, 0.4]])
    """
    return sc.add_gradient_(weights, grads, state, factor=factor, n_iter=n_iter, step=_step)
