"""Read a checkpoint or a live model tensor by tensor, and measure each matrix in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from .._convolution import convolution_norm
from .._layout import Layout, as_matrix
from .entry import Checkpoint, Stored, TensorEntry
from .files import short
from .layouts import Choice, layout_of
from .live import blamed, listed, name_of
from .lora import pairs
from .matrix import Numbers, measure
from .numbers import widened
from .result import Report, Row, finite

Layouts = Mapping[str, Layout | str | None]
Progress = Callable[[Sequence[TensorEntry]], Iterator[TensorEntry]]

_MOST_TAPS = 31**2  # the kernel's sums need the square of their number
_MOST_CONVOLUTION = 2**22  # elements of a kernel: the symbol is factorized some hundred times
_TOLERANCE = 1e-2  # of the norm of a convolution
_CHUNK = 1 << 20


def report_of(
    source: Any,
    *,
    layouts: Layouts | None = None,
    proven: bool = False,
    convolutions: bool = True,
    progress: Progress = iter,
) -> Report:
    """Return the report of a path, a mapping of arrays or a model: see `spectral_core.report`."""
    checkpoint = listed(source)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    broken: dict[str, int] = {}
    options = (layouts or {}, proven, convolutions)
    for entry in progress(checkpoint.entries):
        if entry.skip:
            skipped[entry.name] = entry.skip
            continue
        with blamed(source, entry):
            _add(entry, checkpoint, options, rows, skipped, broken)
    rows += pairs(checkpoint.entries)
    return Report(name_of(source), rows, skipped, broken)


def _add(
    entry: TensorEntry,
    checkpoint: Checkpoint,
    options: tuple[Layouts, bool, bool],
    rows: list[Row],
    skipped: dict[str, str],
    broken: dict[str, int],
) -> None:
    """Measure a tensor: add its rows, or the reason why it has none."""
    layouts, proven, convolutions = options
    if not entry.size:
        skipped[entry.name] = "empty"
        return
    if len(entry.shape) < 2:
        count = _nonfinite(entry)
        if count:
            broken[entry.name] = count
        skipped[entry.name] = "not a matrix: fewer than two axes"
        return
    choice = layout_of(entry.name, entry.shape, checkpoint.kind, layouts, checkpoint.layouts)
    if choice.layout is None:
        skipped[entry.name] = choice.note
        return
    stored = np.asarray(entry.load())
    matrices = as_matrix(stored, choice.layout, name=short(entry.name))
    stack = matrices.shape[:-2]
    found: dict[str, Numbers] = {}
    for index in np.ndindex(*stack):
        name = entry.name + "".join(f"[{i}]" for i in index)
        found[name] = measure(matrices[index], lambda x: widened(x, entry.dtype), proven=proven)
    norm = _convolution(entry, stored, choice.layout) if convolutions else (None, None, "")
    m, n = matrices.shape[-2:]
    rows += [row_of(name, entry, choice, (m, n), x, norm) for name, x in found.items()]


def row_of(
    name: str,
    entry: TensorEntry,
    choice: Choice,
    shape: tuple[int, int],
    found: Numbers,
    norm: tuple[float | None, float | None, str] = (None, None, ""),
) -> Row:
    """Return the row of a matrix."""
    m, n = shape
    layout = choice.layout
    axes = (
        "" if layout is None else layout.axes + (f":{layout.groups}" if layout.groups > 1 else "")
    )
    rank = (found.frobenius / found.sigma) ** 2 if found.sigma else np.nan
    return Row(
        name=name,
        tensor=entry.name,
        shape=entry.shape,
        dtype=entry.dtype,
        layout=axes,
        guessed=choice.guessed,
        rows=m,
        columns=n,
        sigma=finite(found.sigma),
        lower=finite(found.lower),
        upper=finite(found.upper),
        method=found.method,
        ratio=finite(found.ratio),
        frobenius=finite(found.frobenius),
        stable_rank=finite(rank),
        relative=finite(found.sigma / (m / n) ** 0.5),
        convolution_lower=norm[0],
        convolution_upper=norm[1],
        largest=finite(found.largest),
        zeros=found.zeros,
        dead_rows=found.dead_rows,
        dead_columns=found.dead_columns,
        nonfinite=found.nonfinite,
        note="; ".join(x for x in (choice.note, norm[2]) if x),
    )


def _convolution(
    entry: TensorEntry, stored: Stored, layout: Layout
) -> tuple[float | None, float | None, str]:
    """Return the bounds of a kernel's norm as a map of images of any size, stride 1."""
    letters = layout.axes.replace("(", "").replace(")", "").replace("g", "")
    taps = [n for letter, n in zip(letters, entry.shape, strict=True) if letter in "kdhw"]
    if not 1 <= len(taps) <= 3 or "s" in letters or all(n == 1 for n in taps):
        return None, None, ""
    if max(taps) > 31 or prod(taps) > _MOST_TAPS or entry.size > _MOST_CONVOLUTION:
        return None, None, "too large for the norm of a convolution"
    found = convolution_norm(widened(stored, entry.dtype), layout, tol=_TOLERANCE)
    return finite(found.lower), finite(found.upper), ""


def _nonfinite(entry: TensorEntry) -> int:
    """Return the number of NaN and Inf of a vector."""
    stored = np.asarray(entry.load()).reshape(-1)
    return sum(
        int((~np.isfinite(widened(stored[i : i + _CHUNK], entry.dtype))).sum())
        for i in range(0, stored.size, _CHUNK)
    )
