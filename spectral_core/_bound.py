"""The number that scales a weight to a largest spectral norm, after an iteration."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, NamedTuple

from ._arrays import Array, array_namespace
from ._validate import Factor, Number, check_factors, check_limit

# The codes of a `Bound`, beside the powers 1 and 2 of a `Slope`: kernels read one number.
AT_MOST, EXACTLY = 3, 4


class Bound(NamedTuple):
    """A spectral norm to scale a weight to: at most the target, or exactly."""

    target: Number
    code: int

    def scale(self, sigma: Array) -> Array:
        """Return the number that scales a matrix of this spectral norm."""
        return scale_to(sigma, self.target, normalize=self.code == EXACTLY)


def bounds_of(bound: Factor, normalize: bool, names: Mapping[str, Any]) -> dict[str, Bound]:
    """Return the bound of each name.

    Raises
    ------
    ArgumentError, NamesError
        If a bound is negative or not finite, or a name has none.
    """
    bounds = check_factors(bound, names, "bound")
    return {name: Bound(bounds[name], EXACTLY if normalize else AT_MOST) for name in names}


def scale_to(sigma: Array, bound: Number, *, normalize: bool = False) -> Array:
    """Return the number that scales a matrix to a spectral norm of at most the bound.

    Parameters
    ----------
    sigma : array, shape (...)
    bound : float or array of shape ()
    normalize : bool
        If True, smaller matrices are scaled up to the bound too.

    Returns
    -------
    array, shape (...)
        bound/σ. It is one where σ is small enough, zero or not finite.

    Raises
    ------
    ArgumentError
        If ``bound`` is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from spectral_core._bound import scale_to
    >>> scale_to(np.array([0.0, 0.5, 4.0]), 1.0)
    array([1.  , 1.  , 0.25])
    >>> scale_to(np.array([0.0, 0.5, 4.0]), 1.0, normalize=True)
    array([1.  , 2.  , 0.25])
    """
    xp = array_namespace(sigma)
    limit = check_limit(bound, "bound", sigma.dtype, xp)
    one = xp.ones_like(sigma)
    acts = (sigma > (0.0 if normalize else limit)) & (sigma < inf)
    return xp.where(acts, limit / xp.where(acts, sigma, one), one)
