"""Power iteration with k ≥ 1 vectors: lines 7 and 8 of the paper's Algorithm 1.

One vector loses its direction where σ₂ overtakes σ₁. The regularizer makes that happen, since it
shrinks the first singular value alone. A second vector that already points along v₂ is there when
it does. All k vectors share one reading of the matrix, so `iterate_rows` is the only iteration:
k = 1 is the paper's.

A step starts from v plus a little of a fixed direction, `fresh_direction`. Power iteration alone
never leaves an invariant subspace: where v is exactly zero on one block of a block-diagonal matrix,
every later v is zero there, however large that block becomes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from math import log2
from operator import index
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_numpy_namespace

from ._arrays import (
    Array,
    Namespace,
    Traits,
    array_namespace,
    cast,
    conj,
    device_of,
    is_complex,
    norm,
    plain,
    squared,
    traits,
    traits_of,
)
from ._validate import check_matrix, check_number
from .errors import ArgumentError, check_int, shown


class PowerIteration(NamedTuple):
    """Result of `power_iteration`."""

    sigma: Array
    u: Array
    v: Array


class BlockIteration(NamedTuple):
    """Result of `block_iteration`."""

    sigma: Array
    u: Array
    v: Array
    V: Array


class Triplet(NamedTuple):
    """A singular triplet, and the rows from which the next iteration starts."""

    sigma: Array  # (*stack,)
    u: Array  # (*stack, m)
    V: Array  # (*stack, k, n): the first row is v


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
        Start vector of any length but zero. It must not be orthogonal to the first right singular
        vector: a Gaussian vector is suitable almost surely. Afterwards, pass the ``v`` of the last
        call.
    n_iter : int
        Number of iterations. One for each training step is enough, since v is kept.
    eps : float, optional
        Added to a squared norm before it divides. The default, and the least, is the smallest
        normal number: it prevents a division by zero, and changes no other norm in range.

    Returns
    -------
    sigma : array, shape (...)
        The estimate, a lower bound of σ₁: real, in the dtype of the iteration. It is zero for a
        zero matrix. It is NaN or infinite where W is not finite or σ² overflows.
    u : array, shape (..., m)
        Unit vector, or zeros where sigma is zero.
    v : array, shape (..., n)
        Unit vector. Where sigma is zero or not finite, the start vector, so that the next call
        starts well.

    Raises
    ------
    ShapeError
        If W has fewer than two axes or an empty one, or v does not fit.
    DTypeError
        If W or v is not floating-point, or v is complex and W real.
    ArgumentError
        If ``n_iter`` is less than 1, or ``eps`` is negative or not finite.

    Notes
    -----
    Nothing is copied to the host. σ is correct while σ² neither overflows nor underflows: from
    about 1e-17 to 1e19 in float32. `spectral_norm` has no such limit.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> W = np.array([[3.0, 3.0], [0.0, 3.0]])
    >>> sigma, u, v = sc.power_iteration(W, np.array([1.0, 0.5]), n_iter=20)
    >>> round(float(sigma), 4)
    4.8541
    """
    W, v = plain(W, "W"), plain(v, "v")
    xp = array_namespace(W, v, name="W and v")
    kind = check_matrix(W, v, xp, rows=False)
    sigma, u, V = _iterate_matrix(W, v[..., None, :], n_iter, eps, kind, xp)
    return PowerIteration(sigma, u, V[..., 0, :])


def block_iteration(
    W: Array, V: Array, *, n_iter: int = 1, eps: float | None = None
) -> BlockIteration:
    r"""Estimate the largest singular value and its vectors with k vectors at once.

    .. math::
        Q = \mathrm{orth}(V W^T), \quad Z = W^H Q, \quad
        c = \arg\max_{‖c‖=1} ‖Zc‖, \quad u ← Qc, \quad σ ← ‖Zc‖, \quad v ← Zc / σ

    Among the unit vectors in the span of the products W·V, u has the largest ‖Wᴴu‖. It is never
    worse than the u of `power_iteration` from the same v. The estimate is a lower bound of σ₁ that
    never falls from one iteration to the next. σ·u·vᴴ = u·(Wᴴu)ᴴ is exactly the gradient of
    ½‖Wᴴu‖² with u held constant.

    Each iteration reads W twice, whatever k is. The rows of the new V are v and the next best of
    the k candidates Zc. From k = 3 on, the v of the iteration before replaces the last candidate.
    That speeds up convergence as momentum does.

    Parameters
    ----------
    W : array, shape (..., m, n)
        A matrix or a stack of them, real or complex floating-point. float16 and bfloat16 are
        iterated in float32.
    V : array, shape (..., k, n)
        Start vectors of any length, one in each row: Gaussian vectors, or the ``V`` of the last
        call. The first row must not be zero. A row that is zero or depends on the rows before it
        starts without effect. k = 1 is `power_iteration`. k may exceed m and n, without benefit.
    n_iter : int
        Number of iterations.
    eps : float, optional
        Added to a squared norm before it divides. The default is the smallest normal number.

    Returns
    -------
    sigma : array, shape (...)
        The estimate, a lower bound of σ₁: real, in the dtype of the iteration. It is zero for a
        zero matrix. It is NaN or infinite where W is not finite or σ² overflows.
    u : array, shape (..., m)
        Unit vector, or zeros where sigma is zero.
    v : array, shape (..., n)
        Unit vector. Where sigma is zero or not finite, the first start vector.
    V : array, shape (..., k, n)
        For the next call: v, and k − 1 unit vectors orthogonal to it. A row is zero where no
        direction is left, as for k > n. Where sigma is zero or not finite, the start vectors.

    Raises
    ------
    ShapeError
        If W has fewer than two axes or an empty one, or V does not fit.
    DTypeError
        If W or V is not floating-point, or V is complex and W real.
    ArgumentError
        If ``n_iter`` is less than 1, or ``eps`` is negative or not finite.

    Notes
    -----
    Nothing is copied to the host. One sweep of Jacobi rotations of pairs of candidates finds c. A
    rotation puts the longer candidate first, so the first one never gets shorter. For k = 2 the
    result is the maximum. For larger k it is close to it: the candidates of the last call are
    nearly sorted, and the next call continues from there.

    The small arrays cost operations but no further reading of W: 78 operations for k = 2, 159 for
    k = 3 and 254 for k = 4, against 17 in `power_iteration`. They pay off for large matrices and
    for stacks.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> W = np.diag([1.0, 0.999, 0.5, 0.4])
    >>> V = sc.start_vector((2, 4), W, seed=1)
    >>> sigma, u, v, V = block_iteration(W, V, n_iter=20)
    >>> round(float(sigma), 9), round(float(sc.power_iteration(W, V[1], n_iter=20).sigma), 9)
    (1.0, 0.999)
    """
    W, V = plain(W, "W"), plain(V, "V")
    xp = array_namespace(W, V, name="W and V")
    kind = check_matrix(W, V, xp, rows=True)
    sigma, u, V = _iterate_matrix(W, V, n_iter, eps, kind, xp)
    return BlockIteration(sigma, u, V[..., 0, :], V)


def _iterate_matrix(
    W: Array, V: Array, n_iter: int, eps: float | None, kind: Traits, xp: Namespace
) -> Triplet:
    W, V = cast(W, kind.iteration_dtype, xp), _unit_rows(V, kind.iteration_dtype, xp)
    n_iter = check_int(n_iter, "n_iter")
    if eps is not None:
        kind = kind._replace(guard=max(kind.guard, check_number(eps, "eps")))
    products = partial(times_rows, W, xp=xp), partial(adjoint_times_rows, W, xp=xp)
    return iterate_rows(*products, V, n_iter, kind, xp)


def _unit_rows(V: Array, dtype: Any, xp: Namespace) -> Array:
    """Return the rows as unit vectors of this dtype, whatever their length.

    A row whose length is one up to a factor of two stays as it is, bit for bit: the rows of the
    last call continue unchanged. The rows of a training step are always of that kind.
    """
    kind = traits(V, xp, "v")
    V = cast(V, kind.iteration_dtype, xp)
    start, largest = V, _largest(V, xp)
    one = xp.ones_like(largest)
    # Away from the ends of the range first: a complex division by a subnormal number overflows.
    # It is done by powers of two, which are exact.
    lift = 2.0 ** int(-0.85 * log2(kind.tiny))
    V = V * cast(xp.where(largest < 1, lift * one, one / 16), V.dtype, xp)
    scale = _largest(V, xp)
    V = V / cast(xp.where(scale > 0, scale, one), V.dtype, xp)
    length = norm(V, xp)[..., None]
    is_unit = xp.abs(xp.where(largest < 2, largest, 0 * one) * length - 1) <= 0.5
    unit = V / cast(xp.where(length > 0, length, one), V.dtype, xp)
    return cast(xp.where(is_unit, start, unit), dtype, xp)


def _largest(V: Array, xp: Namespace) -> Array:
    """Return the largest part of an element of each row; an absolute value could overflow."""
    if not is_complex(V, xp):
        return xp.max(xp.abs(V), axis=-1, keepdims=True)
    parts = xp.concat([xp.real(V), xp.imag(V)], axis=-1)
    return xp.max(xp.abs(parts), axis=-1, keepdims=True)


def iterate_rows(
    times: Callable[[Array], Array],
    adjoint_times: Callable[[Array], Array],
    V: Array,
    n_iter: int,
    kind: Traits,
    xp: Namespace,
    fresh: Array | float = 0.0,
) -> Triplet:
    """Iterate k vectors with a matrix W that is given by its two products.

    Parameters
    ----------
    times : callable
        ``times(V)`` returns the rows Wv of the rows v, (*stack, k, m).
    adjoint_times : callable
        ``adjoint_times(Q)`` returns the rows Wᴴq of the rows q, (*stack, k, n).
    V : array, shape (*stack, k, n)
        The rows to start from, in the dtype of the iteration.
    n_iter : int
        Number of iterations, at least 1.
    kind : Traits
        Traits of the dtype. Its ``guard`` is added to a squared norm before it divides.
    xp : namespace
    fresh : array, shape (n,)
        Added to the rows before the first product: see `fresh_direction`. Where sigma is zero or
        not finite, the rows of the result are those of V, without it.

    Returns
    -------
    Triplet
    """
    start = V + fresh
    for _ in range(n_iter):
        Q = left_rows(times(start), kind, xp)
        triplet = right_rows(adjoint_times(Q), Q, V, kind, xp)
        start = V = triplet.V
    return triplet


def left_rows(Y: Array, kind: Traits, xp: Namespace) -> Array:
    """Return orthonormal rows with the span of the rows Y = VWᵀ: the first half of an iteration.

    This is Gram–Schmidt. A row that adds no direction becomes zero. The first row keeps its
    direction, so k vectors are never worse than the first one alone.
    """
    if Y.shape[-2] == 1:
        return _normalized(Y, kind.guard, xp)[0]
    # Relative to all rows together: the square of a short row would underflow in float32.
    square = xp.sum(squared(Y, xp), axis=(-2, -1), keepdims=True)
    Y = Y * (xp.sqrt(square) / (square + kind.guard))
    first, _, _ = _normalized(Y[..., :1, :], kind.guard, xp)
    rows = [first]
    for i in range(1, Y.shape[-2]):
        Q = _together(rows, xp)
        y = _without(_without(Y[..., i : i + 1, :], Q, xp), Q, xp)
        unit, _, length = _normalized(y, kind.guard, xp)
        rows.append(xp.where(length > kind.eps, unit, xp.zeros_like(unit)))
    return _together(rows, xp)


def right_rows(Z: Array, Q: Array, V: Array, kind: Traits, xp: Namespace) -> Triplet:
    """Return sigma, u and the next V from the rows Z = Wᴴq: the second half of an iteration."""
    if Z.shape[-2] == 1:  # the paper's iteration: there is nothing to sort
        unit, inverse, sigma = _normalized(Z, kind.guard, xp)
        return Triplet(sigma[..., 0, 0], Q[..., 0, :], xp.where(inverse > 0, unit, V))
    n = Z.shape[-1]
    # The rotation that sorts the rows of Z sorts those of Q too. Side by side, one product rotates
    # both.
    rows = _sorted_by_rotations(xp.concat([Z, Q], axis=-1), n, kind, xp)
    unit, inverse, sigma = _normalized(rows[0][..., :n], kind.guard, xp)
    others = [row[..., :n] for row in rows[1:]]
    new = _next(unit, [other * inverse for other in others], V, kind, xp)
    u = rows[0][..., 0, n:]
    return Triplet(sigma[..., 0, 0], u, xp.where(inverse > 0, new, V))


def times_rows(W: Array, V: Array, xp: Namespace) -> Array:
    """Return the rows Wv, (*stack, k, m), of the rows of V.

    One row is multiplied as a vector: BLAS has faster matrix–vector products than thin matrix
    products.
    """
    if V.shape[-2] > 1:
        return xp.matmul(V, xp.matrix_transpose(W))
    if W.ndim == 2:
        return (W @ V[0, :])[None, :]
    return xp.matrix_transpose(W @ xp.matrix_transpose(V))


def adjoint_times_rows(W: Array, Q: Array, xp: Namespace) -> Array:
    """Return the rows Wᴴq, (*stack, k, n), of the rows of Q.

    They are computed as (qᴴW)ᴴ: the direct way would transpose or conjugate the matrix.
    """
    q = conj(Q, xp)
    if W.ndim == 2 and Q.shape[-2] == 1:
        return conj(q[0, :] @ W, xp)[None, :]
    return conj(q @ W, xp)


def matvec(W: Array, v: Array, xp: Namespace) -> Array:
    """Return Wv, or the stack of these products."""
    return times_rows(W, v[..., None, :], xp)[..., 0, :]


def rmatvec(W: Array, u: Array, xp: Namespace) -> Array:
    """Return Wᴴu, or the stack of these products."""
    return adjoint_times_rows(W, u[..., None, :], xp)[..., 0, :]


def start_vector(shape: tuple[int, ...], like: Array, *, seed: int = 0, name: str = "") -> Array:
    """Draw unit Gaussian vectors (Algorithm 1, line 1), the same ones on every backend.

    Parameters
    ----------
    shape : tuple of int
        ``(..., n)`` for a stack of matrices of n columns.
    like : array
        The weight. Its backend, device and dtype of iteration are used.
    seed : int
        Seed of the draw, together with ``name``.
    name : str
        Name of the weight: each weight of a model has a draw of its own.

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
    rng = np.random.Generator(np.random.PCG64(_entropy(seed, name)))
    v = rng.standard_normal(shape)
    if kind.complex:
        v = v + 1j * rng.standard_normal(shape)
    v = v / np.linalg.norm(v, axis=-1, keepdims=True)
    return xp.asarray(v, dtype=kind.iteration_dtype, device=device_of(like, xp))


FRESH, FRESH_64 = 2.0**-20, 2.0**-27
"""Largest element of `fresh_direction` in float32, and in float64.

In float32 it is eight roundings of 1: with less, v + r is sometimes rounded back to v, and v stays
where it is for ever. In float64, where rounding is no obstacle, less suffices.
"""

# The golden ratio as a fraction of 2³², as a signed number of 32 bits.
_GOLDEN = 0x9E3779B1 - 2**32


def fresh_direction(V: Array, xp: Namespace) -> Array:
    r"""Return the little that a step adds to each row of V before it iterates.

    .. math:: r_j = ε · \mathrm{frac}_{±1}(φ j²), \quad j = 1 … n

    ε is `FRESH` or `FRESH_64`. The component of r along any fixed unit vector is of that order. In
    a subspace where singular values are larger, it grows by their squared ratio in each step. From
    5.5 % larger on, sigma is there within 200 steps.

    Why this sequence: it needs no state, no seed and no memory, so that a step can be resumed bit
    for bit and kernels compute it in registers. All backends compute it in integers of 32 bits that
    wrap around, so they agree. Its elements are spread evenly over (−1, 1), and sums over any part
    of them are as small as those of random numbers.

    Parameters
    ----------
    V : array, shape (*stack, k, n)
    xp : namespace

    Returns
    -------
    array, shape (n,)
        In the dtype and on the device of V.
    """
    fresh = _kept if is_numpy_namespace(xp) else _fresh
    return fresh(V.shape[-1], V.dtype, device_of(V, xp), xp)


@lru_cache(maxsize=256)
def _kept(n: int, dtype: Any, device: Any, xp: Namespace) -> Array:
    """Return the direction in NumPy, kept: its operations cost as much as those of a small step."""
    fresh = _fresh(n, dtype, device, xp)
    fresh.flags.writeable = False
    return fresh


def _fresh(n: int, dtype: Any, device: Any, xp: Namespace) -> Array:
    places = xp.arange(1, n + 1, dtype=xp.int32, device=device)
    fractions = places * places * _GOLDEN  # modulo 2³², between −2³¹ and 2³¹
    kind = traits_of(dtype, xp)
    largest = FRESH if kind is None or kind.eps > 1e-9 else FRESH_64
    return xp.astype(fractions, dtype) * (largest / 2**31)


def _entropy(seed: int, name: str) -> np.random.SeedSequence:
    """Return the entropy of the seed and of the bytes of the name."""
    try:
        seed = index(seed)
        # One array of 32-bit words: of a list, NumPy converts each number alone, which needs more
        # time than the draw. A larger seed has several words.
        words: Any = [seed, *name.encode()]
        return np.random.SeedSequence(np.array(words, np.uint32) if seed < 2**32 else words)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"seed must be an integer ≥ 0, not {shown(seed)}") from None


def _normalized(x: Array, guard: float, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return (x/‖x‖, 1/‖x‖, ‖x‖) over the last axis, which is kept.

    The inverse is computed as ‖x‖/(‖x‖² + guard). It is zero for a zero vector. It is NaN for a
    vector that is not finite, and also where the square overflows: that must not pass for zero.
    """
    square = xp.sum(squared(x, xp), axis=-1, keepdims=True)
    length = xp.sqrt(square)
    inverse = length / (square + guard)
    return x * inverse, inverse, length


def _sorted_by_rotations(T: Array, n: int, kind: Traits, xp: Namespace) -> list[Array]:
    """Make the first n elements of the rows orthogonal by one Jacobi sweep, the longest first."""
    rows = [T[..., i : i + 1, :] for i in range(T.shape[-2])]
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            pair = _together([rows[i], rows[j]], xp)
            pair = xp.matmul(_rotation(pair[..., :n], kind, xp), pair)
            rows[i], rows[j] = pair[..., :1, :], pair[..., 1:, :]
    return rows


def _rotation(pair: Array, kind: Traits, xp: Namespace) -> Array:
    """Return the unitary 2 × 2 matrix that makes two rows orthogonal, the longer one first.

    Its first row is the first eigenvector of the rows' Gram matrix [[p, b/2], [b̄/2, q]]. With
    d = p − q and r² = d² + |b|², that is (r + d, b̄) or (b, r − d): the form without cancellation.
    """
    gram = xp.matmul(conj(pair, xp), xp.matrix_transpose(pair))
    p, q = _real(gram[..., :1, :1], xp), _real(gram[..., 1:, 1:], xp)
    gram = gram / (p + q + kind.tiny)  # of trace 1: its squares stay in range
    d, b = _real(gram[..., :1, :1] - gram[..., 1:, 1:], xp), gram[..., :1, 1:]
    b = b + b
    bb = squared(b, xp)
    w = xp.sqrt(d * d + bb) + xp.abs(d) + kind.tiny**0.5
    length, w = xp.sqrt(w * w + bb), cast(w, pair.dtype, xp)
    ways = xp.concat([w, conj(b, xp)], axis=-1), xp.concat([b, w], axis=-1)
    first = xp.where(d >= 0, *ways) / length
    c, s = first[..., :1], first[..., 1:]
    return _together([first, xp.concat([-conj(s, xp), conj(c, xp)], axis=-1)], xp)


def _next(v: Array, others: list[Array], V: Array, kind: Traits, xp: Namespace) -> Array:
    """Return the next V: v, the other candidates relative to σ, and from k = 3 on the old v."""
    k = V.shape[-2]
    kept = slice(1, max(2, k - 1))
    # Why k rows recover: if the rank is below k, the extra rows are rounding noise. Mix in a little
    # of the old rows: a row that collapses to zero or onto v never recovers.
    spare = V[..., kept, :] + 0.5 * V[..., :1, :]
    rest = _together(others[: max(1, k - 2)], xp) + kind.eps * spare
    rows = _together([v, _orthogonal_unit(rest, v, kind, xp)], xp)
    if k == 2:
        return rows
    return _together([rows, _orthogonal_unit(V[..., :1, :], rows, kind, xp)], xp)


def _orthogonal_unit(x: Array, Q: Array, kind: Traits, xp: Namespace) -> Array:
    """Return unit rows orthogonal to the rows of ``Q``: zero where ``x`` lies in their span.

    Rounding leaves a little of Q after the first subtraction. Where the second one takes away most
    of the rest, nothing but rounding is left (Kahan's criterion).
    """
    once = _without(x, Q, xp)
    unit, _, length = _normalized(_without(once, Q, xp), kind.guard, xp)
    is_new = length > 0.5 * norm(once, xp)[..., None]
    return xp.where(is_new, unit, xp.zeros_like(unit))


def _without(x: Array, Q: Array, xp: Namespace) -> Array:
    """Remove from the rows of ``x`` their components along the orthonormal rows of ``Q``."""
    return x - xp.matmul(xp.matmul(x, xp.matrix_transpose(conj(Q, xp))), Q)


def _together(rows: list[Array], xp: Namespace) -> Array:
    return rows[0] if len(rows) == 1 else xp.concat(rows, axis=-2)


def _real(x: Array, xp: Namespace) -> Array:
    return xp.real(x) if is_complex(x, xp) else x
