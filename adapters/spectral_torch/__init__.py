"""Spectral norm regularization for PyTorch: an optimizer hook over `spectral_core`."""

from spectral_core import Layout

from .constraint import SpectralNormConstraint
from .regularizer import SpectralNormRegularizer
from .watch import Watch

__all__ = ["Layout", "SpectralNormConstraint", "SpectralNormRegularizer", "Watch"]
