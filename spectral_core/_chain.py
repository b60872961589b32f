"""Bound the Lipschitz constant of a chain of matrices and activations, rounding included.

The product of the norms counts on every layer stretching the same vector. A quadratic form δᵀXδ
that bounds the squared difference of two inputs follows the chain more closely (ECLipsE-Fast, Xu
and Sivaranjani 2024). Let the activation have slopes in [α, β], with centre c and radius r. Where
z = Wδ' and δ is the difference after the activation, (δ − αz)ᵀ(βz − δ) ≥ 0. So for any l > 0

    X ⪯ l·I − l²c²·W X̃⁻¹Wᵀ,  X̃ = X' + lαβ·WᵀW ≻ 0

proves δᵀXδ ≤ δ'ᵀX'δ'. The largest smallest eigenvalue of X comes with l = 1/(r(r + |c|)·λ_max),
of the matrix WX'⁻¹Wᵀ: then all eigenvalues of X are between l·r/(r + |c|) and l. Nothing here is
close to singular.

In floating point, X is any matrix that fulfills the inequality. So each quantity is moved to the
safe side by a bound of its error: the residual of the equations X̃Z = Wᵀ, and a factorization that
proves λ_max (see `_certificate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import frexp, inf, isfinite, log10, ulp
from typing import Any, NamedTuple

import numpy as np

from ._arrays import Array, array_namespace, as_numpy, cast, constant, is_complex, plain, traits
from ._certificate import Host, allowance, gamma, is_below, scaled_up, times_power_of_two
from ._interval import bounds
from .errors import ArgumentError, DTypeError, ShapeError, shown

_UNIT = 2.0**-53
_SAFE = 1 + 2.0**-40  # times a sum of positive numbers: more than its own rounding
_LOG2 = log10(2)

Slopes = tuple[float, float]


class ChainBound(NamedTuple):
    """Result of `chain_bound`."""

    log10_upper: float
    log10_product: float


class Inexact(NamedTuple):
    """A matrix, and a bound of the norm of what it lacks to the one that is meant."""

    matrix: Host
    error: float


def chain_bound(
    weights: Sequence[Array], *, slopes: Slopes | Sequence[Slopes] = (0.0, 1.0)
) -> ChainBound:
    r"""Bound the Lipschitz constant of x ↦ W_L φ(… φ(W_2 φ(W_1 x))) from above.

    Every activation acts on each element alone, with slopes in [α, β]: [0, 1] for ReLU, tanh and
    softplus. Biases change nothing.

    Parameters
    ----------
    weights : sequence of arrays, shapes (n_1, n_0), (n_2, n_1), …
        The matrices in the order in which they are applied, real floating-point.
    slopes : (float, float), or a sequence of them
        Least and largest slope of the activations: one pair for all, or one for each of the
        activations, which are one fewer than the matrices.

    Returns
    -------
    log10_upper : float
        Logarithm to base 10 of a proven bound, never above ``log10_product``. −inf if the chain is
        constant, inf if a matrix is not finite.
    log10_product : float
        That of the product of the norms and of the largest slopes.

    Raises
    ------
    ShapeError
        If there is no matrix, or the shapes do not fit each other.
    DTypeError
        If a matrix is not real floating-point.
    ArgumentError
        If ``weights`` is a mapping, a pair of slopes is not finite or not in order, or the number
        of pairs does not fit.

    Notes
    -----
    Proven, rounding included: the chain of the stored numbers, computed exactly, has no larger
    constant. It is proven by a residual and a Cholesky factorization in float64 on the host for
    each layer, of about 3n³ multiplications. What a device adds by rounding in the network itself
    is not part of that.

    Examples
    --------
    >>> import numpy as np
    >>> import spectral_core as sc
    >>> rng = np.random.default_rng(0)
    >>> weights = [rng.standard_normal((32, 32)) for _ in range(10)]
    >>> bound = sc.chain_bound(weights)
    >>> bool(bound.log10_upper < bound.log10_product - 0.5)
    True
    """
    if isinstance(weights, Mapping):
        raise ArgumentError("weights is a mapping: pass its matrices in order, [*weights.values()]")
    maps = [Inexact(_real(W, i), 0.0) for i, W in enumerate(weights)]
    if not maps:
        raise ShapeError("weights is empty: a chain has one matrix at least")
    for i, (before, after) in enumerate(pairwise(maps)):
        if after.matrix.shape[1] != before.matrix.shape[0]:
            raise ShapeError(
                f"weights {i} and {i + 1} have shapes {before.matrix.shape} and "
                f"{after.matrix.shape}: the second must have as many columns as the first has rows"
            )
    return certified_chain(maps, _pairs(slopes, len(maps) - 1))


def certified_chain(maps: Sequence[Inexact], slopes: Sequence[Slopes]) -> ChainBound:
    """Return the bounds for matrices that are known up to an error."""
    if not all(np.isfinite(one.matrix).all() for one in maps):
        return ChainBound(inf, inf)
    product = 0.0
    for matrix, error in maps:
        product += log10_up((float(bounds(matrix).upper) + error) * _SAFE)
    for pair in slopes:
        product += log10_up(max(map(abs, pair)))
    product = product if product in (inf, -inf) else rounded_up(product, len(maps) + len(slopes))
    return ChainBound(min(product, _eclipse(maps, slopes)), product)


def log10_up(value: float) -> float:
    """Return a number ≥ the logarithm of ``value`` to base 10; −inf for zero."""
    return rounded_up(log10(value)) if 0 < value < inf else (-inf if value == 0 else inf)


def rounded_up(logarithm: float, operations: int = 1) -> float:
    """Return a logarithm moved up by more than the rounding of so many operations on it."""
    return logarithm + 4 * (operations + 1) * ulp(max(1.0, abs(logarithm)))


def _eclipse(maps: Sequence[Inexact], slopes: Sequence[Slopes]) -> float:
    """Return the logarithm of the bound by quadratic forms, inf where rounding leaves none."""
    form = _Form(np.eye(maps[0].matrix.shape[1]), 1.0)
    total, last = 0.0, len(maps) - 1  # the logarithm of what is divided out
    current, exponent = _scaled(maps[0])
    for i in range(last + 1):
        if not current.matrix.any() and current.error == 0:
            return -inf
        if i == last:
            total += exponent * _LOG2 + log10_up(_largest(_congruence(current, form))) / 2
            return rounded_up(total, 4 * last + 8)
        alpha, beta = slopes[i]
        following, shift = _scaled(maps[i + 1])
        if alpha == beta:  # no activation: the two matrices are one
            current, more = _scaled(_product(following, current, alpha))
            exponent += shift + more
            continue
        total += exponent * _LOG2
        found = _next(current, form, alpha, beta)
        if found is None:
            return inf
        current, exponent = following, shift
        form, halved = found
        total += halved * _LOG2 / 2
    raise AssertionError("a chain has a last matrix")


def _product(after: Inexact, before: Inexact, scale: float) -> Inexact:
    """Return scale·after·before with its error."""
    a, b = _norm(after.matrix), _norm(before.matrix)
    error = gamma(len(before.matrix) + 4, before.matrix) * a * b
    error += after.error * (b + before.error) + a * before.error
    return Inexact(scale * (after.matrix @ before.matrix), abs(scale) * error * _SAFE)


class _Form(NamedTuple):
    """A symmetric matrix and a positive number that is below its eigenvalues."""

    matrix: Host
    floor: float


def _next(one: Inexact, form: _Form, alpha: float, beta: float) -> tuple[_Form, int] | None:
    """Return the next form divided by 2^e, and −e; None where rounding leaves none."""
    center, radius = (alpha + beta) / 2, (beta - alpha) / 2
    A, error = found = _congruence(one, form)
    top = _largest(found)
    if top == 0:  # a zero matrix: the difference is zero, whatever the form says
        return _Form(np.eye(len(A)), 1.0), 0
    if not isfinite(top):
        return None
    # Any length is right; this one is best. The product is that of the numbers as they are rounded.
    length = 1 / (radius * (radius + abs(center)) * top)
    factor = length * alpha * beta
    if factor and center:
        inner = _shifted(one, form, factor, top)
        if inner is None:
            return None
        A, error = found = _congruence(one, inner)
        top = _largest(found)
    weight = (length * center) ** 2
    X = length * np.eye(len(A)) - weight * A
    # What A lacks, and the rounding of the numbers before it and of X itself.
    rounding = 16 * _UNIT * (length * len(A) ** 0.5 + weight * (_norm(A) + error))
    shift = (weight * error + rounding) * _SAFE
    X[np.diag_indices(len(X))] -= shift
    floor = length - weight * top * _SAFE - 3 * shift
    if not floor > 2.0**-20 * length:
        return None
    exponent = frexp(length)[1] - 1
    return _Form(X * 2.0**-exponent, floor * 2.0**-exponent), -exponent


def _shifted(one: Inexact, form: _Form, factor: float, top: float) -> _Form | None:
    """Return a matrix below X + factor·WᵀW."""
    W = one.matrix
    size = _norm(W)
    error = gamma(len(W) + 8, W) * size**2 + one.error * (2 * size + one.error)
    error = (abs(factor) * error + 8 * _UNIT * _norm(form.matrix)) * _SAFE
    X = form.matrix + factor * (W.T @ W)
    X[np.diag_indices(len(X))] -= error
    # WᵀW ⪯ top·X: a negative factor removes no more than that share.
    floor = form.floor * min(1.0, 1 + factor * top) - 3 * error
    return _Form(X, floor) if floor > 2.0**-20 * form.floor else None


def _congruence(one: Inexact, form: _Form) -> Inexact:
    """Return W X⁻¹ Wᵀ and a bound of its error, by the residual of the equations."""
    W, X = one.matrix, form.matrix
    Z = np.linalg.solve(X, W.T)
    A = W @ Z
    A = (A + A.T) / 2
    rate = gamma(len(X) + 4, W)
    size = _norm(W)
    residual = _norm(W.T - X @ Z) + rate * (_norm(X) * _norm(Z) + size)
    error = size * residual / form.floor + rate * size * _norm(Z)
    error += one.error * (2 * size + one.error) / form.floor
    return Inexact(A, error * _SAFE)


def _largest(one: Inexact) -> float:
    """Return a proven upper bound of the largest eigenvalue of a symmetric matrix."""
    A, error = one
    if not np.isfinite(A).all() or not isfinite(error):
        return inf
    if not A.any():
        return error
    start = max(float(np.linalg.eigvalsh(A)[-1]), 0.0)
    for slack in (8 * len(A) * _UNIT, 2.0**-30):
        square = start * (1 + slack) + slack * float(np.abs(A).max())
        if is_below(A, square):
            return (square + allowance(A, square) + error) * _SAFE
    return inf


def _norm(W: Host) -> float:
    """Return an upper bound of the Frobenius norm."""
    return float(np.linalg.norm(W)) * (1 + (W.size + 8) * _UNIT)


def _scaled(one: Inexact) -> tuple[Inexact, int]:
    """Return W/2^e with its largest element between 1 and 2, and e."""
    largest = float(np.abs(one.matrix).max())
    exponent = frexp(largest)[1] - 1 if largest else 0
    error = scaled_up(one.error, -exponent)
    return Inexact(times_power_of_two(one.matrix, -exponent), error), exponent


def _real(W: Array, place: int) -> Host:
    name = f"weight {place}"
    W = plain(W, name)
    xp = array_namespace(W, name=name)
    kind = traits(W, xp, name)
    if is_complex(W, xp):
        raise DTypeError(f"{name} is complex: the slopes of activations are those of real numbers")
    if W.ndim != 2 or 0 in W.shape:
        raise ShapeError(f"{name} has shape {tuple(W.shape)}: it must be a matrix")
    return as_numpy(cast(constant(W), kind.iteration_dtype, xp), name).astype(np.float64)


def _pairs(slopes: Slopes | Sequence[Slopes], n: int) -> list[Slopes]:
    """Return one pair of slopes for each activation."""
    given: Sequence[Any] = list(slopes) if isinstance(slopes, Iterable) else [slopes]
    pairs = [given] * n if given and not isinstance(given[0], Sequence) else given
    found = []
    for pair in pairs:
        try:
            alpha, beta = map(float, pair)
        except (TypeError, ValueError):
            alpha = beta = inf
        if not (isfinite(alpha) and isfinite(beta) and alpha <= beta):
            raise ArgumentError(f"slopes must be pairs (least, largest), not {shown(pair)}")
        found.append((alpha, beta))
    if len(found) != n:
        raise ArgumentError(f"slopes has {len(found)} pairs for {n} activations")
    return found
