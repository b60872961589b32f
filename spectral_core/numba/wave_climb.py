"""The part of an iteration with waves that reads no weight, compiled: see `climb` of the core.

Everything here is in float64, whatever the dtype of a weight. The arrays are small: their sizes
depend on the number of waves and on the taps alone.

G(ω) is the sum of R_Δ·exp(iω·Δ) over the differences Δ between taps, and R_−Δ is the transpose of
R_Δ. So half of the differences suffice, the first of which is 0. Of R_Δ + R_Δᵀ and of R_Δ − R_Δᵀ
the lower triangles are kept, row by row.
"""

import numpy as np

# What is kept on disk is compiled anew only where this file has changed: who changes one of these
# touches this file too.
from .kernels import _compiled, _inverse

# As in the core's `_wave`. Not imported, for the same reason.
EXPLORERS, PATIENCE, POWERS = 2, 8, 4
REACH, NEAR, ALIKE = 0.5, 0.05, 0.8


@_compiled
def _unit(x, extra):
    """Add ``extra`` to the elements of x, which become those of a unit vector."""
    square = 0.0
    for j in range(x.size):
        x[j] += extra
        square += x[j] * x[j]
    inverse = _inverse(np.sqrt(square))
    for j in range(x.size):
        x[j] *= inverse


@_compiled
def _dot(x, y):
    """Return the inner product."""
    total = 0.0
    for j in range(x.size):
        total += x[j] * y[j]
    return total


@_compiled
def _phases(ω, steps, powers, out):
    """Store the cosines and the sines of the angles of some places or differences.

    They are products of powers of exp(iω_j): that is faster than a cosine for each.
    """
    d = ω.size
    for j in range(d):
        re, im, p, q = powers[2 * j], powers[2 * j + 1], np.cos(ω[j]), np.sin(ω[j])
        re[0], im[0] = 1.0, 0.0
        for h in range(1, re.size):
            re[h], im[h] = re[h - 1] * p - im[h - 1] * q, re[h - 1] * q + im[h - 1] * p
    for h in range(steps.shape[0]):
        x, y = 1.0, 0.0
        for j in range(d):
            step = steps[h, j]
            p, q = powers[2 * j, abs(step)], powers[2 * j + 1, abs(step)]
            q = q if step >= 0 else -q
            x, y = x * p - y * q, x * q + y * p
        out[0, h], out[1, h] = x, y


@_compiled
def _weighted(X, weights, out):
    """Store the sum of the rows of X from row 1 on, each times its weight."""
    for p in range(out.size):
        out[p] = 0.0
    h = 1
    while h + 4 <= X.shape[0]:
        a, b, c, d = X[h], X[h + 1], X[h + 2], X[h + 3]
        p, q, r, s = weights[h], weights[h + 1], weights[h + 2], weights[h + 3]
        for j in range(out.size):
            out[j] += p * a[j] + q * b[j] + r * c[j] + s * d[j]
        h += 4
    while h < X.shape[0]:
        a, p = X[h], weights[h]
        for j in range(out.size):
            out[j] += p * a[j]
        h += 1


@_compiled
def _gram_at(ω, R, steps, powers, phases, halves, G):
    """Store the real part A of G(ω) above its imaginary part B in G.

    R holds the triangles of the sums, then those of the differences.
    """
    count, k = steps.shape[0], G.shape[1]
    _phases(ω, steps, powers, phases)
    _weighted(R[:count], phases[0], halves[0])
    _weighted(R[count:], phases[1], halves[1])
    p = 0
    for a in range(k):
        for b in range(a + 1):
            G[a, b] = G[b, a] = halves[0, p] + R[0, p]
            G[k + a, b], G[k + b, a] = halves[1, p], -halves[1, p]
            p += 1


@_compiled
def _apply(G, x, y):
    """Store Gx in y: rows of real parts, then of imaginary parts. B is antisymmetric."""
    k = G.shape[1]
    re, im = y[:k], y[k:]
    for i in range(k):
        re[i] = im[i] = 0.0
    for j in range(k):
        A, B, p, q = G[j], G[k + j], x[j], x[k + j]
        for i in range(k):
            re[i] += A[i] * p + B[i] * q
            im[i] += A[i] * q - B[i] * p


@_compiled
def _raise_by_powers(G, c, room):
    """Make c the unit vector of G⁴c, and return its quotient."""
    for _ in range(POWERS // 2):
        _apply(G, c, room)
        _apply(G, room, c)
    _unit(c, 0.0)
    _apply(G, c, room)
    return _dot(c, room)


@_compiled
def _contracted(c, R, count, halves, out):
    """Store cᴴR_Δc of each difference: the real, then the imaginary parts."""
    k, p = c.size // 2, 0
    for a in range(k):
        for b in range(a + 1):
            twice = 1.0 if a > b else 0.5
            halves[0, p] = twice * (c[a] * c[b] + c[k + a] * c[k + b])
            halves[1, p] = c[a] * c[k + b] - c[k + a] * c[b]
            p += 1
    for h in range(count):
        out[0, h] = _dot(R[h], halves[0])
        out[1, h] = _dot(R[count + h], halves[1])
    # The one at Δ = 0 is its own transpose, and so is not a sum of two.
    out[0, 0] *= 2.0


@_compiled
def _value(ω, quotients, steps, powers, phases):
    """Return cᴴG(ω)c."""
    _phases(ω, steps, powers, phases)
    total = quotients[0, 0]
    for h in range(1, steps.shape[0]):
        total += 2.0 * (quotients[0, h] * phases[0, h] - quotients[1, h] * phases[1, h])
    return total


@_compiled
def _slopes(quotients, steps, phases, system):
    """Store minus the second derivatives beside the first ones: d equations."""
    d = system.shape[0]
    for i in range(d):
        for j in range(d + 1):
            system[i, j] = 0.0
    for h in range(1, steps.shape[0]):
        cos, sin, re, im = phases[0, h], phases[1, h], quotients[0, h], quotients[1, h]
        here, turned = 2.0 * (re * cos - im * sin), 2.0 * (re * sin + im * cos)
        for i in range(d):
            system[i, d] -= turned * steps[h, i]
            for j in range(d):
                system[i, j] += here * steps[h, i] * steps[h, j]


@_compiled
def _solve(system, out):
    """Solve the equations, or store a step uphill where they are not definite."""
    d, bound = out.size, 0.0
    for i in range(d):
        for j in range(d):
            bound += abs(system[i, j])
    for i in range(d):
        out[i] = system[i, d] / (bound if bound > 0.0 else 1.0)
    for i in range(d):
        if not system[i, i] > 1e-3 * bound:
            return
        for row in range(i + 1, d):
            ratio = system[row, i] / system[i, i]
            for j in range(i, d + 1):
                system[row, j] -= ratio * system[i, j]
    for i in range(d - 1, -1, -1):
        for j in range(i + 1, d):
            system[i, d] -= system[i, j] * out[j]
        out[i] = system[i, d] / system[i, i]


@_compiled
def _newton(ω, c, R, steps, powers, phases, halves, quotients, system, moved, eps):
    """Take one Newton step in ω up cᴴG(ω)c with c held, unless it is a loss."""
    _contracted(c, R, steps.shape[0], halves, quotients)
    before = _value(ω, quotients, steps, powers, phases)
    _slopes(quotients, steps, phases, system)
    _solve(system, moved)
    for j in range(ω.size):
        moved[j] = ω[j] + min(max(moved[j], -REACH), REACH)
    if _value(moved, quotients, steps, powers, phases) >= before * (1.0 - 16.0 * eps):
        for j in range(ω.size):
            ω[j] = moved[j]


@_compiled
def _same(ω, c, a, b):
    """Return True if two waves are one: at the same frequency, or at its negative."""
    near = mirrored = 0.0
    for j in range(ω.shape[1]):
        near += 1.0 - np.cos(ω[a, j] - ω[b, j])
        mirrored += 1.0 - np.cos(ω[a, j] + ω[b, j])
    if near >= NEAR and mirrored >= NEAR:
        return False
    k = c.shape[1] // 2
    x, y, p, q = c[a, :k], c[a, k:], c[b, :k], c[b, k:]
    xp, yq, xq, yp = _dot(x, p), _dot(y, q), _dot(x, q), _dot(y, p)
    if near < NEAR and (xp + yq) ** 2 + (xq - yp) ** 2 > ALIKE:
        return True
    return mirrored < NEAR and (xp - yq) ** 2 + (xq + yp) ** 2 > ALIKE


@_compiled
def _order(keys, out):
    """Store the places of the keys, the largest first; of equal ones the earlier first."""
    for i in range(keys.size):
        place = i
        while place > 0 and not keys[out[place - 1]] >= keys[i]:
            out[place] = out[place - 1]
            place -= 1
        out[place] = i


@_compiled
def _is_twin(ω, c, value, a):
    """Return True if a wave is another one with a larger value, or an earlier equal one."""
    for b in range(value.size):
        larger = value[b] > value[a] or (value[b] == value[a] and b < a)
        if larger and _same(ω, c, a, b):
            return True
    return False


@_compiled
def _keep(to, a, found, b):
    """Store wave b of those found at the place a of the sorted waves."""
    (places, vectors, values), (ω, c, value) = to, found
    for j in range(ω.shape[1]):
        places[a, j] = np.mod(ω[b, j], 2.0 * np.pi)
    for j in range(c.shape[1]):
        vectors[a, j] = c[b, j]
    values[a] = value[b]


@_compiled(fastmath=False)
def _sort(near, far, before, keys, order, to):
    """Store the waves, the best one first; explorers that are done become waves of ``far``.

    All three are tuples of frequencies, vectors and values.
    """
    ω, c, value = near
    count, best = value.size, value.max()
    done = before  # each element is read before it is written
    for a in range(count):
        twin = _is_twin(ω, c, value, a)
        stays = value[a] * (value[a] / before[a]) ** PATIENCE > best
        keys[a], done[a] = -value[a] if twin else value[a], 0.0 if stays and not twin else 1.0
    _order(keys, order[0])
    _order(far[2], order[1])
    explorers = count - count // EXPLORERS
    for a in range(count):
        wave = order[0, a]
        if a >= explorers and done[wave] > 0.5:
            _keep(to, a, far, order[1, a - explorers])
        else:
            _keep(to, a, near, wave)


@_compiled(fastmath=False)
def _climb(near, far, to, images, R, steps, leap, room, order, eps):
    """Improve every wave within the basis, and sort the waves; return the size of their values.

    Parameters
    ----------
    near, far, to : (ω, c, value) each
        The waves, with the frequencies set; room for those far away, and for the result.
    images : (F, 2k)
        Coordinates of the waves' images.
    R : (2H, k(k + 1)/2)
        See above. It is divided by its size.
    steps : (H, d)
        The differences.
    leap : (d,)
        As in the core's `Taps`.
    room : tuple of arrays
    eps : float
        Of the dtype of the weight.
    """
    (ω, c, value), (places, others, hopes) = near, far
    powers, phases, halves, G, quotients, system, moved, vector, before, keys = room
    k, size = G.shape[1], 0.0
    for a in range(k):
        size += R[0, a * (a + 3) // 2]
    inverse = _inverse(size)
    for h in range(R.shape[0]):
        for p in range(R.shape[1]):
            R[h, p] *= inverse
    for f in range(value.size):
        square = 0.0
        for j in range(2 * k):
            c[f, j] = images[f, j]
            square += c[f, j] * c[f, j]
        before[f] = square * inverse + 1e-300
        _unit(c[f], 0.0)
        # A little of all directions: rows that are zero would stay so.
        _unit(c[f], eps)
        for j in range(2 * k):
            others[f, j] = c[f, j]
        # Each wave also looks at a frequency far away, where an explorer may go.
        for j in range(leap.size):
            places[f, j] = ω[f, j] + leap[j] * (f + 1)
        _gram_at(places[f], R, steps, powers, phases, halves, G)
        hopes[f] = _raise_by_powers(G, others[f], vector)
        _gram_at(ω[f], R, steps, powers, phases, halves, G)
        _raise_by_powers(G, c[f], vector)
        _newton(ω[f], c[f], R, steps, powers, phases, halves, quotients, system, moved, eps)
        _gram_at(ω[f], R, steps, powers, phases, halves, G)
        _apply(G, c[f], vector)
        for j in range(2 * k):
            c[f, j] = vector[j]
        _unit(c[f], 0.0)
        _apply(G, c[f], vector)
        value[f] = _dot(c[f], vector)
    _sort(near, far, before, keys, order, to)
    return size
