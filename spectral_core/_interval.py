"""Bound the largest singular value from above as well as from below: proven, or with a probability.

An iteration approaches σ₁ from below and never says how far it is. Four ways give an upper bound:

- A Cholesky factorization of τ²I − WᴴW in float64 proves σ₁ ≤ τ (Rump): see `_certificate`.
- Lanczos steps from a random start find less than (1 − ε)·σ₁² with a probability that is known
  (Kuczyński and Woźniakowski 1992). They need nothing but products with W.
- Norms of rows and columns bound it at once, from both sides.
- The Gram iteration squares the matrix again and again (Delattre et al. 2023). It is a composition
  of products and a norm, so it runs on stacks and has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import frexp, inf, isfinite, log, prod
from typing import NamedTuple

import numpy as np

from ._arrays import (
    Array,
    Namespace,
    array_namespace,
    as_numpy,
    cast,
    conj,
    constant,
    is_complex,
    norm,
    squared,
    to_host,
    traits,
)
from ._certificate import (
    Host,
    close_bounds,
    from_norms,
    last_pair,
    scaled_down,
    scaled_up,
    times,
    times_power_of_two,
)
from ._lanczos import as_matrices
from ._layout import Layout, stack_layout
from ._power import matvec, rmatvec, start_vector
from ._validate import check_number
from .errors import ArgumentError, DTypeError, check_int, shown

METHODS = ("factorization", "lanczos", "cheap")

# Residuals of the vectors from which a factorization starts. The first is enough unless values
# beside the largest are closer to it than that: an eigenvalue's error is the residual's square.
_TOLERANCES = (1e-7, 1e-13)
_MOST_PRODUCTS = 300
_SAFE = 15  # binary orders of magnitude from 1 where no fourth power is close to float32's ends
_NARROW = 512  # rows from which products in float32 are much faster
_NARROW_TOL = 3e-7
_EACH = 5  # products after which it is asked whether they are enough


class SigmaBounds(NamedTuple):
    """Result of `bounds`."""

    lower: Host
    upper: Host
    method: str


def bounds(
    W: Array,
    *,
    layout: Layout | str | None = None,
    method: str | None = None,
    probability: float | None = None,
    n_iter: int = 100,
    seed: int = 0,
) -> SigmaBounds:
    r"""Bound the largest singular value from below and above, rounding included.

    There are three methods:

    - ``"factorization"``, the default: both bounds are proven by a factorization in float64 on the
      host. They are about 1e-10 apart for 2,000 rows, and closer for fewer, whatever the spectrum
      is. The work is m·n² + n³/3 multiplications, with n the shorter side.
    - ``"lanczos"``, the default with ``probability``: ``n_iter`` products with W and Wᴴ on the
      device of W. The upper bound fails with at most that probability over the seeds:

      .. math:: σ_1^2 ≤ \frac{θ}{1 - ε}, \quad
                \sqrt{ε}\,(2k - 1) = \ln\frac{1.648 \sqrt{n}}{p}

      θ is the largest Ritz value of k steps from a random start (Kuczyński & Woźniakowski 1992).
      For n = 4096, 100 steps and p = 1e-9, σ₁ is at most 0.8 % above its estimate.
    - ``"cheap"``: both bounds are proven, by one look at each element. They are the norms of rows
      and columns, ‖W‖_F/√n ≤ σ₁ ≤ ‖W‖_F, and σ₁² ≤ ‖W‖₁·‖W‖_∞. They can be far apart. With one
      product, ``gram_bound(W, n_iter=1)`` is a closer upper bound, ‖WᴴW‖_F^½.

    Parameters
    ----------
    W : array, or sequence of sequences of numbers
        A matrix, or a tensor that ``layout`` makes a matrix or a stack of matrices of. The bounds
        are those of the stored numbers, also in half precision.
    layout : Layout or str, optional
        The meaning of the axes. It is needed for three axes and more.
    method : str, optional
        One of the three above.
    probability : float, optional
        Probability that the upper bound is too small, between 0 and 1. For a stack, it is that of
        each matrix.
    n_iter : int
        Number of Lanczos steps k. n steps at most are made.
    seed : int
        Seed of the random start.

    Returns
    -------
    lower, upper : NumPy array of float64, shape (*stack,)
        lower ≤ σ₁ ≤ upper. NaN where W is not finite. ``upper`` is infinite where σ₁ may exceed the
        largest float64.
    method : str
        The method that was used.

    Raises
    ------
    ShapeError
        If W has fewer than two axes or an empty one, has three or more and no ``layout``, or does
        not fit its layout.
    DTypeError
        If W is not an array of numbers, is sparse or masked, or float64 has no place for it.
    ArgumentError
        If ``method`` is not one of the three, or does not fit ``probability``. Also if
        ``probability`` is not between 0 and 1, ``n_iter`` is less than 1, or ``seed`` is negative.

    Notes
    -----
    The function waits for the device, so it does not run inside ``jax.jit``. The Lanczos steps run
    in float64 where the backend has it. In float32, the allowance for rounding may be a percent.
    The factorization is faster where SciPy is installed.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> W = np.array([[3.0, 3.0], [0.0, 3.0]])
    >>> lower, upper, method = sc.bounds(W)
    >>> bool(lower <= 4.854101966249685 <= upper), bool(upper - lower < 1e-11), method
    (True, True, 'factorization')
    >>> lower, upper, method = sc.bounds(W, probability=1e-9)
    >>> bool(lower <= 4.854101966249685 <= upper), method
    (True, 'lanczos')
    >>> lower, upper, method = sc.bounds(W, method="cheap")
    >>> round(float(lower), 6), round(float(upper), 6)
    (4.242641, 5.196152)
    """
    W = as_matrices(W, layout)
    xp = array_namespace(W)
    steps = check_int(n_iter, "n_iter")
    method = _method(method, probability)
    stack = tuple(W.shape[:-2])
    flat = xp.reshape(constant(W), (prod(stack), *W.shape[-2:]))
    found = []
    for i in range(flat.shape[0]):
        if method == "factorization":
            found.append(_factorized(flat[i, ...], seed, xp))
        elif method == "cheap":
            found.append(_cheap(flat[i, ...], xp))
        else:
            assert probability is not None
            found.append(_random(flat[i, ...], steps, probability, seed, xp))
    lower, upper = np.array(found).T.reshape(2, *stack)
    return SigmaBounds(lower, upper, method)


def gram_bound(W: Array, *, n_iter: int = 10) -> Array:
    r"""Bound the largest singular values of a stack of matrices from above, with a gradient.

    .. math:: G_0 = W, \quad G_{t+1} = G_t^H G_t, \quad σ_1 ≤ ‖G_t‖_F^{1/2^t}

    The bound is too large by a factor of rank^(1/2^(t+1)) at most: 0.3 % for 512 rows after 10
    products, 0.01 % after 15. Each product is as large as WᴴW.

    Parameters
    ----------
    W : array, shape (..., m, n)
        A matrix or a stack of them, real or complex floating-point. float16 and bfloat16 are
        computed in float32.
    n_iter : int
        Number of products t.

    Returns
    -------
    array, shape (...)
        Upper bounds, rounding included, in the dtype of the iteration. Zero for a zero matrix, NaN
        where W is not finite, and infinite where rounding leaves no bound, as for many thousand
        rows in float32.

    Raises
    ------
    ShapeError, DTypeError
        If W is no floating-point matrix or stack of matrices, or an axis is empty.
    ArgumentError
        If ``n_iter`` is less than 1.

    Notes
    -----
    Nothing is copied to the host. The function runs inside ``jax.jit`` and has the gradient of what
    it computes (Delattre et al. 2023).

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> bool(4.8541019 < sc.gram_bound(np.array([[3.0, 3.0], [0.0, 3.0]])) < 4.857)
    True
    """
    ndim = len(getattr(W, "shape", ()))
    W = as_matrices(W, stack_layout(ndim) if ndim > 2 else None)
    xp = array_namespace(W)
    kind = traits(W, xp, "W")
    G = cast(W, kind.iteration_dtype, xp)
    m, n = G.shape[-2:]
    if m < n:
        G = conj(xp.matrix_transpose(G), xp)
    products = check_int(n_iter, "n_iter")
    unit = kind.eps / 2
    rate = (4 if kind.complex else 1) * (max(m, n) + 4) * unit
    # The logarithm of the scale of G, divided by 2^t. The largest element comes first: a squared
    # norm could overflow. Small numbers are lifted before: a division by a subnormal one may.
    least = float(xp.finfo(G.dtype).smallest_normal)
    largest = xp.max(xp.abs(G), axis=(-2, -1), keepdims=True)
    small = largest < 1
    lift = xp.where(small, xp.full_like(largest, least**-0.5), xp.ones_like(largest))
    safe = xp.where(largest == 0, xp.ones_like(largest), largest * lift)  # NaN stays
    exponent = xp.log(safe) - xp.log(lift)
    G = G * cast(lift, G.dtype, xp) / cast(safe, G.dtype, xp)
    for t in range(products):
        length = _frobenius(G, xp)
        nonzero = xp.where(length == 0, xp.ones_like(length), length)
        G = G / nonzero
        G = xp.matmul(conj(xp.matrix_transpose(G), xp), G)
        square = _frobenius(G, xp)
        # ‖GᴴG‖_F ≤ σ₁(G)·‖G‖_F: what rounding may hide, relative to σ₁², is at most this.
        hidden = rate / xp.where(square == 0, xp.ones_like(square), square * square)
        left = xp.log(xp.where(hidden < 0.5, 1 - hidden, xp.ones_like(hidden)))
        left = xp.where(hidden < 0.5, left, xp.full_like(left, -inf))
        exponent = exponent + (xp.log(nonzero) - left / 2) / 2**t
    total = xp.log(xp.where(square == 0, xp.ones_like(square), square))
    bound = xp.exp(exponent + total / 2**products) * (1 + 8 * (products + 8) * kind.eps)
    # Exponents lose digits in proportion to their size.
    bound = bound * (1 + 8 * kind.eps * (1 + xp.abs(exponent)))
    # Below the normal numbers, rounding is absolute.
    bound = bound + xp.where(
        bound < least, xp.full_like(bound, 2 * kind.eps * least), xp.zeros_like(bound)
    )
    return xp.where(largest == 0, xp.zeros_like(bound), bound)[..., 0, 0]


def _frobenius(G: Array, xp: Namespace) -> Array:
    return xp.sqrt(xp.sum(squared(G, xp), axis=(-2, -1), keepdims=True))


def _method(method: str | None, probability: float | None) -> str:
    """Return the method that is meant; raise `ArgumentError` if it does not fit the probability."""
    if probability is not None and not 0 < check_number(probability, "probability") < 1:
        raise ArgumentError(f"probability must be between 0 and 1, not {probability!r}")
    method = method or ("factorization" if probability is None else "lanczos")
    if method not in METHODS:
        raise ArgumentError(f"method must be one of {', '.join(METHODS)}, not {shown(method)}")
    if (method == "lanczos") != (probability is not None):
        raise ArgumentError(
            f"method {method!r} has no probability to fail: leave probability out"
            if probability is not None
            else "method 'lanczos' needs a probability to fail, such as probability=1e-9"
        )
    return method


def _factorized(W: Array, seed: int, xp: Namespace) -> tuple[float, float]:
    """Return proven bounds by a factorization in float64 on the host."""
    narrow = traits(W, xp, "W").iteration_dtype
    host = cast(W, narrow, xp)
    if not isinstance(host, np.ndarray) or not host.dtype.isnative:  # nothing is written into it
        host = as_numpy(host, "W")
    exponent, value = _exponent(host, np)
    if exponent is None:
        return value, value
    host = host.astype(np.result_type(host, np.float64), copy=False)
    if abs(exponent) < _SAFE:
        exponent = 0
    host = times_power_of_two(host, -exponent)

    def vectors(gram: Host) -> Iterator[Host]:
        v = start_vector((len(gram),), gram, seed=seed)
        if len(gram) >= _NARROW:
            v = _narrow_ritz(gram, v)
        for tol in _TOLERANCES:
            v = _top(gram, v, tol)
            yield v

    norms = from_norms(host, 0.0, np)
    found = close_bounds(host, norms.upper, vectors)
    upper = min(found.upper, norms.upper)
    return scaled_down(max(found.lower, 0.0), exponent), scaled_up(upper, exponent)


def _narrow_ritz(gram: Host, v: Host) -> Host:
    """Return a first estimate of the first eigenvector, from products in float32.

    A product reads the whole matrix from memory: half of the bytes are half of the time. The
    estimate proves nothing, and only a few products in float64 are left to do.
    """
    narrow = np.complex64 if np.iscomplexobj(gram) else np.float32
    found = _top(gram.astype(narrow), v.astype(narrow), _NARROW_TOL).astype(gram.dtype)
    return found / np.linalg.norm(found)


def _top(gram: Host, x: Host, tol: float) -> Host:
    """Return an estimate of the first eigenvector by the Lanczos method, without a restart.

    No vector is made orthogonal to those before the last two. They are no longer so once the first
    eigenvector is found (Paige 1980), and then nothing more is asked for.
    """
    most = min(len(gram), _MOST_PRODUCTS)
    basis = np.empty((most, len(gram)), gram.dtype)
    diagonal, beside = np.zeros(most), np.zeros(most + 1)
    for k in range(most):
        basis[k] = x
        y = times(gram, x)
        if k:
            y = y - y.dtype.type(beside[k]) * basis[k - 1]
        diagonal[k] = float(np.vdot(x, y).real)
        y = y - y.dtype.type(diagonal[k]) * x
        length = float(np.linalg.norm(y))
        is_last = k + 1 == most or length <= tol * diagonal[k]
        if is_last or k % _EACH == _EACH - 1:
            value, vector = last_pair(diagonal[: k + 1], beside[1 : k + 1], len(gram))
            if is_last or length * abs(vector[-1]) <= tol * value:
                break
        beside[k + 1] = length
        x = y / y.dtype.type(length)
    found = times(basis[: k + 1], vector.astype(gram.dtype), transposed=True)
    return found / np.linalg.norm(found)


def _cheap(W: Array, xp: Namespace) -> tuple[float, float]:
    """Return bounds from the norms of rows and columns."""
    W = _wide(W, xp)
    exponent, value = _exponent(W, xp)
    if exponent is None:
        return value, value
    W = times_power_of_two(W, -exponent)
    squares = squared(W, xp)
    rows, columns = (float(xp.max(xp.sum(squares, axis=axis))) for axis in (1, 0))
    mean = float(xp.sum(xp.sum(squares, axis=1), axis=0)) / min(W.shape)
    found = from_norms(W, max(rows, columns, mean) ** 0.5, xp)
    return scaled_down(found.lower, exponent), scaled_up(found.upper, exponent)


def _exponent(W: Array, xp: Namespace) -> tuple[int | None, float]:
    """Return the exponent of the largest element, or None and the norm where that is enough."""
    # The absolute value of a finite complex number may overflow.
    parts = (xp.real(W), xp.imag(W)) if is_complex(W, xp) else (W,)
    if xp is np:  # two looks are faster than a copy
        longest = np.max([look for part in parts for look in (part.max(), -part.min())])
    else:
        longest = xp.max(xp.stack([xp.max(xp.abs(part)) for part in parts]))
    largest = float(longest)
    is_kept = isfinite(largest) and (largest > 0 or not bool(longest > 0))
    if not is_kept and bool(xp.isfinite(longest)):  # of NumPy's longdouble
        raise DTypeError("W has its largest element beyond the range of float64: scale it first")
    if largest == 0 or not isfinite(largest):
        return None, 0.0 if largest == 0 else np.nan
    return frexp(largest)[1] - 1, largest


def _random(W: Array, steps: int, chance: float, seed: int, xp: Namespace) -> tuple[float, float]:
    """Return bounds from Lanczos steps, of which the upper one may fail with a probability."""
    W = _wide(W, xp)
    kind = traits(W, xp, "W")
    exponent, value = _exponent(W, xp)
    if exponent is None:
        return value, value
    W = times_power_of_two(W, -exponent)
    m, n = W.shape
    if m < n:
        W, m, n = conj(xp.matrix_transpose(W), xp), n, m
    steps = min(steps, n)
    values = ritz_values(_gram_of(W, xp), start_vector((n,), W, seed=seed), steps, xp)
    absolute = xp.abs(W)
    sums = float(xp.max(xp.sum(absolute, axis=0))) * float(xp.max(xp.sum(absolute, axis=1)))
    eps = kind.eps
    lower, upper = enclosure(
        float(values[-1]), steps, (m, n), sums, chance, eps, is_complex=kind.complex
    )
    return scaled_down(lower, exponent), scaled_up(upper, exponent)


def enclosure(
    theta: float,
    steps: int,
    shape: tuple[int, int],
    sums: float,
    chance: float,
    eps: float,
    *,
    is_complex: bool,
) -> tuple[float, float]:
    """Return bounds of σ₁ from the largest Ritz value of WᴴW after Lanczos steps.

    The upper one fails with at most the probability ``chance``. ``sums`` is the product of the
    largest sums of |W| over a row and over a column, which bounds σ₁² and the rounding.
    """
    m, n = shape
    # In real numbers, a complex matrix has twice the size and each value twice.
    size = 2 * n if is_complex else n
    missed = (log(1.648 * size**0.5 / chance) / (2 * steps - 1)) ** 2
    if steps == n:
        missed = 0.0  # the space of all steps holds every eigenvector that the start has a part of
    rounding = (4 if is_complex else 1) * (m + n + 8 * steps) * eps * sums
    lower = max(theta - rounding, 0.0) ** 0.5
    # Where the steps say nothing, the sums of rows and columns do.
    upper = ((theta + rounding) / (1 - missed)) ** 0.5 if missed < 1 else np.inf
    upper = min(upper, (sums * (1 + 8 * (m + n) * eps)) ** 0.5) * (1 + 8 * eps)
    return lower * (1 - 8 * eps), upper


def _wide(W: Array, xp: Namespace) -> Array:
    """Return W in float64, or as it is where JAX has no float64 or longdouble has more."""
    kind = traits(W, xp, "W")
    W = cast(W, kind.iteration_dtype, xp)
    wide = xp.complex128 if kind.complex else xp.float64
    if xp.finfo(W.dtype).bits >= 64 * (1 + kind.complex):
        return W
    return cast(W, wide, xp) if xp.zeros(1, dtype=wide).dtype == wide else W


def _gram_of(W: Array, xp: Namespace) -> Callable[[Array], Array]:
    return lambda x: rmatvec(W, matvec(W, x, xp), xp)


def ritz_values(gram: Callable[[Array], Array], x: Array, steps: int, xp: Namespace) -> Host:
    """Return the Ritz values of the Krylov space of that many steps, in rising order."""
    (T,) = projections(lambda X: gram(X[0, :])[None, :], x[None, :], steps, xp)
    return np.linalg.eigvalsh(T, UPLO="U")


def projections(gram: Callable[[Array], Array], X: Array, steps: int, xp: Namespace) -> list[Host]:
    """Return the operator in the Krylov space of each row of X: the upper half of a matrix.

    ``gram`` is applied to all rows at once, so that a weight is read once a step for all of them.
    The vectors are made orthogonal to all before, twice: the theorem is about exact arithmetic.
    The array of vectors has one shape in all steps, so that JAX compiles once. A row whose space is
    complete goes on as zeros.
    """
    count = X.shape[0]
    rows = xp.arange(steps)
    basis = X[:, None, :] * xp.zeros((1, steps, 1), dtype=X.dtype, device=X.device)
    T = np.zeros((count, steps, steps), complex)
    used, going = [0] * count, [True] * count
    least = 8 * traits(X, xp, "x").eps
    for k in range(steps):
        basis = basis + xp.astype(rows == k, X.dtype)[None, :, None] * X[:, None, :]
        Y = gram(X)
        products = xp.matmul(conj(basis, xp), Y[..., None])
        T[:, :, k] = to_host(xp.reshape(products, (-1,))).reshape(count, steps)
        for _ in range(2):
            along = xp.matmul(conj(basis, xp), Y[..., None])
            Y = Y - xp.matmul(xp.matrix_transpose(along), basis)[:, 0, :]
        length = norm(Y, xp)
        inverse = np.zeros(count)
        for i, own in enumerate(to_host(length).real):
            used[i] += going[i]
            going[i] = going[i] and bool(own > least * abs(T[i, k, k]))
            inverse[i] = 1 / own if going[i] else 0.0
        if not any(going):
            break
        X = Y * xp.asarray(inverse, dtype=length.dtype, device=X.device)[:, None]
    # Column k holds the products with the vectors up to it: the upper half of the operator.
    return [T[i, : used[i], : used[i]] for i in range(count)]
