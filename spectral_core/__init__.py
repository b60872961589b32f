"""Spectral norm regularization (Yoshida & Miyato, 2017) for every array framework."""

from .block import BlockIteration, block_iteration
from .constraint import constrain, constrain_
from .errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    NamesError,
    ShapeError,
    SpectralError,
)
from .estimate import SpectralNorm, spectral_norm
from .layout import Layout, as_matrix, from_matrix
from .penalty import penalty, penalty_at, rank_one, slope
from .power import PowerIteration, power_iteration, start_vector
from .regularizer import SpectralState, add_gradient, add_gradient_, init, iterate
from .saving import load_state_dict, state_dict
from .watch import Watch

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BlockIteration",
    "DTypeError",
    "DeviceError",
    "Layout",
    "NamesError",
    "PowerIteration",
    "ShapeError",
    "SpectralError",
    "SpectralNorm",
    "SpectralState",
    "Watch",
    "add_gradient",
    "add_gradient_",
    "as_matrix",
    "block_iteration",
    "constrain",
    "constrain_",
    "from_matrix",
    "init",
    "iterate",
    "load_state_dict",
    "penalty",
    "penalty_at",
    "power_iteration",
    "rank_one",
    "slope",
    "spectral_norm",
    "start_vector",
    "state_dict",
]
