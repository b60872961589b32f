"""Which parameters of a PyTorch model are weights, and the meaning of their axes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from spectral_core import ArgumentError, Layout, NamesError
from spectral_core.engine import Choice, choose, default_layout

Model: TypeAlias = "nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]"

# A parametrized module keeps its weight as `parametrizations.weight.original`, or as several
# originals. The older hooks keep it as `weight_orig` (spectral norm, pruning) or `weight_v`.
_PARAMETRIZED = re.compile(r"^(?:(.*)\.)?parametrizations\.([^.]+)\.original\d*$")
_REPARAMETRIZED = re.compile(r"_(orig|v)$")


def choose_parameters(
    model: Model,
    include: Choice | None,
    exclude: Choice | None,
    layouts: Mapping[str, Layout | str] | None,
) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    """Return the parameters to regularize, each once, and their layouts.

    Raises
    ------
    NamesError
        If a pattern of ``include``, ``exclude`` or ``layouts`` matches no parameter with two
        axes, or nothing is left.
    ArgumentError
        If a chosen parameter is not initialized yet.
    """
    known, candidates = _scan(model)
    others = dict.fromkeys(candidates, "not a weight of a known layer")
    chosen = choose(
        candidates,
        {**others, **known},
        include=include,
        exclude=exclude,
        layouts=layouts,
        default=_default,
    ).layouts
    if not chosen:
        raise NamesError(
            "there is nothing to regularize: the model has no linear, convolution or recurrent "
            f"weight that include and exclude leave; parameters with two axes: {list(candidates)}"
        )
    # A tied weight has several names: the first chosen name stands for it.
    once = {id(candidates[name]): name for name in reversed(chosen)}
    parameters = {name: candidates[name] for name in chosen if once[id(candidates[name])] == name}
    for name, parameter in parameters.items():
        if isinstance(parameter, UninitializedParameter):
            raise ArgumentError(f"parameter {name!r} is lazy: run the model once before this")
    return parameters, {name: chosen[name] for name in parameters}


def _default(parameter: Tensor) -> Layout:
    lazy = isinstance(parameter, UninitializedParameter)  # it has no axes yet, and is refused later
    return default_layout(2 if lazy else parameter.ndim)


def _scan(model: Model) -> tuple[dict[str, Layout], dict[str, Tensor]]:
    """Return the layouts that the model's modules define, and all parameters with two axes."""
    if not isinstance(model, nn.Module):
        pairs = model.items() if isinstance(model, Mapping) else model
        candidates = {name: p for name, p in pairs if _may_be_weight(p)}
        return {name: default_layout(p.ndim) for name, p in candidates.items()}, candidates
    modules = dict(model.named_modules(remove_duplicate=False))
    known, candidates = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not _may_be_weight(parameter):
            continue
        candidates[name] = parameter
        layout = _layout_in(modules, name, parameter)
        if layout is not None:
            known[name] = layout
    return known, candidates


def _may_be_weight(parameter: Tensor) -> bool:
    if isinstance(parameter, UninitializedParameter):
        return True
    return parameter.ndim >= 2 and (parameter.is_floating_point() or parameter.is_complex())


def _layout_in(modules: Mapping[str, nn.Module], name: str, parameter: Tensor) -> Layout | None:
    parametrized = _PARAMETRIZED.match(name)
    if parametrized:
        owner, attribute = parametrized[1] or "", parametrized[2]
        originals = list(modules[name.rpartition(".")[0]].parameters(recurse=False))
        # Weight normalization keeps lengths before directions, which have the weight's shape.
        if parameter is not max(reversed(originals), key=Tensor.numel):
            return None
    else:
        owner, _, attribute = name.rpartition(".")
        attribute = _REPARAMETRIZED.sub("", attribute)
    layout = _layout_of(modules[owner], attribute)
    uninitialized = isinstance(parameter, UninitializedParameter)
    if layout is None or uninitialized or layout.ndim == parameter.ndim:
        return layout
    return None


def _layout_of(module: nn.Module, attribute: str) -> Layout | None:
    """Return the layout of a module's parameter if it is the weight of a layer, else None."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
        return Layout("oi") if "weight" in attribute else None
    if attribute != "weight":
        return None
    if isinstance(module, nn.Linear):
        return Layout("oi")
    if isinstance(module, nn.Bilinear):
        return Layout("oii")
    if isinstance(module, nn.modules.conv._ConvNd):
        kernel, grouped = "k" * len(module.kernel_size), module.groups > 1
        if module.transposed:
            return Layout(("(gi)o" if grouped else "io") + kernel, module.groups)
        return Layout(("(go)i" if grouped else "oi") + kernel, module.groups)
    return None
