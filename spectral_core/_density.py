"""Estimate the distribution of all singular values by stochastic Lanczos quadrature.

Lanczos steps from a random start give a small matrix. Its eigenvalues, weighted by the squares of
their vectors' first elements, are the Gauss quadrature of the distribution that the start sees
(Golub and Welsch 1969; Lin, Saad and Yang 2016). The mean over random starts is unbiased. It needs
products alone, so a matrix that is too large for a factorization has a spectrum too.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

import numpy as np

from ._arrays import (
    Array,
    Namespace,
    array_namespace,
    cast,
    conj,
    constant,
    traits,
)
from ._certificate import Host
from ._interval import projections
from ._lanczos import as_matrices, scale_of
from ._layout import Layout
from ._power import adjoint_times_rows, start_vector, times_rows
from .errors import ShapeError, check_int

GRID = 128  # values at which a density is given
# The kernel's standard deviation is this many mean distances of nodes. With less, the nodes of
# single starts show as waves.
_WIDTH = 1.25


class SpectralDensity(NamedTuple):
    """Result of `spectral_density`."""

    sigma: Host
    weight: Host
    values: Host
    density: Host


def spectral_density(
    W: Array,
    *,
    layout: Layout | str | None = None,
    n_probes: int = 8,
    n_steps: int = 64,
    seed: int = 0,
) -> SpectralDensity:
    """Estimate the distribution of the singular values of a matrix from products with it.

    The method is stochastic Lanczos quadrature with full reorthogonalization. It needs ``n_steps``
    products of a block of ``n_probes`` vectors with W and Wᴴ. A decomposition needs some four times
    the number of rows, and the memory for its factors.

    Parameters
    ----------
    W : array, or sequence of sequences of numbers
        A matrix, or a tensor that ``layout`` makes one matrix of. float16 and bfloat16 are computed
        in float32.
    layout : Layout or str, optional
        The meaning of the axes. It is needed for three axes and more.
    n_probes : int
        Number of random starts. The error of a share falls with the root of it, and with the root
        of the shorter side.
    n_steps : int
        Number of Lanczos steps, at most the shorter side. Details of less than σ₁/n_steps blur.
    seed : int
        Seed of the starts.

    Returns
    -------
    sigma : NumPy array, shape (k,)
        Nodes in rising order, for k at most ``n_probes`` · ``n_steps``.
    weight : NumPy array, shape (k,)
        Their shares, with sum 1: ``weight[sigma > x].sum()`` estimates the share of the min(m, n)
        singular values that are larger than x.
    values : NumPy array, shape (128,)
        A grid from 0 to a little more than the largest node.
    density : NumPy array, shape (128,)
        The density there: the nodes are smoothed by a Gaussian with the standard deviation
        1.25·σ₁/n_steps, mirrored at zero. It has the integral 1.

    Raises
    ------
    ShapeError
        If W is not one matrix with no empty axis.
    DTypeError
        If W is not an array of numbers, or is sparse or masked.
    ArgumentError
        If ``n_probes`` or ``n_steps`` is less than 1, or ``seed`` is out of its range.

    Notes
    -----
    The results are NaN where W is not finite. The function waits for the device at every step, so
    it does not run inside ``jax.jit``. The starts need n_probes·n_steps vectors of memory.

    Examples
    --------
    A third of the singular values are 3, and the others 1:

    >>> import numpy as np
    >>> import spectral_core as sc
    >>> W = np.diag([3.0, 1.0, 1.0] * 300)
    >>> found = sc.spectral_density(W)
    >>> bool(abs(found.weight[found.sigma > 2].sum() - 1 / 3) < 0.02)
    True
    """
    W = constant(as_matrices(W, layout))
    xp = array_namespace(W)
    kind = traits(W, xp, "W")
    W = cast(W, kind.iteration_dtype, xp)
    n_probes, n_steps = check_int(n_probes, "n_probes"), check_int(n_steps, "n_steps")
    if W.ndim != 2:
        raise ShapeError(
            f"W is a stack of shape {tuple(W.shape)}: call the function for each matrix"
        )
    largest = float(xp.max(xp.abs(W)))
    if not isfinite(largest):
        nan = np.full(1, np.nan)
        return SpectralDensity(nan, nan, np.full(GRID, np.nan), np.full(GRID, np.nan))
    scale = scale_of(W, largest, xp) if largest > 0 else 1.0
    W = W / scale
    if W.shape[0] < W.shape[1]:
        W = conj(xp.matrix_transpose(W), xp)
    n = W.shape[1]
    starts = start_vector((n_probes, n), W, seed=seed)
    sigma, weight = quadrature(
        lambda X: adjoint_times_rows(W, times_rows(W, X, xp), xp), starts, min(n_steps, n), xp
    )
    values, density = smoothed(sigma, weight, n_steps)
    return SpectralDensity(sigma * scale, weight, values * scale, density / scale)


def quadrature(
    gram: Callable[[Array], Array], starts: Array, n_steps: int, xp: Namespace
) -> tuple[Host, Host]:
    """Return nodes and weights of the distribution of the roots of an operator's eigenvalues.

    ``gram`` applies WᴴW to each row, and the rows of ``starts`` have the length 1.
    """
    nodes, weights = zip(*quadratures(gram, starts, n_steps, xp), strict=True)
    sigma, weight = np.sqrt(np.maximum(np.concatenate(nodes), 0.0)), np.concatenate(weights)
    order = np.argsort(sigma, kind="stable")
    return sigma[order], weight[order] / weight.sum()


def quadratures(
    gram: Callable[[Array], Array], starts: Array, n_steps: int, xp: Namespace
) -> list[tuple[Host, Host]]:
    """Return the nodes, which rise, and the weights of each start's Gauss quadrature.

    The measure of a unit vector y with respect to a symmetric operator has the mass |⟨x, y⟩|² at
    the eigenvalue of each eigenvector x. The eigenvalues of the operator in the Krylov space of y
    are the nodes, and the squares of its eigenvectors' first elements are the weights.
    """
    found = []
    for T in projections(gram, starts, n_steps, xp):
        values, vectors = np.linalg.eigh(T, UPLO="U")
        found.append((values, np.abs(vectors[0]) ** 2))
    return found


def smoothed(sigma: Host, weight: Host, n_steps: int) -> tuple[Host, Host]:
    """Return a grid and the density of weighted nodes on it."""
    top = float(sigma.max()) or 1.0
    width = _WIDTH * top / n_steps
    values = np.linspace(0.0, top + 3 * width, GRID)
    # What would be below zero is mirrored: no singular value is negative.
    steps = [(values[:, None] - sign * sigma) / width for sign in (1, -1)]
    kernel = sum(np.exp(-0.5 * step * step) for step in steps)
    density = np.asarray(kernel @ weight)
    return values, density / np.trapezoid(density, values)
