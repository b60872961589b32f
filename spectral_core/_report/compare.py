"""Compare two checkpoints: how far each matrix moved, and in which directions.

Both are read tensor by tensor, and at most two matrices are decoded in memory at a time. The
difference of two large ones is not among them: its tiles are made in each product.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import frexp, isfinite
from typing import Any, NamedTuple, cast

import numpy as np

from .._certificate import times_power_of_two
from .._select import numbered
from .._validate import check_number
from ..errors import ArgumentError, check_int
from .compiled import is_worth
from .drift import Comparison, Drift
from .entry import Checkpoint, CheckpointError, Stored, TensorEntry
from .files import short
from .intruders import Similarity, similarity_of, similarity_of_large
from .layouts import Choice, check_patterns, layout_of
from .live import blamed, listed, name_of
from .matrix import MOST_PROVEN, Numbers, measure
from .run import Layouts, Progress
from .scales import matrices_of, with_scales
from .texts import finite
from .tiling import Decode

_MOST_ELEMENTS = 2**28  # of a matrix whose vectors are computed: 1 GB in float32
_UNIT = 2.0**-53


class _Options(NamedTuple):
    layouts: Layouts
    proven: bool
    n_vectors: int
    similarity: float
    compiled: bool


class _Found(NamedTuple):
    """What is collected on the way."""

    rows: list[Drift]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    skipped: dict[str, str]


class _Pair(NamedTuple):
    """A matrix before and after, as it is stored, and how each is decoded."""

    before: Any
    after: Any
    decode: tuple[Decode, Decode]
    dtypes: tuple[str, str]

    def decoded(self) -> tuple[Stored, Stored]:
        """Return both matrices as float64 or complex128."""
        return self.decode[0](self.before), self.decode[1](self.after)

    def scaled(self, numbers: tuple[Numbers, Numbers]) -> tuple[Stored, Stored]:
        """Return both matrices, each times a power of two: its largest element is near 1.

        Singular vectors stay the same, and no square leaves float32.
        """
        before, after = (
            times_power_of_two(decode(x), -frexp(number.largest)[1])
            for x, decode, number in zip(self[:2], self.decode, numbers, strict=True)
        )
        return before, after

    def narrow(self, numbers: tuple[Numbers, Numbers]) -> tuple[Stored, Stored]:
        """Return both scaled matrices in float32 where it holds them, and in one dtype."""
        before, after = self.scaled(numbers)
        both = np.result_type(before, after)
        if not {"float64", "complex128"} & {*self.dtypes}:
            both = np.dtype(np.complex64 if both.kind == "c" else np.float32)
        return before.astype(both, copy=False), after.astype(both, copy=False)


class _Difference:
    """The difference of two matrices, made where it is read: a stand-in for an array in `measure`.

    Each element is rounded once, which `_measured` adds to the interval.
    """

    def __init__(self, pair: _Pair) -> None:
        self._pair = pair
        self.shape, self.size = pair.before.shape, pair.before.size

    @property
    def T(self) -> _Difference:  # noqa: N802
        """The transpose."""
        pair = self._pair
        return _Difference(pair._replace(before=pair.before.T, after=pair.after.T))

    def __getitem__(self, rows: slice) -> Stored:
        pair = self._pair
        part = pair._replace(before=pair.before[rows], after=pair.after[rows])
        before, after = part.decoded()
        return np.asarray(after - before)


@np.errstate(over="ignore", invalid="ignore")  # as in `report_of`
def compared(
    before: Any,
    after: Any,
    *,
    layouts: Layouts | None = None,
    proven: bool = False,
    n_vectors: int = 10,
    similarity: float = 0.5,
    progress: Progress = iter,
) -> Comparison:
    """Return how two checkpoints or models differ: see `spectral_core.compare`."""
    n_vectors = check_int(n_vectors, "n_vectors", least=0)
    if not 0 < check_number(similarity, "similarity") <= 1:
        raise ArgumentError(f"similarity must be above 0 and at most 1, not {similarity!r}")
    first, second = listed(before), listed(after)
    own, other = (_by_name(part) for part in (first, second))
    common = [name for name in own if name in other]
    if not common:
        raise CheckpointError(
            f"{name_of(before)} and {name_of(after)} have no tensor of the same name: the first "
            f"has {_some(own)}, the second {_some(other)}"
        )
    entries = (*own.values(), *other.values())
    check_patterns(layouts or {}, {entry.name: entry for entry in entries})
    found = _Found([], {}, {})
    shared = [own[name] for name in common]
    options = _Options(layouts or {}, proven, n_vectors, float(similarity), is_worth(shared))
    both = f"{name_of(before)} or {name_of(after)}"
    for name, entry in zip(common, progress(shared), strict=True):
        with blamed(both, entry):
            _add(name, entry, other[name], first, options, found)
    return Comparison(
        (name_of(before), name_of(after)),
        found.rows,
        only_before=[name for name in own if name not in other],
        only_after=[name for name in other if name not in own],
        shapes=found.shapes,
        skipped=found.skipped,
        n_vectors=n_vectors,
        similarity=options.similarity,
    )


def _by_name(part: Checkpoint) -> dict[str, TensorEntry]:
    """Return the tensors by name. One whose name occurred before gets a number."""
    entries = with_scales(part.entries)
    return dict(zip(numbered(entry.name for entry in entries), entries, strict=True))


def _some(names: Mapping[str, Any]) -> str:
    return short(next(iter(names))) if names else "none"


def _add(
    name: str,
    before: TensorEntry,
    after: TensorEntry,
    base: Checkpoint,
    options: _Options,
    found: _Found,
) -> None:
    """Compare a tensor: add its rows, or the reason why it has none."""
    shape = before.shape
    reason = before.skip or after.skip
    if not reason and shape != after.shape:
        found.shapes[name] = (shape, after.shape)
        return
    if not reason and not before.size:
        reason = "empty"
    elif not reason and len(shape) < 2:
        reason = "not a matrix: fewer than two axes"
    choice = Choice(None, note=reason)
    if not reason:  # the axes are those of the base: one meaning for both
        choice = layout_of(before.name, shape, base.kind, options.layouts, base.layouts)
    if choice.layout is None:
        found.skipped[name] = choice.note
        return
    (A, first, old), (B, second, new) = (matrices_of(x, choice.layout) for x in (before, after))
    about = (
        [old]
        if old == new
        else [f"{side}: {x}" for side, x in (("before", old), ("after", new)) if x]
    )
    choice = choice._replace(note="; ".join(x for x in (choice.note, *about) if x))
    for index in np.ndindex(*A.shape[:-2]):
        pair = _Pair(A[index], B[index], (first, second), (before.dtype, after.dtype))
        row_name = name + "".join(f"[{i}]" for i in index)
        found.rows.append(_row(row_name, before, choice, pair, options))


def _row(name: str, entry: TensorEntry, choice: Choice, pair: _Pair, options: _Options) -> Drift:
    """Return the row of a matrix."""
    before, after = (
        measure(x, decode, proven=options.proven, compiled=options.compiled)
        for x, decode in zip(pair[:2], pair.decode, strict=True)
    )
    change = _measured(pair, proven=options.proven)
    like, note = _similarity(pair, (before, after), options)
    m, n = pair.before.shape
    drift = change.frobenius / before.frobenius if before.frobenius else np.nan
    return Drift(
        name=name,
        tensor=entry.name,
        shape=entry.shape,
        layout=choice.axes,
        guessed=choice.guessed,
        rows=m,
        columns=n,
        drift=0.0 if change.frobenius == 0 else finite(drift),
        sigma=finite(change.sigma),
        lower=finite(change.lower),
        upper=finite(change.upper),
        method=change.method,
        sigma_before=finite(before.sigma),
        upper_before=finite(before.upper),
        sigma_after=finite(after.sigma),
        upper_after=finite(after.upper),
        stable_rank_before=finite(before.stable_rank),
        stable_rank_after=finite(after.stable_rank),
        frobenius_before=finite(before.frobenius),
        frobenius_after=finite(after.frobenius),
        frobenius=finite(change.frobenius),
        left_overlap=like and like.overlaps[0],
        right_overlap=like and like.overlaps[1],
        left_angle=like and like.angles[0],
        right_angle=like and like.angles[1],
        left_intruders=like and like.intruders[0],
        right_intruders=like and like.intruders[1],
        undecided=like.undecided if like else 0,
        note="; ".join(x for x in (choice.note, note) if x),
    )


def _measured(pair: _Pair, *, proven: bool) -> Numbers:
    """Return the norms of the difference, whose interval holds for the exact one.

    Subtraction rounds each element by its share of 2⁻⁵³. The norm of all these errors is at most
    that share of the Frobenius norm.
    """
    found = measure(cast(Stored, _Difference(pair)), np.asarray, proven=proven)
    error = 2 * _UNIT * found.frobenius
    lower, upper = np.nextafter([found.lower - error, found.upper + error], [-np.inf, np.inf])
    if not found.frobenius > 0:
        lower, upper = found.lower, found.upper
    return found._replace(lower=max(float(lower), 0.0), upper=float(upper))


def _similarity(
    pair: _Pair, numbers: tuple[Numbers, Numbers], options: _Options
) -> tuple[Similarity | None, str]:
    """Compare the first singular vectors, or return the reason why they are not."""
    m, n = pair.before.shape
    if any(x.nonfinite for x in numbers):
        return None, "NaN or Inf"
    if not options.n_vectors:
        return None, ""
    if not all(isfinite(x.largest) for x in numbers):
        return None, "beyond float64"
    if any(x.sigma == 0 for x in numbers):
        return None, "a zero matrix has no singular vectors"
    if options.proven or m * n * min(m, n) <= MOST_PROVEN:
        found = similarity_of(*pair.scaled(numbers), options.n_vectors, options.similarity)
        return found, ""
    if m * n > _MOST_ELEMENTS:
        return None, "too large for its singular vectors: --proven computes them"
    found = similarity_of_large(*pair.narrow(numbers), options.n_vectors, options.similarity)
    return found, "" if found.converged else "singular vectors have not converged"
