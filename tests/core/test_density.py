"""The estimated distribution of the singular values against the exact one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc


def distance(found, exact):
    """Return the area between two distribution functions, as a share of the largest value."""
    sigma = np.concatenate([found.sigma, exact])
    weight = np.concatenate([found.weight, np.full(exact.size, -1 / exact.size)])
    order = np.argsort(sigma)
    gaps = np.diff(sigma[order])
    return float((np.abs(np.cumsum(weight[order])[:-1]) * gaps).sum() / exact.max())


def marchenko_pastur(ratio, values):
    """Return the density of the singular values of a Gaussian matrix with m = n/ratio rows."""
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    x = values**2
    inside = np.maximum((high - x) * (x - low), 0) ** 0.5
    return inside / (np.pi * ratio * np.where(values > 0, values, 1.0))


def spectra(kind, n, rng):
    if kind == "spike":
        return np.r_[np.full(1, 30.0), rng.random(n - 1)]
    if kind == "low rank":
        return np.r_[1 + rng.random(n // 8), np.zeros(n - n // 8)]
    if kind == "two values":
        return np.repeat([3.0, 1.0], [n // 4, n - n // 4])
    return np.arange(1, n + 1) ** -0.7  # a power law


@pytest.mark.parametrize("kind", ["spike", "low rank", "two values", "power law"])
@pytest.mark.parametrize("turned", [False, True])
def test_distribution_of_known_spectra(kind, turned):
    rng = np.random.default_rng(0)
    m, n = 300, 240
    s = spectra(kind, n, rng)
    U, V = (np.linalg.qr(rng.standard_normal((k, n)))[0] for k in (m, n))
    W = (U * s) @ V.T
    found = sc.spectral_density(W.T if turned else W)
    assert found.weight.sum() == pytest.approx(1)
    assert distance(found, s) < 0.015
    if kind == "low rank":  # the largest value's neighbours do not hide the zeros
        assert found.weight[found.sigma < 0.5].sum() == pytest.approx(7 / 8, abs=0.02)


def test_marchenko_pastur():
    # Not the seed of the starts: they would be rows of W.
    W = np.random.default_rng(5).standard_normal((1200, 600)) / 1200**0.5
    found = sc.spectral_density(W, n_probes=4, n_steps=48)
    exact = marchenko_pastur(0.5, found.values)
    area = np.trapezoid(np.abs(found.density - exact), found.values)
    assert area < 0.08
    assert np.trapezoid(found.density, found.values) == pytest.approx(1)
    assert distance(found, np.linalg.svd(W, compute_uv=False)) < 0.01


@given(st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_moments_are_those_that_the_starts_see(m, n, is_complex, seed):
    """With as many steps as columns, a quadrature of a start is exact for all powers."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((m, n)) + (1j * rng.standard_normal((m, n)) if is_complex else 0)
    found = sc.spectral_density(W, n_probes=3, n_steps=12, seed=seed)
    H = W if m >= n else W.conj().T
    starts = sc.start_vector((3, min(m, n)), H, seed=seed)
    for power in (1, 2):
        G = np.linalg.matrix_power(H.conj().T @ H, power)
        seen = np.einsum("bi,ij,bj->", starts.conj(), G, starts).real / 3
        assert (found.weight * found.sigma ** (2 * power)).sum() == pytest.approx(seen)


@pytest.mark.parametrize("factor", [1e-300, 1e300])
def test_scales_do_not_matter(factor):
    W = np.random.default_rng(0).standard_normal((20, 16))
    plain, scaled = sc.spectral_density(W), sc.spectral_density(W * factor)
    np.testing.assert_allclose(scaled.sigma, plain.sigma * factor, rtol=1e-6, atol=1e-9 * factor)


def test_each_backend_agrees_with_numpy(backend):
    W = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    found = sc.spectral_density(backend.asarray(W), n_probes=2, n_steps=10)
    expected = sc.spectral_density(W.astype(float), n_probes=2, n_steps=10)
    np.testing.assert_allclose(found.sigma, expected.sigma, rtol=1e-3)
    np.testing.assert_allclose(found.density, expected.density, atol=1e-2)


def test_special_matrices():
    zero = sc.spectral_density(np.zeros((3, 4)))
    assert (zero.sigma == 0).all()
    assert zero.weight.sum() == 1
    assert np.isnan(sc.spectral_density(np.array([[np.nan, 1.0]])).density).all()
    identity = sc.spectral_density(np.eye(50), n_probes=2)
    np.testing.assert_allclose(identity.sigma, [1, 1])
    with pytest.raises(sc.ShapeError, match="stack"):
        sc.spectral_density(np.ones((2, 3, 3)), layout="soi")
    with pytest.raises(sc.ArgumentError, match="n_probes"):
        sc.spectral_density(np.eye(3), n_probes=0)
