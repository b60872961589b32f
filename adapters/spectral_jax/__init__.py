"""Spectral norm regularization for JAX: an optax transformation over `spectral_core`."""

from spectral_core import Layout

from .transformation import SpectralNormState, add_spectral_norm_regularization, sigmas
from .watch import Watch

__all__ = ["Layout", "SpectralNormState", "Watch", "add_spectral_norm_regularization", "sigmas"]
