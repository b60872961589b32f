"""The Lanczos norm agrees with the SVD and keeps its error bound."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import KINDS, SLOW, gaussian, matrix, on, orthogonal, svd_norm, unit
from spectral_core import _certificate, spectral_norm
from spectral_core._arrays import array_namespace

DTYPES = ("float64", "complex128")
sizes = st.one_of(st.integers(1, 8), st.integers(30, 45))  # the basis restarts at 32


@st.composite
def matrices(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind, dtype = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from(DTYPES))
    return matrix(rng, kind, draw(sizes), draw(sizes), dtype)


def assert_agrees(W, result):
    """Assert that σ, its error bound and the vectors agree with the SVD, in float64."""
    sigma = svd_norm(W)
    assert result.converged
    np.testing.assert_allclose(result.sigma, sigma, rtol=1e-10)
    assert np.all(np.abs(result.sigma - sigma) <= result.error_bound)
    assert np.all(result.error_bound <= 1e-9 * sigma)
    np.testing.assert_allclose(np.linalg.norm(result.u, axis=-1), 1, rtol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(result.v, axis=-1), 1, rtol=1e-13)
    WHu = np.einsum("...mn,...m->...n", W.conj(), result.u)
    np.testing.assert_allclose(
        WHu, np.asarray(result.sigma)[..., None] * result.v, atol=1e-13 * sigma.max()
    )


@given(matrices())
def test_spectral_norm_agrees_with_the_svd(W):
    assert_agrees(W, spectral_norm(W))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(6, 6), (40, 40), (200, 5), (5, 200), (1, 9), (9, 1), (1, 1)])
def test_spectral_norm_agrees_with_the_svd_on_each_kind(kind, shape, dtype):
    W = matrix(np.random.default_rng(0), kind, *shape, dtype)
    result = spectral_norm(W)
    assert_agrees(W, result)
    assert 1 <= result.n_iter <= 1000
    if min(shape) <= 32:  # the basis is complete, so the iteration ends
        assert result.n_iter <= min(shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stack_equals_its_matrices_one_by_one(dtype):
    rng = np.random.default_rng(0)
    W = np.stack([matrix(rng, kind, 7, 5, dtype) for kind in list(KINDS)[:6]])
    W = W.reshape(2, 3, 7, 5)
    result = spectral_norm(W, layout="ssoi")
    assert_agrees(W, result)
    assert (result.sigma.shape, result.error_bound.shape) == ((2, 3), (2, 3))
    assert (result.u.shape, result.v.shape) == ((2, 3, 7), (2, 3, 5))
    one_by_one = [spectral_norm(W[index]) for index in np.ndindex(2, 3)]
    assert result.n_iter == max(one.n_iter for one in one_by_one)
    np.testing.assert_array_equal(np.ravel(result.sigma), [one.sigma for one in one_by_one])


@given(matrices(), st.integers(1, 6))
def test_error_bound_holds_for_the_largest_before_convergence(W, max_iter):
    result = spectral_norm(W, max_iter=max_iter)
    sigma = svd_norm(W)
    assert abs(sigma - result.sigma) <= result.error_bound + 1e-14 * sigma  # the SVD rounds too
    assert abs(sigma - result.sigma) >= result.error_bound - 1e-11 * sigma
    assert result.sigma <= sigma * (1 + 1e-12)
    assert result.n_iter <= max_iter


@pytest.mark.parametrize(
    ("dtype", "gap"),
    [("float32", 1e-5), ("float32", 1e-4), ("float64", 1e-11), ("float64", 1e-10), ("float64", 0)],
)
@pytest.mark.parametrize("shape", [(30, 30), (45, 30), (30, 45)])
def test_error_bound_contains_the_largest_of_a_cluster(dtype, gap, shape):
    """The iteration may stop at σ₂, and the residual does not see it."""
    W = np.zeros(shape)
    W[range(30), range(30)] = np.r_[1, 1 - gap, np.linspace(0.5, 0.1, 28)]
    for seed in range(20):
        result = spectral_norm(W.astype(dtype), seed=seed)
        assert result.converged
        assert abs(float(result.sigma) - 1) <= float(result.error_bound) <= 2 * gap + 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("most", [0, 10**10])
@pytest.mark.parametrize("max_iter", [1, 1000])
def test_error_bound_holds_with_and_without_a_factorization(
    monkeypatch, kind, dtype, most, max_iter
):
    monkeypatch.setattr(_certificate, "_MOST", most)
    for shape in ((7, 7), (20, 3), (3, 20), (1, 5), (5, 1)):
        W = matrix(np.random.default_rng(0), kind, *shape, dtype).astype(dtype)
        result = spectral_norm(W, max_iter=max_iter)
        exact = svd_norm(W.astype(dtype).astype("complex128"))
        error = abs(float(result.sigma) - exact)
        assert error <= float(result.error_bound) + 1e-14 * exact
        if most and max_iter > 1:
            precision = max(1e-12, float(np.finfo(dtype).eps))
            assert float(result.error_bound) <= error + precision * exact
        elif not most:
            assert np.isfinite(result.error_bound)


@pytest.mark.parametrize("v", [[1, 0, 0], [0, 0, 1], [0, 0, 0], [np.nan, 0, 0], [1e-200, 1e200, 0]])
def test_bounds_hold_for_any_vector(v):
    W = np.diag([1.75, 1.0, 0.5])
    with np.errstate(all="ignore"):
        lower, upper = _certificate.bounds(W, np.asarray(v, float), 0.0, array_namespace(W))
    assert 0 <= lower <= 1.75 <= upper <= 1.75 * (1 + 1e-12)


def test_bounds_hold_for_a_wrong_estimate_of_a_large_cluster():
    rng = np.random.default_rng(0)
    W = orthogonal(rng, 120, 100) * np.r_[1.9, np.full(99, 1.8)] @ orthogonal(rng, 100, 100)
    v = unit(rng, 100)
    lower, upper = _certificate.bounds(W, v, 0.0, array_namespace(W))
    assert lower < 1.9 < upper < 1.9 * (1 + 1e-11)


@pytest.mark.parametrize("scale", [5e-324, 1e-320, 1e-310, 1e-300])
def test_error_bound_of_subnormal_matrices_is_not_zero(scale):
    W = np.array([[3.0, 1.0], [1.0, 2.0]])
    result = spectral_norm(W * scale)
    exact = svd_norm(np.round(W * scale / 5e-324)) * 5e-324 if scale < 1e-300 else None
    assert result.error_bound > 0
    if exact is not None:
        assert abs(float(result.sigma) - exact) <= float(result.error_bound)


def test_converged_is_false_until_the_tolerance_is_met():
    W = matrix(np.random.default_rng(0), "gaussian", 30, 30)
    assert not spectral_norm(W, max_iter=3).converged
    assert not spectral_norm(np.stack([np.eye(30), W]), layout="soi", max_iter=3).converged
    loose = spectral_norm(W, tol=0.1)
    assert loose.converged
    assert loose.n_iter < spectral_norm(W).n_iter
    tight = spectral_norm(W, tol=0)
    assert tight.sigma == pytest.approx(svd_norm(W), rel=1e-14)
    assert tight.error_bound < 1e-12 * tight.sigma


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_extreme_scales_work_in_float64(scale, dtype):
    W = matrix(np.random.default_rng(0), "gaussian", 5, 7, dtype)
    result = spectral_norm(W * scale)
    assert result.converged
    assert result.sigma == pytest.approx(svd_norm(W) * scale, rel=1e-10, abs=0)
    assert result.error_bound < 1e-9 * result.sigma


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_work_in_float32(backend, scale):
    W = matrix(np.random.default_rng(0), "gaussian", 5, 7)
    result = spectral_norm(backend.asarray((W * scale).astype("float32")))
    assert result.converged
    assert float(result.sigma) == pytest.approx(svd_norm(W) * scale, rel=1e-5, abs=0)


def test_largest_float_does_not_overflow(backend):
    W = backend.asarray(np.array([[3e38, 0], [0, 1e38], [0, 0]], dtype="float32"))
    result = spectral_norm(W)
    assert result.converged
    assert float(result.sigma) == pytest.approx(3e38, rel=1e-5)


@on(module="torch")
def test_result_has_no_autograd_graph(backend):
    W = backend.asarray(np.eye(3)).requires_grad_()
    assert not spectral_norm(W).sigma.requires_grad


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        ("float32", 1e-5),
        pytest.param("float64", 1e-12, marks=SLOW),
        pytest.param("complex64", 1e-5, marks=SLOW),
        ("complex128", 1e-12),
    ],
)
def test_every_backend_agrees_with_the_svd(backend, dtype, precision):
    rng = np.random.default_rng(0)
    W = np.stack([matrix(rng, kind, 4, 6, dtype) for kind in ("gaussian", "decaying")])
    result = spectral_norm(backend.asarray(W.astype(dtype)), layout="soi")
    assert result.converged is True
    assert backend.dtype_name(result.v) == dtype
    exact = svd_norm(W.astype(dtype).astype("complex128"))
    np.testing.assert_allclose(backend.to_numpy(result.sigma), exact, rtol=precision)
    error = np.abs(backend.to_numpy(result.sigma) - exact)
    assert np.all(error <= backend.to_numpy(result.error_bound))


@on(dtype="bfloat16")
def test_bfloat16_is_computed_in_float32(backend):
    W = backend.asarray(gaussian(np.random.default_rng(0), 8, 8), "bfloat16")
    result = spectral_norm(W)
    assert backend.dtype_name(result.sigma) == "float32"
    assert float(result.sigma) == pytest.approx(svd_norm(backend.to_numpy(W)), rel=1e-5)


@pytest.mark.parametrize("W", [[[3, 4]], ((3, 4),), [np.array([3, 4])], [[True, True]]], ids=str)
def test_sequences_of_numbers_are_matrices(W):
    result = spectral_norm(W)
    assert result.sigma.dtype == np.float64
    np.testing.assert_allclose(result.sigma, svd_norm(np.asarray(W, float)), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool"])
def test_integers_are_converted_to_the_default_float(backend, dtype):
    W = np.array([[3, 0], [4, 1], [0, 2]]).astype(dtype)
    result = spectral_norm(backend.asarray(W))
    assert backend.dtype_name(result.sigma) in ("float32", "float64")
    assert float(result.sigma) == pytest.approx(svd_norm(W.astype(float)), rel=1e-5)


@pytest.mark.parametrize("layout", ["oihw", "hwio", sc.Layout("(go)ihw", groups=2), "soii"])
def test_layout_makes_the_matrices(layout):
    W = gaussian(np.random.default_rng(0), 4, 2, 3, 4)
    result = spectral_norm(W, layout=layout)
    expected = svd_norm(sc.as_matrix(W, layout))
    assert result.sigma.shape == expected.shape
    np.testing.assert_allclose(result.sigma, expected, rtol=1e-10)


@given(matrices(), st.integers(0, 2**32))
def test_sigma_is_invariant(W, seed):
    rng = np.random.default_rng(seed)
    m, n = W.shape
    P, Q = orthogonal(rng, m, m, W.dtype.name), orthogonal(rng, n, n, W.dtype.name)
    sigma = spectral_norm(W).sigma
    for other in (
        -W.conj(),
        W.T,
        P @ W @ Q,
        W[rng.permutation(m)][:, rng.permutation(n)],
        np.r_[W, np.zeros((1, n))],
    ):
        assert spectral_norm(other, seed=seed).sigma == pytest.approx(sigma, rel=1e-9)
    assert spectral_norm(W * -3.7).sigma == pytest.approx(3.7 * sigma, rel=1e-9)


def test_result_is_deterministic_and_depends_on_the_seed():
    W = matrix(np.random.default_rng(0), "gaussian", 40, 40)
    first = spectral_norm(W, seed=1)
    np.testing.assert_array_equal(first.v, spectral_norm(W, seed=1).v)
    assert np.any(first.v != spectral_norm(W, seed=2).v)


def test_zero_matrix_has_zero_vectors(backend):
    result = spectral_norm(backend.asarray(np.zeros((3, 4))))
    assert (float(result.sigma), float(result.error_bound)) == (0, 0)
    assert result.converged
    for vector, size in ((result.u, 3), (result.v, 4)):
        np.testing.assert_array_equal(backend.to_numpy(vector), np.zeros(size))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_matrix_has_sigma_nan(backend, value):
    W = np.stack([np.eye(3), np.eye(3), 2 * np.eye(3)])
    W[1, 0, 2] = value
    result = spectral_norm(backend.asarray(W), layout="soi")
    assert not result.converged
    sigma = backend.to_numpy(result.sigma)
    np.testing.assert_allclose(sigma, [1, np.nan, 2], rtol=1e-14)
    assert np.isnan(backend.to_numpy(result.error_bound)[1])


@pytest.mark.parametrize(
    ("W", "arguments", "error", "words"),
    [
        (np.ones(3), {}, sc.ShapeError, "W has shape (3,)"),
        (np.ones((0, 3)), {}, sc.ShapeError, "W has shape (0, 3)"),
        (np.ones((0, 3, 3)), {}, sc.ShapeError, "W has shape (0, 3, 3)"),
        (np.ones((2, 3, 3)), {}, sc.ShapeError, "W has shape (2, 3, 3): say which matrix"),
        (np.ones((2, 3, 3)), {}, sc.ShapeError, "'soi' (a stack of matrices)"),
        (np.ones((1, 2, 3, 3)), {}, sc.ShapeError, "'ssoi' (a stack of matrices)"),
        (np.ones((2, 3, 3)), {"layout": "oihw"}, sc.ShapeError, "layout 'oihw' needs 4 axes"),
        (np.ones((2, 3, 3)), {"layout": "xyz"}, sc.ArgumentError, "cannot read layout 'xyz'"),
        (3.0, {}, sc.ShapeError, "W has shape ()"),
        ([1, 2], {}, sc.ShapeError, "W has shape (2,)"),
        ([[1, 2], [3]], {}, sc.ShapeError, "of one length"),
        ([["1", "2"]], {}, sc.DTypeError, "W has dtype <U1"),
        ([[10**400, 2]], {}, sc.DTypeError, "W has dtype object"),
        (None, {}, sc.DTypeError, "NoneType"),
        ("ab", {}, sc.DTypeError, "builtins.str"),
        (np.eye(2), {"tol": 10**400}, sc.ArgumentError, "tol must be"),
        (
            np.eye(2),
            {"tol": -1.0},
            sc.ArgumentError,
            "tol must be a finite number ≥ 0, not -1.0",
        ),
        (np.eye(2), {"tol": np.nan}, sc.ArgumentError, "tol must be"),
        (np.eye(2), {"tol": np.inf}, sc.ArgumentError, "tol must be"),
        (np.eye(2), {"max_iter": 0}, sc.ArgumentError, "max_iter must be an integer ≥ 1, not 0"),
        (np.eye(2), {"max_iter": 1.5}, sc.ArgumentError, "max_iter must be"),
        (np.eye(2), {"seed": -1}, sc.ArgumentError, "seed must be an integer ≥ 0, not -1"),
        (np.eye(2), {"seed": "x"}, sc.ArgumentError, "seed must be"),
    ],
)
def test_wrong_arguments_raise(W, arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        spectral_norm(W, **arguments)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("seed", range(5))
def test_a_bound_that_is_subnormal_is_rounded_up(dtype, seed):
    """The result is a normal number there, and its error bound is not."""
    rng = np.random.default_rng(seed)
    whole = rng.integers(-9, 10, (6, 6)).astype(dtype)
    sigma = np.linalg.norm(whole.astype(complex), 2)
    found = sc.spectral_norm(whole * np.asarray(2.0**-125, dtype))
    error = abs(float(found.sigma) * 2.0**125 - sigma)
    assert error <= float(found.error_bound) * 2.0**125 <= 1e-4 * sigma
