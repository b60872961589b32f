"""List the variables of a layer or model for `spectral_core.report`."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers as kl

from spectral_core import Layout
from spectral_core.engine import numbered

from ._select import _layout_of, holders


def live_tensors(model: keras.Layer) -> tuple[str, dict[str, Any], dict[str, Layout | str]]:
    """Return the convention of the axes, the variables, and the layouts of known layers.

    A table of embeddings has a row for each input.
    """
    held = holders(model)
    known: dict[str, Layout | str] = {}
    # Two variables may have one path.
    names = numbered(variable.path for variable in model.weights)
    variables = dict(zip(names, model.weights, strict=True))
    for name, variable in variables.items():
        chain = held.get(id(variable))
        if chain is None or len(variable.shape) < 2:
            continue
        found = _layout_of(chain, variable)
        if isinstance(chain[-1], kl.Embedding):
            found = Layout("io")
        if isinstance(found, Layout):
            known[name] = found
    return "keras", variables, known
