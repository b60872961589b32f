"""Find the optimizer whose steps run hooks, and refuse one whose steps would not."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

import spectral_core as sc

# Methods such as `first_step` and `second_step` of sharpness-aware minimization.
_PHASE = re.compile(r"^[a-z]+_step$")
# Packages whose wrappers step the optimizer within at the weights that the gradients belong to.
# Other wrappers, such as the schedule-free one, may move the weights before.
_TRANSPARENT = ("accelerate", "lightning", "pytorch_lightning", "torch")


def unwrapped(optimizer: Any, by_hand: str) -> Optimizer:
    """Return the optimizer whose ``step`` runs hooks: itself, or the one that it wraps.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer or a wrapper of one
    by_hand : str
        The remedy that an error names, where no step runs hooks.

    Raises
    ------
    spectral_core.ArgumentError
        If ``optimizer`` is something else, if its step runs no hooks or runs them twice, or if its
        work is done by several methods and none of them is an optimizer's step.
    """
    seen: list[Any] = []
    while not _runs_hooks(optimizer) or _phases(type(optimizer)):
        inner = [x for x in _attributes(optimizer) if x is not optimizer and x not in seen]
        known = type(optimizer).__module__.partition(".")[0] in _TRANSPARENT
        if len(inner) != 1 or not (known or _phases(type(optimizer))):
            raise sc.ArgumentError(_refusal(optimizer, inner, by_hand))
        seen.append(optimizer)
        optimizer = inner[0]
    kind = type(optimizer)
    if _calls_parents_step(kind):
        raise sc.ArgumentError(
            f"{kind.__name__}.step calls the step of a class that it is derived from, and "
            f"PyTorch may run the hooks in both: {by_hand} instead"
        )
    found: Optimizer = optimizer
    return found


def is_nested(optimizer: Optimizer) -> bool:
    """Return True if a step of ``optimizer`` runs within another step of the same optimizer.

    PyTorch wraps the step of each class, so a step that reaches its parent's step by a helper runs
    every hook twice. The wrapper's frames on the stack say so.
    """
    found, frame, file = 0, sys._getframe(1), inspect.getfile(Optimizer)
    while frame is not None and found < 2:
        wraps = frame.f_code.co_filename == file
        found += wraps and frame.f_code.co_name == "wrapper" and _first(frame) is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return found == 2


def _first(frame: Any) -> Any:
    """Return the first positional argument of a wrapper's frame."""
    args = frame.f_locals.get("args")
    return args[0] if args else None


def _runs_hooks(optimizer: Any) -> bool:
    return isinstance(optimizer, Optimizer) and getattr(type(optimizer).step, "hooked", False)


def _phases(kind: type) -> list[str]:
    """Return the methods, two or more, in which an optimizer works beside ``step``."""
    own = sorted(set(dir(kind)) - set(dir(Optimizer)))
    phases = [name for name in own if _PHASE.match(name) and _needs_nothing(getattr(kind, name))]
    return phases if len(phases) > 1 else []


def _needs_nothing(method: Any) -> bool:
    """Return True for a method that can be called without arguments, as a phase is."""
    if not inspect.isroutine(method):
        return False
    try:
        _, *parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):
        return False
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(p.default is not p.empty or p.kind in optional for p in parameters)


def _attributes(optimizer: Any) -> list[Any]:
    """Return the optimizers that the attributes of a wrapper hold."""
    values = vars(optimizer).values() if hasattr(optimizer, "__dict__") else ()
    found: list[Any] = []
    for value in values:
        wraps = isinstance(value, Optimizer) or (
            not isinstance(value, (type, Iterable)) and _is_wrapper(value)
        )
        if wraps and not any(value is one for one in found):
            found.append(value)
    return found


def _is_wrapper(value: Any) -> bool:
    return callable(getattr(value, "step", None)) and hasattr(value, "param_groups")


def _refusal(optimizer: Any, inner: list[Any], by_hand: str) -> str:
    kind = type(optimizer).__name__
    if isinstance(optimizer, (list, tuple)) and optimizer:
        return f"attach() got a {kind}: give the optimizers one by one, attach(*optimizers)"
    if len(inner) > 1:
        kinds = ", ".join(type(x).__name__ for x in inner)
        return f"{kind} holds several optimizers ({kinds}): attach each of them"
    if not callable(getattr(optimizer, "step", None)):
        return f"attach() got a {kind}: give it the optimizer, attach(optimizer)"
    phases = _phases(type(optimizer))
    if phases:
        return (
            f"{kind} works in {', '.join(phases)}, where no hooks run: {by_hand} that changes "
            "the weights"
        )
    return (
        f"{kind}.step runs no hooks: {by_hand}, or attach the optimizer that it wraps, if that one "
        "steps at the weights which the gradients belong to"
    )


def _calls_parents_step(kind: type[Optimizer]) -> bool:
    """PyTorch hooks the step of each class that an optimizer was ever made of."""
    steps = {inspect.unwrap(vars(base)["step"]) for base in kind.__mro__ if "step" in vars(base)}
    own = inspect.unwrap(kind.step)
    overridden = steps - {own, inspect.unwrap(Optimizer.step)}
    return bool(overridden) and "step" in own.__code__.co_names
