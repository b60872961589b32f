"""Spectral norm regularization for JAX: an optax transformation over `spectral_core`."""

from spectral_core import Layout

from .transformation import SpectralNormState, add_spectral_norm_regularization, sigmas

__all__ = ["Layout", "SpectralNormState", "add_spectral_norm_regularization", "sigmas"]
