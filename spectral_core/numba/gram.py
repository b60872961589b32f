"""Find the compiled loops of a report."""

from __future__ import annotations

from typing import Any


def kernels() -> Any:
    """Return the module of the loops, or None where Numba was told not to compile.

    Raises
    ------
    ImportError
        If Numba is not installed.
    """
    import numba

    if numba.config.DISABLE_JIT:
        return None
    from . import gram_kernels

    return gram_kernels
