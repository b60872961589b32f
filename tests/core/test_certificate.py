"""Factorizations prove what they claim: in float64, in float32, with SciPy and without."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from spectral_core import _certificate

DTYPES = [np.float64, np.float32, np.complex128, np.complex64]


def matrix(m, n, dtype):
    rng = np.random.default_rng(m)
    W = rng.standard_normal((m, n)) + 1j * rng.standard_normal((m, n))
    return (W if np.issubdtype(dtype, np.complexfloating) else W.real).astype(dtype)


def is_semidefinite(A):
    """Return True if a matrix of fractions has no negative eigenvalue, by elimination."""
    while A:
        pivot, rest = A[0][0], A[1:]
        if pivot < 0 or (pivot == 0 and any(A[0])):
            return False
        A = [
            [
                x - (row[0] * y / pivot if pivot else 0)
                for x, y in zip(row[1:], A[0][1:], strict=True)
            ]
            for row in rest
        ]
    return True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [192, 301])
def test_the_factor_in_place_is_numpy_s(dtype, n):
    pytest.importorskip("scipy")
    W = matrix(n, n, dtype)
    gram = W.conj().T @ W
    norm = np.linalg.norm(W.astype(complex), 2) ** 2
    found = _certificate._factor(gram, 1.5 * norm)
    expected = _certificate._factor_by_numpy(gram, 1.5 * norm)
    assert found.dtype == dtype
    tol = 1e3 * np.finfo(dtype).eps
    np.testing.assert_allclose(abs(found), abs(expected), atol=tol * norm**0.5)
    assert not np.triu(found, 1).any()
    for factor in (_certificate._factor, _certificate._factor_by_numpy):
        assert factor(gram, 0.99 * norm) is None


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_the_gram_matrix_in_panels_is_the_product(dtype):
    W = matrix(_certificate._ROWS + 5, _certificate._PANEL + 7, dtype)
    np.testing.assert_allclose(_certificate._gram(W, 1.0).matrix, W.conj().T @ W, atol=1e-10)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(-9, 9), min_size=n, max_size=n), min_size=1, max_size=5
        )
    ),
    st.sampled_from([-1e-2, -1e-5, -1e-7, 0.0, 1e-7, 1e-5, 1e-4, 1e-2, 1.0]),
)
def test_what_float32_proves_is_true(W, above):
    W = np.array(W)
    gram = W.T @ W
    largest = float(np.linalg.eigvalsh(gram)[-1])
    limit = largest * (1 + above)
    narrow = gram.astype(np.float32)
    proven = _certificate.is_proven_below(gram.astype(float), narrow, limit, largest * (1 - 1e-9))
    n = len(gram)
    exact = [[Fraction(limit) * (i == j) - int(gram[i, j]) for j in range(n)] for i in range(n)]
    assert not proven or is_semidefinite(exact)
    assert proven or above < 1e-2 or largest < 0.5


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("above", [-1e-3, -1e-9, 1e-3, 3e-3, 1e-2])
def test_float32_proves_what_is_far_enough(dtype, above, monkeypatch):
    pytest.importorskip("scipy")
    W = matrix(300, 200, dtype)
    gram = W.conj().T @ W
    largest = float(np.linalg.eigvalsh(gram)[-1])
    narrow = _certificate.narrowed(gram)
    assert narrow.dtype == (np.complex64 if dtype == np.complex128 else np.float32)
    limit = largest * (1 + above)
    proven = _certificate.is_proven_below(gram, narrow, limit, largest * (1 - 1e-9))
    assert proven == (above > 0)
    if above == 1e-2:  # the wide factorization is not needed
        monkeypatch.setattr(_certificate, "is_below", None)
        assert _certificate.is_proven_below(gram, narrow, limit, largest * (1 - 1e-9))


@pytest.mark.parametrize("scale", [1.0, 2.0**15, 2.0**-15, 2.0**40])
def test_bounds_without_scipy_are_as_close(monkeypatch, scale):
    W = matrix(700, 600, np.float64) * scale
    exact = np.linalg.norm(W, 2)
    for _ in range(2):
        lower, upper, _ = sc.bounds(W)
        assert lower <= exact * (1 + 1e-14)
        assert exact * (1 - 1e-14) <= upper <= lower * (1 + 1e-10)
        monkeypatch.setattr(_certificate, "_lapack", lambda: None)


def test_the_frobenius_norm_allows_for_its_rounding():
    """One sum of 36 million equal squares is too small by more than is allowed for."""
    W = np.broadcast_to(1.3, (6000, 6000))
    assert Fraction(_certificate.from_norms(W, 0.0, np).upper) >= 6000 * Fraction(1.3)
