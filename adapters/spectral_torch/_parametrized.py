"""Find weights from which a layer computes another one, where that needs saying."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from spectral_core.errors import listed

_NORMALIZED = ("SpectralNorm", "WeightNorm")


def remarks(model: Any, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what a user of these parameters should know, by kind.

    Parameters
    ----------
    model : torch.nn.Module or anything else
    parameters : mapping of name to tensor
        The chosen ones.
    """
    if not isinstance(model, nn.Module):
        return {}
    kinds = {id(p): kind for module in model.modules() for kind, p in _computed_from(module)}
    by_kind: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        if id(parameter) in kinds:
            by_kind.setdefault(kinds[id(parameter)], []).append(name)
    return {kind: _REMARKS[kind].format(listed(names)) for kind, names in by_kind.items()}


_REMARKS = {
    "normalized": (
        "{0} are normalized by their layer (spectral_norm or weight_norm), which computes its "
        "weight anew from them: their σ has no effect on the layer; exclude them, or remove the "
        "normalization"
    ),
    "pruned": (
        "{0} are pruned: σ and the term are those of the parameter without its mask; make the "
        "pruning permanent (torch.nn.utils.prune.remove) or exclude them"
    ),
}


def _computed_from(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that a module normalizes or prunes, with the kind."""
    parametrizations: Mapping[str, Any] = getattr(module, "parametrizations", {})
    for those in parametrizations.values():
        if any(type(one).__name__.lstrip("_") in _NORMALIZED for one in those):
            yield from (("normalized", p) for p in those.parameters(recurse=False))
    hooks: Iterable[Any] = module._forward_pre_hooks.values()
    for hook in hooks:
        if type(hook).__name__ in _NORMALIZED:
            found = (getattr(module, f"{hook.name}_{end}", None) for end in ("orig", "v"))
            yield from (("normalized", p) for p in found if p is not None)
        elif hasattr(hook, "compute_mask") and hasattr(hook, "_tensor_name"):
            original = getattr(module, f"{hook._tensor_name}_orig", None)
            if original is not None:
                yield "pruned", original
