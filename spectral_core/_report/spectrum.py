"""Draw a spectrum as a line of characters."""

from __future__ import annotations

import numpy as np

from .matrix import Spectrum

_BARS = "▁▂▃▄▅▆▇█"
_BINS = 12


def sparkline(spectrum: Spectrum) -> str:
    """Return bars for the shares of singular values from 0 to the largest, in twelve bins.

    The height is the root of the share, so that a few values are still seen. A bin without values
    is a space.

    >>> sparkline((12.0, 6.0, 6.0, 6.0, 0.5))
    '|▅     █    ▅|'
    """
    if isinstance(spectrum, dict):
        values, weight = (np.asarray(spectrum[key]) for key in ("values", "density"))
    else:
        values, weight = np.asarray(spectrum), np.ones(len(spectrum))
    top = float(values.max(initial=0.0)) or 1.0
    shares = np.histogram(values / top, _BINS, (0.0, 1.0), weights=weight)[0]
    heights = (shares / (shares.max() or 1.0)) ** 0.5
    heights[shares < 1e-3 * shares.sum() / _BINS] = -1  # what a smooth density has everywhere
    return f"|{''.join(' ' if h < 0 else _BARS[round(7 * h)] for h in heights)}|"
