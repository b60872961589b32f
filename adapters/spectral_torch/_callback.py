"""Schedules of the trainers' step, for the callbacks of Lightning and transformers."""

from __future__ import annotations

from typing import Any

from spectral_core.engine import at_step

from ._regularizer import SpectralNormRegularizer


def set_numbers(reg: SpectralNormRegularizer, factor: Any, target: Any, step: int) -> None:
    """Set λ and the target to those of a step.

    What has not changed is not set again: that would undo what the regularizer remembers of it.
    """
    factor, target = at_step(factor, step), at_step(target, step)
    if factor is not reg.factor:
        reg.factor = factor
    if target is not reg.target:
        reg.target = target
