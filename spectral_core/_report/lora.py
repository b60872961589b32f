"""Measure low-rank updates: the product of the two factors, and the weight that it changes.

Neither is formed in memory. B·A is measured by the cores of the factors. W + s·B·A is decoded tile
by tile as W is, with the update added to each tile.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any, NamedTuple

import numpy as np

from .._layout import Layout
from .._operator import product_norm
from .._plan import letters_of
from .adapters import Pair, Scale
from .entry import CheckpointError, Stored, TensorEntry
from .files import short
from .layouts import Choice
from .matrix import Numbers, measure
from .numbers import stored_dtype, widened
from .result import Row
from .rows import row_of
from .scales import matrices_of
from .texts import finite
from .tiling import Decode

# PEFT, and the names of kohya's scripts. The first factor maps inputs to the rank.
_DOWN = re.compile(r"\.(lora_A|lora_down|lora_embedding_A)(\.\w+)?\.weight$|\.(lora_\w*A)(\.\w+)?$")
_MOST_RANK = 4096  # the products of a factor with itself have the square of it
_UP = {"lora_A": "lora_B", "lora_down": "lora_up", "lora_embedding_A": "lora_embedding_B"}
_EPS = 2.0**-52
_PREFIX = "base_model.model."

Chosen = Callable[[TensorEntry], Choice]


class Base(NamedTuple):
    """The weights that updates belong to, by name, and how they are read and measured."""

    entries: Mapping[str, TensorEntry]
    choose: Chosen
    measure: Callable[[Any, Decode], Numbers]


@dataclass(frozen=True)
class Updated:
    """The matrix W + B·A, of which parts of the rows are decoded; see `scales.Scaled`."""

    stored: Any
    decode: Decode
    B: Stored
    A: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self.stored.shape[0]), int(self.stored.shape[1]))

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def T(self) -> Updated:  # noqa: N802 as of an array
        return replace(self, stored=self.stored.T, B=self.A.T, A=self.B.T)

    def __getitem__(self, rows: slice) -> Updated:
        return replace(self, stored=self.stored[rows], B=self.B[rows])

    def numbers(self) -> Stored:
        """Return the sum in float64."""
        return self.decode(self.stored) + self.B @ self.A


def found_pairs(entries: Iterable[TensorEntry]) -> list[Pair]:
    """Return the factors that belong together. Kernels are flattened to matrices."""
    named = {entry.name: entry for entry in entries}
    readable = {name: entry for name, entry in named.items() if not entry.skip}
    found = []
    for name, down in readable.items():
        match = _DOWN.search(name)
        part = match and (match[1] or match[3])
        if match is None or part not in _UP:
            continue
        stem = name[: match.start()]
        up = readable.get(stem + match[0].replace(part, _UP[part]))
        if up is None or not _fit(up.shape, down.shape):
            continue
        magnitude = any(
            f"{stem}.lora_magnitude_vector{end}" in readable
            for end in ("", ".weight", match[2] or "")
        )
        alpha = named.get(f"{stem}.alpha")  # it may be an integer, which no weight is
        if alpha is not None and stored_dtype(alpha.dtype) is None:
            alpha = None
        middle = f"{stem}.lora_mid.weight" in named
        adapter = (match[2] or match[4] or "").removeprefix(".")
        pair = Pair(stem, up, down, alpha, embedding=part.endswith("ding_A"), adapter=adapter)
        found.append(pair._replace(magnitude=magnitude, middle=middle))
    several = {name for name, count in Counter(pair.name for pair in found).items() if count > 1}
    return [x if x.name in several else x._replace(adapter="") for x in found]


def _fit(up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    """Return True if the shapes are (m, r, 1, …) and (r, …)."""
    if len(up) < 2 or len(down) < 2 or 0 in (*up, *down):
        return False
    return up[1] == down[0] <= _MOST_RANK and prod(up[2:]) == 1


def check_pairs(entries: Iterable[TensorEntry], scale: Scale, base: Any) -> None:
    """Raise `CheckpointError` if a base or a scale is given where there is no update."""
    given = [("--base", base), ("--lora-scale", scale.given)]
    flags = [flag for flag, value in given if value is not None]
    if flags and not found_pairs(entries):
        raise CheckpointError(f"the source has no factors of LoRA: leave {' and '.join(flags)} out")


def pairs(
    entries: Iterable[TensorEntry], scale: Scale, base: Base | None, skipped: dict[str, str]
) -> list[Row]:
    """Return a row for the update of each pair of factors, and for the weight with its update.

    A pair that fits no weight of the base, or is not the whole update, gets its reason in
    ``skipped``.
    """
    rows = []
    named = None if base is None else _Names(base.entries)
    for pair in found_pairs(entries):
        if pair.middle:
            skipped[pair.titled("s·B·A")] = "a factor lora_mid is between B and A"
            continue
        s = scale.of(pair)
        B, A = _factors(pair)
        rows.append(_row(pair, s, B, A))
        if base is None or named is None:
            continue
        if s is None:
            raise CheckpointError(
                f"W + s·B·A of {short(pair.name)} needs the scale s: there is no "
                "adapter_config.json with lora_alpha beside the file; give --lora-scale S"
            )
        entry = named.of(pair.name)
        reason = "the base has no such weight" if entry is None else ""
        if entry is not None:
            row, reason = _sum(pair, s, B, A, entry, base)
            rows += [] if row is None else [row]
        if reason:
            skipped[pair.titled("W + s·B·A")] = reason
    return rows


def _factors(pair: Pair) -> tuple[Stored, Stored]:
    """Return B (m, r) and A (r, n) in float64."""
    B, A = (
        np.ascontiguousarray(widened(np.asarray(x.load()), x.dtype)).reshape(x.shape[0], -1)
        for x in (pair.up, pair.down)
    )
    kind = np.result_type(A, B)
    return B.astype(kind, copy=False), A.astype(kind, copy=False)


def product_bounds(B: Stored, A: Stored) -> tuple[float, float, float]:
    """Return σ₁(B·A) and its bounds, from the triangular factors of both. NaN if not finite."""
    if not (np.isfinite(B).all() and np.isfinite(A).all()):
        return np.nan, np.nan, np.nan
    found = product_norm(B, A)
    sigma = float(found.sigma)
    # `error_bound` is that of the core; the factorizations add roundings of ‖A‖·‖B‖.
    lengths = float(np.linalg.norm(A)) * float(np.linalg.norm(B))
    error = float(found.error_bound) + 64 * (B.shape[0] + A.shape[1]) * _EPS * lengths
    return sigma, max(sigma - error, 0.0), sigma + error


def _row(pair: Pair, s: float | None, B: Stored, A: Stored) -> Row:
    """Return the row of s·B·A, or of B·A where s is not known."""
    m, n = B.shape[0], A.shape[1]
    nonfinite = int((~np.isfinite(B)).sum() + (~np.isfinite(A)).sum())
    sigma, lower, upper = product_bounds(B if s is None else s * B, A)
    frobenius = np.nan
    if not nonfinite:
        product = np.trace((B.conj().T @ B) @ (A @ A.conj().T)).real
        frobenius = max(float(product), 0.0) ** 0.5 * abs(1.0 if s is None else s)
    about = f"low-rank update of rank {A.shape[0]}"
    return Row(
        name=pair.titled("B·A" if s is None else "s·B·A"),
        tensor=pair.up.name,
        shape=(m, n),
        dtype=pair.up.dtype,
        layout="oi",
        guessed=False,
        rows=m,
        columns=n,
        sigma=finite(sigma),
        lower=finite(lower),
        upper=finite(upper),
        method="" if nonfinite else "product",
        ratio=None,
        frobenius=finite(frobenius),
        stable_rank=finite((frobenius / sigma) ** 2) if sigma else None,
        relative=finite(sigma / (m / n) ** 0.5),
        convolution_lower=None,
        convolution_upper=None,
        largest=None,
        zeros=1.0 if sigma == 0 else 0.0,
        dead_rows=0,
        dead_columns=0,
        nonfinite=nonfinite,
        note=f"{about}, without its scale" if s is None else f"{about}, with s = {s:g}",
    )


def _sum(
    pair: Pair, s: float, B: Stored, A: Stored, entry: TensorEntry, base: Base
) -> tuple[Row | None, str]:
    """Return the row of W + s·B·A, or the reason why there is none."""
    choice = base.choose(entry)
    if entry.skip or choice.layout is None:
        return None, entry.skip or choice.note
    if not entry.size:
        return None, "the base's weight is empty"
    axes = letters_of(choice.layout.axes).replace("g", "")
    if sorted(axes[:2]) != ["i", "o"]:
        return None, f"the base's weight has the layout {choice.layout.axes}"
    if pair.embedding:  # its factors are those of the table's transpose
        axes = "io"
    W, decode, note = matrices_of(entry, Layout(axes))
    m, n = W.shape
    if (m, n) != (B.shape[0], A.shape[1]):
        return None, f"the base's matrix has shape {(m, n)}, not {(B.shape[0], A.shape[1])}"
    alone = measure(W, decode)
    found = base.measure(Updated(W, decode, s * B, A), Updated.numbers)
    # Each element of the sum has a rounding of the product of r terms, of s·B and of the addition.
    lengths = [float(np.linalg.norm(x)) for x in (B, A)]
    error = (A.shape[0] + 4) * _EPS * (alone.frobenius + abs(s) * lengths[0] * lengths[1])
    about = [note, f"s = {s:g}, rank {A.shape[0]}; σ₁ of W alone is {alone.sigma:.5g}"]
    if pair.magnitude:
        about.append("DoRA: without its magnitudes")
    choice = Choice(Layout(axes), choice.guessed, "; ".join(x for x in about if x))
    row = row_of(pair.titled("W + s·B·A"), entry, choice, (m, n), found)
    if row.lower is not None and row.upper is not None:
        # An error that is not finite leaves no bound but zero.
        lower = max(row.lower - error, 0.0) if isfinite(error) else 0.0
        row = replace(row, lower=lower, upper=finite(row.upper + error))
    return row, ""


class _Names:
    """Weights of a base by the names that adapters have for them."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        self._full: dict[str, TensorEntry] = {}
        self._inner: dict[str, TensorEntry | None] = {}  # without the first part of the name
        self._flat: dict[str, TensorEntry | None] = {}  # as kohya's scripts write names
        for name, entry in entries.items():
            stem = name.removesuffix(".weight")
            self._full[stem] = entry
            inner = stem.partition(".")[2]
            self._inner[inner] = None if inner in self._inner else entry
            flat = stem.replace(".", "_")
            self._flat[flat] = None if flat in self._flat else entry

    def of(self, name: str) -> TensorEntry | None:
        """Return the weight that an adapter's module changes, or None."""
        name = name.removeprefix(_PREFIX).removesuffix(".base_layer")
        rest = name
        while rest:
            if rest in self._full:
                return self._full[rest]
            rest = rest.partition(".")[2]
        flat = re.sub(r"^lora_[a-z0-9]+_", "", name) if name.startswith("lora_") else name
        return self._inner.get(name) or self._flat.get(flat)
