"""Which variables of a Keras model are weights, what their axes are, and how to find them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import keras
from keras import layers as kl
from spectral_core.layout import as_layout
from spectral_core.patterns import by_name

from spectral_core import Layout, NamesError

Variable: TypeAlias = Any
Choice: TypeAlias = "str | Iterable[str] | Callable[[str, Variable], bool]"

_CONVOLUTIONS = (kl.Conv1D, kl.Conv2D, kl.Conv3D)
_TRANSPOSED = (kl.Conv1DTranspose, kl.Conv2DTranspose, kl.Conv3DTranspose)
_DEPTHWISE = (kl.DepthwiseConv1D, kl.DepthwiseConv2D, kl.SeparableConv1D, kl.SeparableConv2D)
_CELLS = (kl.SimpleRNNCell, kl.GRUCell, kl.LSTMCell)
_RECURRENT = (kl.ConvLSTM1D, kl.ConvLSTM2D, kl.ConvLSTM3D)  # Keras does not export their cell
_KERNELS = ("kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel")


@dataclass(frozen=True)
class Weights:
    """The chosen weights by path.

    A class of its own, since Keras takes variables that it finds in the dicts and lists of an
    optimizer for that optimizer's.
    """

    layouts: dict[str, Layout]
    places: dict[str, int]  # among the variables that are trained, as Keras finds momenta again
    n_variables: int
    variables: dict[str, Variable] = field(default_factory=dict)  # empty if read from a config

    def among(self, variables: Sequence[Variable]) -> Weights:
        """Those that are trained, where ``variables`` are all that are.

        Raises
        ------
        NamesError
            If none is, or they are not the variables of the model that was saved.
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
        # By place first: a model that is loaded has other paths, without the model's own name and
        # with new numbers for layers that have none.
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
        """What `from_config` takes: the trained ones, as JSON can hold them."""
        kept = [(path, self.layouts[path], place) for path, place in self.places.items()]
        weights = {path: [layout.axes, layout.groups, place] for path, layout, place in kept}
        return {"weights": weights, "n_variables": self.n_variables}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Weights:
        """Undo `get_config`, without the variables."""
        weights = config["weights"].items()
        return cls(
            {path: Layout(axes, groups) for path, (axes, groups, _) in weights},
            {path: place for path, (_, _, place) in weights},
            config["n_variables"],
        )


def places(chosen: Mapping[str, Variable], variables: Sequence[Variable]) -> dict[str, int]:
    """Where the chosen ones stand among the variables, those that do."""
    at = {id(variable): i for i, variable in enumerate(variables)}
    return {path: at[id(v)] for path, v in chosen.items() if id(v) in at}


def choose(
    model: keras.Model,
    include: Choice | None,
    exclude: Choice | None,
    layouts: Mapping[str, Layout | str] | None,
) -> Weights:
    """The weights to regularize.

    Raises
    ------
    NamesError
        If a pattern of ``include``, ``exclude`` or ``layouts`` matches no variable with two axes,
        nothing is left, or a path stands for two variables.
    """
    candidates = [v for v in model.weights if len(v.shape) > 1 and "float" in v.dtype]
    variables = {variable.path: variable for variable in candidates}
    twice = [path for path, n in Counter(v.path for v in candidates).items() if n > 1]
    if twice:
        raise NamesError(f"several variables have the path {twice}: name their layers differently")
    known = {path: layout for path, layout in _known(model) if path in variables}
    given = by_name(layouts or {}, variables, "layouts")
    wanted = {*known, *given} if include is None else _matching(variables, include, "include")
    if exclude is not None:
        wanted -= _matching(variables, exclude, "exclude")
    chosen = {path: v for path, v in variables.items() if path in wanted}
    if not chosen:
        raise NamesError(
            "there is nothing to regularize: the model has no dense, convolution or recurrent "
            f"kernel that include and exclude leave, or is not built (call it once, or give it an "
            f"Input); variables with two axes: {list(variables)}"
        )
    axes = {
        path: as_layout(given[path]) if path in given else known.get(path, _channels_last(v))
        for path, v in chosen.items()
    }
    trained = model.trainable_variables
    return Weights(axes, places(chosen, trained), len(trained), chosen)


def _known(model: keras.Model) -> Iterable[tuple[str, Layout]]:
    """The paths and layouts of the kernels that the model's layers tell."""
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
    """Kernel, input, output: the order of Keras, wherever the channels of an image stand."""
    return Layout("k" * (len(kernel.shape) - 2) + "io")


def _einsum_layout(equation: str) -> Layout | None:
    """What the axes of an `EinsumDense` kernel are, if each is an input, an output, or both."""
    inputs, kernel, outputs = equation.replace(" ", "").replace("->", ",").split(",")
    letters = {(True, True): "s", (True, False): "i", (False, True): "o"}
    axes = "".join(letters.get((a in inputs, a in outputs), "?") for a in kernel)
    return Layout(axes) if {"i", "o"} <= set(axes) and "?" not in axes else None


def _matching(variables: Mapping[str, Variable], choice: Choice, what: str) -> set[str]:
    if callable(choice):
        return {path for path, variable in variables.items() if choice(path, variable)}
    patterns = [choice] if isinstance(choice, str) else choice
    return set(by_name(dict.fromkeys(patterns), variables, what))
