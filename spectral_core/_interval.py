"""Bound the largest singular value from above as well as from below: proven, or with a probability.

An iteration approaches σ₁ from below and never says how far it is. Three ways give an upper bound:

- A Cholesky factorization of τ²I − WᴴW in float64 proves σ₁ ≤ τ (Rump): see `_certificate`.
- Lanczos steps from a random start find less than (1 − ε)·σ₁² with a probability that is known
  (Kuczyński and Woźniakowski 1992). They need nothing but products with W.
- The Gram iteration squares the matrix again and again (Delattre et al. 2023). It is a composition
  of products and a norm, so it runs on stacks and has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from math import frexp, inf, isfinite, log, prod
from typing import Any, NamedTuple

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
from ._certificate import Host, scaled_down, scaled_up, times_power_of_two
from ._certificate import bounds as proven
from ._lanczos import as_matrices, top_ritz
from ._layout import Layout, stack_layout
from ._power import matvec, rmatvec, start_vector
from ._validate import check_number
from .errors import ArgumentError, check_int

_CONVERGED = 1e-13  # of the lower bound in float64, from which the factorization starts
_MOST_PRODUCTS = 500


class SigmaBounds(NamedTuple):
    """Result of `bounds`."""

    lower: Host
    upper: Host
    method: str


def bounds(
    W: Array,
    *,
    layout: Layout | str | None = None,
    probability: float | None = None,
    n_iter: int = 100,
    seed: int = 0,
) -> SigmaBounds:
    r"""Bound the largest singular value from below and above, rounding included.

    Without ``probability`` the bounds are proven by a factorization in float64 on the host. They
    are about 1e-12 apart, whatever the spectrum is. The work is m·n² + n³/3 multiplications, with
    n the shorter side.

    With ``probability`` the upper bound fails with at most that probability over the seeds. It
    needs ``n_iter`` products with W and Wᴴ on the device of W:

    .. math:: σ_1^2 ≤ \frac{θ}{1 - ε}, \quad
              \sqrt{ε}\,(2k - 1) = \ln\frac{1.648 \sqrt{n}}{p}

    θ is the largest Ritz value of k Lanczos steps from a random start (Kuczyński & Woźniakowski
    1992). For n = 4096, 100 steps and p = 1e-9, σ₁ is at most 0.8 % above its estimate.

    Parameters
    ----------
    W : array, or sequence of sequences of numbers
        A matrix, or a tensor that ``layout`` makes a matrix or a stack of matrices of. The bounds
        are those of the stored numbers, also in half precision.
    layout : Layout or str, optional
        The meaning of the axes. It is needed for three axes and more.
    probability : float, optional
        Probability that the upper bound is too small, between 0 and 1. For a stack, it is that of
        each matrix.
    n_iter : int
        Number of Lanczos steps k, with ``probability``. n steps at most are made.
    seed : int
        Seed of the random start.

    Returns
    -------
    lower, upper : NumPy array of float64, shape (*stack,)
        lower ≤ σ₁ ≤ upper. NaN where W is not finite. ``upper`` is infinite where σ₁ may exceed the
        largest float64.
    method : str
        "factorization", or "lanczos".

    Raises
    ------
    ShapeError
        If W has fewer than two axes or an empty one, has three or more and no ``layout``, or does
        not fit its layout.
    DTypeError
        If W is not an array of numbers, or is sparse or masked.
    ArgumentError
        If ``probability`` is not between 0 and 1, ``n_iter`` is less than 1, or ``seed`` is
        negative.

    Notes
    -----
    The function waits for the device, so it does not run inside ``jax.jit``. The Lanczos steps run
    in float64 where the backend has it. In float32, the allowance for rounding may be a percent.

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
    """
    W = as_matrices(W, layout)
    xp = array_namespace(W)
    steps = check_int(n_iter, "n_iter")
    chance = None if probability is None else _probability(probability)
    stack = tuple(W.shape[:-2])
    flat = xp.reshape(constant(W), (prod(stack), *W.shape[-2:]))
    found = []
    for i in range(flat.shape[0]):
        if chance is None:
            found.append(_factorized(flat[i, ...], seed, xp))
        else:
            found.append(_random(flat[i, ...], steps, chance, seed, xp))
    lower, upper = np.array(found).T.reshape(2, *stack)
    return SigmaBounds(lower, upper, "factorization" if chance is None else "lanczos")


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
    # norm could overflow.
    largest = xp.max(xp.abs(G), axis=(-2, -1), keepdims=True)
    safe = xp.where(largest == 0, xp.ones_like(largest), largest)  # NaN stays
    G, exponent = G / safe, xp.log(safe)
    for t in range(products):
        length = _frobenius(G, xp)
        nonzero = xp.where(length == 0, xp.ones_like(length), length)
        G = G / nonzero
        G = xp.matmul(conj(xp.matrix_transpose(G), xp), G)
        square = _frobenius(G, xp)
        # ‖GᴴG‖_F ≤ σ₁(G)·‖G‖_F: what rounding may hide, relative to σ₁², is at most this.
        hidden = rate / xp.where(square == 0, xp.ones_like(square), square * square)
        left = xp.where(hidden < 0.5, 1 - hidden, xp.zeros_like(hidden))
        exponent = exponent + (xp.log(nonzero) - xp.log(left) / 2) / 2**t
    total = xp.log(xp.where(square == 0, xp.ones_like(square), square))
    bound = xp.exp(exponent + total / 2**products) * (1 + 8 * (products + 8) * kind.eps)
    # Exponents lose digits in proportion to their size.
    bound = bound * (1 + 8 * kind.eps * (1 + xp.abs(exponent)))
    return xp.where(largest == 0, xp.zeros_like(bound), bound)[..., 0, 0]


def _frobenius(G: Array, xp: Namespace) -> Array:
    return xp.sqrt(xp.sum(squared(G, xp), axis=(-2, -1), keepdims=True))


def _probability(value: float) -> float:
    found = check_number(value, "probability")
    if not 0 < found < 1:
        raise ArgumentError(f"probability must be between 0 and 1, not {value!r}")
    return found


def _factorized(W: Array, seed: int, xp: Namespace) -> tuple[float, float]:
    """Return proven bounds by a factorization in float64 on the host."""
    wide = np.complex128 if is_complex(W, xp) else np.float64
    narrow = traits(W, xp, "W").iteration_dtype
    host = as_numpy(cast(W, narrow, xp), "W")
    largest = float(np.abs(host).max())
    if largest == 0 or not isfinite(largest):
        return (0.0, 0.0) if largest == 0 else (np.nan, np.nan)
    exponent = frexp(largest)[1] - 1
    host = times_power_of_two(host, -exponent)
    exact = host.astype(wide)
    x = start_vector((host.shape[1],), exact, seed=seed)
    v, _ = top_ritz(_gram_of(exact, np), x, _CONVERGED, _MOST_PRODUCTS, np)
    found = proven(host, v, 0.0, np, most=inf)
    return scaled_down(found.lower, exponent), scaled_up(found.upper, exponent)


def _random(W: Array, steps: int, chance: float, seed: int, xp: Namespace) -> tuple[float, float]:
    """Return bounds from Lanczos steps, of which the upper one may fail with a probability."""
    kind = traits(W, xp, "W")
    W = cast(W, _widest(kind.complex, kind.iteration_dtype, xp), xp)
    largest = float(xp.max(xp.abs(W)))
    if largest == 0 or not isfinite(largest):
        return (0.0, 0.0) if largest == 0 else (np.nan, np.nan)
    exponent = frexp(largest)[1] - 1
    W = times_power_of_two(W, -exponent)
    m, n = W.shape
    if m < n:
        W, m, n = conj(xp.matrix_transpose(W), xp), n, m
    steps = min(steps, n)
    theta = _lanczos(_gram_of(W, xp), start_vector((n,), W, seed=seed), steps, xp)
    # In real numbers, a complex matrix has twice the size and each value twice.
    size = 2 * n if kind.complex else n
    missed = (log(1.648 * size**0.5 / chance) / (2 * steps - 1)) ** 2
    if steps == n:
        missed = 0.0  # the space of all steps holds every eigenvector that the start has a part of
    absolute = xp.abs(W)
    sums = float(xp.max(xp.sum(absolute, axis=0))) * float(xp.max(xp.sum(absolute, axis=1)))
    eps = traits(W, xp, "W").eps
    rounding = (4 if kind.complex else 1) * (m + n + 8 * steps) * eps * sums
    lower = max(theta - rounding, 0.0) ** 0.5
    # Where the steps say nothing, the sums of rows and columns do.
    upper = ((theta + rounding) / (1 - missed)) ** 0.5 if missed < 1 else np.inf
    upper = min(upper, (sums * (1 + 8 * (m + n) * eps)) ** 0.5) * (1 + 8 * eps)
    return scaled_down(lower * (1 - 8 * eps), exponent), scaled_up(upper, exponent)


def _widest(is_complex: bool, dtype: Any, xp: Namespace) -> Any:
    """Return float64, or the dtype itself where JAX has no float64 or longdouble has more."""
    wide = xp.complex128 if is_complex else xp.float64
    if xp.finfo(dtype).bits >= 64 * (1 + is_complex):
        return dtype
    return wide if xp.zeros(1, dtype=wide).dtype == wide else dtype


def _gram_of(W: Array, xp: Namespace) -> Callable[[Array], Array]:
    return lambda x: rmatvec(W, matvec(W, x, xp), xp)


def _lanczos(gram: Callable[[Array], Array], x: Array, steps: int, xp: Namespace) -> float:
    """Return the largest Ritz value of the Krylov space of that many steps.

    The vectors are made orthogonal to all before, twice: the theorem is about exact arithmetic.
    The array of vectors has one shape in all steps, so that JAX compiles once.
    """
    rows = xp.arange(steps)
    basis = x[None, :] * xp.zeros((steps, 1), dtype=x.dtype, device=x.device)
    T = np.zeros((steps, steps), complex)
    for k in range(steps):
        basis = basis + xp.astype(rows == k, x.dtype)[:, None] * x[None, :]
        y = gram(x)
        products = xp.matmul(conj(basis, xp), y)
        T[:, k] = to_host(products)
        for _ in range(2):
            y = y - xp.matmul(xp.matmul(conj(basis, xp), y), basis)
        length = float(norm(y, xp))
        if length <= 8 * traits(x, xp, "x").eps * abs(T[k, k]) or k + 1 == steps:
            break
        x = y / length
    # Column k holds the products with the vectors up to it: the upper half of the operator.
    return float(np.linalg.eigvalsh(T[: k + 1, : k + 1], UPLO="U")[-1])
