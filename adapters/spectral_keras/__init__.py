"""Regularize spectral norms in Keras 3, on PyTorch and JAX: an optimizer around another."""

from importlib.util import find_spec

# Not by importing it: Keras also fails where the backend that it is set to is missing, and its own
# error says so.
if find_spec("keras") is None:
    raise ImportError("spectral_keras needs Keras: pip install spectral-core[keras]")

from spectral_core import Layout, SpectralWarning, __version__

from ._callbacks import SpectralNormLogger
from ._constraint import SpectralNormConstraint
from ._kernel import SpectralNorm, SpectralNormBound
from ._optimizer import SpectralNormRegularizer

__all__ = [
    "Layout",
    "SpectralNorm",
    "SpectralNormBound",
    "SpectralNormConstraint",
    "SpectralNormLogger",
    "SpectralNormRegularizer",
    "SpectralWarning",
    "__version__",
]
