"""Guess the layout of a tensor from its name, its shape, and the framework that wrote the file.

A file says nothing about axes. The framework's convention is certain for most layers; what else is
read into a name is marked as a guess. A pattern of the user comes before all rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from .._layout import Layout, as_layout, default_layout, stack_layout
from ..errors import ArgumentError, NamesError
from .files import short

SKIP = "skip"


class Choice(NamedTuple):
    """A layout, whether it is guessed, and why a tensor has none."""

    layout: Layout | None
    guessed: bool = False
    note: str = ""

    @property
    def axes(self) -> str:
        """The layout as it is written: "oihw", or "(go)i:3" for three groups; "" for none."""
        if self.layout is None:
            return ""
        return self.layout.axes + (f":{self.layout.groups}" if self.layout.groups > 1 else "")


Shape = tuple[int, ...]
_TABLE = re.compile(
    r"(^|[._/])(wte|wpe|embed|embed_(in|tokens|positions)|embeddings?|embd|shared"
    r"|relative_attention_bias)[._/]\w+$"
    r"|(^|[._/])(pos_embed|pos_embedding|position_embeddings?|positional_embedding)$"
)
_BIAS = re.compile(r"(^|[._/])(\w*_)?bias(_table)?(:0)?$")
_HEAD_BIAS = re.compile(r"(^|/)_?(query|key|value)_dense/vars/1$")  # of Keras, with a row a head
_TOKEN = re.compile(r"(^|[._/])(\w+_token|(query|prompt)_tokens)$")
_LOGARITHM = re.compile(r"(^|\.)A_log$")  # of Mamba
_LENGTHS = re.compile(r"(weight_g|parametrizations\.weight\.original0)$")
_DIRECTIONS = re.compile(r"(weight_v|parametrizations\.weight\.original1)$")
_KERNEL = re.compile(r"(^|[./])(kernel|embedding)$")  # how Flax calls them, in files of any kind
_GATE_UP = re.compile(r"gate_up_proj\.weight$")
_FUSED = re.compile(r"(in_proj_weight|qkv\w{0,40}\.weight|Wqkv\.weight)$")
_MIXED = re.compile(r"query_key_value\.weight$")  # GPT-NeoX and BLOOM: a head after the other
_CONV1D = re.compile(r"(^|\.)h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
_EXPERTS = re.compile(r"expert")
_TRANSPOSED = re.compile(r"(deconv|transpose|upconv|ups\.\d+\.)", re.I)
_DEPTHWISE = re.compile(r"(depthwise|dwconv|\bdw\b|_dw\.)", re.I)
_OPTIMIZER = re.compile(
    r"^(optim\w*|opt_state|adam\w*|lr_scheduler\w*|scaler|master_?weights)[._/]"
)
_COMPANION = re.compile(r"(weight_scale(_inv)?|_scale|scales|absmax|quant_map|zeros|g_idx)$")


# What has two axes or more and is no matrix of a layer.
_NO_MATRICES = {
    _OPTIMIZER: "state of an optimizer",
    _COMPANION: "scales of a quantized weight",
    _BIAS: "a bias, not the matrix of a layer",
    _HEAD_BIAS: "a bias, not the matrix of a layer",
    _TOKEN: "a token, not the matrix of a layer",
    _LOGARITHM: "logarithms of a state space, not the matrix of a layer",
    _LENGTHS: "lengths of a weight normalization",
}


def parsed(text: str) -> tuple[str, Layout | None]:
    """Return the pattern and the layout of "PATTERN=AXES", "PATTERN=AXES:GROUPS" or "…=skip".

    >>> parsed("*.c_attn.weight=i(go):3")
    ('*.c_attn.weight', Layout(axes='i(go)', groups=3))
    >>> parsed("*.bias=skip")
    ('*.bias', None)
    """
    pattern, equals, axes = text.rpartition("=")
    if not equals or not pattern:
        raise ArgumentError(f"a layout is PATTERN=AXES, such as '*.conv.weight=oihw', not {text!r}")
    if axes == SKIP:
        return pattern, None
    axes, colon, groups = axes.partition(":")
    if colon and not groups.isdecimal():
        raise ArgumentError(f"the number of groups in {text!r} is no number")
    return pattern, Layout(axes, int(groups) if colon else 1)


def check_patterns(own: Mapping[str, Layout | str | None], names: Iterable[str]) -> None:
    """Raise an error for a pattern that no name fits, which is most often a typing error.

    Raises
    ------
    NamesError
        If a pattern fits none of the names. The message has the pattern and a name.
    """
    known = list(names)
    for pattern in own:
        if not any(_fits(name, pattern) for name in known):
            such = f", such as {short(known[0])}" if known else ""
            raise NamesError(
                f"layouts: pattern {pattern!r} fits none of the {len(known):,} names{such}. A "
                "pattern is a whole name, in which * stands for any text"
            )


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # a name may contain brackets itself


def layout_of(
    name: str,
    shape: Shape,
    kind: str,
    own: Mapping[str, Layout | str | None],
    known: Mapping[str, Layout] | None = None,
) -> Choice:
    """Return the layout of a tensor with two axes or more.

    Patterns of the user (``own``) come first, then the layouts that layers of a live model have
    (``known``), then the rules.

    >>> layout_of("features.0.weight", (8, 3, 5, 5), "torch", {}).layout.axes
    'oikk'
    >>> layout_of("params/Conv_0/kernel", (5, 5, 3, 8), "flax", {}).layout.axes
    'hwio'
    >>> layout_of("h.0.attn.c_attn.weight", (8, 24), "torch", {}).layout
    Layout(axes='i(go)', groups=3)
    """
    for pattern, chosen in own.items():
        if _fits(name, pattern):
            if chosen is None or chosen == SKIP:
                return Choice(None, note="left out by a pattern")
            layout = as_layout(chosen)
            if layout.ndim != len(shape):
                raise ArgumentError(
                    f"layout {layout.axes!r} of pattern {pattern!r} does not fit {short(name)} of "
                    f"shape {shape}"
                )
            return Choice(layout)
    rule = _ruled(name, shape, kind)
    if not known or name not in known:
        return rule
    # A layer says which axis is the output, but not that its outputs are several maps.
    fused = rule.layout is not None and (rule.layout.groups > 1 or rule.note)
    return rule if fused and len(shape) == 2 else Choice(known[name])


def _ruled(name: str, shape: Shape, kind: str) -> Choice:
    """Return what the convention of a framework and the name say."""
    for pattern, reason in _NO_MATRICES.items():
        if pattern.search(name):
            return Choice(None, note=reason)
    if kind in ("flax", "keras"):
        return _channels_last(name, shape, kind)
    if _KERNEL.search(name):
        found = _channels_last(name, shape, "flax")
        return found._replace(guessed=True)
    found = _channels_first(name, shape, guessed=kind == "numpy")
    if _DIRECTIONS.search(name) and found.layout is not None:
        return Choice(found.layout, True, "without the lengths of its weight normalization")
    return found


def _channels_first(name: str, shape: Shape, *, guessed: bool) -> Choice:
    """Return the layout in the convention of PyTorch: outputs come first."""
    ndim = len(shape)
    if ndim == 2:
        if _TABLE.search(name):
            return Choice(Layout("io"), guessed)  # a table has a row for each input
        if _CONV1D.search(name):
            return _gpt2(name, shape, guessed=guessed)
        if _MIXED.search(name):
            return Choice(Layout("oi"), True, "fused query, key and value, not taken apart")
        if _FUSED.search(name):
            if shape[0] == 3 * shape[1]:
                return Choice(Layout("(go)i", 3), guessed, "query, key and value")
            return Choice(Layout("oi"), True, "fused query, key and value, not taken apart")
        if _GATE_UP.search(name) and shape[0] % 2 == 0:
            return Choice(Layout("(go)i", 2), guessed, "gate and up")
        return Choice(Layout("oi"), guessed)
    if ndim == 3 and shape[0] == 1 and _TABLE.search(name):
        return Choice(Layout("sio"), guessed, "positions")
    if _EXPERTS.search(name):
        return Choice(stack_layout(ndim), True, "one matrix an expert")
    if ndim > 5:
        return Choice(None, note=f"{ndim} axes: give a layout")
    if _TRANSPOSED.search(name):
        return Choice(Layout("io" + "k" * (ndim - 2)), True, "a transposed convolution")
    if _DEPTHWISE.search(name) and shape[1] == 1 < shape[0]:
        return Choice(Layout("(go)i" + "k" * (ndim - 2), shape[0]), True, "depthwise")
    # A kernel has few taps. Three axes of which the last is long are rather a stack of matrices.
    unusual = max(shape[2:]) > 31 or (shape[1] == 1 < shape[0])
    return Choice(default_layout(ndim), guessed or unusual)


def _gpt2(name: str, shape: Shape, *, guessed: bool) -> Choice:
    """Return the layout of a layer of GPT-2: transposed in its own code, not in copies of it."""
    wide = shape[1] > shape[0]
    if name.endswith("c_attn.weight"):
        if shape[1] == 3 * shape[0]:
            return Choice(Layout("i(go)", 3), guessed)
        if shape[0] == 3 * shape[1]:
            return Choice(Layout("(go)i", 3), guessed, "query, key and value")
        return Choice(Layout("io"), True)
    if shape[0] == shape[1]:
        return Choice(Layout("io"), True)
    grows = "c_fc" in name
    return Choice(Layout("io" if wide == grows else "oi"), guessed)


_ATTENTION = re.compile(  # of Flax, and of Keras in its files
    r"(^|/)_?(query|key|value|(?P<out>(attention_)?out(put)?))(_dense)?/(kernel|vars/0)$"
)
_KERNELS = {2: "io", 3: "kio", 4: "hwio", 5: "dhwio"}


def _channels_last(name: str, shape: Shape, kind: str) -> Choice:
    """Return the layout in the convention of Flax and Keras: outputs come last."""
    ndim = len(shape)
    attention = _ATTENTION.search(name)
    if ndim == 3 and attention:
        return Choice(Layout("iio" if attention["out"] else "ioo"), note="all heads together")
    if ndim not in _KERNELS:
        return Choice(None, note=f"{ndim} axes: give a layout")
    if ndim > 3 and _DEPTHWISE.search(name):
        if shape[-2] == 1:  # Flax
            return Choice(Layout("k" * (ndim - 2) + "i(go)", shape[-1]), True, "depthwise")
        return Choice(Layout("k" * (ndim - 2) + "(gi)o", shape[-2]), True, "depthwise")
    if kind == "keras" and ndim > 2 and _TRANSPOSED.search(name):  # Flax keeps inputs, outputs
        return Choice(Layout("k" * (ndim - 2) + "oi"), True, "a transposed convolution")
    # Embeddings, dense layers and convolutions all have their outputs last. The kernel of a
    # recurrent layer joins its gates, which is one matrix of the map to all gates. A Keras file
    # names a layer by its class, or by its model's attribute: that says nothing about the class.
    plain = "conv" in name.lower() and "separable" not in name.lower()
    return Choice(Layout(_KERNELS[ndim]), ndim == 3 or (kind == "keras" and ndim > 3 and not plain))
