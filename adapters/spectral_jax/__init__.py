"""Spectral norm regularization for JAX: an optax transformation over `spectral_core`."""

from spectral_core import Layout

from .constraint import constrain_spectral_norm
from .transformation import SpectralNormState, add_spectral_norm_regularization, sigmas
from .watch import Watch

__all__ = [
    "Layout",
    "SpectralNormState",
    "Watch",
    "add_spectral_norm_regularization",
    "constrain_spectral_norm",
    "sigmas",
]
