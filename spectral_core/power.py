"""The power iteration: one step is lines 7 and 8 of the paper's Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import NamedTuple

import numpy as np

from ._arrays import (
    Array,
    Namespace,
    Traits,
    array_namespace,
    cast,
    conj,
    device_of,
    squared,
    traits,
)
from .errors import ArgumentError, DTypeError, ShapeError, checked_int


class PowerIteration(NamedTuple):
    """What `power_iteration` returns."""

    sigma: Array
    u: Array
    v: Array


def power_iteration(
    W: Array, v: Array, *, n_iter: int = 1, eps: float | None = None
) -> PowerIteration:
    r"""Estimate the largest singular value and its vectors (Algorithm 1, lines 7–8).

    .. math:: u ← Wv / ‖Wv‖, \quad σ ← ‖W^H u‖, \quad v ← W^H u / σ

    The paper prints σ ← ‖u‖/‖v‖ after both products, which tends to 1/σ₁. With unit v, the
    estimate here obeys ‖Wv‖ ≤ σ ≤ σ₁ and never falls from one iteration to the next, and
    σ·u·vᴴ = u·(Wᴴu)ᴴ is exactly the gradient of ½‖Wᴴu‖² with u held constant.

    Parameters
    ----------
    W : array, shape (..., m, n)
        A matrix or a stack of them, real or complex floating-point. float16 and bfloat16 are
        iterated in float32.
    v : array, shape (..., n)
        Where to start: any vector that is not orthogonal to the first right singular vector, of
        any length. A Gaussian one is, almost surely; afterwards, the ``v`` of the last call.
    n_iter : int
        How many iterations. The paper needs one a training step, since v is kept.
    eps : float, optional
        Added to a squared norm before it divides. By default the smallest normal number, which
        makes zero divide nothing and changes no other norm in range.

    Returns
    -------
    sigma : array, shape (...)
        The estimate, a lower bound of σ₁; real, in the dtype of the iteration. Zero for a zero
        matrix, NaN or infinite where W is not finite or σ² overflows.
    u : array, shape (..., m)
        Unit vector, or zeros where sigma is zero.
    v : array, shape (..., n)
        Unit vector; the ``v`` that came in where sigma is zero or not finite, so that the next
        call starts well.

    Raises
    ------
    ShapeError
        If W has fewer than two axes or an empty one, or v does not fit.
    DTypeError
        If W or v is not floating-point, or v is complex and W real.
    ArgumentError
        If ``n_iter`` is less than 1.

    Notes
    -----
    Nothing is copied to the host. σ is right while σ² neither overflows nor underflows, that is
    from about 1e-17 to 1e19 in float32; `spectral_norm` has no such limit.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> W = np.array([[3.0, 3.0], [0.0, 3.0]])
    >>> sigma, u, v = sc.power_iteration(W, np.array([1.0, 0.5]), n_iter=20)
    >>> round(float(sigma), 4)
    4.8541
    """
    xp = array_namespace(W, v)
    kind = _check(W, v, xp)
    W, v = cast(W, kind.iteration_dtype, xp), cast(v, kind.iteration_dtype, xp)
    tiny = kind.tiny if eps is None else eps
    n_iter = checked_int(n_iter, "n_iter")
    return iterated(lambda v: matvec(W, v), lambda u: rmatvec(W, u, xp), v, n_iter, tiny, xp)


def iterated(
    times: Callable[[Array], Array],
    adjoint_times: Callable[[Array], Array],
    v: Array,
    n_iter: int,
    tiny: float,
    xp: Namespace,
) -> PowerIteration:
    """The iteration of `power_iteration`, of a matrix that is given by its two products."""
    for _ in range(n_iter):
        u = left_of(times(v), tiny, xp)
        sigma, _, v = right_of(adjoint_times(u), u, v, tiny, xp)
    return PowerIteration(sigma, u, v)


def left_of(Wv: Array, tiny: float, xp: Namespace) -> Array:
    """The first half of an iteration: u."""
    return _normalized(Wv, tiny, xp)[0]


def right_of(WHu: Array, u: Array, v: Array, tiny: float, xp: Namespace) -> PowerIteration:
    """The second half: σ, u and the next v."""
    unit, inverse, sigma = _normalized(WHu, tiny, xp)
    return PowerIteration(sigma[..., 0], u, xp.where(inverse > 0, unit, v))


def start_vector(shape: tuple[int, ...], like: Array, *, seed: int = 0, name: str = "") -> Array:
    """Draw unit Gaussian vectors (Algorithm 1, line 1), the same ones on every backend.

    Parameters
    ----------
    shape : tuple of int
        ``(..., n)`` for a stack of matrices of n columns.
    like : array
        The weight: it gives the backend, the device and the dtype of the iteration.
    seed : int
        Together with ``name`` it decides the draw.
    name : str
        The weight's name, so that each weight of a model has a draw of its own.

    Returns
    -------
    array of the given shape
        Unit vectors along the last axis.

    Raises
    ------
    ArgumentError
        If ``seed`` is not an integer ≥ 0.
    DTypeError
        If ``like`` is not floating-point.

    Examples
    --------
    >>> import numpy as np
    >>> v = start_vector((3,), np.zeros((2, 3), dtype=np.float32), seed=1)
    >>> v.dtype, round(float(np.linalg.norm(v)), 4)
    (dtype('float32'), 1.0)
    """
    xp = array_namespace(like)
    kind = traits(like, xp, f"weight {name!r}")
    try:
        entropy = np.random.SeedSequence([index(seed), *name.encode()])
    except (TypeError, ValueError):
        raise ArgumentError(f"seed must be an integer ≥ 0, not {seed!r}") from None
    rng = np.random.Generator(np.random.PCG64(entropy))
    v = rng.standard_normal(shape)
    if kind.complex:
        v = v + 1j * rng.standard_normal(shape)
    v = v / np.linalg.norm(v, axis=-1, keepdims=True)
    return xp.asarray(v, dtype=kind.iteration_dtype, device=device_of(like, xp))


def matvec(W: Array, v: Array) -> Array:
    """Wv, stacked."""
    return W @ v if W.ndim == 2 else (W @ v[..., None])[..., 0]


def vecmat(u: Array, W: Array) -> Array:
    """uᵀW, stacked."""
    return u @ W if W.ndim == 2 else (u[..., None, :] @ W)[..., 0, :]


def rmatvec(W: Array, u: Array, xp: Namespace) -> Array:
    """Wᴴu, as (uᴴW)ᴴ: the long way round would transpose or conjugate the matrix."""
    return conj(vecmat(conj(u, xp), W), xp)


def _check(W: Array, v: Array, xp: Namespace) -> Traits:
    shape = tuple(W.shape)
    if len(shape) < 2 or 0 in shape:
        raise ShapeError(
            f"W has shape {shape}: it must be a matrix or a stack of matrices with no empty axis "
            "(as_matrix makes one of a weight tensor)"
        )
    expected = (*shape[:-2], shape[-1])
    if tuple(v.shape) != expected:
        raise ShapeError(f"v has shape {tuple(v.shape)}, but W of shape {shape} needs {expected}")
    kind = traits(W, xp, "W")
    if traits(v, xp, "v").complex and not kind.complex:
        raise DTypeError(f"v has dtype {v.dtype}, but W is real ({W.dtype}): start from a real v")
    return kind


def _normalized(x: Array, tiny: float, xp: Namespace) -> tuple[Array, Array, Array]:
    """(x/‖x‖, 1/‖x‖, ‖x‖), the last axis kept.

    As ‖x‖/(‖x‖² + tiny), the inverse is zero for a zero vector, and NaN not only for one that is
    not finite but also where the square overflows: that must not pass for zero.
    """
    square = xp.sum(squared(x, xp), axis=-1, keepdims=True)
    length = xp.sqrt(square)
    inverse = length / (square + tiny)
    return x * inverse, inverse, length
