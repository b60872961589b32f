"""Make a row of the report from the numbers of a matrix."""

from __future__ import annotations

from .entry import TensorEntry
from .layouts import Choice
from .matrix import Numbers
from .result import Row
from .texts import finite


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
    return Row(
        name=name,
        tensor=entry.name,
        shape=entry.shape,
        dtype=entry.dtype,
        layout=choice.axes,
        guessed=choice.guessed,
        rows=m,
        columns=n,
        sigma=finite(found.sigma),
        lower=finite(found.lower),
        upper=finite(found.upper),
        method=found.method,
        ratio=finite(found.ratio),
        frobenius=finite(found.frobenius),
        stable_rank=finite(found.stable_rank),
        relative=finite(found.sigma / (m / n) ** 0.5),
        convolution_lower=norm[0],
        convolution_upper=norm[1],
        largest=finite(found.largest),
        zeros=found.zeros,
        dead_rows=found.dead_rows,
        dead_columns=found.dead_columns,
        nonfinite=found.nonfinite,
        note="; ".join(x for x in (choice.note, norm[2]) if x),
        spectrum=found.spectrum,
    )
