"""Power iteration with several vectors: its properties, precision and errors."""

import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import spectral_core as sc
from backends import (
    KINDS,
    SLOW,
    gaussian,
    get,
    matrix,
    on,
    orthogonal,
    outer,
    slow,
    svd_norm,
    unit,
)
from spectral_core import block_iteration, power_iteration

DTYPES = ("float64", "complex128")


@st.composite
def problems(draw):
    """Draw a matrix or a stack of any of ``KINDS``, and k unit vectors for it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    m, n, k = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 5))
    kind, dtype = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from(DTYPES))
    stack = draw(st.sampled_from([(), (3,), (2, 2)]))
    flat = [matrix(rng, kind, m, n, dtype) for _ in range(int(np.prod(stack)))]
    W = np.stack(flat).reshape(*stack, m, n) * 10.0 ** draw(st.integers(-3, 3))
    return W, unit(rng, *stack, k, n, dtype=dtype), rng


def norm(x):
    return np.linalg.norm(x, axis=-1)


def product(W, v):
    return np.einsum("...mn,...n->...m", W, v)


def adjoint(W):
    return np.swapaxes(W, -1, -2).conj()


def rows_times(V, Q):
    """Return the rows Qv of the rows v of V."""
    return V @ np.swapaxes(Q, -1, -2)


def spectrum(rng, s, m, n, dtype="float64"):
    """Return an m × n matrix with these singular values, and the v of the first one."""
    U, V = orthogonal(rng, m, len(s), dtype), orthogonal(rng, n, len(s), dtype)
    return U * s @ V.conj().T, V[:, 0]


@given(problems())
def test_estimate_is_between_power_iteration_and_sigma(problem):
    W, V, _ = problem
    sigma = block_iteration(W, V).sigma
    assert np.all(sigma >= power_iteration(W, V[..., 0, :]).sigma * (1 - 1e-12))
    assert np.all(sigma <= svd_norm(W) * (1 + 1e-13))


@given(problems())
def test_estimate_never_falls(problem):
    W, V, _ = problem
    last = norm(product(W, V[..., 0, :]))
    for _ in range(5):
        sigma, _, _, V = block_iteration(W, V)
        assert np.all(sigma >= last * (1 - 1e-12))
        last = sigma


@given(problems())
def test_triplet_is_the_gradient_at_constant_u(problem):
    """σ·v = Wᴴu, so that σ·u·vᴴ = u·(Wᴴu)ᴴ."""
    W, V, _ = problem
    sigma, u, v, _ = block_iteration(W, V)
    scale = svd_norm(W).max()
    np.testing.assert_allclose(
        sigma[..., None] * v, product(adjoint(W), u), rtol=1e-12, atol=1e-13 * scale
    )
    np.testing.assert_allclose(norm(u), 1, rtol=1e-12)
    np.testing.assert_allclose(norm(v), 1, rtol=1e-13)


@given(problems())
def test_one_iteration_finds_the_best_vector_of_the_span(problem):
    """The largest singular value of WᴴQ is the best in the span of W·V, and k = 2 attains it."""
    W, V, _ = problem
    V = V[..., :2, :]
    s = np.linalg.svd(rows_times(V, W), compute_uv=False)
    assume(np.all(s[..., -1] > 1e-3 * s[..., 0]))
    Q = np.swapaxes(np.linalg.qr(np.swapaxes(rows_times(V, W), -1, -2))[0], -1, -2)
    np.testing.assert_allclose(block_iteration(W, V).sigma, svd_norm(Q.conj() @ W), rtol=1e-10)


@given(problems())
def test_new_rows_are_orthonormal(problem):
    W, V, _ = problem
    k = min(W.shape[-1], V.shape[-2])
    new = block_iteration(W, V[..., :k, :]).V
    gram = new.conj() @ np.swapaxes(new, -1, -2)
    np.testing.assert_allclose(
        gram[..., 0, :], np.broadcast_to(np.eye(k)[0], gram.shape[:-1]), atol=1e-12
    )
    assert np.all(norm(new) < 1 + 1e-12)
    np.testing.assert_array_equal(new[..., 0, :], block_iteration(W, V[..., :k, :]).v)


@given(problems(), st.integers(2, 4))
def test_n_iter_equals_that_many_calls(problem, count):
    W, V, _ = problem
    together = block_iteration(W, V, n_iter=count)
    for _ in range(count):
        result = block_iteration(W, V)
        V = result.V
    for one, other in zip(together, result, strict=True):
        np.testing.assert_array_equal(one, other)


@given(problems())
def test_one_vector_equals_power_iteration(problem):
    W, V, _ = problem
    block, power = (
        block_iteration(W, V[..., :1, :], n_iter=2),
        power_iteration(W, V[..., 0, :], n_iter=2),
    )
    for one, other in zip(block[:3], power, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


# Well-separated problems: where two candidates are equally good, either can win.


def gap_problem(seed, dtype, k=3, stack=()):
    rng = np.random.default_rng(seed)
    s = np.r_[2, 1.5, np.linspace(1, 0.5, 4)]
    W = np.stack([spectrum(rng, s, 8, 7, dtype)[0] for _ in range(int(np.prod(stack)))])
    return W.reshape(*stack, 8, 7), unit(rng, *stack, k, 7, dtype=dtype), rng


def same(result, other, atol=1e-9):
    """Assert that σ and uvᴴ are equal: the phase of u and v is free."""
    np.testing.assert_allclose(result[0], other[0], rtol=1e-9)
    np.testing.assert_allclose(outer(1, *result[1:3]), outer(1, *other[1:3]), atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**32), c=st.floats(1e-3, 1e3))
def test_scaling_the_matrix_scales_sigma(dtype, seed, c):
    W, V, _ = gap_problem(seed, dtype)
    sigma, u, v, _ = block_iteration(W, V, n_iter=2)
    same(block_iteration(-c * W, V, n_iter=2), (c * sigma, -u, v))


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**32))
def test_unitary_matrices_rotate_the_vectors(dtype, seed):
    W, V, rng = gap_problem(seed, dtype)
    P, Q = orthogonal(rng, 8, 8, dtype), orthogonal(rng, 7, 7, dtype)
    sigma, u, v, _ = block_iteration(W, V, n_iter=2)
    rotated = block_iteration(P @ W @ adjoint(Q), rows_times(V, Q), n_iter=2)
    same(rotated, (sigma, product(P, u), product(Q, v)), atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 2**32))
def test_only_the_span_of_two_vectors_matters(dtype, seed):
    W, V, rng = gap_problem(seed, dtype, k=2)
    turned = orthogonal(rng, 2, 2, dtype) @ V
    same(block_iteration(W, turned), block_iteration(W, V), atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_stack_equals_its_matrices_one_by_one(dtype, k):
    W, V, _ = gap_problem(0, dtype, k=k, stack=(2, 3))
    result = block_iteration(W, V, n_iter=2)
    for index in np.ndindex(2, 3):
        single = block_iteration(W[index], V[index], n_iter=2)
        for part, other in zip(result, single, strict=True):
            np.testing.assert_allclose(part[index], other, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float64", *slow("complex128")])
@pytest.mark.parametrize("k", [2, *slow(3, 4, 8)])
@pytest.mark.parametrize("shape", [(9, 9), (12, 9), (9, 20)], ids=str)
def test_converges_to_the_svd(backend, shape, k, dtype):
    rng = np.random.default_rng(0)
    W, _ = spectrum(rng, np.r_[1, 0.9, np.linspace(0.6, 0.1, 7)], *shape, dtype)
    V = unit(rng, k, shape[1], dtype=dtype)
    result = block_iteration(backend.asarray(W), backend.asarray(V), n_iter=60)
    sigma, u, v, V = (backend.to_numpy(part) for part in result)
    U, s, Vh = np.linalg.svd(W)
    np.testing.assert_allclose(sigma, s[0], rtol=1e-13)
    np.testing.assert_allclose(np.outer(u, v.conj()), np.outer(U[:, 0], Vh[0]), atol=1e-10)
    assert abs(Vh[1] @ V[1]) == pytest.approx(1)  # the second row points along v₂
    assert {backend.dtype_name(part) for part in result[1:]} == {dtype}
    assert backend.dtype_name(result.sigma) == "float64"


@pytest.mark.thorough("jax-cpu")
def test_more_vectors_converge_faster_on_a_close_pair(backend):
    """The number of readings of W is the same. The old v as a third vector helps further."""
    rng = np.random.default_rng(0)
    s = np.r_[1, 0.999, np.linspace(0.9, 0.1, 30)]
    cases = [spectrum(rng, s, 40, 50) for _ in range(9)]
    W, v1 = (np.stack(parts) for parts in zip(*cases, strict=True))
    V = unit(rng, 9, 3, 50)
    error = {}
    for k in (1, 2, 3):
        v = block_iteration(backend.asarray(W), backend.asarray(V[:, :k]), n_iter=40).v
        cosine = np.sum(backend.to_numpy(v) * v1, axis=-1)
        error[k] = np.median(np.sqrt(np.maximum(0, 1 - cosine**2)))
    assert error[1] > 1e-2
    assert error[2] < error[1] / 10
    assert error[3] < error[2] / 10


@pytest.mark.parametrize("dtype", slow("float32", "float64"))
def test_two_vectors_follow_a_crossing_that_one_misses(backend, dtype):
    """σ₂ overtakes σ₁ within 20 steps, as in training with the regularizer."""
    rng = np.random.default_rng(0)
    U, X = orthogonal(rng, 30, 10), orthogonal(rng, 40, 10)
    V, v = unit(rng, 2, 40), unit(rng, 40)
    V, v = backend.asarray(V, dtype), backend.asarray(v, dtype)
    errors = []
    for step in range(-60, 21):
        t = max(step, 0) / 100
        s = np.r_[1 - t, 0.9 + t, np.linspace(0.5, 0.1, 8)]
        W = backend.asarray(U * s @ X.T, dtype)
        power, block = power_iteration(W, v), block_iteration(W, V)
        v, V = power.v, block.V
        errors.append([1 - float(result.sigma) / s.max() for result in (power, block)])
    assert errors[-1][0] > 0.1
    assert max(error[1] for error in errors[60:]) < 1e-5


@pytest.mark.parametrize("k", [1, 2, *slow(3, 5)])
def test_zero_matrix_keeps_the_rows(backend, k):
    V = backend.asarray(unit(np.random.default_rng(0), k, 3))
    sigma, u, v, new = block_iteration(backend.asarray(np.zeros((2, 3))), V, n_iter=3)
    assert float(sigma) == 0
    np.testing.assert_array_equal(backend.to_numpy(u), 0)
    np.testing.assert_array_equal(backend.to_numpy(new), backend.to_numpy(V))
    np.testing.assert_array_equal(backend.to_numpy(v), backend.to_numpy(V)[0])


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("k", [1, 2, *slow(4)])
def test_bad_matrix_of_a_stack_affects_no_other(backend, k):
    """One zero, one NaN, one infinite and one overflowing matrix between two sound ones."""
    rng = np.random.default_rng(0)
    W, V = gaussian(rng, 6, 3, 4), unit(rng, 6, k, 4)
    W[1] = 0
    W[2, 0, 0] = np.nan
    W[3, 1, 1] = np.inf
    W[4] *= 1e200
    result = block_iteration(backend.asarray(W), backend.asarray(V), n_iter=2)
    sigma, _, _, new = (backend.to_numpy(part) for part in result)
    assert sigma[1] == 0
    assert not np.isfinite(sigma[2:5]).any()
    np.testing.assert_array_equal(new[1:5], V[1:5])
    sound = [0, 5]
    expected = block_iteration(W[sound], V[sound], n_iter=2)
    np.testing.assert_allclose(sigma[sound], expected.sigma, rtol=1e-12)
    np.testing.assert_allclose(new[sound, 0], expected.V[:, 0], atol=1e-9)


@pytest.mark.parametrize("dtype", [*slow("float32"), "float64", "complex64"])
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (2, 9), (9, 2), (6, 6)], ids=str)
@pytest.mark.parametrize("k", [2, *slow(3, 5, 8)])
def test_sigma_of_rank_one_is_exact_with_surplus_vectors(backend, k, shape, dtype):
    """The matrix has rank one and the rows of V are equal: σ is exact from the first step on."""
    rng = np.random.default_rng(0)
    W = np.outer(gaussian(rng, shape[0], dtype=dtype), gaussian(rng, shape[1], dtype=dtype))
    V = np.repeat(unit(rng, 1, shape[1], dtype=dtype), k, axis=0)
    mine, V = backend.asarray(W), backend.asarray(V)
    for _ in range(5):
        sigma, u, v, V = block_iteration(mine, V)
        precision = 1e-13 if dtype == "float64" else 1e-5
        assert float(sigma) == pytest.approx(svd_norm(W), rel=precision)
        term = outer(*(backend.to_numpy(part) for part in (sigma, u, v)))
        np.testing.assert_allclose(term, W, rtol=0, atol=precision * float(sigma))
        assert np.isfinite(backend.to_numpy(V)).all()


@pytest.mark.parametrize("dtype", [*slow("float32"), "float64"])
@pytest.mark.parametrize("k", [2, *slow(3, 4)])
def test_lost_row_recovers_when_the_matrix_gains_rank(backend, k, dtype):
    """A second row that a rank-one W removed, or that equals the first, must recover."""
    rng = np.random.default_rng(0)
    U, X = orthogonal(rng, 8, 6), orthogonal(rng, 9, 6)
    V = backend.asarray(np.repeat(unit(rng, 1, 9), k, axis=0), dtype)
    low, full = (backend.asarray(U * s @ X.T, dtype) for s in (np.eye(6)[0], 1 / np.r_[1:7]))
    V = block_iteration(low, V, n_iter=20).V
    result = block_iteration(full, V, n_iter=20)
    V = backend.to_numpy(result.V)
    assert abs(V[1] @ X[:, 1]) == pytest.approx(1, abs=1e-4)


def test_rows_along_the_axes_recover(backend):
    """Products that are exactly zero have no rounding noise to recover from."""
    V = backend.asarray(np.eye(3)[:2])
    V = block_iteration(backend.asarray(np.diag([0.0, 1.0, 0.0])), V, n_iter=3).V
    rows = backend.to_numpy(V)
    np.testing.assert_allclose(np.abs(rows), np.eye(3)[[1, 0]], atol=1e-15)


def half_precision_case(backend, dtype):
    W = backend.asarray(gaussian(np.random.default_rng(0), 6, 300), dtype)
    V = unit(np.random.default_rng(1), 3, 300, dtype="float32")
    result = block_iteration(W, backend.asarray(V))
    exact = block_iteration(backend.to_numpy(W).astype("float64"), V.astype("float64"))
    assert {backend.dtype_name(part) for part in result} == {"float32"}
    for part, expected in zip(result[:3], exact[:3], strict=True):
        np.testing.assert_allclose(backend.to_numpy(part), expected, rtol=1e-4, atol=1e-5)


@SLOW
@on(dtype="float16")
def test_float16_iterates_in_float32(backend):
    half_precision_case(backend, "float16")


@on(dtype="bfloat16")
def test_bfloat16_iterates_in_float32(backend):
    half_precision_case(backend, "bfloat16")


@pytest.mark.parametrize("scale", [1e-17, 1e17])
@pytest.mark.parametrize("k", [2, 4])
def test_sigma_is_right_at_the_ends_of_the_float32_range(k, scale):
    rng = np.random.default_rng(0)
    W, V = gaussian(rng, 4, 5), unit(rng, k, 5)
    expected = block_iteration(W, V, n_iter=3).sigma
    sigma = block_iteration((W * scale).astype("float32"), V.astype("float32"), n_iter=3).sigma
    assert float(sigma) == pytest.approx(expected * scale, rel=1e-2)


@pytest.mark.parametrize("k", slow(2, 3, 4))
def test_float32_stays_a_lower_bound_up_to_rounding(backend, k):
    rng = np.random.default_rng(0)
    for kind in KINDS:
        W, V = matrix(rng, kind, 20, 30, "float32"), unit(rng, k, 30, dtype="float32")
        mine, V, last = backend.asarray(W), backend.asarray(V), 0
        for _ in range(30):
            sigma, _, _, V = block_iteration(mine, V)
            assert last * (1 - 2e-6) <= float(sigma) <= svd_norm(W.astype("float64")) * (1 + 1e-6)
            last = float(sigma)


@SLOW
def test_inputs_do_not_change(backend):
    rng = np.random.default_rng(0)
    W, V = gaussian(rng, 3, 4), unit(rng, 3, 4)
    mine, my_v = backend.asarray(W), backend.asarray(V)
    block_iteration(mine, my_v, n_iter=3)
    np.testing.assert_array_equal(backend.to_numpy(mine), W)
    np.testing.assert_array_equal(backend.to_numpy(my_v), V)


@SLOW
def test_real_vectors_fit_a_complex_matrix(backend):
    rng = np.random.default_rng(0)
    W, V = gaussian(rng, 3, 4, dtype="complex128"), unit(rng, 2, 4)
    real = block_iteration(backend.asarray(W), backend.asarray(V))
    expected = block_iteration(W, V.astype("complex128"))
    for part, other in zip(real, expected, strict=True):
        np.testing.assert_allclose(backend.to_numpy(part), other, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_block_iteration_runs_under_jit(k):
    backend = get("jax-cpu")
    import jax

    rng = np.random.default_rng(0)
    W, V = gaussian(rng, 2, 5, 6), unit(rng, 2, k, 6)
    traced = jax.jit(block_iteration, static_argnames="n_iter")
    result = traced(backend.asarray(W), backend.asarray(V), n_iter=2)
    for part, other in zip(result, block_iteration(W, V, n_iter=2), strict=True):
        np.testing.assert_allclose(backend.to_numpy(part), other, atol=1e-9)


@pytest.mark.parametrize(
    ("W", "V", "error", "words"),
    [
        (np.ones(3), np.ones((1, 3)), sc.ShapeError, "W has shape (3,)"),
        (np.ones((0, 3)), np.ones((2, 3)), sc.ShapeError, "W has shape (0, 3)"),
        (np.ones((2, 3)), np.ones(3), sc.ShapeError, "V has shape (3,).*needs (k, 3)"),
        (np.ones((2, 3)), np.ones((2, 2)), sc.ShapeError, "V has shape (2, 2).*needs (k, 3)"),
        (np.ones((2, 3)), np.ones((0, 3)), sc.ShapeError, "V has shape (0, 3).*k ≥ 1"),
        (np.ones((4, 2, 3)), np.ones((4, 3)), sc.ShapeError, "(4, 3).*needs (4, k, 3)"),
        (np.ones((2, 3), dtype=int), np.ones((1, 3)), sc.DTypeError, "W has dtype int64"),
        (np.ones((2, 3)), np.ones((1, 3), dtype=int), sc.DTypeError, "V has dtype int64"),
        (np.ones((2, 3)), np.ones((1, 3)) * 1j, sc.DTypeError, "complex128.*float64"),
        ([[1.0]], np.ones((1, 1)), sc.DTypeError, "builtins.list"),
    ],
)
def test_wrong_arrays_raise(W, V, error, words):
    with pytest.raises(error, match=".*".join(map(re.escape, words.split(".*")))):
        block_iteration(W, V)


@pytest.mark.parametrize("n_iter", [0, 1.5, None])
def test_wrong_n_iter_raises(n_iter):
    words = f"n_iter must be an integer ≥ 1, not {n_iter!r}"
    with pytest.raises(sc.ArgumentError, match=re.escape(words)):
        block_iteration(np.eye(2), np.ones((2, 2)), n_iter=n_iter)


def assert_orthogonal_or_zero(V, precision):
    """Assert that each row is a unit vector orthogonal to the first, or zero."""
    V = np.asarray(V, "complex128" if np.iscomplexobj(V) else "float64")
    lengths = np.linalg.norm(V, axis=-1)
    assert np.all((lengths < precision) | (abs(lengths - 1) < precision)), lengths
    assert np.all(abs(V[1:] @ V[0].conj()) < precision), V @ V[0].conj()


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("factors", [(1, 1), (1, -2, 1e3), (1, 0), (1, 0, 0, 1), (1, 1 + 1e-6)])
@pytest.mark.parametrize("converged", [False, True])
@pytest.mark.filterwarnings("error")
def test_parallel_and_zero_rows_give_orthogonal_rows(dtype, n, factors, converged):
    rng = np.random.default_rng(0)
    W = matrix(rng, "decaying", 6, n, dtype)
    v = np.linalg.svd(W)[2][0].conj() if converged else unit(rng, n, dtype=dtype)
    V = (np.asarray(factors)[:, None] * v).astype(dtype)
    precision = 1e-4 if dtype == "float32" else 1e-12
    for _ in range(4):
        sigma, u, v, V = block_iteration(W, V, n_iter=3)
        assert_orthogonal_or_zero(V, precision)
        assert abs(np.linalg.norm(u) - 1) < precision
        assert abs(np.linalg.norm(v) - 1) < precision
    np.testing.assert_allclose(sigma, svd_norm(W), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-16, 1e-15, 1e-10, 1e10, 1e17])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_vectors_are_unit_vectors_at_the_ends_of_the_float32_range(k, scale):
    rng = np.random.default_rng(0)
    for _ in range(20):
        W = (matrix(rng, "decaying", 12, 9) * scale).astype("float32")
        V = unit(rng, k, 9, dtype="float32")
        for _ in range(3):
            sigma, u, v, V = block_iteration(W, V)
            assert np.linalg.norm(u.astype("float64")) == pytest.approx(1, abs=1e-4)
            assert np.linalg.norm(v.astype("float64")) == pytest.approx(1, abs=1e-4)
            assert_orthogonal_or_zero(V, 1e-4)
            assert sigma <= scale * (1 + 1e-5)
