"""An engine for the CPU, compiled by Numba."""

from .engine import NUMPY, Memory, NumbaEngine

__all__ = ["NUMPY", "Memory", "NumbaEngine"]
