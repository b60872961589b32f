"""Read a checkpoint or a live model tensor by tensor, and measure each matrix in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .._convolution import convolution_norm
from .._layout import Layout
from .._plan import letters_of
from .adapters import CONFIG, Scale, read_beside
from .compiled import is_worth
from .entry import Checkpoint, TensorEntry
from .heads import Heads, check_attention, head_norms
from .layouts import Choice, check_patterns, layout_of
from .live import blamed, listed, name_of
from .lora import Base, check_pairs, pairs
from .matrix import Numbers, measure
from .numbers import widened
from .result import Report, Row
from .rows import row_of
from .scales import matrices_of, with_scales
from .texts import finite

Layouts = Mapping[str, Layout | str | None]
Progress = Callable[[Sequence[TensorEntry]], Iterator[TensorEntry]]

_MOST_TAPS = 31**2  # the kernel's sums need the square of their number
_MOST_CONVOLUTION = 2**22  # elements of a kernel: the symbol is factorized some hundred times
_TOLERANCE = 1e-2  # of the norm of a convolution
_CHUNK = 1 << 20


class Options(NamedTuple):
    """What is measured, and how."""

    layouts: Layouts
    proven: bool
    convolutions: bool
    spectrum: bool
    compiled: bool


# What is beyond float64 has None in its row: a warning of NumPy would say no more.
@np.errstate(over="ignore", invalid="ignore")
def report_of(
    source: Any,
    *,
    layouts: Layouts | None = None,
    proven: bool = False,
    convolutions: bool = True,
    spectrum: bool = False,
    heads: bool | int = False,
    config: Any = None,
    base: Any = None,
    lora_scale: float | None = None,
    progress: Progress = iter,
) -> Report:
    """Return the report of a path, a mapping of arrays or a model: see `spectral_core.report`."""
    checkpoint = listed(source)
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    broken: dict[str, int] = {}
    scale = Scale(lora_scale, read_beside(source, CONFIG))
    attention = Heads.of(source, heads, config)
    entries = with_scales(checkpoint.entries)
    options = Options(layouts or {}, proven, convolutions, spectrum, is_worth(entries))
    check_attention(entries, attention)
    check_pairs(entries, scale, base)
    others = None if base is None else _base(base, options)
    known = chain((x.name for x in entries), others.entries if others else ())
    check_patterns(options.layouts, known)
    for entry in progress(entries):
        if entry.skip:
            skipped[entry.name] = entry.skip
            continue
        with blamed(source, entry):
            _add(entry, checkpoint, options, rows, skipped, broken)
    rows += pairs(entries, scale, others, skipped)
    report = Report(name_of(source), rows, skipped, broken)
    if attention is not None:
        report.heads, report.without_heads = head_norms(
            entries, attention, _chooser(checkpoint, options)
        )
    return report


def _chooser(checkpoint: Checkpoint, options: Options) -> Callable[[TensorEntry], Choice]:
    """Return the function that chooses the layout of a tensor."""
    return lambda entry: layout_of(
        entry.name, entry.shape, checkpoint.kind, options.layouts, checkpoint.layouts
    )


def _base(source: Any, options: Options) -> Base:
    """Return the weights that low-rank updates belong to."""
    found = listed(source)
    named = {entry.name: entry for entry in with_scales(found.entries)}
    measured = partial(measure, proven=options.proven, spectrum=options.spectrum)
    return Base(named, _chooser(found, options), measured)


def _add(
    entry: TensorEntry,
    checkpoint: Checkpoint,
    options: Options,
    rows: list[Row],
    skipped: dict[str, str],
    broken: dict[str, int],
) -> None:
    """Measure a tensor: add its rows, or the reason why it has none."""
    if not entry.size:
        skipped[entry.name] = "empty"
        return
    if len(entry.shape) < 2:
        count = _nonfinite(entry)
        if count:
            broken[entry.name] = count
        skipped[entry.name] = "not a matrix: fewer than two axes"
        return
    choice = _chooser(checkpoint, options)(entry)
    if choice.layout is None:
        skipped[entry.name] = choice.note
        return
    layout = choice.layout
    matrices, decode, note = matrices_of(entry, layout)
    choice = choice._replace(note="; ".join(x for x in (choice.note, note) if x))
    found: dict[str, Numbers] = {}
    for index in np.ndindex(*matrices.shape[:-2]):
        name = entry.name + "".join(f"[{i}]" for i in index)
        found[name] = measure(
            matrices[index],
            decode,
            proven=options.proven,
            spectrum=options.spectrum,
            compiled=options.compiled,
        )
    norm = _convolution(entry, layout) if options.convolutions else (None, None, "")
    m, n = matrices.shape[-2:]
    rows += [row_of(name, entry, choice, (m, n), x, norm) for name, x in found.items()]


def _convolution(entry: TensorEntry, layout: Layout) -> tuple[float | None, float | None, str]:
    """Return the bounds of a kernel's norm as a map of images of any size, stride 1."""
    letters = letters_of(layout.axes).replace("g", "")
    taps = [n for letter, n in zip(letters, entry.shape, strict=True) if letter in "kdhw"]
    if not 1 <= len(taps) <= 3 or "s" in letters or all(n == 1 for n in taps):
        return None, None, ""
    if max(taps) > 31 or prod(taps) > _MOST_TAPS or entry.size > _MOST_CONVOLUTION:
        return None, None, "too large for the norm of a convolution"
    if entry.scale is not None:
        return None, None, "the norm of a convolution is not computed with scales"
    kernel = widened(np.asarray(entry.load()), entry.dtype)
    found = convolution_norm(kernel, layout, tol=_TOLERANCE)
    return finite(found.lower), finite(found.upper), ""


def _nonfinite(entry: TensorEntry) -> int:
    """Return the number of NaN and Inf of a vector."""
    stored = np.asarray(entry.load()).reshape(-1)
    return sum(
        int((~np.isfinite(widened(stored[i : i + _CHUNK], entry.dtype))).sum())
        for i in range(0, stored.size, _CHUNK)
    )
