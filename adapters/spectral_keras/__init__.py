"""Spectral norm regularization for Keras 3, on PyTorch and JAX: an optimizer around another."""

try:
    import keras as _keras
except ImportError as error:
    raise ImportError("spectral_keras needs Keras: pip install spectral-core[keras]") from error

from spectral_core import Layout, __version__

from ._optimizer import SpectralNormRegularizer

del _keras

__all__ = ["Layout", "SpectralNormRegularizer", "__version__"]
