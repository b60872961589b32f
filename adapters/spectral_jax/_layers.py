"""Read which leaves are weights, and how: from their module, or else from names and shapes.

Equinox trees hold their modules. Flax and Haiku trees hold names alone. There the shape of the
bias beside a kernel tells which axes are outputs, and which are a stack of layers. σ does not
depend on the order of the columns: a kernel's input and kernel axes need not be told apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from spectral_core import Layout
from spectral_core.engine import Geometry

Shape: TypeAlias = tuple[int, ...]
Places: TypeAlias = Mapping[str, Mapping[str, Shape]]
"""The shapes of all leaves, by the path of what holds them and their own name."""


class Reading(NamedTuple):
    """The meaning of one leaf.

    Attributes
    ----------
    meaning : Layout, str or None
        The layout of a weight, the reason why the leaf is no weight, or None if it is unknown.
    guessed : bool
        True if only a name speaks for it.
    """

    meaning: Layout | str | None
    guessed: bool = False


UNKNOWN = Reading(None)
IO = Reading(Layout("io"))

_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm")
# What wraps a layer and normalizes its weight: σ of the stored array is not that of the layer.
_NORMALIZERS = ("SpectralNorm", "WeightNorm")

_KERNEL = re.compile(r"kernel|w")  # the leaves of Flax's and Haiku's layers
_WEIGHT = re.compile(r"([Ww]|[Ww]eights?|kernel)(\d+|_\w+)?|\w+_(w|weight|kernel)|lora_[abAB]")
_BIAS = re.compile(r"(bias|b)(\d+|_\w+)?")
_EMBEDDING = re.compile(
    r"(\w+_)?(embed|embeds|embedder|embedding|embeddings|emb|wte|wpe)(_\d+)?"
    r"|embed_(tokens|positions|in|out)|pos|position|positions|positional|(cls|mask)_token"
    r"|Embed_\d+|embeddings?_\d+"
)
_NORM = re.compile(
    r"((\w+_)?norm|\w*(layer|batch|group|instance|rms)_?norm)(_?\d+)?", re.IGNORECASE
)
_TRANSPOSED = re.compile(r"transpose|deconv", re.IGNORECASE)
_CONVOLUTION = re.compile(r"conv", re.IGNORECASE)
_DEPTHWISE = re.compile(r"depthwise", re.IGNORECASE)
_ATTENTION = ("query", "key", "value", "out")


def is_weightlike(leaf: Any) -> bool:
    """Return True for an array with two axes or more: one that could be a weight."""
    return len(getattr(leaf, "shape", ())) > 1 and hasattr(leaf, "dtype")


def is_sparse(leaf: Any) -> bool:
    """Return True for a sparse array of JAX."""
    return any(kind.__module__.startswith("jax.experimental.sparse") for kind in type(leaf).mro())


def read_leaf(name: str, leaf: Any, owners: Sequence[Any], places: Places) -> Reading:
    """Return the meaning of an array with two axes or more.

    Parameters
    ----------
    name : str
    leaf : array
    owners : sequence of object
        The objects on the way to the leaf, the one that holds it last.
    places : mapping of path to mapping of name to shape
        The shapes of all leaves.
    """
    if is_sparse(leaf):
        return IO  # refused, once it is chosen
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return Reading(f"not trainable: {leaf.dtype}")
    attribute = name.rpartition("/")[2]
    if owners:
        reading = _equinox(owners, attribute, leaf.ndim) or _nnx(owners[-1], attribute, leaf.ndim)
        if reading is not None:
            return reading
    reading = _by_name(name, tuple(leaf.shape), places)
    own = bool(owners) and is_of(owners[-1], "equinox")
    return UNKNOWN if own and isinstance(reading.meaning, Layout) else reading


# Modules


def is_of(module: Any, package: str) -> bool:
    """Return True if a class of the module, or one that it derives from, is of the package."""
    return any(f"{kind.__module__}.".startswith(f"{package}.") for kind in type(module).mro())


def _kinds(module: Any, package: str) -> Iterator[str]:
    """Yield the names of the module's classes that are of the package: itself and its bases."""
    for kind in type(module).mro():
        if f"{kind.__module__}.".startswith(f"{package}."):
            yield kind.__name__


def _equinox(owners: Sequence[Any], attribute: str, ndim: int) -> Reading | None:
    for module in owners:
        for kind in _kinds(module, "equinox.nn"):
            if kind in _NORMALIZERS:
                return Reading(f"under {kind}, which normalizes it")
    kinds = list(_kinds(owners[-1], "equinox.nn"))
    if not kinds:
        return None
    return next(filter(None, (_equinox_layer(k, owners[-1], attribute, ndim) for k in kinds)), None)


def _equinox_layer(kind: str, module: Any, attribute: str, ndim: int) -> Reading | None:
    """Return the meaning of an attribute of a layer; axes before a layer's own are a stack."""
    if attribute.startswith("bias"):
        return Reading("a bias")
    if kind in ("Conv", "ConvTranspose") and attribute == "weight":
        axes = ("(go)i" if module.groups > 1 else "oi") + "k" * module.num_spatial_dims
        return Reading(
            Layout("s" * (ndim - 2 - module.num_spatial_dims) + axes, max(module.groups, 1))
        )
    if kind in ("Linear", "GRUCell", "LSTMCell") and attribute.startswith("weight"):
        return Reading(Layout("s" * (ndim - 2) + "oi"))
    if kind == "Embedding":
        return Reading("an embedding")
    if kind in _NORMS:
        return Reading("a norm")
    return Reading("slopes") if kind == "PReLU" else None


def _nnx(module: Any, attribute: str, ndim: int) -> Reading | None:
    """Return the meaning of a kernel of a Flax NNX layer, where the tree holds its modules."""
    kinds = list(_kinds(module, "flax.nnx"))
    if attribute != "kernel":
        return None
    if "Conv" in kinds or "ConvTranspose" in kinds:
        groups = getattr(module, "feature_group_count", 1)
        n_kernel = len(module.kernel_size)
        axes = "oi" if getattr(module, "transpose_kernel", False) else "io"
        axes = "i(go)" if groups > 1 else axes
        return Reading(Layout("s" * (ndim - n_kernel - 2) + "k" * n_kernel + axes, groups))
    if "LinearGeneral" in kinds:
        axes = "i" * len(module.axis) + "o" * len(module.out_features)
        return Reading(Layout("s" * (ndim - len(axes)) + axes))
    return None


def geometries(owners: Mapping[str, Any]) -> dict[str, Geometry]:
    """Return the stride and dilation of each weight whose module is a convolution.

    Parameters
    ----------
    owners : mapping of name to module
    """
    found = {}
    for name, module in owners.items():
        kinds = {*_kinds(module, "equinox.nn"), *_kinds(module, "flax.nnx")}
        if not kinds & {"Conv", "ConvTranspose"}:
            continue
        flax = is_of(module, "flax.nnx")
        numbers = (
            getattr(module, attribute)
            for attribute in (("strides", "kernel_dilation") if flax else ("stride", "dilation"))
        )
        stride, dilation = (1 if x is None else x for x in numbers)
        found[name] = Geometry(stride, dilation, "ConvTranspose" in kinds)
    return found


# Names and shapes


def _by_name(name: str, shape: Shape, places: Places) -> Reading:
    """Return the meaning of a leaf in a tree without modules."""
    place, _, last = name.rpartition("/")
    beside = {other: s for other, s in places[place].items() if other != last}
    if bias := _bias(last, shape, beside):
        return bias
    of_a_norm = bool(_NORM.fullmatch(_holder(place))) or {last, *beside} == {"scale", "bias"}
    if last in ("scale", "bias"):
        return Reading(f"a {last}", guessed=not of_a_norm)
    if last in ("embedding", "embeddings"):  # the leaves of Flax's and Haiku's Embed
        return Reading("an embedding")
    if _KERNEL.fullmatch(last):
        return IO if len(shape) == 2 else _kernel(name, shape, places)
    for component in (last, _holder(place)):
        if _EMBEDDING.fullmatch(component):
            return Reading("an embedding, by its name", guessed=True)
        if _NORM.fullmatch(component):
            return Reading("a norm, by its name", guessed=True)
    if len(shape) > 2:
        one = sum(size != 1 for size in shape) < 2
        return Reading("a vector: at most one axis is longer than 1") if one else UNKNOWN
    of_a_layer = any(len(s) == 1 and s[0] in shape for s in beside.values())
    return IO if of_a_layer or _WEIGHT.fullmatch(last) else UNKNOWN


def _bias(last: str, shape: Shape, beside: Mapping[str, Shape]) -> Reading | None:
    """Return the meaning of a bias: a leaf of this name beside a weight whose outputs it fits."""
    weights = [s for other, s in beside.items() if _WEIGHT.fullmatch(other)]
    if not (weights and _BIAS.fullmatch(last)):
        return None
    if last == "bias":
        return Reading("a bias")
    flat = sum(size != 1 for size in shape) < 2
    return Reading("a bias") if flat or any(_axes(s, shape) for s in weights) else None


def _kernel(name: str, shape: Shape, places: Places) -> Reading:
    """Return the meaning of a kernel of Flax or Haiku with three axes or more."""
    place, _, last = name.rpartition("/")
    if attention := _attention(place, shape, places):
        return Reading(Layout(attention))
    layer = _holder(place)
    if _DEPTHWISE.search(layer):
        return UNKNOWN  # the number of groups is not in the tree
    bias = places[place].get("bias" if last == "kernel" else "b")
    plain, transposed = ("k" * (len(shape) - 2) + channels for channels in ("io", "oi"))
    haiku = last == "w"
    likely = transposed if haiku and _TRANSPOSED.search(layer) else plain
    if bias is not None:
        found = _axes(shape, bias)
        if len(found) == 1:
            return Reading(Layout(found.pop()))
        if found != {plain, transposed}:
            return UNKNOWN  # a stack, or several output axes
        # As many inputs as outputs: only the name tells a transposed convolution.
        certain = bool(_CONVOLUTION.search(layer)) if haiku else not _TRANSPOSED.search(layer)
        return Reading(Layout(likely), guessed=not certain)
    if _CONVOLUTION.search(layer) or (haiku and _TRANSPOSED.search(layer)):
        return Reading(Layout(likely))
    return UNKNOWN if len(shape) == 3 else Reading(Layout(plain), guessed=True)


def _attention(place: str, shape: Shape, places: Places) -> str | None:
    """Return the axes of a kernel of Flax's attention, whose four layers are beside each other."""
    above, _, role = place.rpartition("/")
    if role not in _ATTENTION:
        return None
    prefix = f"{above}/" if above else ""
    kernels = [places.get(f"{prefix}{one}", {}).get("kernel", ()) for one in _ATTENTION]
    n_stack = len(shape) - 3
    if any(len(kernel) != len(shape) for kernel in kernels):
        return None
    query, out = kernels[0], kernels[-1]
    if query[-2:] != out[-3:-1] or query[:n_stack] != out[:n_stack]:
        return None  # four convolutions
    return "s" * n_stack + ("iio" if role == "out" else "ioo")


def _axes(kernel: Shape, bias: Shape) -> set[str]:
    """Return the axes that a kernel can have, given the shape of its bias.

    A bias has the axes of the stack, then those of the outputs. In a kernel the outputs are last,
    or, in some transposed convolutions, before the inputs.

    >>> _axes((3, 3, 4, 8), (8,)), _axes((8, 2, 4), (2, 4)), _axes((6, 3, 4), (6, 4))
    ({'kkio'}, {'ioo'}, {'sio'})
    """
    if len(bias) > 1 and set(bias[1:]) == {1}:  # Haiku, channels first
        return _axes(kernel, bias[:1])
    n, found = len(kernel), set()
    for n_stack in range(len(bias)):
        n_outputs = len(bias) - n_stack
        n_inputs = n - len(bias)
        if n_inputs > 0 and bias == kernel[:n_stack] + kernel[n - n_outputs :]:
            found.add("s" * n_stack + "k" * (n_inputs - 1) + "i" + "o" * n_outputs)
        n_kernel = n_inputs - 1
        if n_outputs == 1 and n_kernel > 0 and bias == (*kernel[:n_stack], kernel[-2]):
            found.add("s" * n_stack + "k" * n_kernel + "oi")
    return found


def _holder(place: str) -> str:
    """Return the last part of a path that is no number."""
    return next((part for part in reversed(place.split("/")) if not part.isdigit()), "")
