"""Choose the weights of a Keras model, with their layouts, and find them again after loading."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import keras
from keras import layers as kl

from spectral_core import ArgumentError, Convolution, Layout, NamesError, SpectralWarning
from spectral_core.engine import (
    FLATTENED,
    OPERATOR,
    Choice,
    Geometry,
    by_name,
    check_norm,
    choose,
    tell_assumed,
    with_operator_norm,
)
from spectral_core.errors import listed

Variable: TypeAlias = Any

_CONVOLUTIONS = (kl.Conv1D, kl.Conv2D, kl.Conv3D)
_TRANSPOSED = (kl.Conv1DTranspose, kl.Conv2DTranspose, kl.Conv3DTranspose)
_DEPTHWISE = (kl.DepthwiseConv1D, kl.DepthwiseConv2D, kl.SeparableConv1D, kl.SeparableConv2D)
_CELLS = (kl.SimpleRNNCell, kl.GRUCell, kl.LSTMCell)
_RECURRENT = (kl.ConvLSTM1D, kl.ConvLSTM2D, kl.ConvLSTM3D)  # Keras does not export their cell
_KERNELS = ("kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel")
_SCALES = tuple(  # layers whose parameters scale each entry, whatever axes they have
    getattr(kl, name)
    for name in (
        "BatchNormalization",
        "GroupNormalization",
        "LayerNormalization",
        "Normalization",
        "PReLU",
        "RMSNormalization",
    )
    if hasattr(kl, name)  # not all are in every version
)
_KNOWN = (kl.Dense, kl.EinsumDense, *_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE, *_CELLS)
_SHOWN = 10  # names in a line to copy
_BIAS, _SCALE = "a bias", "a scale or shift of each entry"
_BIAS_BY_NAME = "a bias, to judge by its name"
_NORMALIZED = "under keras.layers.SpectralNormalization, which sets its σ to 1"


@dataclass(frozen=True)
class Weights:
    """The chosen weights by path.

    Why a class: if the optimizer held the variables in a dict or a list, Keras would track them as
    the optimizer's own.
    """

    layouts: dict[str, Layout]
    places: dict[str, int]  # among the trained variables, as Keras finds momenta again
    n_variables: int
    variables: dict[str, Variable] = field(default_factory=dict)  # empty if read from a config
    left_out: dict[str, str] = field(default_factory=dict)  # path: the reason
    others: dict[str, Variable] = field(default_factory=dict)  # those of them that are frozen
    model: str = ""  # its name, which a path may begin with

    def among(self, variables: Sequence[Variable]) -> Weights:
        """Return the weights that are trained.

        Parameters
        ----------
        variables : sequence of keras.Variable
            All trained variables.

        Raises
        ------
        NamesError
            If none of the weights is trained, or the variables are not those of the saved model.
        """
        ids = {id(variable) for variable in variables}
        if self.variables:
            found = {path: v for path, v in self.variables.items() if id(v) in ids}
        else:
            found = self._again(variables)
        if not found:
            raise NamesError(
                f"none of {listed(self.layouts)} is among the optimizer's variables: the layers "
                "are frozen, or the variables are of another model"
            )
        thawed = [path for path, v in self.others.items() if id(v) in ids]
        if thawed:
            warnings.warn(
                f"{listed(thawed)} was frozen when the optimizer was made, and so is not "
                "regularized: make the optimizer anew after trainable has changed",
                SpectralWarning,
                stacklevel=2,
            )
        frozen = {path: "frozen" for path in self.layouts if path not in found}
        return replace(
            self,
            layouts={path: self.layouts[path] for path in found},
            places=places(found, variables),
            n_variables=len(variables),
            variables=found,
            left_out={**self.left_out, **frozen},
        )

    def trained(self) -> Weights:
        """Return the weights that are not frozen now, without their places."""
        found = {path: v for path, v in self.variables.items() if v.trainable}
        return replace(self, layouts={path: self.layouts[path] for path in found}, variables=found)

    def by_path(self, settings: Mapping[Any, Any], what: str) -> dict[str, Any]:
        """Return each weight's entry of a mapping; a path may lack the name of the model.

        Raises
        ------
        NamesError
            If an entry matches none of the weights, or a weight has no entry.
        """
        values = list(settings.values())
        short = aliases(self.layouts, self.model)
        names = {path: (path, *short.get(path, ())) for path in self.layouts}
        places = dict(zip(settings, range(len(values)), strict=True))
        found = by_name(places, dict.fromkeys(n for pair in names.values() for n in pair), what)
        chosen = {}
        for path, pair in names.items():
            exact = [places[name] for name in pair if name in places]
            first = exact or [found[name] for name in pair if name in found]
            if first:
                chosen[path] = values[min(first)]
        missing = [path for path in names if path not in chosen]
        if missing:
            raise NamesError(
                f"{what} has no entry for {listed(missing)}: add one, or a '*' for all others"
            )
        return chosen

    def _again(self, variables: Sequence[Variable]) -> dict[str, Variable]:
        # By place first: the paths of a loaded model lack the model's own name, and unnamed layers
        # have new numbers.
        if len(variables) == self.n_variables:
            return {path: variables[place] for path, place in self.places.items()}
        by_path = {variable.path: variable for variable in variables}
        if all(path in by_path for path in self.layouts):
            return {path: by_path[path] for path in self.layouts}
        raise NamesError(
            f"the weights {listed(self.layouts)} were chosen among {self.n_variables} variables, "
            f"but here are {listed(by_path)}: make the optimizer anew from the model"
        )

    def get_config(self) -> dict[str, Any]:
        """Return the trained weights in a form that JSON can hold, for `from_config`."""
        weights = {}
        for path, place in self.places.items():
            layout = self.layouts[path]
            weights[path] = [layout.axes, layout.groups, place]
            if isinstance(layout, Convolution):
                weights[path] += [list(layout.stride), list(layout.dilation), layout.waves]
        return {
            "weights": weights,
            "n_variables": self.n_variables,
            "left_out": self.left_out,
            "model": self.model,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Weights:
        """Return the weights that `get_config` described, without the variables."""
        weights = config["weights"].items()
        return cls(
            {path: _layout_from(axes, groups, *more) for path, (axes, groups, _, *more) in weights},
            {path: place for path, (_, _, place, *_) in weights},
            config["n_variables"],
            left_out=dict(config.get("left_out", {})),  # version 0.1.0 saved none
            model=config.get("model", ""),
        )


def _layout_from(axes: str, groups: int, *geometry: Any) -> Layout:
    """Return the layout that a config describes: a convolution's has its geometry and its waves."""
    return Convolution(axes, groups, *geometry) if geometry else Layout(axes, groups)


def places(chosen: Mapping[str, Variable], variables: Sequence[Variable]) -> dict[str, int]:
    """Return the places of the chosen weights among the variables, where they are among them."""
    at = {id(variable): i for i, variable in enumerate(variables)}
    return {path: at[id(v)] for path, v in chosen.items() if id(v) in at}


def choose_variables(
    model: keras.Model,
    include: Choice | None,
    exclude: Choice | None,
    layouts: Mapping[str, Layout | str] | None,
    norm: str = FLATTENED,
) -> Weights:
    """Return the weights to regularize.

    With ``norm="operator"`` a convolution's layout is a `Convolution` with the strides and the
    dilation rate of its layer.

    Raises
    ------
    ArgumentError
        If the model is not built, or ``norm`` is unknown.
    NamesError
        If a pattern of ``include``, ``exclude`` or ``layouts`` matches no variable with two axes,
        nothing is left, two variables have the same path, or a kernel with three axes or more is of
        an unknown layer.
    """
    check_built(model)
    if layouts is not None and not isinstance(layouts, Mapping):
        raise ArgumentError(
            f"layouts must be a mapping of path or pattern to a layout, not {layouts!r}: write "
            'layouts={"dense": "io"}'
        )
    candidates, chains, known, no_matrices = _candidates(model)
    selection = choose(
        candidates,
        known,
        include=_named(include, chains, "include"),
        exclude=_named(exclude, chains, "exclude"),
        layouts=layouts,
        default=_channels_last,
        owners={path: chain[-1] for path, chain in chains.items()},
        aliases=aliases(candidates, model.name),
    )
    layouts_of, left_out = selection.layouts, {**selection.left_out, **no_matrices}
    if not layouts_of:
        reasons = [f"{path}: {why}" for path, why in left_out.items()]
        raise NamesError(
            f"there is nothing to regularize in {model.name!r}: it has no dense, convolution or "
            f"recurrent kernel that include and exclude leave; left out: {listed(reasons)}"
        )
    _warn_of_guesses(selection.guessed, candidates, layouts_of)
    _warn_of_names([path for path, why in left_out.items() if why == _BIAS_BY_NAME])
    _warn_of_normalized(selection, chains)
    if check_norm(norm) == OPERATOR:
        layouts_of, assumed = with_operator_norm(layouts_of, _geometries(candidates, chains))
        tell_assumed(assumed, layouts_of, 5)
    trained, found = model.trainable_variables, {path: candidates[path] for path in layouts_of}
    frozen = {path: candidates[path] for path, why in left_out.items() if why == "frozen"}
    return Weights(
        layouts_of, places(found, trained), len(trained), found, left_out, frozen, model.name
    )


def _candidates(
    model: keras.Model,
) -> tuple[
    dict[str, Variable], dict[str, list[keras.Layer]], dict[str, Layout | str], dict[str, str]
]:
    """Return the variables that can be weights, their layers and readings, and the others' reasons.

    Raises
    ------
    NamesError
        If two variables have the same path.
    """
    held = holders(model)
    variables = [v for v in model.weights if len(v.shape) > 1]
    twice = [path for path, n in Counter(v.path for v in variables).items() if n > 1]
    if twice:
        raise NamesError(
            f"several variables have the path {listed(twice)}: name their layers differently"
        )
    candidates, known, no_matrices = {}, {}, {}
    for variable in variables:
        reading = _reading(held[id(variable)], variable)
        if "float" not in variable.dtype:
            no_matrices[variable.path] = f"quantized ({variable.dtype})"
        elif reading in (_BIAS, _SCALE):  # which a pattern such as "dense*" does not mean
            no_matrices[variable.path] = str(reading)
        else:
            candidates[variable.path] = variable
            if reading is not None:
                known[variable.path] = reading
    chains = {path: held[id(variable)] for path, variable in candidates.items()}
    return candidates, chains, known, no_matrices


def check_built(model: Any) -> None:
    """Raise `ArgumentError` if the model has no weights yet; warn of layers that have none yet."""
    layers = model._flatten_layers()
    if not model.weights:
        raise ArgumentError(
            f"the model {model.name!r} is not built, and so has no weights: first call it on a "
            "batch, or call model.build(input_shape), or begin it with keras.Input(shape)"
        )
    known = (*_KNOWN, kl.RNN)
    without = [layer.name for layer in layers if isinstance(layer, known) and not layer.built]
    if without:
        warnings.warn(
            f"the layers {listed(without)} are not built, and so are not regularized: call the "
            "model on a batch first",
            SpectralWarning,
            stacklevel=5,
        )


def holders(model: keras.Model) -> dict[int, list[keras.Layer]]:
    """Return the layers that hold each variable, by its id, from the model to the innermost."""
    chains: dict[int, list[keras.Layer]] = {}

    def visit(layer: keras.Layer, above: list[keras.Layer]) -> None:
        if any(layer is one for one in above):
            return
        chain = [*above, layer]
        for variable in layer.weights:
            held = chains.get(id(variable))
            # A tied variable is what its first innermost layer says, or an embedding.
            if held is None or chain[:-1] == held or isinstance(layer, kl.Embedding):
                chains[id(variable)] = chain
        for inner in layer._flatten_layers(include_self=False, recursive=False):
            visit(inner, chain)

    visit(model, [])
    return chains


def _named(choice: Any, chains: Mapping[str, Sequence[keras.Layer]], what: str) -> Choice | None:
    """Return a choice with paths in place of classes, layers and variables.

    A class also means layers that contain others: the weights of a `keras.layers.LSTM` are held by
    its cell.
    """
    if isinstance(choice, type):
        found = [path for path, chain in chains.items() if isinstance_of_any(chain, choice)]
        if not found and what == "include":
            kinds = dict.fromkeys(type(chain[-1]).__name__ for chain in chains.values())
            raise NamesError(
                f"{what}: no layer of class {choice.__name__} holds a weight with two axes or "
                f"more; the layers that do are {listed(kinds)}"
            )
        return found
    if isinstance(choice, keras.Layer):
        found = [path for path, chain in chains.items() if any(x is choice for x in chain)]
        if not found:
            raise NamesError(f"{what}: the layer {choice.name!r} holds no weight of the model")
        return found
    if isinstance(choice, keras.Variable):
        return [choice.path]
    if choice is None or isinstance(choice, (str, re.Pattern)) or callable(choice):
        return choice
    if isinstance(choice, Iterable):
        return [part for one in choice for part in _parts(_named(one, chains, what))]
    return choice  # the core refuses it


def _parts(choice: Any) -> list[Any]:
    return choice if isinstance(choice, list) else [choice]


def isinstance_of_any(chain: Iterable[keras.Layer], kind: Any) -> bool:
    """Return True if one of the layers is of this class."""
    return any(isinstance(layer, kind) for layer in chain)


def _reading(chain: Sequence[keras.Layer], variable: Variable) -> Layout | str | None:
    """Return a variable's layout, the reason to leave it out, or None in an unknown layer."""
    layer = chain[-1]
    if not variable.trainable:
        return "frozen" if variable.name in _KERNELS or _is_frozen(chain) else "not trainable"
    if isinstance_of_any(chain, kl.SpectralNormalization):
        return _NORMALIZED
    if isinstance(layer, kl.Embedding):
        if variable.name == "reverse_embeddings":
            return Layout("io")  # a head of its own
        return "an embedding"
    if isinstance(layer, _SCALES):
        return _SCALE
    layout = _layout_of(chain, variable)
    if layout is None and variable.name == "bias":
        return _BIAS if isinstance(layer, _KNOWN) else _BIAS_BY_NAME
    return layout


def _is_frozen(chain: Sequence[keras.Layer]) -> bool:
    return any(not layer.trainable for layer in chain)


def _layout_of(chain: Sequence[keras.Layer], variable: Variable) -> Layout | str | None:
    """Return the layout of a known layer's kernel."""
    layer, name = chain[-1], variable.name
    known = (kl.Dense, *_CELLS, *_CONVOLUTIONS)
    if isinstance(layer, kl.EinsumDense):
        return _einsum_layout(layer.equation, name)
    if isinstance(layer, known) and name in ("lora_kernel_a", "lora_kernel_b"):
        return _channels_last(variable)  # from the input to the rank, from the rank to the output
    if name not in _KERNELS:
        return None
    if isinstance(layer, (kl.Dense, *_CELLS)) or isinstance_of_any(chain, _RECURRENT):
        return _channels_last(variable)
    if isinstance(layer, _CONVOLUTIONS) and layer.groups > 1:
        return Layout("k" * layer.rank + "i(go)", layer.groups)
    if isinstance(layer, _DEPTHWISE) and name != "pointwise_kernel":
        # A grouped convolution with one input channel a group.
        return Layout("k" * layer.rank + "(gi)o", variable.shape[-2])
    if isinstance(layer, (*_CONVOLUTIONS, *_DEPTHWISE)):
        return _channels_last(variable)
    if isinstance(layer, _TRANSPOSED):
        return Layout("k" * layer.rank + "oi")
    return None


def _geometries(
    variables: Mapping[str, Variable], chains: Mapping[str, Sequence[keras.Layer]]
) -> dict[str, Geometry]:
    """Return the stride and the dilation of each kernel whose layer convolves with it."""
    found = {}
    for path, chain in chains.items():
        layer, name = chain[-1], variables[path].name
        if name in ("recurrent_kernel", "pointwise_kernel"):
            found[path] = Geometry()  # the layer's own strides are those of its other kernel
        elif isinstance(layer, (*_CONVOLUTIONS, *_DEPTHWISE, *_TRANSPOSED)) or isinstance_of_any(
            chain, _RECURRENT
        ):
            transposed = isinstance(layer, _TRANSPOSED)
            found[path] = Geometry(layer.strides, layer.dilation_rate, transposed)
    return found


def _channels_last(kernel: Variable) -> Layout:
    """Return kernel, input, output: the order of Keras, whatever the order of an image's axes."""
    return Layout("k" * (len(kernel.shape) - 2) + "io")


def _einsum_layout(equation: str, name: str) -> Layout | str | None:
    """Return the layout of an `EinsumDense` kernel if each axis is an input, an output or both."""
    inputs, kernel, outputs = equation.replace(" ", "").replace("->", ",").split(",")
    letters = {(True, True): "s", (True, False): "i", (False, True): "o"}
    axes = "".join(letters.get((a in inputs, a in outputs), "?") for a in kernel)
    # LoRA divides the last axis from the others, with its rank between them.
    if name in ("lora_kernel_a", "lora_kernel_b") and axes[-1] == "s":
        axes = "?"
    elif name == "lora_kernel_b":
        axes = "io" if axes[-1] == "o" else "oi"
    elif name not in ("kernel", "lora_kernel_a"):
        return None
    if {"i", "o"} <= set(axes) and "?" not in axes:
        return Layout(axes)
    return f"the equation {equation!r} makes no matrix of it"


def aliases(paths: Iterable[str], model: str) -> dict[str, list[str]]:
    """Return the paths without the name of the model, where no other path is the same."""
    paths = set(paths)
    short = {path: path.removeprefix(f"{model}/") for path in paths}
    return {path: [name] for path, name in short.items() if name not in paths}


def _warn_of_guesses(
    guessed: Sequence[str], variables: Mapping[str, Variable], layouts: Mapping[str, Layout]
) -> None:
    if not guessed:
        return
    read = [f"{path} {tuple(variables[path].shape)} as {layouts[path].axes!r}" for path in guessed]
    lines = ", ".join(f'"{path}": "{layouts[path].axes}"' for path in guessed[:_SHOWN])
    warnings.warn(
        f"these weights are of layers that are not known, and are read as input × output: "
        f"{listed(read)}. Say so with layouts={{{lines}}}, or leave them out with "
        f"exclude={list(guessed[:_SHOWN])}",
        SpectralWarning,
        stacklevel=5,
    )


def _warn_of_names(paths: Sequence[str]) -> None:
    if paths:
        warnings.warn(
            f"left out for their names alone, as biases: {listed(paths)}. Write "
            f"exclude={list(paths[:_SHOWN])} if they are, or include or layouts if they are not",
            SpectralWarning,
            stacklevel=5,
        )


def _warn_of_normalized(selection: Any, chains: Mapping[str, Sequence[keras.Layer]]) -> None:
    """Tell of weights that `keras.layers.SpectralNormalization` rescales in each training step."""
    under = [
        path for path, chain in chains.items() if isinstance_of_any(chain, kl.SpectralNormalization)
    ]
    kept = [path for path in under if path in selection.layouts]
    dropped = [path for path in under if selection.left_out.get(path) == _NORMALIZED]
    if not kept and not dropped:
        return
    what = "has no effect on" if kept else "leaves out"
    warnings.warn(
        f"the optimizer {what} {listed(kept or dropped)}: keras.layers.SpectralNormalization "
        "sets σ to 1 in each training step. Unwrap the layer, or write "
        f"exclude={(kept or dropped)[:_SHOWN]}",
        SpectralWarning,
        stacklevel=5,
    )
