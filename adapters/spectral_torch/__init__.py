"""Spectral norm regularization for PyTorch: an optimizer hook over `spectral_core`."""

from spectral_core import Layout

from .constraint import SpectralNormConstraint
from .regularizer import SpectralNormRegularizer

__all__ = ["Layout", "SpectralNormConstraint", "SpectralNormRegularizer"]
