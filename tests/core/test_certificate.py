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


@pytest.mark.parametrize("library", ["numpy", "scipy"])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("rows", [200, _certificate._ROWS, 2 * _certificate._ROWS + 5])
def test_both_halves_of_the_gram_matrix_are_the_product(monkeypatch, dtype, rows, library):
    """Of integers, without a rounding."""
    if library == "scipy":
        pytest.importorskip("scipy")
    else:
        monkeypatch.setattr(_certificate, "_blas", lambda: None)
    W = np.round(4 * matrix(rows, _certificate._PANEL + 7, dtype))
    for A in (W, np.asfortranarray(W), np.repeat(W, 2, axis=1)[:, ::2]):
        found = _certificate._gram(A, 1.0).matrix
        np.testing.assert_array_equal(found, W.conj().T @ W)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 200])
def test_a_product_with_a_vector_is_numpy_s(dtype, n):
    A, x = np.round(9 * matrix(7, n, dtype)), np.round(9 * matrix(n, 1, dtype))[:, 0]
    y = x[:7] if n > 7 else np.resize(x, 7)
    for B in (A, np.asfortranarray(A)):
        np.testing.assert_array_equal(_certificate.times(B, x), A @ x)
        np.testing.assert_array_equal(_certificate.times(B, y, transposed=True), A.T @ y)


@pytest.mark.parametrize("shape", [(3, 2), (200, 1000), (70, 1100), (1, 2**17)])
def test_norms_of_rows_and_columns_are_those_of_all_blocks(shape):
    W = np.round(9 * matrix(*shape, np.float64))
    found = _certificate._sums(W)
    assert found == (float((W * W).sum()), *(abs(W).sum(axis=axis).max() for axis in (1, 0)))


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
    n, wide = len(gram), gram.astype(float)
    exact = [[Fraction(limit) * (i == j) - int(gram[i, j]) for j in range(n)] for i in range(n)]
    for v in np.linalg.eigh(wide)[1].T:  # also those that are not the first
        proven = _certificate.is_proven_narrow(narrow, 0.0, limit, top_of(wide, v))
        assert not proven or is_semidefinite(exact)
    proven = _certificate.is_proven_narrow(narrow, 0.0, limit)
    assert not proven or is_semidefinite(exact)
    assert proven or above < 1e-2 or largest < 0.5


def top_of(gram, v):
    """Return how a vector lies to a matrix, with what rounding adds."""
    value, slack = float((v.conj() @ gram @ v).real), 1e-13 * float(np.linalg.norm(gram))
    rest = float(np.linalg.norm(gram @ v - value * v))
    return _certificate.Top(value - slack, value + slack, rest + slack, v)


def with_values(values, dtype):
    """Return a matrix with these eigenvalues, and its eigenvectors as columns."""
    Q = np.linalg.qr(matrix(len(values), len(values), dtype))[0]
    gram = (Q * values) @ Q.conj().T
    return (gram + gram.conj().T) / 2, Q


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("above", [-1e-3, -1e-6, 1e-6, 1e-3, 1e-2])
@pytest.mark.parametrize("second", [1.0, 0.99])
def test_float32_proves_a_close_limit_without_the_first_vector(dtype, above, second):
    pytest.importorskip("scipy")
    gram, Q = with_values(np.r_[1.0, second, np.linspace(0, 0.98, 198)], dtype)
    narrow = gram.astype(np.complex64 if dtype == np.complex128 else np.float32)
    error = 2.0**-23 * float(np.linalg.norm(gram))
    limit = 1 + above
    alone = _certificate.is_proven_narrow(narrow, error, limit)
    without = _certificate.is_proven_narrow(narrow, error, limit, top_of(gram, Q[:, 0]))
    assert alone == (above == 1e-2)
    assert without == (above > 0 and (second < 1 or above == 1e-2))


@pytest.mark.parametrize("tilt", [0.0, 1e-6, 1e-4, 1e-2, 0.3])
def test_a_vector_that_is_not_the_first_proves_nothing_false(tilt):
    """The limit is below the first eigenvalue by so little that float32 cannot see it."""
    pytest.importorskip("scipy")
    gram, Q = with_values(np.r_[1.0, 0.98, np.linspace(0, 0.97, 198)], np.float64)
    error = 2.0**-23 * float(np.linalg.norm(gram))
    narrow = gram.astype(np.float32)
    v = (Q[:, 0] + tilt * Q[:, 1]) / (1 + tilt**2) ** 0.5
    for below in (1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4):
        top = top_of(gram, v)
        assert not _certificate.is_proven_narrow(narrow, error, 1 - below, top)


@pytest.mark.parametrize("scale", [1.0, 2.0**15, 2.0**-15, 2.0**40])
def test_bounds_without_scipy_are_as_close(monkeypatch, scale):
    W = matrix(700, 600, np.float64) * scale
    exact = np.linalg.norm(W, 2)
    for _ in range(2):
        lower, upper, _ = sc.bounds(W)
        assert lower <= exact * (1 + 1e-14)
        assert exact * (1 - 1e-14) <= upper <= lower * (1 + 1e-10)
        for name in ("_lapack", "_blas"):
            monkeypatch.setattr(_certificate, name, lambda: None)


def test_the_frobenius_norm_allows_for_its_rounding():
    """One sum of 36 million equal squares is too small by more than is allowed for."""
    W = np.broadcast_to(1.3, (6000, 6000))
    assert Fraction(_certificate.from_norms(W, 0.0, np).upper) >= 6000 * Fraction(1.3)
