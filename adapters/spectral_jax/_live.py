"""List the arrays of a module or of a parameter tree for `spectral_core.report`."""

from __future__ import annotations

from typing import Any

from spectral_core import Layout

from ._layers import is_of
from ._select import _readings, named_leaves


def live_tensors(tree: Any) -> tuple[str, dict[str, Any], dict[str, Layout | str]]:
    """Return the convention of the axes, the arrays, and what the layers say of them.

    What they say is a layout, or the reason why an array is no matrix. A table of embeddings is
    one: it has a row for each input.
    """
    leaves = [leaf for leaf in named_leaves(tree)[0] if hasattr(leaf.value, "dtype")]
    shapes = {leaf.name: tuple(leaf.value.shape) for leaf in leaves}
    known: dict[str, Layout | str] = {}
    for name, (meaning, guessed) in _readings(leaves)[0].items():
        if meaning == "an embedding" and not guessed:
            known[name] = Layout("s" * (len(shapes[name]) - 2) + "io")
        elif meaning in ("a bias", "a norm", "slopes") or isinstance(meaning, Layout):
            known[name] = meaning
    own = any(is_of(owner, "equinox") for leaf in leaves for owner in leaf.owners)
    return "torch" if own else "flax", {leaf.name: leaf.value for leaf in leaves}, known
