"""Block iteration: `power_iteration` with several vectors for one reading of the matrix.

One vector loses its way where σ₂ overtakes σ₁, which the regularizer makes happen: it pushes the
first singular value alone. A second one that already points along v₂ is there when that happens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ._arrays import Array, Namespace, Traits, array_namespace, cast, conj, is_complex, squared
from .errors import ShapeError, checked_int
from .power import PowerIteration, _check, _normalized, power_iteration


class BlockIteration(NamedTuple):
    """What `block_iteration` returns."""

    sigma: Array
    u: Array
    v: Array
    V: Array


def block_iteration(
    W: Array, V: Array, *, n_iter: int = 1, eps: float | None = None
) -> BlockIteration:
    r"""Estimate the largest singular value and its vectors with k vectors at once.

    .. math::
        Q = \mathrm{orth}(V W^T), \quad Z = W^H Q, \quad
        c = \arg\max_{‖c‖=1} ‖Zc‖, \quad u ← Qc, \quad σ ← ‖Zc‖, \quad v ← Zc / σ

    so that of all unit vectors u in the span of the products W·V, the one with the largest
    ‖Wᴴu‖ is taken: never a worse one than `power_iteration` from the same v. Like there, the
    estimate is a lower bound of σ₁ that does not fall from one iteration to the next, and
    σ·u·vᴴ = u·(Wᴴu)ᴴ is exactly the gradient of ½‖Wᴴu‖² with u held constant.

    Each iteration reads W twice, whatever k is. The rows of the new V are v and the next best
    of the k candidates Zc. From k = 3 on, the last of them makes room for the v of the iteration
    before, which speeds up convergence as momentum does.

    Parameters
    ----------
    W : array, shape (..., m, n)
        A matrix or a stack of them, real or complex floating-point. float16 and bfloat16 are
        iterated in float32.
    V : array, shape (..., k, n)
        Where to start, one vector a row: Gaussian ones, or the ``V`` of the last call. k = 1 is
        `power_iteration`. k may exceed m and n, to no use.
    n_iter : int
        How many iterations.
    eps : float, optional
        Added to a squared norm before it divides. By default the smallest normal number.

    Returns
    -------
    sigma : array, shape (...)
        The estimate, a lower bound of σ₁; real, in the dtype of the iteration. Zero for a zero
        matrix, NaN or infinite where W is not finite or σ² overflows.
    u : array, shape (..., m)
        Unit vector, or zeros where sigma is zero.
    v : array, shape (..., n)
        Unit vector; the first row of the V that came in where sigma is zero or not finite.
    V : array, shape (..., k, n)
        For the next call: v, and k − 1 unit vectors orthogonal to it (a row is zero where none
        is left, as for k > n). The V that came in where sigma is zero or not finite.

    Raises
    ------
    ShapeError
        If W has fewer than two axes or an empty one, or V does not fit.
    DTypeError
        If W or V is not floating-point, or V is complex and W real.
    ArgumentError
        If ``n_iter`` is less than 1.

    Notes
    -----
    Nothing is copied to the host. c is found by one sweep of Jacobi rotations of pairs of
    candidates, the larger one first, so that the first never gets smaller. For k = 2 that is the
    maximum. With more it comes near, since the candidates of the last call come nearly sorted,
    and the next call goes on from there.

    The small arrays cost operations, though no readings of W: 78 for k = 2, 159 for 3 and 254 for
    4, where `power_iteration` has 17. A launch of each is worth it on large or many stacked W.

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
    xp = array_namespace(W, V)
    kind = _check_rows(W, V, xp)
    W, V = cast(W, kind.iteration_dtype, xp), cast(V, kind.iteration_dtype, xp)
    tiny = kind.tiny if eps is None else eps
    sigma, u, V = iterated_rows(
        lambda V: xp.matmul(V, xp.matrix_transpose(W)),
        lambda Q: conj(xp.matmul(conj(Q, xp), W), xp),
        V,
        checked_int(n_iter, "n_iter"),
        tiny,
        kind,
        xp,
    )
    return BlockIteration(sigma, u, V[..., 0, :], V)


def iterated_rows(
    times: Callable[[Array], Array],
    adjoint_times: Callable[[Array], Array],
    V: Array,
    n_iter: int,
    tiny: float,
    kind: Traits,
    xp: Namespace,
) -> PowerIteration:
    """The iteration of `block_iteration`, of a matrix that is given by its products with rows."""
    for _ in range(n_iter):
        Q = left_rows(times(V), tiny, kind, xp)
        sigma, u, V = right_rows(adjoint_times(Q), Q, V, tiny, kind, xp)
    return PowerIteration(sigma, u, V)


def iterations(
    matrices: Sequence[Array], vectors: Sequence[Array], n_iter: int
) -> list[PowerIteration]:
    """`power_iteration` of each matrix, or `block_iteration` where it comes with several vectors.

    The last of each triple is what the next call starts from: v, or V whose first row is v.
    """
    return [
        power_iteration(W, v, n_iter=n_iter) if v.ndim < W.ndim else _with_block(W, v, n_iter)
        for W, v in zip(matrices, vectors, strict=True)
    ]


def _with_block(W: Array, V: Array, n_iter: int) -> PowerIteration:
    sigma, u, _, V = block_iteration(W, V, n_iter=n_iter)
    return PowerIteration(sigma, u, V)


def left_rows(Y: Array, tiny: float, kind: Traits, xp: Namespace) -> Array:
    """The first half of an iteration, given the rows Y = VWᵀ: orthonormal ones of the same span.

    By Gram and Schmidt; a row that brings nothing new is zero. The first keeps its direction: the
    result is no worse than that of the first row alone.
    """
    noise = kind.eps * xp.sqrt(xp.sum(squared(Y, xp), axis=(-2, -1), keepdims=True))
    rows = [_normalized(Y[..., :1, :], tiny, xp)[0]]
    for i in range(1, Y.shape[-2]):
        Q = _together(rows, xp)
        y = _without(_without(Y[..., i : i + 1, :], Q, xp), Q, xp)
        unit, _, length = _normalized(y, tiny, xp)
        rows.append(xp.where(length > noise, unit, xp.zeros_like(unit)))
    return _together(rows, xp)


def right_rows(
    Z: Array, Q: Array, V: Array, tiny: float, kind: Traits, xp: Namespace
) -> PowerIteration:
    """The second half, given the rows Z of all Wᴴq: σ, u and the rows to start from next."""
    n = Z.shape[-1]
    # A rotation of the rows of Z is one of Q: side by side, one product does both.
    rows = _sorted_by_rotations(xp.concat([Z, Q], axis=-1), n, kind, xp)
    unit, inverse, sigma = _normalized(rows[0][..., :n], tiny, xp)
    others = [row[..., :n] for row in rows[1:]]
    new = _next(unit, others, kind.eps * sigma, V, tiny, xp)
    u = rows[0][..., 0, n:]
    return PowerIteration(sigma[..., 0, 0], u, xp.where(inverse > 0, new, V))


def _sorted_by_rotations(T: Array, n: int, kind: Traits, xp: Namespace) -> list[Array]:
    """One Jacobi sweep: the first n elements of the rows become orthogonal, the longest first."""
    rows = [T[..., i : i + 1, :] for i in range(T.shape[-2])]
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            pair = _together([rows[i], rows[j]], xp)
            pair = xp.matmul(_rotation(pair[..., :n], kind, xp), pair)
            rows[i], rows[j] = pair[..., :1, :], pair[..., 1:, :]
    return rows


def _rotation(pair: Array, kind: Traits, xp: Namespace) -> Array:
    """The unitary 2 × 2 matrix that makes two rows orthogonal, the longer one first.

    Its first row is the first eigenvector of the rows' Gram matrix [[p, b/2], [b̄/2, q]], which is
    (r + d, b̄) or (b, r − d) with d = p − q and r² = d² + |b|²: the one without cancellation.
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


def _next(
    v: Array, others: list[Array], noise: Array, V: Array, tiny: float, xp: Namespace
) -> Array:
    """The rows to start from next: v, the other candidates, and from k = 3 on the old v."""
    k = V.shape[-2]
    if k == 1:
        return v
    kept = slice(1, max(2, k - 1))
    # Of a matrix of lower rank nothing is left there but noise. Let it be that of other old rows
    # then: a row that became zero, or another v, would stay so for ever.
    spare = V[..., kept, :] + 0.5 * V[..., :1, :]
    rest = _together(others[: max(1, k - 2)], xp) + noise * spare
    rest, _, _ = _normalized(_without(rest, v, xp), tiny, xp)
    rows = _together([v, rest], xp)
    if k == 2:
        return rows
    old = _without(_without(V[..., :1, :], rows, xp), rows, xp)
    return _together([rows, _normalized(old, tiny, xp)[0]], xp)


def _without(x: Array, Q: Array, xp: Namespace) -> Array:
    """The rows of ``x`` less their parts along the orthonormal rows of ``Q``."""
    return x - xp.matmul(xp.matmul(x, xp.matrix_transpose(conj(Q, xp))), Q)


def _together(rows: list[Array], xp: Namespace) -> Array:
    return rows[0] if len(rows) == 1 else xp.concat(rows, axis=-2)


def _real(x: Array, xp: Namespace) -> Array:
    return xp.real(x) if is_complex(x, xp) else x


def _check_rows(W: Array, V: Array, xp: Namespace) -> Traits:
    shape, given = tuple(W.shape), tuple(V.shape)
    if len(given) < 2 or given[-2] < 1 or (*given[:-2], given[-1]) != (*shape[:-2], *shape[-1:]):
        if len(shape) > 1:  # else _check says what is wrong with W
            expected = ", ".join(map(str, (*shape[:-2], "k", shape[-1])))
            raise ShapeError(
                f"V has shape {given}, but W of shape {shape} needs ({expected}) with k ≥ 1: "
                "one vector a row"
            )
        return _check(W, V, xp)
    return _check(W, V[..., 0, :], xp)
