"""Spectral norm regularization for hand-written CuPy loops.

CuPy arrays run through `spectral_core` as NumPy's do. What this adds is a step of all weights in
three kernels, however many there are: it reads each weight once, and writes each gradient once.
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

from .device import CuPyRuntime
from .fused import FusedStep
from .watch import Watch

__all__ = ["SpectralState", "Stepper", "Watch", "add_gradient_", "init", "iterate"]

# In the dtype of the vectors, and rounded once: float16 gradients take float32 terms.
_outer_kernel = cupy.ElementwiseKernel(
    "S u, S v", "T grad", "grad = T(S(grad) + u * v)", "spectral_core_add_outer"
)


def _add_outer_(grad: cupy.ndarray, u: cupy.ndarray, v: cupy.ndarray) -> cupy.ndarray:
    wide = cupy.result_type(grad.dtype, u.dtype, v.dtype)  # a wider gradient keeps its digits
    return _outer_kernel(u.astype(wide, copy=False), v.astype(wide, copy=False), grad)


class Stepper(FusedStep):
    """A step of all weights at once, which keeps its tables between steps.

    Give one to every call of `add_gradient_` of a loop: where shapes, addresses and factors are
    those of the step before, nothing is made or sent to the device anew. It may be used with
    other weights at any time, but not by two threads at once. It holds memory of the device: two
    tables of some bytes for each weight.

    Contiguous float16, float32 and float64 weights and gradients in an order such as ``"oihw"``
    or ``"(go)ihw"``, whose matrix is the tensor reshaped, go together: three launches for each
    iteration and pair of dtypes. All others, such as ``"hwio"`` and complex ones, go one by one.

    Examples
    --------
    >>> import cupy as cp, spectral_cupy
    >>> weights, grads = {"w": cp.asarray([[3.0, 4.0]])}, {"w": cp.zeros((1, 2))}
    >>> state, stepper = spectral_cupy.init(weights), spectral_cupy.Stepper()
    >>> for _ in range(2):
    ...     state = spectral_cupy.add_gradient_(
    ...         weights, grads, state, factor=0.1, stepper=stepper
    ...     )
    >>> cp.round(grads["w"], 4)
    array([[0.6, 0.8]])
    """

    def __init__(self) -> None:
        super().__init__(CuPyRuntime(), partial(plain_step, add=_add_outer_))


def add_gradient_(
    weights: Mapping[str, cupy.ndarray],
    grads: Mapping[str, cupy.ndarray | None],
    state: SpectralState,
    *,
    factor: Factor = 0.01,
    target: Factor = 0.0,
    power: int = 2,
    n_iter: int = 1,
    stepper: Stepper | None = None,
) -> SpectralState:
    """Add factor·σ·u·vᴴ to each gradient in place, by the same few kernels for all of them.

    Parameters
    ----------
    weights, grads, state, factor, target, power
        As for `spectral_core.add_gradient_`.
    n_iter : int
        Power iterations in this step. With 0, the term of the step before is added anew, and no
        weight is read: to iterate in every k-th step only, give ``int(step % k == 0)``.
    stepper : Stepper, optional
        Keeps tables from step to step; without one they are made and sent in each call.

    Returns
    -------
    spectral_core.SpectralState
        For the next step; the one that came in is as it was. Its arrays may share one piece of
        memory, which lives as long as one of them.

    Raises
    ------
    spectral_core.SpectralError
        As `spectral_core.add_gradient_`.

    Notes
    -----
    Nothing waits for the device or is copied from it. The kernels are compiled when first used,
    and kept on disk by CuPy.

    Examples
    --------
    >>> import cupy as cp, spectral_cupy
    >>> weights, grads = {"w": cp.asarray([[3.0, 4.0]])}, {"w": cp.zeros((1, 2))}
    >>> state = spectral_cupy.init(weights)
    >>> for step in range(4):
    ...     state = spectral_cupy.add_gradient_(
    ...         weights, grads, state, factor=0.1, n_iter=int(step % 2 == 0)
    ...     )
    >>> cp.round(grads["w"], 4)
    array([[1.2, 1.6]])
    """
    return sc.add_gradient_(
        *(weights, grads, state),
        factor=factor,
        target=target,
        power=power,
        n_iter=n_iter,
        step=stepper or Stepper(),
    )
