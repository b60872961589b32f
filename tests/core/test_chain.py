"""A chain's bound is above every Jacobian, below the product of norms, and exact where linear."""

from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spectral_core as sc

SLOPES = [(0.0, 1.0), (0.01, 1.0), (-0.129, 1.129), (-1.0, 1.0), (0.25, 1.0), (-0.5, 0.0), (1, 1)]


def weights_of(rng, widths, kind, scale=1.0):
    found = []
    for n, m in pairwise(widths):
        W = rng.standard_normal((m, n))
        if kind == "orthogonal":
            W = np.linalg.qr(rng.standard_normal((max(m, n),) * 2))[0][:m, :n]
        elif kind == "low rank":
            W = np.outer(W[:, 0], W[0])
        elif kind == "integers":
            W = np.round(W)
        found.append(scale * W)
    return found


def jacobians(rng, weights, slopes, n):
    """Yield Jacobians of the chain at random slopes, most of them at an end of the interval."""
    for _ in range(n):
        J = weights[0]
        for W, (alpha, beta) in zip(weights[1:], slopes, strict=True):
            share = rng.random(len(J))
            share = np.where(rng.random(len(J)) < 0.8, np.round(share), share)
            J = W @ ((alpha + (beta - alpha) * share)[:, None] * J)
        yield J


@given(
    seed=st.integers(0, 2**32 - 1),
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    kind=st.sampled_from(["gaussian", "orthogonal", "low rank", "integers"]),
    scale=st.sampled_from([1.0, 1e-60, 1e40]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_bound_is_above_every_jacobian(seed, widths, kind, scale, data):
    rng = np.random.default_rng(seed)
    weights = weights_of(rng, widths, kind, scale)
    slopes = [data.draw(st.sampled_from(SLOPES)) for _ in weights[1:]]
    found = sc.chain_bound(weights, slopes=slopes)
    assert found.log10_upper <= found.log10_product
    exact = max(
        np.linalg.norm(J / np.abs(J).max(), 2) * np.abs(J).max() if J.any() else 0.0
        for J in jacobians(rng, weights, slopes, 8)
    )
    if exact:
        assert np.log10(exact) <= found.log10_upper + 1e-13 * (1 + abs(found.log10_upper))


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_linear_chain_has_the_norm_of_its_product(seed, n):
    rng = np.random.default_rng(seed)
    weights = weights_of(rng, rng.integers(1, 9, n + 1), "gaussian")
    exact = np.linalg.norm(reduce(lambda J, W: W @ J, weights), 2)
    for slopes, factor in [((1, 1), 1.0), ((-0.5, -0.5), 0.5 ** (n - 1))]:
        found = sc.chain_bound(weights, slopes=slopes)
        assert exact * factor * (1 - 1e-13) <= 10**found.log10_upper <= exact * factor * (1 + 1e-9)


def test_two_layers_of_one_neuron_are_exact():
    found = sc.chain_bound([np.array([[3.0]]), np.array([[-2.0]])], slopes=(-0.25, 0.5))
    np.testing.assert_allclose(10**found.log10_upper, 3.0, rtol=1e-12)


def test_disjoint_paths_do_not_meet():
    """The first layer stretches one vector, and the second another one."""
    weights = [np.diag([2.0, 1.0]), np.diag([1.0, 2.0])]
    found = sc.chain_bound(weights)
    np.testing.assert_allclose(10**found.log10_product, 4.0, rtol=1e-10)
    assert 2.0 <= 10**found.log10_upper < 3.1


@pytest.mark.parametrize(("depth", "low", "high"), [(3, 1.4, 1.8), (10, 8.0, 10.5), (20, 95, 125)])
def test_gain_over_the_product_grows_with_depth(depth, low, high):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((64, 64)) / 8 for _ in range(depth)]
    found = sc.chain_bound(weights)
    assert low < 10 ** (found.log10_product - found.log10_upper) < high


def test_hundred_layers_neither_overflow_nor_underflow():
    for scale in (1e-30, 1e30):
        found = sc.chain_bound([np.eye(4) * scale] * 100)
        assert abs(found.log10_product - 100 * np.log10(scale)) < 1e-9
        assert found.log10_upper <= found.log10_product


def test_zero_and_nan():
    eye = np.eye(2)
    assert sc.chain_bound([eye, 0 * eye, eye]).log10_upper == -np.inf
    assert sc.chain_bound([eye, np.nan * eye]).log10_upper == np.inf
    assert sc.chain_bound([eye], slopes=[]).log10_upper == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ([], {}, sc.ShapeError, "empty"),
        ([np.eye(2), np.eye(3)], {}, sc.ShapeError, "0 and 1"),
        ([np.ones(3)], {}, sc.ShapeError, "must be a matrix"),
        ([np.eye(2) * 1j], {}, sc.DTypeError, "complex"),
        ([np.eye(2, dtype=int)], {}, sc.DTypeError, "floating"),
        ([np.eye(2)] * 3, {"slopes": [(0, 1)]}, sc.ArgumentError, "1 pairs for 2"),
        ([np.eye(2)] * 2, {"slopes": (1, 0)}, sc.ArgumentError, "least, largest"),
        ([np.eye(2)] * 2, {"slopes": 0.5}, sc.ArgumentError, "least, largest"),
        ({"a": np.eye(2)}, {}, sc.ArgumentError, r"weights\.values"),
        ([np.eye(2)] * 2, {"slopes": (0, np.inf)}, sc.ArgumentError, "least, largest"),
    ],
)
def test_misfits_are_errors(weights, options, error, message):
    with pytest.raises(error, match=message):
        sc.chain_bound(weights, **options)
