"""Power iteration with one vector: its properties, precision and errors."""

import re
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import KINDS, gaussian, matrix, on, orthogonal, slow, svd_norm, unit
from spectral_core import power_iteration, start_vector
from spectral_core._arrays import array_namespace, conj, traits
from spectral_core._power import adjoint_times_rows, iterate_rows, times_rows

DTYPES = ("float64", "complex128")
PINNED_REAL = [-0.217253352533214, -0.9613108422094184, -0.16935892496026744]
PINNED_COMPLEX = [
    -0.21265061776592634 - 0.16577088269083498j,
    -0.9409444875179233 + 0.2047515582976216j,
]
GOLDEN = 3 * (1 + 5**0.5) / 2  # of [[3, 3], [0, 3]]: 4.8541…


@st.composite
def problems(draw):
    """Draw a matrix or a stack of any of ``KINDS``, and a unit v for it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    kind, dtype = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from(DTYPES))
    stack = draw(st.sampled_from([(), (3,), (2, 2)]))
    flat = [matrix(rng, kind, m, n, dtype) for _ in range(int(np.prod(stack)))]
    W = np.stack(flat).reshape(*stack, m, n) * 10.0 ** draw(st.integers(-3, 3))
    return W, unit(rng, *stack, n, dtype=dtype), rng


def norm(x):
    return np.linalg.norm(x, axis=-1)


def product(W, v):
    return np.einsum("...mn,...n->...m", W, v)


def adjoint(W):
    return np.swapaxes(W, -1, -2).conj()


def same(triple, other, atol=1e-9):
    """Assert that σ, u and v are equal up to rounding, which a step may amplify."""
    np.testing.assert_allclose(triple[0], other[0], rtol=1e-9)
    np.testing.assert_allclose(triple[1], other[1], atol=atol)
    np.testing.assert_allclose(triple[2], other[2], atol=atol)


@given(problems())
def test_estimate_is_between_the_norm_of_the_product_and_sigma(problem):
    W, v, _ = problem
    sigma = power_iteration(W, v).sigma
    assert np.all(sigma >= norm(product(W, v)) * (1 - 1e-13))
    assert np.all(sigma <= svd_norm(W) * (1 + 1e-13))


@given(problems())
def test_estimate_never_falls(problem):
    W, v, _ = problem
    last = norm(product(W, v))
    for _ in range(4):
        sigma, _, v = power_iteration(W, v)
        assert np.all(sigma >= last * (1 - 1e-13))
        last = sigma


@given(problems())
def test_one_iteration_follows_the_definition(problem):
    W, v, _ = problem
    sigma, u, new_v = power_iteration(W, v)
    Wv = product(W, v)
    np.testing.assert_allclose(u, Wv / norm(Wv)[..., None], atol=1e-12)
    np.testing.assert_allclose(sigma, norm(product(adjoint(W), u)), rtol=1e-12)
    np.testing.assert_allclose(
        sigma[..., None] * new_v, product(adjoint(W), u), rtol=1e-12, atol=1e-12 * svd_norm(W).max()
    )
    np.testing.assert_allclose(norm(u), 1, rtol=1e-13)
    np.testing.assert_allclose(norm(new_v), 1, rtol=1e-13)


def unit_and_length(x, xp, guard):
    """Return x/‖x‖, its inverse norm and its norm, as the iteration of one vector has it."""
    square = x * x
    if xp.isdtype(x.dtype, "complex floating"):
        re_, im = xp.real(x), xp.imag(x)
        square = re_ * re_ + im * im
    square = xp.sum(square, axis=-1, keepdims=True)
    length = xp.sqrt(square)
    inverse = length / (square + guard)
    return x * inverse, inverse, length[..., 0]


@pytest.mark.parametrize("dtype", ["float32", *slow("float64", "complex128")])
@pytest.mark.parametrize("shape", [(7, 5), (5, 300), (3, 4, 6), (2, 2, 9, 1)], ids=str)
def test_one_vector_is_iterated_by_the_formulas_of_one_vector(backend, shape, dtype):
    """Bit for bit: u = Wv/‖Wv‖, σ = ‖Wᴴu‖, v = Wᴴu/σ, as version 0.1.0 computed them."""
    rng = np.random.default_rng(0)
    W = backend.asarray(gaussian(rng, *shape, dtype=dtype))
    start = v = backend.asarray(unit(rng, *shape[:-2], shape[-1], dtype=dtype))
    xp = array_namespace(W)
    kind = traits(W, xp, "W")
    for _ in range(3):
        Wv = W @ v if W.ndim == 2 else (W @ v[..., None])[..., 0]
        u, _, _ = unit_and_length(Wv, xp, kind.tiny)
        uH = conj(u, xp)
        WHu = conj(uH @ W if W.ndim == 2 else (uH[..., None, :] @ W)[..., 0, :], xp)
        v_next, inverse, sigma = unit_and_length(WHu, xp, kind.tiny)
        v = xp.where(inverse > 0, v_next, v)
    products = (partial(multiply, W, xp=xp) for multiply in (times_rows, adjoint_times_rows))
    triplet = iterate_rows(*products, start[..., None, :], 3, kind, xp)
    assert triplet.V.shape == (*shape[:-2], 1, shape[-1])
    found = triplet.sigma, triplet.u, triplet.V[..., 0, :]
    for part, expected in zip(found, (sigma, u, v), strict=True):
        np.testing.assert_array_equal(backend.to_numpy(part), backend.to_numpy(expected))


@given(problems(), st.integers(2, 5))
def test_n_iter_equals_that_many_calls(problem, k):
    W, v, _ = problem
    together = power_iteration(W, v, n_iter=k)
    for _ in range(k):
        sigma, u, v = power_iteration(W, v)
    for one, other in zip(together, (sigma, u, v), strict=True):
        np.testing.assert_array_equal(one, other)


@given(problems())
def test_stack_equals_its_matrices_one_by_one(problem):
    W, v, _ = problem
    triple = power_iteration(W, v)
    for index in np.ndindex(W.shape[:-2]):
        same([part[index] for part in triple], power_iteration(W[index], v[index]))


@given(problems(), st.floats(1e-3, 1e3))
def test_scaling_the_matrix_scales_sigma(problem, c):
    W, v, _ = problem
    sigma, u, new_v = power_iteration(W, v)
    same(power_iteration(-c * W, v), (c * sigma, -u, new_v))
    same(power_iteration(W, c * v), (sigma, u, new_v))


@given(problems())
def test_phase_of_v_passes_to_u(problem):
    W, v, rng = problem
    phase = np.exp(1j * rng.uniform(0, 6)) if np.iscomplexobj(W) else -1
    sigma, u, new_v = power_iteration(W, v)
    same(power_iteration(W, phase * v), (sigma, phase * u, phase * new_v))


@given(problems())
def test_unitary_matrices_rotate_the_vectors(problem):
    W, v, rng = problem
    m, n = W.shape[-2:]
    P, Q = (orthogonal(rng, k, k, W.dtype.name) for k in (m, n))
    sigma, u, new_v = power_iteration(W, v)
    rotated = power_iteration(P @ W @ adjoint(Q), product(Q, v))
    # A v that W nearly annihilates makes Wv, and so u, ill-conditioned.
    same(rotated, (sigma, product(P, u), product(Q, new_v)), atol=1e-6)


@given(problems())
def test_permutations_of_the_matrix_permute_the_vectors(problem):
    W, v, rng = problem
    rows, columns = (rng.permutation(k) for k in W.shape[-2:])
    sigma, u, new_v = power_iteration(W, v)
    permuted = power_iteration(W[..., rows, :][..., columns], v[..., columns])
    same(permuted, (sigma, u[..., rows], new_v[..., columns]))


@given(problems())
def test_transposed_matrix_continues_where_the_matrix_stopped(problem):
    W, v, _ = problem
    sigma, u, new_v = power_iteration(W, v)
    transposed = power_iteration(adjoint(W), u)
    np.testing.assert_allclose(transposed.u, new_v, atol=1e-9)
    assert np.all(transposed.sigma >= sigma * (1 - 1e-13))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 4), (9, 2), (1, 6), (6, 1)], ids=str)
def test_converges_to_the_svd(shape, dtype):
    rng = np.random.default_rng(0)
    W = matrix(rng, "decaying", *shape, dtype)
    sigma, u, v = power_iteration(W, unit(rng, shape[1], dtype=dtype), n_iter=60)
    U, s, Vh = np.linalg.svd(W)
    np.testing.assert_allclose(sigma, s[0], rtol=1e-13)
    np.testing.assert_allclose(np.outer(u, v.conj()), np.outer(U[:, 0], Vh[0]), atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_golden_matrix_has_the_known_sigma(backend, dtype):
    W = backend.asarray([[3, 3], [0, 3]], dtype)
    v = backend.asarray([1, 0.5], dtype)
    sigma, u, v = power_iteration(W, v, n_iter=20)
    precision = 1e-6 if dtype in ("float32", "complex64") else 1e-14
    assert float(sigma) == pytest.approx(GOLDEN, rel=precision)
    assert backend.dtype_name(sigma) == {"complex64": "float32", "complex128": "float64"}.get(
        dtype, dtype
    )
    assert backend.dtype_name(u) == backend.dtype_name(v) == dtype


def half_precision_case(backend, dtype):
    W = backend.asarray(gaussian(np.random.default_rng(0), 6, 300), dtype)
    v = unit(np.random.default_rng(1), 300, dtype="float32")
    triple = power_iteration(W, backend.asarray(v))
    exact = power_iteration(backend.to_numpy(W).astype("float64"), v.astype("float64"))
    assert {backend.dtype_name(part) for part in triple} == {"float32"}
    for part, expected in zip(triple, exact, strict=True):
        np.testing.assert_allclose(backend.to_numpy(part), expected, rtol=1e-5, atol=1e-6)


@on(dtype="float16")
def test_float16_iterates_in_float32(backend):
    half_precision_case(backend, "float16")


@on(dtype="bfloat16")
def test_bfloat16_iterates_in_float32(backend):
    half_precision_case(backend, "bfloat16")


def test_half_precision_does_not_overflow():
    W = np.full((64, 64), 6e4, dtype="float16")
    assert power_iteration(W, np.ones(64, dtype="float32")).sigma == pytest.approx(
        64 * float(W[0, 0]), rel=1e-6
    )


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_sigma_is_right_at_the_ends_of_the_float32_range(scale):
    W = gaussian(np.random.default_rng(0), 4, 5)
    v = start_vector((5,), W.astype("float32"))
    expected = power_iteration(W, v.astype("float64"), n_iter=3).sigma
    sigma = power_iteration((W * scale).astype("float32"), v, n_iter=3).sigma
    assert float(sigma) == pytest.approx(expected * scale, rel=1e-2)


def test_default_eps_changes_only_zero():
    rng = np.random.default_rng(0)
    W, v = gaussian(rng, 4, 5) * 1e-100, unit(rng, 5)
    for one, other in zip(power_iteration(W, v), power_iteration(W, v, eps=0.0), strict=True):
        np.testing.assert_array_equal(one, other)


def test_eps_is_added_to_both_squared_norms():
    W, v = np.array([[3.0, 0.0], [0.0, 0.0]]), np.array([1.0, 0.0])
    sigma, u, v = power_iteration(W, v, eps=1.0)
    assert u[0] == pytest.approx(9 / (9 + 1))  # ‖Wv‖² = 9
    assert sigma == pytest.approx(2.7)
    assert v[0] == pytest.approx(2.7**2 / (2.7**2 + 1))


def test_zero_matrix_keeps_v(backend):
    v = backend.asarray(unit(np.random.default_rng(0), 3))
    sigma, u, new_v = power_iteration(backend.asarray(np.zeros((2, 3))), v, n_iter=3)
    assert float(sigma) == 0
    np.testing.assert_array_equal(backend.to_numpy(u), 0)
    np.testing.assert_array_equal(backend.to_numpy(new_v), backend.to_numpy(v))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_bad_matrix_of_a_stack_affects_no_other(backend):
    """One zero, one NaN, one infinite and one overflowing matrix between two sound ones."""
    rng = np.random.default_rng(0)
    W, v = gaussian(rng, 6, 3, 4), unit(rng, 6, 4)
    W[1] = 0
    W[2, 0, 0] = np.nan
    W[3, 1, 1] = np.inf
    W[4] *= 1e200
    triple = power_iteration(backend.asarray(W), backend.asarray(v), n_iter=2)
    sigma, _, new_v = (backend.to_numpy(part) for part in triple)
    assert sigma[1] == 0
    assert not np.isfinite(sigma[2:5]).any()
    np.testing.assert_array_equal(new_v[1:5], v[1:5])
    sound = [0, 5]
    expected = power_iteration(W[sound], v[sound], n_iter=2)
    np.testing.assert_allclose(sigma[sound], expected.sigma, rtol=1e-13)
    np.testing.assert_allclose(new_v[sound], expected.v, atol=1e-13)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_overflow_of_the_second_product_keeps_v(backend):
    v = np.array([1e-100, 1.0])
    sigma, _, new_v = power_iteration(backend.asarray(np.diag([1e160, 1.0])), backend.asarray(v))
    assert float(sigma) == np.inf
    np.testing.assert_array_equal(backend.to_numpy(new_v), v)


def test_inputs_do_not_change(backend):
    rng = np.random.default_rng(0)
    W, v = gaussian(rng, 3, 4), unit(rng, 4)
    mine, my_v = backend.asarray(W), backend.asarray(v)
    power_iteration(mine, my_v, n_iter=3)
    np.testing.assert_array_equal(backend.to_numpy(mine), W)
    np.testing.assert_array_equal(backend.to_numpy(my_v), v)


def test_real_v_fits_a_complex_matrix(backend):
    rng = np.random.default_rng(0)
    W, v = gaussian(rng, 3, 4, dtype="complex128"), unit(rng, 4)
    real = power_iteration(backend.asarray(W), backend.asarray(v))
    expected = power_iteration(W, v.astype("complex128"))
    for part, other in zip(real, expected, strict=True):
        np.testing.assert_allclose(backend.to_numpy(part), other, atol=1e-13)


@pytest.mark.parametrize(
    ("W", "v", "error", "words"),
    [
        (np.ones(3), np.ones(3), sc.ShapeError, "W has shape (3,)"),
        (np.ones((0, 3)), np.ones(3), sc.ShapeError, "W has shape (0, 3)"),
        (np.ones((2, 3, 0)), np.ones((2, 0)), sc.ShapeError, "W has shape (2, 3, 0)"),
        (np.ones((2, 3)), np.ones(2), sc.ShapeError, "v has shape (2,).* (2, 3) needs (3,)"),
        (np.ones((4, 2, 3)), np.ones(3), sc.ShapeError, "v has shape (3,).* needs (4, 3)"),
        (np.ones((2, 3), dtype=int), np.ones(3), sc.DTypeError, "W has dtype int64"),
        (np.ones((2, 3), dtype=bool), np.ones(3), sc.DTypeError, "W has dtype bool"),
        (np.ones((2, 3)), np.ones(3, dtype=int), sc.DTypeError, "v has dtype int64"),
        (np.ones((2, 3)), np.ones(3) * 1j, sc.DTypeError, "v has dtype complex128.*float64"),
        ([[1.0]], np.ones(1), sc.DTypeError, "builtins.list"),
        (np.ones((1, 1)), [1.0], sc.DTypeError, "builtins.list"),
    ],
)
def test_wrong_arrays_raise(W, v, error, words):
    with pytest.raises(error, match=".*".join(map(re.escape, words.split(".*")))):
        power_iteration(W, v)


@pytest.mark.parametrize("n_iter", [0, -1, 1.5, 1.0, "2", None])
def test_wrong_n_iter_raises(n_iter):
    words = f"n_iter must be an integer ≥ 1, not {n_iter!r}"
    with pytest.raises(sc.ArgumentError, match=re.escape(words)):
        power_iteration(np.eye(2), np.ones(2), n_iter=n_iter)


@on("array-api-strict", "torch-cpu", "jax-cpu")
def test_arrays_of_two_libraries_raise(backend):
    with pytest.raises(sc.DTypeError, match=r"arrays of one library.*numpy"):
        power_iteration(np.eye(2), backend.asarray(np.ones(2)))


def test_start_vector_is_pinned():
    """A change of the draw would make ranks and checkpoints differ, so it is pinned."""
    real = start_vector((3,), np.zeros((2, 3)), seed=7, name="layer.weight")
    complex_ = start_vector((2,), np.zeros((2, 2), dtype="complex128"), seed=7, name="layer.weight")
    np.testing.assert_allclose(real, PINNED_REAL, rtol=1e-12)
    np.testing.assert_allclose(complex_, PINNED_COMPLEX, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)], ids=str)
def test_start_vectors_are_unit_and_equal_on_every_backend(backend, dtype, shape):
    v = start_vector(shape, backend.asarray(np.zeros((2, 2)), dtype), seed=3, name="w")
    wide = "complex128" if dtype.startswith("complex") else "float64"
    expected = start_vector(shape, np.zeros((2, 2), wide), seed=3, name="w")
    assert backend.dtype_name(v) == dtype
    np.testing.assert_array_equal(backend.to_numpy(v), expected.astype(dtype))
    np.testing.assert_allclose(norm(expected), 1, rtol=1e-14)


def test_start_vectors_differ_by_seed_and_name():
    draws = {
        start_vector((4,), np.zeros(1), seed=seed, name=name).tobytes()
        for seed in (0, 1, 2**40)
        for name in ("", "a", "b", "ab", "ba", "gewicht.ß")
    }
    assert len(draws) == 18


def test_start_vectors_of_a_stack_differ():
    v = start_vector((50, 4), np.zeros(1))
    assert np.abs(v @ v.T - np.eye(50)).max() < 0.9999


@pytest.mark.parametrize("seed", [-1, 0.5, "x", None])
def test_wrong_seed_raises(seed):
    with pytest.raises(sc.ArgumentError, match=f"seed must be an integer ≥ 0, not {seed!r}"):
        start_vector((3,), np.zeros(3), seed=seed)


def test_start_vector_error_names_the_weight():
    with pytest.raises(sc.DTypeError, match="weight 'count' has dtype int64"):
        start_vector((3,), np.zeros(3, dtype="int64"), name="count")


LENGTHS = {"float64": [5e-324, 1e-300, 1e-30, 1e30, 1e300], "float32": [1e-44, 1e-30, 1e30, 3e38]}
LENGTHS |= {"complex128": LENGTHS["float64"], "complex64": LENGTHS["float32"]}


@pytest.mark.parametrize(
    ("dtype", "length"),
    [(dtype, length) for dtype, lengths in LENGTHS.items() for length in lengths],
)
@pytest.mark.parametrize("W_dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("rows", [False, True], ids=["v", "V"])
def test_start_vector_has_any_length(dtype, length, W_dtype, rows):
    """Its direction alone matters; a subnormal vector has few digits of it."""
    if dtype.startswith("complex") and not W_dtype.startswith("complex"):
        pytest.skip("a complex v does not fit a real matrix")
    rng = np.random.default_rng(0)
    W = matrix(rng, "decaying", 6, 4, "complex128" if W_dtype == "complex128" else "float64")
    W = W.astype(W_dtype)
    v = rng.uniform(0.1, 1, (2, 4)).astype(dtype)
    v = v / abs(v).max(axis=-1, keepdims=True) * np.asarray(length, v.real.dtype)
    v = v if rows else v[0]
    found = (sc.block_iteration if rows else power_iteration)(W, v, n_iter=30)
    np.testing.assert_allclose(found.sigma, 1, rtol=1e-5)
    for vector in (found.u, found.v):
        np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)


def test_short_and_long_start_vectors_on_every_backend(backend):
    W = backend.asarray(np.diag([3.0, 1.0, 0.5]).astype("float32"))
    for length in (1e-36, 1e-20, 1e20, 1e37):
        v = backend.asarray((np.ones(3) * length).astype("float32"))
        assert float(power_iteration(W, v, n_iter=20).sigma) == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("eps", [-1.0, np.nan, np.inf, "x", None, 1j])
def test_eps_is_a_number_of_at_least_zero(eps):
    if eps is None:  # the default
        assert power_iteration(np.zeros((2, 2)), np.ones(2), eps=0.0).sigma == 0  # not NaN
        return
    with pytest.raises(sc.ArgumentError, match="eps must be a finite number ≥ 0"):
        power_iteration(np.eye(2), np.ones(2), eps=eps)
