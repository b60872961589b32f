"""Find parameters from which a layer computes its weight: pruned ones, and normalized ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
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
}


def _computed_from(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that a module normalizes, with the kind."""
    parametrizations: Mapping[str, Any] = getattr(module, "parametrizations", {})
    for those in parametrizations.values():
        if any(type(one).__name__.lstrip("_") in _NORMALIZED for one in those):
            yield from (("normalized", p) for p in those.parameters(recurse=False))
    hooks: Iterable[Any] = module._forward_pre_hooks.values()
    for hook in hooks:
        if type(hook).__name__ in _NORMALIZED:
            found = (getattr(module, f"{hook.name}_{end}", None) for end in ("orig", "v"))
            yield from (("normalized", p) for p in found if p is not None)


class Mask(NamedTuple):
    """The place of a pruned parameter's mask: `torch.nn.utils.prune` keeps it in its module."""

    module: Any
    name: str

    def without_module(self) -> Mask:
        """Return the mask as it is now, for a copy that must not copy the module too."""
        return Mask(SimpleNamespace(**{self.name: self.now()}), self.name)

    def now(self) -> Tensor | None:
        """Return the mask, which pruning again replaces, or None once pruning is permanent."""
        found: Tensor | None = getattr(self.module, self.name, None)
        return found

    def applied(self, parameter: Tensor) -> Tensor:
        """Return mask · parameter: the weight that the layer uses."""
        mask = self.now()
        return parameter if mask is None else parameter * mask

    def write(self, weight: Tensor, parameter: Tensor) -> None:
        """Write a scaled weight into its parameter, but for the entries that the mask removes."""
        mask = self.now()
        if mask is not None:
            parameter.copy_(torch.where(mask != 0, weight / mask, parameter))


def masks(model: Any, parameters: Mapping[str, Tensor]) -> dict[str, Mask]:
    """Return the masks of the pruned ones among these parameters."""
    if not isinstance(model, nn.Module):
        return {}
    found = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            mask = f"{name.removesuffix('_orig')}_mask"
            if name.endswith("_orig") and isinstance(getattr(module, mask, None), Tensor):
                found[id(parameter)] = Mask(module, mask)
    return {name: found[id(p)] for name, p in parameters.items() if id(p) in found}
