"""Regularize, measure and bound spectral norms (Yoshida & Miyato, 2017), in any array library."""

from ._algorithm import add_gradient, add_gradient_, init, iterate
from ._chain import ChainBound, chain_bound
from ._constraint import constrain, constrain_
from ._convolution import ConvolutionNorm, convolution_norm
from ._density import SpectralDensity, spectral_density
from ._geometry import Convolution
from ._interval import SigmaBounds, bounds, gram_bound
from ._lanczos import SpectralNorm, spectral_norm
from ._layout import Layout, as_matrix, from_matrix
from ._logging import Watch
from ._network import LayerBound, NetworkBound
from ._norms import embedding_norm, schatten_norm
from ._operator import OperatorNorm, operator_norm, product_norm
from ._penalty import penalty, penalty_at, rank_one, slope
from ._power import (
    BlockIteration,
    PowerIteration,
    block_iteration,
    power_iteration,
    start_vector,
)
from ._reporting import compare, report
from ._spectrum import TopTriplets, stable_rank, top_triplets
from ._state_dict import SpectralState, load_state_dict, state_dict
from ._summary import Summary
from .errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    NamesError,
    ShapeError,
    SpectralError,
    SpectralWarning,
)

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BlockIteration",
    "ChainBound",
    "Convolution",
    "ConvolutionNorm",
    "DTypeError",
    "DeviceError",
    "LayerBound",
    "Layout",
    "NamesError",
    "NetworkBound",
    "OperatorNorm",
    "PowerIteration",
    "ShapeError",
    "SigmaBounds",
    "SpectralDensity",
    "SpectralError",
    "SpectralNorm",
    "SpectralState",
    "SpectralWarning",
    "Summary",
    "TopTriplets",
    "Watch",
    "add_gradient",
    "add_gradient_",
    "as_matrix",
    "block_iteration",
    "bounds",
    "chain_bound",
    "compare",
    "constrain",
    "constrain_",
    "convolution_norm",
    "embedding_norm",
    "from_matrix",
    "gram_bound",
    "init",
    "iterate",
    "load_state_dict",
    "operator_norm",
    "penalty",
    "penalty_at",
    "power_iteration",
    "product_norm",
    "rank_one",
    "report",
    "schatten_norm",
    "slope",
    "spectral_density",
    "spectral_norm",
    "stable_rank",
    "start_vector",
    "state_dict",
    "top_triplets",
]
