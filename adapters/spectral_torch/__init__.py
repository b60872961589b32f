"""Spectral norm regularization for PyTorch: an optimizer hook over `spectral_core`."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("spectral_torch needs PyTorch: pip install spectral-core[torch]") from error

from spectral_core import Layout, __version__

from ._constraint import SpectralNormConstraint
from ._lipschitz import lipschitz_bound
from ._regularizer import SpectralNormRegularizer
from ._watch import Watch

__all__ = [
    "Layout",
    "SpectralNormConstraint",
    "SpectralNormRegularizer",
    "Watch",
    "__version__",
    "lipschitz_bound",
]
