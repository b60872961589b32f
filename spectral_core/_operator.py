"""Compute the norm of a map that is given by its products, such as a product of two matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ._arrays import Array, Namespace, array_namespace, cast, conj, constant, norm, plain, traits
from ._lanczos import SpectralNorm, spectral_norm, top_ritz
from ._layout import stack_layout
from ._validate import check_number
from .errors import DTypeError, ShapeError, check_int


class OperatorNorm(NamedTuple):
    """Result of `operator_norm`."""

    sigma: Array
    u: Array
    v: Array
    residual: Array
    converged: bool
    n_iter: int


def operator_norm(
    times: Callable[[Array], Array],
    adjoint_times: Callable[[Array], Array],
    start: Array,
    *,
    tol: float | None = None,
    max_iter: int = 1000,
) -> OperatorNorm:
    """Compute the largest singular value of a linear map from its products.

    Parameters
    ----------
    times : callable
        ``times(x)`` returns the product with ``x``, an array of the shape of ``start``. The result
        may have any shape.
    adjoint_times : callable
        ``adjoint_times(y)`` returns the product of the adjoint with such a result. In JAX,
        ``jax.linear_transpose`` makes it of ``times``, for real numbers; in PyTorch,
        ``torch.func.vjp`` does.
    start : array
        Where the iteration starts: floating-point of 32 bits or more, and not zero. Random numbers
        are suitable.
    tol : float, optional
        Stop when the residual is at most this share of sigma². The default is ε^(2/3): 4e-11 in
        float64, 2e-5 in float32.
    max_iter : int
        Largest number of products with the map and its adjoint.

    Returns
    -------
    sigma : array, shape ()
        A lower bound of the norm, up to rounding. NaN if a product is not finite.
    u : array
        The unit result of the map, or zeros for a map that is zero.
    v : array, of the shape of ``start``
        The unit argument.
    residual : array, shape ()
        ‖Aᴴu − σv‖. Some singular value is that close to sigma. `bounds` says more of a matrix.
    converged : bool
        True if the residual is small.
    n_iter : int

    Raises
    ------
    DTypeError
        If ``start`` is not floating-point, or narrower than 32 bits.
    ShapeError
        If ``start`` is empty, or ``adjoint_times`` returns another shape.
    ArgumentError
        If ``tol`` is negative or not finite, or ``max_iter`` is less than 1.

    Notes
    -----
    The function waits for the device at every iteration, so it does not run inside ``jax.jit``.

    Examples
    --------
    The product of two matrices, which is never formed:

    >>> import numpy as np
    >>> import spectral_core as sc
    >>> A, B = np.array([[3.0], [4.0]]), np.array([[2.0, 0.0]])
    >>> found = sc.operator_norm(
    ...     lambda x: A @ (B @ x), lambda y: B.T @ (A.T @ y), np.array([1.0, 1.0])
    ... )
    >>> round(float(found.sigma), 10)
    10.0
    """
    start = constant(plain(start, "start"))
    xp = array_namespace(start, name="start")
    kind = traits(start, xp, "start")
    if kind.iteration_dtype != start.dtype:
        raise DTypeError(f"start has dtype {start.dtype}: give it 32 bits or more")
    shape = tuple(start.shape)
    if 0 in shape:
        raise ShapeError(f"start has shape {shape}: an axis is empty")
    bound = kind.eps ** (2 / 3) if tol is None else check_number(tol, "tol")
    max_iter = check_int(max_iter, "max_iter")

    def gram(x: Array) -> Array:
        found = adjoint_times(times(xp.reshape(x, shape)))
        if tuple(found.shape) != shape:
            raise ShapeError(f"adjoint_times returned shape {tuple(found.shape)}, not {shape}")
        return xp.reshape(found, (-1,))

    x = xp.reshape(start, (-1,))
    x = x / xp.max(xp.abs(x))
    x = x / norm(x, xp)
    first = norm(gram(x), xp)
    if not bool(first > 0) or not bool(xp.isfinite(first)):
        y = times(start)
        zero = bool(first == 0)
        value = first if zero else first * float("nan")
        return OperatorNorm(value, y * 0, start * 0, value, converged=zero, n_iter=0)
    x, n_iter = top_ritz(gram, x, bound, max_iter, xp)
    v = xp.reshape(x, shape)
    y = times(v)
    flat = xp.reshape(y, (-1,))
    sigma = norm(flat, xp)
    u = y / sigma
    residual = norm(xp.reshape(adjoint_times(u), (-1,)) - sigma * x, xp)
    rounding = kind.eps * (x.shape[0] + flat.shape[0]) ** 0.5
    return OperatorNorm(
        sigma,
        u,
        v,
        residual,
        converged=bool(residual <= max(bound, rounding) * sigma),
        n_iter=n_iter,
    )


def product_norm(
    A: Array,
    B: Array,
    *,
    tol: float | None = None,
    max_iter: int = 1000,
) -> SpectralNorm:
    """Compute the largest singular values of products A·B of thin matrices, without forming them.

    Attention has such products: ``product_norm(Wq.T, Wk)`` of a head, whose core is as small as the
    head. So has a low-rank update: ``product_norm(lora_B, lora_A)``. Stacks broadcast: heads that
    share a key need it once.

    Parameters
    ----------
    A : array, shape (..., m, r)
    B : array, shape (..., r, n)
        Both of one floating-point dtype. The axes before the last two broadcast. float16 and
        bfloat16 are computed in float32.
    tol : float, optional
        As in `spectral_norm`.
    max_iter : int
        As in `spectral_norm`.

    Returns
    -------
    SpectralNorm
        ``sigma`` (...), ``u`` (..., m), ``v`` (..., n) and the fields of `spectral_norm` for the
        core R_A·R_Bᴴ of the factors' QR factorizations. ``error_bound`` is that of the core; the
        factorizations add a few roundings of ‖A‖·‖B‖.

    Raises
    ------
    ShapeError
        If the shapes do not fit or broadcast, or an axis is empty.
    DTypeError
        If A or B is not floating-point, or they have two dtypes.
    ArgumentError
        If ``tol`` or ``max_iter`` is out of its range.

    Notes
    -----
    The work is (m + n)·r² for the factorizations, and r² a step after that. The function waits for
    the device.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> A, B = np.array([[3.0], [4.0]]), np.array([[2.0, 0.0]])
    >>> round(float(sc.product_norm(A, B).sigma), 10)
    10.0

    Six heads of queries, of which each three share one of two heads of keys:

    >>> Wq, Wk = np.ones((2, 3, 4, 8)), np.ones((2, 1, 4, 8))
    >>> sc.product_norm(Wq.swapaxes(-1, -2), Wk).sigma.shape
    (2, 3)
    """
    A, B = constant(plain(A, "A")), constant(plain(B, "B"))
    xp = array_namespace(A, B, name="A and B")
    kind = traits(A, xp, "A")
    traits(B, xp, "B")
    if A.dtype != B.dtype:
        raise DTypeError(f"A has dtype {A.dtype} but B has {B.dtype}: convert one")
    a, b = tuple(A.shape), tuple(B.shape)
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2] or not _broadcast(a[:-2], b[:-2]) or 0 in a + b:
        raise ShapeError(f"A has shape {a} and B {b}: they must be (..., m, r) and (..., r, n)")
    A, B = cast(A, kind.iteration_dtype, xp), cast(B, kind.iteration_dtype, xp)
    left, R_left = thin_qr(A, xp)
    right, R_right = thin_qr(conj(xp.matrix_transpose(B), xp), xp)
    core = xp.matmul(R_left, conj(xp.matrix_transpose(R_right), xp))
    found = spectral_norm(core, layout=stack_layout(core.ndim), tol=tol, max_iter=max_iter)
    u = xp.matmul(left, found.u[..., None])[..., 0]
    v = xp.matmul(right, found.v[..., None])[..., 0]
    return found._replace(u=u, v=v)


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return True if two shapes broadcast."""
    each = zip(reversed(a), reversed(b), strict=False)
    return all(m == n or 1 in (m, n) for m, n in each)


def thin_qr(A: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return Q and R: by the backend's factorization, or by Gram–Schmidt where it has none.

    Twice is enough: rounding leaves a component along the columns before after the first time. A
    column that adds no direction becomes zero, which changes no singular value of Q·R.
    """
    try:
        factorize = xp.linalg.qr
    except AttributeError:
        factorize = None
    if factorize is not None:
        Q, R = factorize(A)
        return Q, R
    eps = traits(A, xp, "A").eps
    Q = A[..., :0]
    for j in range(A.shape[-1]):
        column = A[..., j : j + 1]
        x = column
        for _ in range(2):
            x = x - xp.matmul(Q, xp.matmul(conj(xp.matrix_transpose(Q), xp), x))
        length, before = (norm(y[..., 0], xp)[..., None, None] for y in (x, column))
        new = length > eps * before
        unit = xp.where(new, x / xp.where(new, length, xp.ones_like(length)), xp.zeros_like(x))
        Q = xp.concat([Q, unit], axis=-1)
    return Q, xp.matmul(conj(xp.matrix_transpose(Q), xp), A)
