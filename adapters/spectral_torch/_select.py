"""Choose the parameters of a PyTorch model that are weights, and say what is left out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from spectral_core import ArgumentError, Layout, NamesError, SpectralWarning
from spectral_core.engine import (
    FLATTENED,
    OPERATOR,
    Choice,
    Geometry,
    Selection,
    check_norm,
    choose,
    default_layout,
    tell_assumed,
    with_operator_norm,
)
from spectral_core.errors import listed

from ._layers import Reading, read_held, read_layer

Model: TypeAlias = "nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]"

# A parametrized module keeps its weight as `parametrizations.weight.original`, or as several
# originals. The older hooks keep it as `weight_orig` (spectral norm, pruning) or `weight_v`.
_PARAMETRIZED = re.compile(r"^(?:(.*)\.)?parametrizations\.([^.]+)$")
_ORIGINAL = re.compile(r"original(\d*)$")
_REPARAMETRIZED = re.compile(r"_(orig|v)$")
_LENGTHS = "lengths of a weight normalization"

# Wrappers hold the plain model under these names, which are left out of the names of weights.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_WRAPPERS_BY_NAME = ("AveragedModel", "DeepSpeedEngine")

_CALLER = 5  # frames from `warnings.warn` to who made the regularizer


class Chosen(NamedTuple):
    """The parameters to regularize.

    Attributes
    ----------
    parameters : dict of name to Tensor
        Each of them once, under the first of its names.
    layouts : dict of name to Layout
    left_out : dict of name to str
        The reason for each other parameter with two axes or more.
    """

    parameters: dict[str, Tensor]
    layouts: dict[str, Layout]
    left_out: dict[str, str]


class _Candidates(NamedTuple):
    """The parameters with two axes or more, each under the first of its names."""

    parameters: dict[str, Tensor]
    readings: dict[str, Reading]
    owners: dict[str, tuple[nn.Module, ...]]
    aliases: dict[str, list[str]]

    def is_weight(self, name: str) -> bool:
        """Return True if the layer of a parameter tells its layout."""
        return isinstance(self.readings[name].found, Layout)


def choose_parameters(
    model: Model,
    include: Choice | None,
    exclude: Choice | None,
    layouts: Mapping[Any, Layout | str] | None,
    norm: str = FLATTENED,
) -> Chosen:
    """Return the parameters to regularize, each once, and their layouts.

    With ``norm="operator"`` a convolution's layout is a `Convolution` with the stride and dilation
    of its module.

    Warns
    -----
    SpectralWarning
        If a layout or a stride is a guess, or a parameter is left out because of its name.

    Raises
    ------
    NamesError
        If a pattern of ``include``, ``exclude`` or ``layouts`` matches no parameter with two
        axes, a tensor can be read in several ways, or nothing is left.
    ArgumentError
        If this is no model, ``norm`` is unknown, or a chosen parameter is sparse or not initialized
        yet.
    """
    found = _scan(model) if isinstance(model, nn.Module) else _named(model)
    selection = choose(
        found.parameters,
        {name: r.found for name, r in found.readings.items() if r.found is not None},
        include=include,
        exclude=exclude,
        layouts=layouts,
        default=lambda parameter: default_layout(parameter.ndim),
        owners=found.owners,
        aliases=found.aliases,
        reasons=_frozen(found) if isinstance(model, nn.Module) else {},
    )
    if not selection.layouts:
        raise NamesError(_nothing(selection, found))
    parameters = {name: found.parameters[name] for name in selection.layouts}
    for name, parameter in parameters.items():
        _check(name, parameter)
    _tell(selection, found)
    chosen = selection.layouts
    if check_norm(norm) == OPERATOR:
        chosen, assumed = with_operator_norm(chosen, _geometries(found))
        tell_assumed(assumed, chosen, _CALLER)
    return Chosen(parameters, chosen, selection.left_out)


def _geometries(found: _Candidates) -> dict[str, Geometry]:
    """Return the stride and dilation of each weight whose module is a convolution.

    A kernel that convolutions of different strides share has none. The library then warns of the
    stride that it assumes.
    """
    geometries = {}
    for name, owners in found.owners.items():
        layers: list[Any] = [o for o in owners if isinstance(o, nn.modules.conv._ConvNd)]
        kinds = {Geometry(x.stride, x.dilation, x.transposed) for x in layers}
        if len(kinds) == 1:
            geometries[name] = kinds.pop()
    return geometries


def _check(name: str, parameter: Tensor) -> None:
    if isinstance(parameter, UninitializedParameter):
        raise ArgumentError(f"parameter {name!r} is lazy: run the model once before this")
    if parameter.layout != torch.strided:
        raise ArgumentError(
            f"parameter {name!r} is sparse ({parameter.layout}), but the term is dense: make it "
            f'dense, or leave it out with exclude=["{name}"]'
        )


def _named(model: Any) -> _Candidates:
    """Return the candidates of names and parameters: all matrices are weights.

    Nothing tells how to read a tensor with three axes or more, so it needs a layout.
    """
    pairs = model.items() if isinstance(model, Mapping) else model
    if isinstance(pairs, Tensor | torch.optim.Optimizer | str) or not isinstance(pairs, Iterable):
        raise ArgumentError(_no_model(model, model))
    found = _Candidates({}, {}, {}, {})
    for pair in pairs:
        if not _is_pair(pair):
            raise ArgumentError(_no_model(model, pair))
        name, parameter = pair
        if _may_be_weight(parameter):
            found.parameters[name] = parameter
            lazy = isinstance(parameter, UninitializedParameter)
            found.readings[name] = Reading(Layout("oi") if lazy or parameter.ndim == 2 else None)
    return _merged(found)


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return False
    return isinstance(pair[0], str) and isinstance(pair[1], Tensor)


def _no_model(model: object, item: object) -> str:
    kind = type(model).__name__
    expected = "a torch.nn.Module, a mapping of name to parameter, or (name, parameter) pairs"
    if isinstance(model, torch.optim.Optimizer):
        return f"model must be {expected}, not {kind}: pass the model, then attach the optimizer"
    if isinstance(item, Tensor):
        return (
            f"model must be {expected}, but {kind} has no names: pass the module itself, or "
            "model.named_parameters()"
        )
    return f"model must be {expected}, not {kind}"


def _scan(model: nn.Module) -> _Candidates:
    """Return the candidates of a module, and how each is read."""
    found = _Candidates({}, {}, {}, {})
    modules = dict(model.named_modules(remove_duplicate=False))
    plain: dict[str, str] = {}
    around: dict[str, tuple[nn.Module, ...]] = {}
    for path, module in modules.items():
        parent, _, last = path.rpartition(".")
        outer = modules[parent] if path else None
        hidden = outer is not None and _is_wrapped(outer, last)
        plain[path] = plain[parent] if hidden else ".".join(filter(None, (plain.get(parent), last)))
        around[path] = (module, *around[parent]) if path else (module,)
        for attribute, parameter in module._parameters.items():
            if parameter is None or not _may_be_weight(parameter):
                continue
            name = ".".join(filter(None, (plain[path], attribute)))
            found.parameters[name] = parameter
            found.readings[name] = _read(modules, path, attribute, parameter)
            found.owners[name] = around[path]
            short = _plain_name(plain[path], attribute)
            if short != name:
                found.aliases[name] = [short]
    return _merged(found)


def _is_wrapped(outer: nn.Module, name: str) -> bool:
    if name == "module":
        return isinstance(outer, _WRAPPERS) or type(outer).__name__ in _WRAPPERS_BY_NAME
    return name in _WRAPPED


def _plain_name(path: str, attribute: str) -> str:
    """Return the name that a reparametrized weight would have without that."""
    parametrized = _PARAMETRIZED.match(path)
    if parametrized and _ORIGINAL.match(attribute):
        return ".".join(filter(None, parametrized.groups()))
    return ".".join(filter(None, (path, _REPARAMETRIZED.sub("", attribute))))


def _merged(found: _Candidates) -> _Candidates:
    """Return each tied parameter once, under the first of its names, with the others as aliases."""
    names: dict[int, list[str]] = {}
    for name, parameter in found.parameters.items():
        names.setdefault(id(parameter), []).append(name)
    merged = _Candidates({}, {}, {}, {})
    for first, *others in names.values():
        merged.parameters[first] = found.parameters[first]
        readings = [found.readings[name] for name in (first, *others)]
        merged.readings[first] = _together(readings) if others else readings[0]
        merged.owners[first] = tuple(
            module for name in (first, *others) for module in found.owners.get(name, ())
        )
        aliases = [
            *others,
            *(alias for name in (first, *others) for alias in found.aliases.get(name, ())),
        ]
        if aliases:
            merged.aliases[first] = aliases
    return merged


def _together(readings: list[Reading]) -> Reading:
    """Return how a tied parameter is read: as an embedding if one layer looks it up."""
    looked_up = [reading for reading in readings if reading.found == "an embedding"]
    if looked_up:
        return looked_up[0] if looked_up == readings else Reading("an embedding (tied)")
    layouts = [reading for reading in readings if isinstance(reading.found, Layout)]
    return (layouts or readings)[0]


def _may_be_weight(parameter: Tensor) -> bool:
    if isinstance(parameter, UninitializedParameter):
        return True
    return parameter.ndim >= 2 and (parameter.is_floating_point() or parameter.is_complex())


def _read(modules: Mapping[str, nn.Module], path: str, attribute: str, x: Tensor) -> Reading:
    module, (outer, _, within) = modules[path], path.rpartition(".")
    if isinstance(module, nn.ParameterList | nn.ParameterDict):
        return read_held(modules[outer], within, attribute, x)
    if isinstance(x, UninitializedParameter):
        return Reading(Layout("oi"))  # it is refused if it is chosen
    parametrized, original = _PARAMETRIZED.match(path), _ORIGINAL.match(attribute)
    if parametrized and original:
        if original[1] == "0" and type(next(module.children())).__name__ == "_WeightNorm":
            return Reading(_LENGTHS)
        largest = max(reversed(list(module.parameters(recurse=False))), key=Tensor.numel)
        if x is not largest:  # one factor of several, or the lengths of an own normalization
            return read_layer(module, attribute, x)
        module, attribute = modules[parametrized[1] or ""], parametrized[2]
    elif attribute.endswith("_g") and f"{attribute[:-2]}_v" in module._parameters:
        return Reading(_LENGTHS)
    else:
        attribute = _REPARAMETRIZED.sub("", attribute)
    return read_layer(module, attribute, x)


def _frozen(found: _Candidates) -> dict[str, str]:
    """Return the frozen parameters that are left out by default.

    A frozen weight is held, because it may wake later. One of a model with low-rank adapters is not
    meant to, nor is a constant of an unknown layer.
    """
    adapted = any(".lora_" in f".{name}" for name in found.parameters)
    return {
        name: "frozen"
        for name, parameter in found.parameters.items()
        if not parameter.requires_grad
        and (found.readings[name].found is None or (adapted and found.is_weight(name)))
    }


def _tell(selection: Selection, found: _Candidates) -> None:
    """Warn once of what was guessed, with the lines that settle it."""
    lines = []
    if selection.guessed:
        shapes = (f"{name}: {tuple(found.parameters[name].shape)}" for name in selection.guessed)
        name = selection.guessed[0]
        lines.append(
            f"regularized as matrices of outputs × inputs ('oi'), although their layers are "
            f'unknown: {listed(shapes)}. To settle it: layouts={{"{name}": "oi"}}, or '
            f'exclude=["{name}"]'
        )
    skipped = [
        name
        for name, reason in selection.left_out.items()
        if found.readings[name].from_name and reason == found.readings[name].found
    ]
    if skipped:
        reasons = (f"{name}: {selection.left_out[name]}" for name in skipped)
        lines.append(
            f"left out because of their names: {listed(reasons)}. To settle it: "
            f'exclude=["{skipped[0]}"], or layouts={{"{skipped[0]}": …}} to regularize it'
        )
    if lines:
        warnings.warn("; ".join(lines), SpectralWarning, stacklevel=_CALLER)


def _nothing(selection: Selection, found: _Candidates) -> str:
    if not found.parameters:
        return "there is nothing to regularize: the model has no parameter with two axes or more"
    reasons = (f"{name}: {reason}" for name, reason in selection.left_out.items())
    return f"there is nothing to regularize; left out are {listed(reasons)}"
