"""List the tensors of a module for `spectral_core.report`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from spectral_core import Layout

from ._select import _scan


def live_tensors(model: nn.Module) -> tuple[str, dict[str, Any], dict[str, Layout | str]]:
    """Return the convention of the axes, the state's tensors, and the layouts of known layers.

    A table of embeddings has a row for each input.
    """
    state = model.state_dict(keep_vars=True)
    found = _scan(model)
    layouts: dict[int, Layout | str] = {}
    for name, reading in found.readings.items():
        meaning = reading.found
        parameter = found.parameters[name]
        if meaning in ("an embedding", "an embedding (tied)") and not reading.from_name:
            meaning = Layout("s" * (parameter.ndim - 2) + "io")
        if isinstance(meaning, Layout):
            layouts[id(parameter)] = meaning
    tensors: dict[str, Any] = {}
    known: dict[str, Layout | str] = {}
    names: dict[int, str] = {}
    for name, tensor in state.items():
        if is_lazy(tensor):  # without a shape, of a lazy module
            tensors[name] = torch.empty(0)
            known[name] = "not initialized: call the model once"
            continue
        if not hasattr(tensor, "shape"):  # the extra state of a module
            continue
        tensors[name] = tensor
        if id(tensor) in names:
            known[name] = f"the same tensor as {names[id(tensor)]}"
        elif id(tensor) in layouts:
            known[name] = layouts[id(tensor)]
        names.setdefault(id(tensor), name)
    return "torch", tensors, known
