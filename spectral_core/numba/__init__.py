"""An engine for the CPU, compiled by Numba."""

from .engine import NUMPY, Memory, NumbaEngine
from .wave_engine import NumbaWaveEngine
from .xla import ForeignMatrix, foreign_function, foreign_table

__all__ = [
    "NUMPY",
    "ForeignMatrix",
    "Memory",
    "NumbaEngine",
    "NumbaWaveEngine",
    "foreign_function",
    "foreign_table",
]
