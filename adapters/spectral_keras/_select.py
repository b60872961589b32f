"""Choose the weights of a Keras model, with their layouts, and find them again after loading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import keras
from keras import layers as kl

from spectral_core import Layout, NamesError
from spectral_core.engine import Choice, choose

Variable: TypeAlias = Any

_CONVOLUTIONS = (kl.Conv1D, kl.Conv2D, kl.Conv3D)
_TRANSPOSED = (kl.Conv1DTranspose, kl.Conv2DTranspose, kl.Conv3DTranspose)
_DEPTHWISE = (kl.DepthwiseConv1D, kl.DepthwiseConv2D, kl.SeparableConv1D, kl.SeparableConv2D)
_CELLS = (kl.SimpleRNNCell, kl.GRUCell, kl.LSTMCell)
_RECURRENT = (kl.ConvLSTM1D, kl.ConvLSTM2D, kl.ConvLSTM3D)  # Keras does not export their cell
_KERNELS = ("kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel")


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
        if self.variables:
            ids = {id(variable) for variable in variables}
            found = {path: v for path, v in self.variables.items() if id(v) in ids}
        else:
            found = self._again(variables)
        if not found:
            raise NamesError(f"none of {list(self.layouts)} is among the optimizer's variables")
        layouts = {path: self.layouts[path] for path in found}
        return Weights(layouts, places(found, variables), len(variables), found)

    def _again(self, variables: Sequence[Variable]) -> dict[str, Variable]:
        # By place first: the paths of a loaded model lack the model's own name, and unnamed layers
        # have new numbers.
        if len(variables) == self.n_variables:
            return {path: variables[place] for path, place in self.places.items()}
        by_path = {variable.path: variable for variable in variables}
        if all(path in by_path for path in self.layouts):
            return {path: by_path[path] for path in self.layouts}
        raise NamesError(
            f"the weights {list(self.layouts)} were chosen among {self.n_variables} variables, but "
            f"here are {list(by_path)}: make the optimizer anew from the model"
        )

    def get_config(self) -> dict[str, Any]:
        """Return the trained weights in a form that JSON can hold, for `from_config`."""
        kept = [(path, self.layouts[path], place) for path, place in self.places.items()]
        weights = {path: [layout.axes, layout.groups, place] for path, layout, place in kept}
        return {"weights": weights, "n_variables": self.n_variables}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Weights:
        """Return the weights that `get_config` described, without the variables."""
        weights = config["weights"].items()
        return cls(
            {path: Layout(axes, groups) for path, (axes, groups, _) in weights},
            {path: place for path, (_, _, place) in weights},
            config["n_variables"],
        )


def places(chosen: Mapping[str, Variable], variables: Sequence[Variable]) -> dict[str, int]:
    """Return the places of the chosen weights among the variables, where they are among them."""
    at = {id(variable): i for i, variable in enumerate(variables)}
    return {path: at[id(v)] for path, v in chosen.items() if id(v) in at}


def choose_variables(
    model: keras.Model,
    include: Choice | None,
    exclude: Choice | None,
    layouts: Mapping[str, Layout | str] | None,
) -> Weights:
    """Return the weights to regularize.

    Raises
    ------
    NamesError
        If a pattern of ``include``, ``exclude`` or ``layouts`` matches no variable with two axes,
        nothing is left, or two variables have the same path.
    """
    candidates = [v for v in model.weights if len(v.shape) > 1 and "float" in v.dtype]
    variables = {variable.path: variable for variable in candidates}
    twice = [path for path, n in Counter(v.path for v in candidates).items() if n > 1]
    if twice:
        raise NamesError(f"several variables have the path {twice}: name their layers differently")
    known = {path: layout for path, layout in _known(model) if path in variables}
    others = dict.fromkeys(variables, "not a kernel of a known layer")
    chosen = choose(
        variables,
        {**others, **known},
        include=include,
        exclude=exclude,
        layouts=layouts,
        default=_channels_last,
    ).layouts
    if not chosen:
        raise NamesError(
            "there is nothing to regularize: the model has no dense, convolution or recurrent "
            f"kernel that include and exclude leave, or is not built (call it once, or give it an "
            f"Input); variables with two axes: {list(variables)}"
        )
    trained, found = model.trainable_variables, {path: variables[path] for path in chosen}
    return Weights(chosen, places(found, trained), len(trained), found)


def _known(model: keras.Model) -> Iterable[tuple[str, Layout]]:
    """Yield the paths and layouts of the kernels of known layers."""
    for layer in model._flatten_layers():
        for variable in layer.weights:
            if variable.name in _KERNELS:
                layout = _layout_of(layer, variable)
                if layout is not None:
                    yield variable.path, layout


def _layout_of(layer: keras.Layer, kernel: Variable) -> Layout | None:
    if isinstance(layer, kl.EinsumDense):
        return _einsum_layout(layer.equation)
    if isinstance(layer, (kl.Dense, *_CELLS, *_RECURRENT)):
        return _channels_last(kernel)
    if isinstance(layer, _CONVOLUTIONS) and layer.groups > 1:
        return Layout("k" * layer.rank + "i(go)", layer.groups)
    if isinstance(layer, _DEPTHWISE) and kernel.name != "pointwise_kernel":
        # A grouped convolution with one input channel a group.
        return Layout("k" * layer.rank + "(gi)o", kernel.shape[-2])
    if isinstance(layer, (*_CONVOLUTIONS, *_DEPTHWISE)):
        return _channels_last(kernel)
    if isinstance(layer, _TRANSPOSED):
        return Layout("k" * layer.rank + "oi")
    return None


def _channels_last(kernel: Variable) -> Layout:
    """Return kernel, input, output: the order of Keras, whatever the order of an image's axes."""
    return Layout("k" * (len(kernel.shape) - 2) + "io")


def _einsum_layout(equation: str) -> Layout | None:
    """Return the layout of an `EinsumDense` kernel if each axis is an input, an output or both."""
    inputs, kernel, outputs = equation.replace(" ", "").replace("->", ",").split(",")
    letters = {(True, True): "s", (True, False): "i", (False, True): "o"}
    axes = "".join(letters.get((a in inputs, a in outputs), "?") for a in kernel)
    return Layout(axes) if {"i", "o"} <= set(axes) and "?" not in axes else None
