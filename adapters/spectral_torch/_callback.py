"""What the callbacks of the trainers share: a regularizer whose weights may thaw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spectral_core.engine import at_step

from ._regularizer import SpectralNormRegularizer


def trainable(module: nn.Module) -> set[str]:
    """Return the names of the parameters that are not frozen."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def load(
    reg: SpectralNormRegularizer, state: Mapping[str, Tensor], module: nn.Module
) -> dict[str, Tensor]:
    """Load a state, and return the part of it that belongs to weights that are frozen now.

    A weight that thaws during training is in the state of a checkpoint, but not in the regularizer
    of the run that resumes from it, until it thaws there.
    """
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    waiting = frozen - reg._parameters.keys()
    kept = {key: x for key, x in state.items() if key.rpartition(".")[0] in waiting}
    own = {key: x for key, x in state.items() if key not in kept}
    if own:
        reg.load_state_dict(own)
    return kept


def set_numbers(reg: SpectralNormRegularizer, factor: Any, target: Any, step: int) -> None:
    """Set λ and the target to those of a step.

    What has not changed is not set again: that would undo what the regularizer remembers of it.
    """
    factor, target = _at_step(factor, step), _at_step(target, step)
    if factor is not reg.factor:
        reg.factor = factor
    if target is not reg.target:
        reg.target = target


def _at_step(given: Any, step: int) -> Any:
    if isinstance(given, Mapping) and not any(map(callable, given.values())):
        return given
    return at_step(given, step)
