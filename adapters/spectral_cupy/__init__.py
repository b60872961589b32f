"""Spectral norm regularization for hand-written CuPy loops.

`spectral_core` runs on CuPy arrays as on NumPy's. This package adds an engine that runs a step of
all weights in three kernels, or eight with several vectors, however many weights there are. It
reads each weight once, and writes each gradient once.
"""

from __future__ import annotations

try:
    import cupy
except ImportError as error:
    raise ImportError(
        'spectral_cupy needs CuPy: pip install "spectral-core[cupy]", or the package for your CUDA '
        "version, such as: pip install cupy-cuda12x"
    ) from error

from collections.abc import Mapping

import spectral_core as sc
from spectral_core import SpectralState, __version__, init, iterate
from spectral_core.engine import Factor, ReferenceEngine

from ._device import add_outer_
from ._engine import CudaEngine
from ._watch import Watch

__all__ = [
    "CudaEngine",
    "SpectralState",
    "Watch",
    "__version__",
    "add_gradient_",
    "init",
    "iterate",
]

_REFERENCE = ReferenceEngine(in_place=True, add=add_outer_)


def add_gradient_(
    weights: Mapping[str, cupy.ndarray],
    grads: Mapping[str, cupy.ndarray | None],
    state: SpectralState,
    *,
    factor: Factor = 0.01,
    target: Factor = 0.0,
    power: int = 2,
    n_iter: int = 1,
    engine: CudaEngine | None = None,
) -> SpectralState:
    """Add factor·σ·u·vᴴ to each gradient in place, by the same few kernels for all of them.

    Parameters
    ----------
    weights, grads, state, factor, target, power
        As for `spectral_core.add_gradient_`.
    n_iter : int
        Power iterations in this step. With 0, the term of the step before is added again, and no
        weight is read. To iterate only in every k-th step, pass ``int(step % k == 0)``.
    engine : CudaEngine, optional
        Keeps its tables from step to step. Without one, they are made and sent in each call.

    Returns
    -------
    spectral_core.SpectralState
        For the next step; the one that came in is as it was. Its arrays may share one piece of
        memory, which is freed with the last of them.

    Raises
    ------
    spectral_core.SpectralError
        As `spectral_core.add_gradient_`.

    Notes
    -----
    Nothing waits for the device or is copied from it. The kernels are compiled when first used,
    and CuPy keeps them on disk. A weight that the engine does not accept is run by
    `spectral_core.engine.ReferenceEngine`.

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
        engines=(engine or CudaEngine(), _REFERENCE),
    )
