"""Norms of attention heads by dense products in float64."""

import numpy as np


def dense(q, k, v, o, heads):
    """Return the exact norms from matrices with a row an output."""
    size = len(q) // heads
    share = heads // (len(k) // size)
    found = {part: [] for part in ("W_q", "W_k", "W_v", "W_o", "W_qᵀW_k", "W_oW_v")}

    def norm(x):
        return np.linalg.norm(x, 2)

    for h in range(heads):
        j = h // share
        Q, K, V = (x[i * size : (i + 1) * size] for x, i in ((q, h), (k, j), (v, j)))
        out = o[:, h * size : (h + 1) * size]
        found["W_q"].append(norm(Q))
        found["W_o"].append(norm(out))
        found["W_qᵀW_k"].append(norm(Q.T @ K))
        found["W_oW_v"].append(norm(out @ V))
        if h % share == 0:
            found["W_k"].append(norm(K))
            found["W_v"].append(norm(V))
    return found


def check(report, expected, layer):
    rows = {row.part: row for row in report.heads if row.layer == layer}
    assert list(rows) == list(expected)
    for part, exact in expected.items():
        row = rows[part]
        np.testing.assert_allclose(row.sigma, exact, rtol=1e-8)
        assert all(a <= s * (1 + 1e-14) for a, s in zip(row.lower, exact, strict=True))
        assert all(s * (1 - 1e-14) <= b for b, s in zip(row.upper, exact, strict=True))
