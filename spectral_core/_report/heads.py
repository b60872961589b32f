"""Measure attention head by head: parts of the queries, keys, values and outputs, and products.

WqᵀWk of a head decides its scores, and Wo·Wv is what it writes. Both have the rank of a head, so
they are measured by small cores and never formed. Biases are not in them, nor rotary positions,
nor the factor 1/√d of the scores. Heads that share keys use the shared ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .._layout import Layout
from .._plan import letters_of
from ..errors import check_int
from .adapters import read_beside, read_config
from .entry import CheckpointError, Stored, TensorEntry
from .layouts import Choice
from .lora import product_bounds
from .matrix import measure
from .result import HeadNorms
from .scales import matrices_of
from .texts import finite
from .tiling import Decode

CONFIG = "config.json"
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads")
_KEYS = ("num_key_value_heads", "n_head_kv", "num_kv_heads")
# Names of the modules of queries, keys, values and outputs, by the family that uses them.
_FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, BART, CLIP, GPT-J
    ("query", "key", "value"),  # BERT, ViT, Flax
    ("query_dense", "key_dense", "value_dense"),  # Keras, in its files
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("to_q", "to_k", "to_v"),  # diffusers
    ("wq", "wk", "wv"),  # Llama's own checkpoints
    ("q", "k", "v"),  # T5
)
_FUSED = ("c_attn", "qkv_proj", "qkv", "Wqkv", "query_key_value", "in_proj")
_OUTPUTS = (
    "o_proj",
    "out_proj",
    "out_lin",
    "to_out.0",
    "wo",
    "o",
    "out",
    "c_proj",
    "proj",
    "dense",
    "output.dense",
    "attention_output",
    "output_dense",
)
_END = re.compile(r"([._/]weight|/kernel|/vars/0)$")
# The parts of a layer, in the order of the table.
_PARTS = ("W_q", "W_k", "W_v", "W_o", "W_qᵀW_k", "W_oW_v")


class Heads(NamedTuple):
    """How many heads there are: given, or by a configuration."""

    given: int | None
    config: Mapping[str, Any]

    @classmethod
    def of(cls, source: Any, heads: bool | int, config: Any) -> Heads | None:
        """Return the numbers for a source, or None where heads are not asked for.

        Raises
        ------
        ArgumentError
            If ``heads`` is neither a bool nor an integer above 0.
        CheckpointError
            If nothing says the number of heads, or two things say it.
        """
        if heads is False and config is None:
            return None
        if heads is not True and heads is not False:
            heads = check_int(heads, "heads")
            if config is not None:
                raise CheckpointError(
                    "--heads N and --config both say the number of heads: leave one of them out"
                )
            return cls(heads, {})
        found = _config(source, config)
        if found is None:
            raise CheckpointError(
                f"the number of heads is not known: there is no {CONFIG} beside the weights; "
                "give --heads N or --config PATH"
            )
        chosen = cls(None, found)
        if not any(_count(part, _HEADS) for part in chosen.sections()):
            raise CheckpointError(
                f"the number of heads is not known: {CONFIG} has none of {', '.join(_HEADS)}; "
                "give --heads N"
            )
        return chosen

    def sections(self) -> list[Mapping[str, Any]]:
        """Return the configuration, and those of its parts."""
        parts = (self.config.get(key) for key in ("text_config", "vision_config"))
        return [self.config, *(part for part in parts if isinstance(part, Mapping))]

    def counts(self, name: str) -> tuple[int | None, int | None]:
        """Return the number of heads of queries and of keys in the layer of that name."""
        if self.given is not None:
            return self.given, None
        part = "vision_config" if "vision" in name or "visual" in name else "text_config"
        own = self.config.get(part)
        sections = [*([own] if isinstance(own, Mapping) else []), self.config]
        names = ("decoder_attention_heads", *_HEADS) if "decoder" in name else _HEADS
        heads = next((found for x in sections if (found := _count(x, names))), None)
        keys = next((found for x in sections if (found := _count(x, _KEYS))), None)
        return heads, keys


def _config(source: Any, config: Any) -> Mapping[str, Any] | None:
    if isinstance(config, Mapping):
        return config
    if config is not None:
        path = Path(config)
        path = path / CONFIG if path.is_dir() else path
        found = read_config(path)
        if found is None:
            raise CheckpointError(f"{path}: there is no such file")
        return found
    if isinstance(source, str | Path):
        return read_beside(source, CONFIG)
    as_dict = getattr(getattr(source, "config", None), "to_dict", None)  # a model of transformers
    found = as_dict() if callable(as_dict) else None
    return found if isinstance(found, Mapping) else None


def _count(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


class _Layer(NamedTuple):
    """The matrices of an attention layer: one fused, or three, and the output."""

    name: str
    parts: tuple[TensorEntry, ...]
    output: TensorEntry | None


_Source: TypeAlias = tuple[Any, Decode]  # a matrix, and how its parts are decoded


class _Piece(NamedTuple):
    """The rows of one role: head h begins at ``starts[h]``."""

    source: _Source
    starts: list[int]
    size: int

    def rows(self, head: int) -> Stored:
        """Return the rows of a head in float64."""
        start = self.starts[head]
        matrix, decode = self.source
        return decode(matrix[start : start + self.size])


def check_attention(entries: Iterable[TensorEntry], heads: Heads | None) -> None:
    """Raise `CheckpointError` if heads are asked for where no layer has names of attention."""
    if heads is not None and next(_layers(entries), None) is None:
        raise CheckpointError(
            "no layer of attention is known by the names of its weights: leave --heads out"
        )


def head_norms(
    entries: Iterable[TensorEntry], heads: Heads, choose: Callable[[TensorEntry], Choice]
) -> tuple[list[HeadNorms], dict[str, str]]:
    """Return the norms of the heads, and the reason for each layer that has none."""
    found: list[HeadNorms] = []
    left_out: dict[str, str] = {}
    for layer in _layers(entries):
        pieces = _pieces(layer, heads.counts(layer.name), choose)
        if isinstance(pieces, str):
            left_out[layer.name] = pieces
        else:
            found += _measured(layer.name, *pieces)
    return found, left_out


def _layers(entries: Iterable[TensorEntry]) -> Iterator[_Layer]:
    named = {_END.sub("", x.name): x for x in entries if len(x.shape) in (2, 3) and not x.skip}
    for name, entry in named.items():
        stem, separator, own = _split(name)
        if own in _FUSED:
            yield _Layer(stem, (entry,), _output(named, stem, separator))
        for family in _FAMILIES:
            parts = [named.get(f"{stem}{separator}{x}") for x in family]
            if own == family[0] and None not in parts:
                yield _Layer(stem, tuple(x for x in parts if x), _output(named, stem, separator))


def _split(name: str) -> tuple[str, str, str]:
    """Return the name of the layer, the separator, and the name of the module in it."""
    place = max(name.rfind("."), name.rfind("/"))
    return (name[:place], name[place], name[place + 1 :]) if place >= 0 else ("", "", name)


def _output(named: Mapping[str, TensorEntry], stem: str, separator: str) -> TensorEntry | None:
    outer = _split(stem)[0]
    for start in (stem, outer) if _split(stem)[2] in ("self", "attention") else (stem,):
        for name in _OUTPUTS:
            found = named.get(f"{start}{separator}{name}")
            if found is not None:
                return found
    return None


def _matrix(entry: TensorEntry, choice: Choice) -> _Source | str:
    """Return the matrix from inputs to outputs, whole."""
    if choice.layout is None:
        return choice.note
    if not entry.size:
        return f"{entry.name} is empty"
    axes = letters_of(choice.layout.axes).replace("g", "")
    if set(axes) != {"i", "o"}:
        return f"the layout {choice.layout.axes} of {entry.name} has no rows of heads"
    matrix, decode, _ = matrices_of(entry, Layout(axes))
    return matrix, decode


_Found = tuple[list[_Piece], _Piece | None]


def _pieces(
    layer: _Layer, counts: tuple[int | None, int | None], choose: Callable[[TensorEntry], Choice]
) -> _Found | str:
    """Return where the heads of queries, keys, values and the output are, or why not."""
    heads, keys = counts
    if heads is None:
        return "the configuration has no number of heads for it"
    matrices = []
    for entry in (*layer.parts, *([layer.output] if layer.output else [])):
        found = _matrix(entry, choose(entry))
        if isinstance(found, str):
            return found
        matrices.append(found)
    output = matrices.pop() if layer.output else None
    wide = int(output[0].shape[1]) if output else None
    if len(matrices) == 1:
        pieces = _fused(layer.parts[0].name, matrices[0], heads, keys, wide)
    else:
        pieces = _separate(matrices, heads)
    if isinstance(pieces, str) or output is None:
        return pieces if isinstance(pieces, str) else (pieces, None)
    size = pieces[2].size
    if wide != heads * size:
        return f"the output has {wide} inputs, not {heads} heads of {size}"
    return pieces, _Piece((output[0].T, output[1]), [h * size for h in range(heads)], size)


def _separate(matrices: list[_Source], heads: int) -> list[_Piece] | str:
    queries, keys, values = (int(matrix.shape[0]) for matrix, _ in matrices)
    size = queries // heads
    if queries != heads * size or not size or keys % size or heads % (keys // size or 1):
        return f"{queries} rows of queries and {keys} of keys do not fit {heads} heads"
    count = keys // size
    if not count or values % count:
        return f"{values} rows of values do not fit {count} heads of keys"
    each = zip(matrices, (heads, count, count), (size, size, values // count), strict=True)
    return [_Piece(matrix, [h * n for h in range(number)], n) for matrix, number, n in each]


def _fused(
    name: str, matrix: _Source, heads: int, keys: int | None, wide: int | None
) -> list[_Piece] | str:
    """Return queries, keys and values of one matrix: one after another, or head by head."""
    rows = int(matrix[0].shape[0])
    size = wide // heads if wide else rows // (3 * heads)
    count = keys or (heads if rows == 3 * heads * size else (rows // (size or 1) - heads) // 2)
    if not size or count < 1 or rows != (heads + 2 * count) * size or heads % count:
        return f"{rows} rows of queries, keys and values do not fit {heads} heads"
    if "query_key_value" in name:  # GPT-NeoX and BLOOM: the three of a head are together
        if count != heads:
            return "queries of several heads between shared keys are not taken apart"
        each = [[(3 * h + part) * size for h in range(heads)] for part in range(3)]
    else:
        firsts = (0, heads * size, (heads + count) * size)
        numbers = (heads, count, count)
        each = [
            [first + h * size for h in range(number)]
            for first, number in zip(firsts, numbers, strict=True)
        ]
    return [_Piece(matrix, starts, size) for starts in each]


def _measured(name: str, pieces: list[_Piece], output: _Piece | None) -> Iterator[HeadNorms]:
    """Yield the norms of a layer: of each matrix, and of the products."""
    queries, keys, values = pieces
    share = len(queries.starts) // len(keys.starts)
    columns: dict[str, list[tuple[float, float, float]]] = {part: [] for part in _PARTS}
    shapes: dict[str, tuple[int, int]] = {}

    def add(part: str, found: tuple[float, float, float], shape: tuple[int, ...]) -> None:
        columns[part].append(found)
        shapes[part] = (shape[0], shape[1])

    for j in range(len(keys.starts)):
        K, V = keys.rows(j), values.rows(j)
        add("W_k", _bounds(K), K.shape)
        add("W_v", _bounds(V), V.shape)
        for h in range(j * share, (j + 1) * share):
            Q = queries.rows(h)
            add("W_q", _bounds(Q), Q.shape)
            add("W_qᵀW_k", product_bounds(Q.conj().T, K), (Q.shape[1], K.shape[1]))
            if output is not None:
                out = output.rows(h).T
                add("W_o", _bounds(out), out.shape)
                add("W_oW_v", product_bounds(out, V), (out.shape[0], V.shape[1]))
    for part in _PARTS:
        if columns[part]:
            sigma, lower, upper = (
                tuple(map(finite, each)) for each in zip(*columns[part], strict=True)
            )
            yield HeadNorms(name, part, *shapes[part], sigma, lower, upper)


def _bounds(matrix: Stored) -> tuple[float, float, float]:
    found = measure(matrix, np.asarray, proven=True)  # a head of 256 × 3,072 is large already
    return found.sigma, found.lower, found.upper
