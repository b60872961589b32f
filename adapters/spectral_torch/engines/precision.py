"""Keep products of float32 in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_full_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function so that its products of float32 are not rounded to TF32 or bfloat16.

    Many training scripts allow that for the whole process: the loss does not mind. Orthogonal
    vectors do, and sigma would be wrong in its fourth digit. A matrix times a vector is never
    rounded; a product of matrices is, as for stacks, several vectors and half precision.
    """

    @wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        before = torch.get_float32_matmul_precision()
        if before == "highest":
            return function(*args, **kwargs)
        torch.set_float32_matmul_precision("highest")
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_float32_matmul_precision(before)

    return exact
