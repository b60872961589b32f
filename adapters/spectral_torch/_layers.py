"""Read a layer's parameter: its layout if it is a weight, or the reason why it is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from spectral_core import Layout

# Their layers are known by name: none of these packages is imported here.
_LIBRARIES = ("torch", "transformers", "timm", "torchvision", "torchaudio", "diffusers", "peft")

_RECURRENT = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?$")
_ATTENTION = re.compile(r"(in|q|k|v)_proj_weight$")
_LORA = re.compile(r"lora_(embedding_)?[AB]$")
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
)

# Layers of `transformers`, by class and attribute. "soi" is one matrix an expert, a codebook or a
# head: entry s is multiplied as `x @ weight[s].T`, that of "sio" as `x @ weight[s]`.
_TRANSFORMERS: dict[str, dict[str, str]] = {
    "Conv1D": {"weight": "io"},
    "GptOssExperts": {"gate_up_proj": "sio", "down_proj": "sio"},
    "Llama4TextExperts": {"gate_up_proj": "sio", "down_proj": "sio"},
    "Qwen3VLMoeTextExperts": {"gate_up_proj": "sio", "down_proj": "sio"},
    "InklingSharedExperts": dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "soi"),
    "JetMoeParallelExperts": {"weight": "soi"},
    "GraniteMoeParallelExperts": {"weight": "soi"},
    "GraniteMoeHybridParallelExperts": {"weight": "soi"},
    "GraniteMoeSharedParallelExperts": {"weight": "soi"},
    "AriaGroupedExpertsGemm": {"weight": "sio"},
    "MoshiFlexibleLinear": {"weight": "soi"},
    "KyutaiSpeechToTextFlexibleLinear": {"weight": "soi"},
    "CsmCodebooksHead": {"weight": "sio"},
    "GroupedLinearLayer": {"weight": "sio"},
    "RecurrentGemmaRglru": {"input_gate_weight": "sio", "recurrent_gate_weight": "sio"},
    "ZambaMambaMixer": {"x_proj_weight": "soi", "dt_proj_weight": "soi"},
    "XLNetRelativeAttention": {**dict.fromkeys("qkvr", "ioo"), "o": "oii"},
    "FunnelRelMultiheadAttention": {"r_kernel": "ioo"},
}
_EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")

# The last word of an attribute's name, but for these, tells what is no weight.
_ENDINGS = {*"hwxytkvu", "rel", "table", "window", "parameter", "1d", "2d"}
_NO_WEIGHTS = {
    **dict.fromkeys(("bias", "biases"), "a bias"),
    **dict.fromkeys(
        ("pos", "position", "positions", "token", "tokens", "codebook"), "an embedding"
    ),
    **dict.fromkeys(("emb", "embed", "embeds", "embedding", "embeddings"), "an embedding"),
    **dict.fromkeys(("scale", "scales", "scaling", "gamma", "gammas", "beta"), "a scale"),
}
_NO_WEIGHTS_OF_LIBRARIES = {
    **dict.fromkeys(("query", "probe", "latents", "prompt", "codevectors"), "an embedding"),
    **dict.fromkeys(("rpb", "enc", "encoding"), "an embedding"),
    "d": "a scale",
}


class Reading(NamedTuple):
    """Say how a parameter is read.

    Attributes
    ----------
    found : Layout, str or None
        The layout of a weight, the reason why it is no weight, or None where nothing is known.
    from_name : bool
        True if the reason is a guess from the parameter's name.
    """

    found: Layout | str | None
    from_name: bool = False


def read_layer(module: nn.Module, attribute: str, parameter: Tensor) -> Reading:
    """Return how a module's parameter is read, by the module's class and then by its name."""
    found = _of_torch(module, attribute) or _of_lora(attribute)
    if found is None:
        found = _of_transformers(module, attribute, parameter)
    if isinstance(found, str) or (found is not None and found.ndim == parameter.ndim):
        return Reading(found)
    if sum(size != 1 for size in parameter.shape) < 2:
        return Reading("a vector")
    return _by_names([attribute], type(module))


def read_held(module: nn.Module, attribute: str, key: str, parameter: Tensor) -> Reading:
    """Return how a parameter in a module's list or dict of parameters is read."""
    lora = _of_lora(attribute)
    if lora is not None and parameter.ndim == 2:
        return Reading(lora)
    if sum(size != 1 for size in parameter.shape) < 2:
        return Reading("a vector")
    return _by_names([key, attribute], type(module))


def _of_torch(module: nn.Module, attribute: str) -> Layout | str | None:
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return Layout("oi") if _RECURRENT.match(attribute) else None
    if isinstance(module, nn.MultiheadAttention):
        return Layout("oi") if _ATTENTION.match(attribute) else None
    if isinstance(module, _NORMS):
        return "a scale" if attribute in ("weight", "bias") else None
    if attribute != "weight":
        return None
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "an embedding"
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


def _of_lora(attribute: str) -> Layout | str | None:
    """Read low-rank factors that are parameters, not layers."""
    if not _LORA.match(attribute):
        return None
    return "an embedding" if attribute == "lora_embedding_A" else Layout("oi")


def _of_transformers(module: nn.Module, attribute: str, parameter: Tensor) -> Layout | str | None:
    names = [kind.__name__ for kind in type(module).__mro__ if _package(kind) == "transformers"]
    if not names:
        return None
    transposed = getattr(module, "is_transposed", None)
    if attribute in _EXPERTS and isinstance(transposed, bool):
        return Layout("sio" if transposed else "soi")
    for name in names:
        axes = _TRANSFORMERS.get(name, {}).get(attribute)
        if axes is not None:
            return Layout(axes)
    if names[0] == "DbrxExpertGLU" and attribute in ("w1", "v1", "w2"):
        experts = int(module.moe_num_experts)  # type: ignore[arg-type]
        return Layout("(gi)o" if attribute == "w2" else "(go)i", experts)
    if attribute == "A_log":  # exp(A_log) multiplies a state entry by entry
        return "rates of decay"
    if parameter.ndim == 2 and attribute == "weight" and re.search("Router|Gate", names[0]):
        return Layout("oi")
    if parameter.ndim == 2 and re.search(r"(^|_)proj(ection)?(_weight)?$", attribute):
        return Layout("oi")
    return None


def _by_names(attributes: Sequence[str], kind: type) -> Reading:
    library = _package(kind) in _LIBRARIES and not issubclass(kind, nn.ModuleDict | nn.ModuleList)
    if library and re.search(r"Embeddings?$", kind.__name__):
        return Reading("an embedding")
    reasons = (_NO_WEIGHTS.get(_last_word(attribute)) for attribute in attributes)
    reason = next(filter(None, reasons), None)
    if reason is None and library:
        reason = _NO_WEIGHTS_OF_LIBRARIES.get(_last_word(attributes[0]))
    return Reading(reason, reason is not None and not library)


def _last_word(attribute: str) -> str:
    words = attribute.lower().split("_")
    while len(words) > 1 and words[-1] in _ENDINGS:
        words.pop()
    return words[-1]


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]
