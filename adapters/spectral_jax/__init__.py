"""Spectral norm regularization for JAX: an optax transformation over `spectral_core`."""

from spectral_core import Layout

from .constraint import constrain_spectral_norm
from .transformation import SpectralNormState, add_spectral_norm_regularization, sigmas

__all__ = [
    "Layout",
    "SpectralNormState",
    "add_spectral_norm_regularization",
    "constrain_spectral_norm",
    "sigmas",
]
