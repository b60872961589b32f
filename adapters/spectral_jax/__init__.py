"""Regularize and bound spectral norms in JAX: optax transformations around `spectral_core`."""

try:
    import jax as _jax
    import optax as _optax
except ImportError as error:
    raise ImportError("spectral_jax needs JAX and optax: pip install spectral-core[jax]") from error

from spectral_core import Layout, __version__

from ._constrain import constrain_spectral_norm
from ._engine import XlaEngine
from ._foreign import NumbaXlaEngine
from ._lipschitz import lipschitz_bound
from ._regularize import (
    SpectralBoundState,
    SpectralNormState,
    add_spectral_norm_regularization,
    sigmas,
)
from ._report import penalty, summary
from ._watch import Watch

del _jax, _optax

__all__ = [
    "Layout",
    "NumbaXlaEngine",
    "SpectralBoundState",
    "SpectralNormState",
    "Watch",
    "XlaEngine",
    "__version__",
    "add_spectral_norm_regularization",
    "constrain_spectral_norm",
    "lipschitz_bound",
    "penalty",
    "sigmas",
    "summary",
]
