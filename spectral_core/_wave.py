"""Follow the largest singular value of a convolution's symbol from step to step.

A convolution's norm as a map of images is the largest singular value of its symbol over all
frequencies ω: K̂(ω) = Σ_t K_t·exp(−iω·p_t), where p_t is the place of tap t. With a stride, p_t
counts whole strides, and taps between two strides belong to classes with amplitudes of their own.

An iteration needs of K̂ only products of the flattened matrix W with a few rows. For amplitudes b,
the wave w = b·exp(−iω·p_t) is a pair of rows of W's inputs, its real and its imaginary part, and
K̂(ω)b = Ww. Back, K̂(ω)ᴴa is Wᴴa projected on waves of this frequency. So W is read twice in an
iteration, as for the norm of W itself.

One iteration with F waves:

1. The real and imaginary parts of all Ww span a subspace of the outputs. Q is its basis.
2. Z = QᵀW gives K̂(ω)ᴴQc for *every* ω and every c. Its squared length is cᴴG(ω)c, where G(ω) is a
   small matrix whose elements are trigonometric polynomials in ω.
3. Each wave gets the largest c at its ω, and a Newton step in ω. All waves share one subspace,
   because the singular vectors at near frequencies are similar.
4. The waves are sorted. Those that stay the last go on to other frequencies: a penalty makes the
   peaks of a symbol equal, and so the largest one can be anywhere.

The state of this iteration is b and ω of each wave, beside each other in one row. A run continues
bit for bit from these rows, and no counter is needed: an explorer that does not grow any more has
found the peak near it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf, pi
from typing import Any, NamedTuple, TypeAlias

from array_api_compat import is_jax_namespace

from ._arrays import Array, Namespace, Traits, cast, device_of, squared
from ._geometry import Taps, Wave, host_taps
from ._operator import thin_qr
from ._power import Triplet

_EXPLORERS = 2  # one of so many waves goes on to other frequencies
_PATIENCE = 8  # an explorer goes on if so much more of its growth would not make it the largest
_POWERS = 4  # products with G in an iteration: they read no weight
_REACH = 0.5  # the longest step in ω along an axis
_NEAR, _ALIKE = 0.05, 0.8  # where two waves count as one: frequencies, and squared cosine


Products: TypeAlias = tuple[Callable[[Array], Array], Callable[[Array], Array]]
"""``times(rows)`` and ``adjoint_times(rows)`` of a matrix."""


class Basis(NamedTuple):
    """What one reading of W tells of the waves."""

    Q: Array  # (*stack, m, k): orthonormal columns
    coordinates: Array  # (*stack, k, 2F): of the waves' images in Q, divided by ``scale``
    Z: Array  # (*stack, k·T, i): QᵀW, tap by tap, divided by ``scale``
    gram: Array  # (*stack, k·T, k·T): ZZᵀ
    scale: Array  # (*stack, 1, 1): see `_scale_of`


class Climb(NamedTuple):
    """The waves after an iteration, the best one first."""

    sigma: Array  # (*stack, F), divided by the scale of the basis
    C: Array  # (*stack, 2F, k): real and imaginary parts of each c
    frequencies: Array  # (*stack, F, d), of the next iteration
    spread: Array  # (*stack, F, 2R, 2T): see `spread_of`, divided by sigma


def first_rows(V: Array, wave: Wave, xp: Namespace) -> Array:
    """Return random rows with frequencies that are spread evenly."""
    taps = taps_of(wave, V, xp)
    d, F = taps.places.shape[-1], V.shape[-2]
    ω = taps.leap * xp.arange(1, F + 1, dtype=V.dtype, device=device_of(V, xp))[:, None]
    ω = xp.broadcast_to(xp.remainder(ω, 2 * pi), (*V.shape[:-1], d))
    return xp.concat([V[..., :-d], ω], axis=-1)


def taps_of(wave: Wave, like: Array, xp: Namespace) -> Taps:
    """Return the places of the taps beside an array, kept: to make them copies to the device."""
    if is_jax_namespace(xp):  # in a trace, what is kept would outlive it
        return Taps(*(x.astype(like.dtype) for x in host_taps(wave)))
    return _kept_taps(wave, like.dtype, device_of(like, xp), xp)


@lru_cache(maxsize=256)
def _kept_taps(wave: Wave, dtype: Any, device: Any, xp: Namespace) -> Taps:
    return Taps(*(xp.asarray(x.astype(float), dtype=dtype, device=device) for x in host_taps(wave)))


def iterate_waves(
    products: Sequence[Products],
    Vs: Sequence[Array],
    wave: Wave,
    n_iter: int,
    kind: Traits,
    xp: Namespace,
    fresh: Sequence[Array | float],
) -> list[Triplet]:
    """Iterate the waves of convolutions with the same taps.

    All arithmetic between the two readings of the weights and the new waves is on arrays whose
    shapes do not depend on a weight's size. So it runs once for all weights.

    Parameters
    ----------
    products : sequence of (times, adjoint_times)
        The two products of each flattened matrix, as for `iterate_rows`, on rows in the order of
        `as_matrix`'s columns.
    Vs : sequence of array, shape ``wave.rows(plan)``
        The rows of the step before.
    wave : Wave
    n_iter : int
        Number of iterations, at least 1.
    kind : Traits
    xp : namespace
    fresh : sequence of array, shape (V.shape[-1],)
        Added to the amplitudes before the first product: see `fresh_direction`.

    Returns
    -------
    list of Triplet
        u is complex: sigma·u is the image of the first wave of V.
    """
    taps, d = taps_of(wave, Vs[0], xp), len(wave.sizes)
    for _ in range(n_iter):
        ω = xp.stack([V[..., -d:] for V in Vs])
        spreads = spread_of(ω, taps, xp)
        bases = []
        for i, ((times, adjoint_times), V, start) in enumerate(
            zip(products, Vs, fresh, strict=True)
        ):
            rows = rows_of(V + start, spreads[i, ...], d, xp)
            bases.append(read(times, adjoint_times, rows, taps, kind, xp))
        coordinates, gram, scale = (
            xp.stack([getattr(basis, field) for basis in bases])
            for field in ("coordinates", "gram", "scale")
        )
        found = climb(ω, coordinates, gram, taps, kind, xp)
        each = [Climb(*(x[i, ...] for x in found)) for i in range(len(bases))]
        news = [turned(one, basis.Q, basis.Z, xp) for one, basis in zip(each, bases, strict=True)]
        sigma = found.sigma[..., 0] * scale[..., 0, 0]
        usable = ((sigma > 0) & (sigma < inf))[..., None, None]
        Vs = [xp.where(usable[i, ...], rows, Vs[i]) for i, (rows, _) in enumerate(news)]
        fresh = [0.0] * len(Vs)
    wide = xp.complex64 if kind.eps > 1e-9 else xp.complex128
    triplets = []
    for i, (_, parts) in enumerate(news):
        re, im = (cast(parts[..., part], wide, xp) for part in (0, 1))
        triplets.append(Triplet(sigma[i, ...], re + im * 1j, Vs[i]))
    return triplets


def spread_of(ω: Array, taps: Taps, xp: Namespace) -> Array:
    """Return matrices (*stack, F, 2R, 2T) that spread the amplitudes of R classes over the taps.

    The columns are the real, then the imaginary part of b·exp(−iω·p_t). The transpose sums taps to
    amplitudes: it is the projection on waves.
    """
    angle = xp.matmul(ω, xp.matrix_transpose(taps.places))[..., None, :]
    cos, sin = taps.classes * xp.cos(angle), taps.classes * xp.sin(angle)
    upper, lower = xp.concat([cos, -sin], axis=-1), xp.concat([sin, cos], axis=-1)
    return xp.concat([upper, lower], axis=-2)


def rows_of(V: Array, spread: Array, d: int, xp: Namespace) -> Array:
    """Return the real and imaginary parts of the waves of d axes, (*stack, 2F, n)."""
    *stack, F, length = V.shape
    classes, taps = spread.shape[-2:]
    T, s, n_inputs = taps // 2, len(stack), (length - d) // classes
    b = xp.reshape(V[..., :-d], (*stack, F, 1, classes, n_inputs))
    each = xp.reshape(spread, (*stack, F, classes, 2, T))
    each = xp.permute_dims(each, (*range(s + 1), s + 2, s + 1, s + 3))
    rows = xp.matmul(xp.matrix_transpose(b), each)
    return xp.reshape(rows, (*stack, 2 * F, n_inputs * T))


def read(
    times: Callable[[Array], Array],
    adjoint_times: Callable[[Array], Array],
    rows: Array,
    taps: Taps,
    kind: Traits,
    xp: Namespace,
) -> Basis:
    """Read W twice: the first two of the four parts of an iteration."""
    images = xp.matrix_transpose(times(rows))
    *stack, m, count = images.shape
    if m > count:
        Q, coordinates = thin_qr(images, xp)
    else:  # the waves would span all outputs
        eye = xp.eye(m, dtype=images.dtype, device=device_of(images, xp))
        Q, coordinates = xp.broadcast_to(eye, (*stack, m, m)), images
    Z = adjoint_times(xp.matrix_transpose(Q))
    scale = _scale_of(Z, kind, xp)
    Z, coordinates = Z / scale, coordinates / scale
    k, T = Z.shape[-2], taps.places.shape[0]
    Z = xp.matrix_transpose(xp.reshape(Z, (*stack, k, -1, T)))
    Z = xp.reshape(Z, (*stack, k * T, -1))
    return Basis(Q, coordinates, Z, xp.matmul(Z, xp.matrix_transpose(Z)), scale)


def _scale_of(X: Array, kind: Traits, xp: Namespace) -> Array:
    """Return 1, or the largest element of matrices whose squares would leave the range of numbers.

    Rounding is then that of one more division. Usual weights keep every bit.
    """
    largest = xp.max(xp.abs(X), axis=(-2, -1), keepdims=True)
    one = xp.ones_like(largest)
    # float32 has an exponent of 8 bits: the fourth root leaves room for sums of many squares.
    usual = (largest > kind.tiny**0.25) & (largest < kind.tiny**-0.25)
    return xp.where(usual | (largest == 0), one, xp.maximum(largest, kind.tiny * one))


def climb(
    ω: Array, coordinates: Array, gram: Array, taps: Taps, kind: Traits, xp: Namespace
) -> Climb:
    """Improve every wave within the basis, and sort the waves: the third part.

    A complex c is a row of its real and its imaginary part here, and G a pair of real matrices:
    small complex products are slow, and some devices have none.
    """
    *stack, k, rows = coordinates.shape
    F = rows // 2
    images = xp.reshape(xp.matrix_transpose(coordinates), (*stack, F, 2 * k))
    R = _polynomials(gram, k, taps, xp)
    largest = xp.max(xp.sum(R[..., :: k + 1], axis=-1), axis=-1)[..., None]  # at Δ = 0
    size = largest + kind.tiny
    R = R / size[..., None]
    # Each wave also looks at a frequency far away, where an explorer may go.
    places = xp.arange(1, F + 1, dtype=ω.dtype, device=device_of(ω, xp))
    far = ω + taps.leap * places[:, None]
    G = _gram(xp.concat([ω, far], axis=-2), R, taps, k, xp)
    # A little of all directions: rows that are zero would stay so.
    c = _unit(_unit(images, kind, xp) + kind.eps, kind, xp)
    c = xp.concat([c, c], axis=-2)
    for _ in range(_POWERS):
        c = _applied(G, c, xp)
    c = _unit(c, kind, xp)
    hopes = xp.sum(c * _applied(G, c, xp), axis=-1, keepdims=True)
    others = xp.concat([far, c[..., F:, :], hopes[..., F:, :]], axis=-1)
    c = c[..., :F, :]
    ω = _newton(ω, c, R, taps, kind, xp)
    G = _gram(ω, R, taps, k, xp)
    c = _unit(_applied(G, c, xp), kind, xp)
    value = xp.sum(c * _applied(G, c, xp), axis=-1)
    before = xp.sum(squared(images, xp), axis=-1) / size + kind.tiny
    ω, c, value = _sorted(ω, c, value, before, others, xp)
    # Rounding makes a zero negative; the best wave is not changed.
    least = kind.eps * xp.max(value, axis=-1, keepdims=True)
    value = xp.maximum(value, xp.maximum(least, xp.zeros_like(least)))
    sigma = xp.sqrt(value * size)
    spread = spread_of(ω, taps, xp) / (sigma + kind.tiny)[..., None, None]
    return Climb(sigma, xp.reshape(c, (*stack, rows, k)), ω, spread)


def turned(found: Climb, Q: Array, Z: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return the rows of the next state, and u as (*stack, m, 2): the last part.

    The amplitudes are K̂(ω)ᴴQc divided by σ. An explorer that leaves gets those of its next ω.
    """
    *stack, F, _, taps = found.spread.shape
    k, inputs = found.C.shape[-1], Z.shape[-1]
    X = xp.matmul(found.C, xp.reshape(Z, (*stack, k, -1)))
    b = xp.matmul(found.spread, xp.reshape(X, (*stack, F, taps, inputs)))
    rows = xp.concat([xp.reshape(b, (*stack, F, -1)), found.frequencies], axis=-1)
    return rows, xp.matmul(Q, xp.matrix_transpose(found.C[..., :2, :]))


def parts_of(triplet: Triplet, wave: Wave | None, xp: Namespace) -> tuple[Triplet, ...]:
    """Return triplets of real vectors, the sum of whose terms is the term of this one.

    The derivative of sigma by K is the real part of conj(a)·w: two terms of rank one.
    """
    if wave is None:
        return (triplet,)
    sigma, u, _ = triplet
    rows = wave_rows(triplet, wave, xp)
    return (
        Triplet(sigma, xp.real(u), rows[..., :1, :]),
        Triplet(sigma, xp.imag(u), rows[..., 1:, :]),
    )


def wave_rows(triplet: Triplet, wave: Wave, xp: Namespace) -> Array:
    """Return the real and the imaginary part of the best wave, (*stack, 2, n)."""
    best, d = triplet.V[..., :1, :], len(wave.sizes)
    return rows_of(best, spread_of(best[..., -d:], taps_of(wave, best, xp), xp), d, xp)


def _polynomials(gram: Array, k: int, taps: Taps, xp: Namespace) -> Array:
    """Return R (*stack, D, k·k): G(ω) is the sum of R_Δ·exp(iω·Δ)."""
    *stack, _, _ = gram.shape
    T, s = taps.places.shape[0], len(stack)
    gram = xp.reshape(gram, (*stack, k, T, k, T))
    gram = xp.permute_dims(gram, (*range(s), s, s + 2, s + 1, s + 3))
    found = xp.matmul(xp.reshape(gram, (*stack, k * k, T * T)), taps.pairs)
    return xp.matrix_transpose(found)


def _gram(ω: Array, R: Array, taps: Taps, k: int, xp: Namespace) -> Array:
    """Return A above B, (*stack, F, 2k, k), of G(ω) = A + iB at each frequency."""
    angle = xp.matmul(ω, xp.matrix_transpose(taps.steps))
    both = xp.concat([xp.cos(angle), xp.sin(angle)], axis=-1)
    both = xp.reshape(both, (*ω.shape[:-2], 2 * ω.shape[-2], angle.shape[-1]))
    return xp.reshape(xp.matmul(both, R), (*ω.shape[:-1], 2 * k, k))


def _newton(ω: Array, c: Array, R: Array, taps: Taps, kind: Traits, xp: Namespace) -> Array:
    """Return ω after one Newton step up cᴴG(ω)c with c held, or as it was where that is a loss."""
    *shape, d = ω.shape
    k = c.shape[-1] // 2
    re, im = c[..., :k], c[..., k:]
    pairs = xp.matrix_transpose(R)
    flat = (*shape, k * k)

    def contracted(x: Array, y: Array) -> Array:
        return xp.reshape(x[..., :, None] * y[..., None, :], flat)

    real = xp.matmul(contracted(re, re) + contracted(im, im), pairs)
    imag = xp.matmul(contracted(re, im) - contracted(im, re), pairs)

    def polynomial(ω: Array) -> tuple[Array, Array]:
        angle = xp.matmul(ω, xp.matrix_transpose(taps.steps))
        cos, sin = xp.cos(angle), xp.sin(angle)
        return real * cos - imag * sin, real * sin + imag * cos

    here, turned_here = polynomial(ω)
    slope = -xp.matmul(turned_here, taps.steps)
    products = xp.reshape(taps.steps[:, :, None] * taps.steps[:, None, :], (-1, d * d))
    curve = xp.matmul(here, products)  # minus the second derivatives
    moved = ω + xp.clip(_solved(curve, slope, xp), -_REACH, _REACH)
    there, _ = polynomial(moved)
    before, after = (xp.sum(x, axis=-1, keepdims=True) for x in (here, there))
    # Near the peak the gain is less than the rounding of a sum, but the step is still right.
    return xp.where(after >= before * (1 - 16 * kind.eps), moved, ω)


def _solved(matrix: Array, right: Array, xp: Namespace) -> Array:
    """Solve systems of 1 to 3 equations, or return a step uphill where one is not definite.

    An elimination without a library: many of those wait for the device, to see if it succeeded.
    """
    d = right.shape[-1]
    bound = xp.sum(xp.abs(matrix), axis=-1)
    a = [[matrix[..., i * d + j] for j in range(d)] for i in range(d)]
    b = [right[..., i] for i in range(d)]
    definite = bound > 0
    for i in range(d):
        definite = definite & (a[i][i] > 1e-3 * bound)
        a[i][i] = xp.where(definite, a[i][i], xp.ones_like(bound))
        for row in range(i + 1, d):
            ratio = a[row][i] / a[i][i]
            a[row] = [x - ratio * y for x, y in zip(a[row], a[i], strict=True)]
            b[row] = b[row] - ratio * b[i]
    for i in reversed(range(d)):
        for j in range(i + 1, d):
            b[i] = b[i] - a[i][j] * b[j]
        b[i] = b[i] / a[i][i]
    uphill = right / xp.where(bound > 0, bound, xp.ones_like(bound))[..., None]
    return xp.where(definite[..., None], xp.stack(b, axis=-1), uphill)


def _sorted(
    ω: Array, c: Array, value: Array, before: Array, others: Array, xp: Namespace
) -> tuple[Array, Array, Array]:
    """Return the waves, the best one first, and twins last; explorers that are done go on.

    They become those waves of ``others``, (ω, c, value) each, that have the largest values.
    """
    F, d = ω.shape[-2:]
    twin = _twins(ω, c, value, xp)
    places = xp.arange(F, device=device_of(value, xp))
    best = xp.max(value, axis=-1, keepdims=True)
    done = xp.astype((value * (value / before) ** _PATIENCE <= best) | twin, value.dtype)
    waves = xp.concat([ω, c, value[..., None], done[..., None]], axis=-1)

    def ordered(rows: Array, key: Array, first: int) -> Array:
        """Return the rows with the largest keys from the place ``first`` on."""
        order = xp.roll(xp.argsort(key, axis=-1, descending=True), first, axis=-1)
        return xp.matmul(xp.astype(order[..., None] == places, rows.dtype), rows)

    explorers = F - F // _EXPLORERS
    waves = ordered(waves, xp.where(twin, -value, value), 0)
    # An explorer that has found the peak near it, and is still among the last.
    leaves = (waves[..., -1:] > 0.5) & (places >= explorers)[:, None]
    waves = xp.where(leaves, ordered(others, others[..., -1], explorers), waves[..., :-1])
    return xp.remainder(waves[..., :d], 2 * pi), waves[..., d:-1], waves[..., -1]


def _twins(ω: Array, c: Array, value: Array, xp: Namespace) -> Array:
    """Return True for a wave that is another one with a larger value, or an earlier equal one.

    A wave at −ω with the conjugate of c is the same: the kernel is real.
    """
    F, k = value.shape[-1], c.shape[-1] // 2
    re, im = c[..., :k], c[..., k:]
    columns = xp.matrix_transpose(c), xp.matrix_transpose(xp.concat([im, -re], axis=-1))
    mirrored = xp.concat([re, -im], axis=-1)
    found = value[..., None] < 0
    for sign, one in ((1.0, c), (-1.0, mirrored)):
        difference = ω[..., :, None, :] - sign * ω[..., None, :, :]
        near = xp.sum(1 - xp.cos(difference), axis=-1) < _NEAR
        alike = sum(squared(xp.matmul(one, column), xp) for column in columns) > _ALIKE
        found = found | (near & alike)
    places = xp.arange(F, device=device_of(value, xp))
    first = places[None, :] < places[:, None]
    here, other = value[..., :, None], value[..., None, :]
    return xp.any(found & ((other > here) | ((other == here) & first)), axis=-1)


def _applied(G: Array, c: Array, xp: Namespace) -> Array:
    """Return Gc, for c as rows of real and imaginary parts (*stack, F, 2k)."""
    k = G.shape[-1]
    parts = xp.matrix_transpose(xp.reshape(c, (*c.shape[:-1], 2, k)))
    found = xp.matmul(G, parts)
    A, B = found[..., :k, :], found[..., k:, :]
    return xp.concat([A[..., 0] - B[..., 1], A[..., 1] + B[..., 0]], axis=-1)


def _unit(c: Array, kind: Traits, xp: Namespace) -> Array:
    """Return unit vectors over the last axis; zeros stay zero."""
    return c / xp.sqrt(xp.sum(squared(c, xp), axis=-1, keepdims=True) + kind.tiny)
