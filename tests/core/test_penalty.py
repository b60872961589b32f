"""The penalties, their slopes and their gradients."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc
from backends import gaussian, get, matrix, on, outer, unit
from spectral_core import penalty, penalty_at, power_iteration, rank_one
from spectral_core._penalty import Slope, add_outer_, is_paper, same_rule, slope_of

CASES = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 6), "float64"),
        ((6, 4), "complex128"),
        ((1, 5), "float64"),
        ((5, 1), "complex128"),
        ((2, 3, 4), "float64"),
        ((2, 3, 4), "complex128"),
    ],
    ids=str,
)


def problem(backend, shape, dtype):
    rng = np.random.default_rng(0)
    W = backend.asarray(gaussian(rng, *shape, dtype=dtype))
    v = backend.asarray(unit(rng, *shape[:-2], shape[-1], dtype=dtype))
    return W, power_iteration(W, v)


def half_squared_norm(W, u):
    """Return ½‖Wᴴu‖² by elementwise operations alone."""
    WHu = (W.conj() * u[..., None]).sum(-2)
    return (WHu * WHu.conj()).real.sum() / 2


@CASES
def test_rank_one_equals_the_outer_product(backend, shape, dtype):
    _, triple = problem(backend, shape, dtype)
    expected = 0.3 * outer(*(backend.to_numpy(part) for part in triple))
    term = rank_one(*triple, factor=0.3)
    assert backend.dtype_name(term) == dtype
    np.testing.assert_allclose(backend.to_numpy(term), expected, atol=1e-15)


@on(module="torch")
@CASES
@pytest.mark.parametrize("through", ["penalty_at", "written out"])
def test_rank_one_is_the_gradient_in_torch(backend, shape, dtype, through):
    W, triple = problem(backend, shape, dtype)
    W.requires_grad_()
    if through == "penalty_at":
        value = penalty_at(W, triple.u, factor=0.3)
    else:
        value = 0.3 * half_squared_norm(W, triple.u)
    value.backward()
    expected = backend.to_numpy(rank_one(*triple, factor=0.3))
    np.testing.assert_allclose(backend.to_numpy(W.grad), expected, rtol=1e-12, atol=1e-14)


@on(module="jax")
@CASES
@pytest.mark.parametrize(
    "through", ["penalty_at", pytest.param("written out", marks=pytest.mark.thorough)]
)
def test_rank_one_is_the_gradient_in_jax(backend, shape, dtype, through):
    import jax

    W, triple = problem(backend, shape, dtype)
    if through == "penalty_at":
        gradient = jax.grad(lambda W: penalty_at(W, triple.u, factor=0.3))
    else:
        gradient = jax.grad(lambda W: 0.3 * half_squared_norm(W, triple.u))
    expected = backend.to_numpy(rank_one(*triple, factor=0.3))
    # JAX's gradient with respect to a complex W is the conjugate of PyTorch's.
    for found in (gradient(W), jax.jit(gradient)(W)):
        np.testing.assert_allclose(backend.to_numpy(found).conj(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (1, 3), (3, 1)], ids=str)
def test_converged_rank_one_is_the_gradient_of_half_sigma_squared(shape, dtype):
    W = matrix(np.random.default_rng(0), "decaying", *shape, dtype)
    found = sc.spectral_norm(W, tol=1e-14)
    term = rank_one(found.sigma, found.u, found.v, factor=1)

    def half_square(W):
        return np.linalg.svd(W, compute_uv=False)[0] ** 2 / 2

    h = 1e-5
    for index in np.ndindex(*shape):
        for direction, part in ((1, np.real), (1j, np.imag))[: 1 + np.iscomplexobj(W)]:
            E = np.zeros(shape, dtype)
            E[index] = h * direction
            difference = (half_square(W + E) - half_square(W - E)) / (2 * h)
            assert part(term[index]) == pytest.approx(difference, rel=1e-6, abs=1e-8)


def test_penalty_at_equals_the_penalty_at_its_own_u(backend):
    W, triple = problem(backend, (2, 4, 6), "float64")
    expected = 0.3 / 2 * np.sum(backend.to_numpy(triple.sigma) ** 2)
    assert float(penalty_at(W, triple.u, factor=0.3)) == pytest.approx(expected, rel=1e-13)
    assert float(penalty(triple.sigma, factor=0.3)) == pytest.approx(expected, rel=1e-13)


def test_penalty_at_zero_is_smooth(backend):
    u = backend.asarray(np.array([1.0, 0.0]))
    assert float(penalty_at(backend.asarray(np.zeros((2, 3))), u)) == 0


@on(dtype="float16")
def test_penalty_at_of_a_half_precision_weight_is_float32(backend):
    W = backend.asarray(np.full((2, 3), 300.0), "float16")  # its square overflows
    value = penalty_at(W, backend.asarray(np.array([1.0, 0.0]), "float32"), factor=2.0)
    assert backend.dtype_name(value) == "float32"
    assert float(value) == 3 * 300.0**2


@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.floats(0, 1e3), max_size=3), min_size=1),
    st.floats(0, 10),
)
def test_penalty_equals_the_sum_of_squares(sigmas, factor):
    arrays = {name: np.array(values) for name, values in sigmas.items()}
    total = sum(value**2 for values in sigmas.values() for value in values)
    assert penalty(arrays, factor=factor) == pytest.approx(factor / 2 * total, rel=1e-12)


def test_each_name_can_have_its_own_factor(backend):
    sigma = {"a.x": backend.asarray(np.array(2.0)), "b": backend.asarray(np.array([1.0, 3.0]))}
    value = penalty(sigma, factor={"a.*": 0.1, "b": backend.asarray(np.array(0.2))})
    assert float(value) == pytest.approx(0.1 / 2 * 4 + 0.2 / 2 * 10)


def test_name_without_a_factor_raises():
    with pytest.raises(sc.NamesError, match=r"no entry for \['b'\]"):
        penalty({"a": np.array(1.0), "b": np.array(1.0)}, factor={"a": 1.0})


@pytest.mark.parametrize(
    "factor", [-0.1, np.nan, np.inf, "0.1", None, True, 1j, np.ones(1)], ids=repr
)
def test_wrong_factor_raises(factor):
    words = re.escape("factor must be a finite number ≥ 0 or an array of shape ()")
    one, vector = np.array(1.0), np.ones(1)
    with pytest.raises(sc.ArgumentError, match=words) as error:
        penalty(one, factor=factor)
    assert repr(factor) in str(error.value)
    with pytest.raises(sc.ArgumentError, match=words):
        penalty_at(np.eye(1), vector, factor=factor)
    with pytest.raises(sc.ArgumentError, match=words):
        rank_one(one, vector, vector, factor=factor)
    with pytest.raises(sc.ArgumentError, match=re.escape("factor['a'] must be")):
        penalty({"a": one}, factor={"a": factor})


# The family of penalties: a hinge at a target, and a penalty linear in σ

FAMILY = pytest.mark.parametrize(
    ("target", "power"), [(0.0, 1), (1.5, 1), (1.5, 2), (100.0, 2)], ids=str
)


def by_hand(sigma, target, power):
    """Return the value and its derivative."""
    over = max(0.0, sigma - target)
    return over**power / power, over if power == 2 else float(sigma > target)


@FAMILY
@CASES
def test_family_has_the_defined_value_slope_and_term(backend, shape, dtype, target, power):
    W, triple = problem(backend, shape, dtype)
    sigma = backend.to_numpy(triple.sigma)
    pairs = [by_hand(s, target, power) for s in sigma.flat]
    options = {"target": target, "power": power}
    expected = 0.3 * sum(value for value, _ in pairs)
    assert float(penalty(triple.sigma, factor=0.3, **options)) == pytest.approx(expected, rel=1e-12)
    assert float(penalty_at(W, triple.u, factor=0.3, **options)) == pytest.approx(
        expected, rel=1e-12
    )
    force = np.array([force for _, force in pairs]).reshape(sigma.shape)
    np.testing.assert_allclose(
        backend.to_numpy(sc.slope(triple.sigma, **options)), force, rtol=1e-12
    )
    _, u, v = (backend.to_numpy(part) for part in triple)
    term = backend.to_numpy(rank_one(*triple, factor=0.3, **options))
    np.testing.assert_allclose(term, 0.3 * outer(force, u, v), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["torch-cpu", "jax-cpu"])
@FAMILY
@CASES
def test_term_of_the_family_is_its_gradient(name, shape, dtype, target, power):
    backend = get(name)
    W, triple = problem(backend, shape, dtype)
    options = {"factor": 0.3, "target": target, "power": power}
    if name == "torch-cpu":
        W.requires_grad_()
        penalty_at(W, triple.u, **options).backward()
        found = backend.to_numpy(W.grad)
    else:
        jax = pytest.importorskip("jax")
        gradient = jax.grad(lambda W: penalty_at(W, triple.u, **options))(W)
        found = backend.to_numpy(gradient).conj()
    expected = backend.to_numpy(rank_one(*triple, **options))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


@on(module="torch")
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_gradient_of_the_family_at_zero_is_zero(backend, target, power):
    W = backend.asarray(np.zeros((2, 3))).requires_grad_()
    u = backend.asarray(np.array([1.0, 0.0]))
    penalty_at(W, u, target=target, power=power).backward()
    assert not W.grad.any()


@pytest.mark.parametrize("power", [1, 2])
def test_slope_of_nan_is_nan(backend, power):
    sigma = backend.asarray(np.array([np.nan, 3.0]))
    slopes = backend.to_numpy(sc.slope(sigma, target=1.0, power=power))
    assert slopes[1] == (2.0 if power == 2 else 1.0)
    assert np.isnan(slopes[0]) or power == 1  # u and v are NaN there


def test_target_can_be_an_array_and_differ_by_name(backend):
    target = {"a": backend.asarray(np.array(1.0), "float32"), "*": 2.0}
    sigma = {"a": backend.asarray(np.array(3.0), "float32"), "b": backend.asarray(np.array(3.0))}
    assert float(penalty(sigma, factor=1.0, target=target)) == pytest.approx(2.0 + 0.5)
    narrow = sc.slope(sigma["a"], target=backend.asarray(np.array(1.0)))
    assert backend.dtype_name(narrow) == "float32"


def test_wrong_target_and_power_raise():
    one, vector = np.array(1.0), np.ones(1)
    for target in (-1.0, np.nan, "1"):
        with pytest.raises(sc.ArgumentError, match="target must be a finite number ≥ 0"):
            penalty(one, target=target)
        with pytest.raises(sc.ArgumentError, match="target must be"):
            rank_one(one, vector, vector, target=target)
        with pytest.raises(sc.ArgumentError, match="target must be"):
            penalty_at(np.eye(1), vector, target=target)
    for power in (0, 3, 1.5, True, None):
        with pytest.raises(sc.ArgumentError, match="power must be 1 or 2"):
            penalty(one, power=power)
        with pytest.raises(sc.ArgumentError, match="power must be 1 or 2"):
            sc.slope(one, power=power)
        with pytest.raises(sc.ArgumentError, match="power must be 1 or 2"):
            rank_one(one, vector, vector, power=power)


def test_slope_is_none_for_the_papers_penalty():
    names = dict.fromkeys("ab")
    assert slope_of(0.0, 2, names) == slope_of(0, 2, names) == {"a": None, "b": None}
    assert slope_of({"a": 1.0, "*": 0.0}, 2, names) == {"a": Slope(1.0, 2), "b": None}
    assert slope_of(0.0, 1, names) == dict.fromkeys("ab", Slope(0.0, 1))
    array = np.asarray(1.0)
    assert not is_paper(array, 2)


def test_slopes_with_equal_numbers_are_the_same(backend):
    one, other = (backend.asarray(np.array(1.0)) for _ in range(2))
    assert same_rule(None, None)
    assert not same_rule(None, Slope(0.0, 1))
    assert same_rule(Slope(1.0, 2), Slope(1.0, 2))
    assert not same_rule(Slope(1.0, 2), Slope(1.0, 1))
    assert not same_rule(Slope(1.0, 2), Slope(2.0, 2))
    assert same_rule(Slope(one, 2), Slope(one, 2))
    assert not same_rule(Slope(one, 2), Slope(other, 2))  # comparing would wait for the device
    assert not same_rule(Slope(one, 2), Slope(1.0, 2))


@pytest.mark.parametrize("order", ["C", "F", "cut"])
@pytest.mark.parametrize("shape", [(300, 701), (3, 90000), (2, 500, 211), (70000, 3)])
def test_large_outer_products_are_added_by_parts(shape, order):
    rng = np.random.default_rng(0)
    grad = rng.standard_normal(shape)
    if order == "cut":
        grad = np.repeat(grad, 2, axis=-1)[..., ::2]
    grad = np.asfortranarray(grad) if order == "F" else grad
    u, v = (rng.standard_normal((*shape[:-2], *last)) for last in ((shape[-2], 1), (1, shape[-1])))
    expected = grad + u * v
    assert add_outer_(grad, u, v) is grad
    np.testing.assert_array_equal(grad, expected)
