"""Spectral norm regularization for Keras 3, on PyTorch and JAX: an optimizer around another."""

from spectral_core import Layout

from .optimizer import SpectralNormRegularizer

__all__ = ["Layout", "SpectralNormRegularizer"]
