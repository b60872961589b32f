"""Pair the two factors of a low-rank update, and measure their product without forming it."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from .._operator import product_norm
from .entry import TensorEntry
from .numbers import widened
from .result import Row, finite

# PEFT, and the names of kohya's scripts. The first factor maps inputs to the rank.
_DOWN = re.compile(r"\.(lora_A|lora_down)(\.\w+)?\.weight$|\.lora_A$")
_MOST_RANK = 4096  # the products of a factor with itself have the square of it
_UP = {"lora_A": "lora_B", "lora_down": "lora_up"}


def pairs(entries: Iterable[TensorEntry]) -> list[Row]:
    """Return a row for B·A of each pair of factors, without the scale that a configuration has."""
    readable = {entry.name: entry for entry in entries if not entry.skip}
    rows = []
    for name, down in readable.items():
        match = _DOWN.search(name)
        if match is None:
            continue
        part = match[1] or "lora_A"
        up = readable.get(name[: match.start()] + match[0].replace(part, _UP[part]))
        if up is None or len(down.shape) != 2 or len(up.shape) != 2:
            continue
        if up.shape[1] == down.shape[0] <= _MOST_RANK and 0 not in (*up.shape, *down.shape):
            rows.append(_row(name[: match.start()], up, down))
    return rows


def _row(name: str, up: TensorEntry, down: TensorEntry) -> Row:
    B, A = (np.ascontiguousarray(widened(np.asarray(x.load()), x.dtype)) for x in (up, down))
    m, n = B.shape[0], A.shape[1]
    nonfinite = int((~np.isfinite(B)).sum() + (~np.isfinite(A)).sum())
    sigma = error = frobenius = np.nan
    if not nonfinite:
        B, A = B.astype(np.result_type(A, B)), A.astype(np.result_type(A, B))
        found = product_norm(B, A)
        sigma = float(found.sigma)
        # `error_bound` is that of the core; the factorizations add roundings of ‖A‖·‖B‖.
        lengths = float(np.linalg.norm(A)) * float(np.linalg.norm(B))
        error = float(found.error_bound) + 64 * (m + n) * np.finfo(float).eps * lengths
        product = np.trace((B.conj().T @ B) @ (A @ A.conj().T)).real
        frobenius = max(float(product), 0.0) ** 0.5
    return Row(
        name=f"{name} (B·A)",
        tensor=up.name,
        shape=(m, n),
        dtype=up.dtype,
        layout="oi",
        guessed=False,
        rows=m,
        columns=n,
        sigma=finite(sigma),
        lower=finite(max(sigma - error, 0.0)),
        upper=finite(sigma + error),
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
        note=f"low-rank update of rank {A.shape[0]}, without its scale",
    )
