"""The norm of a convolution, followed by waves, against certified bounds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spectral_core as sc

KERNEL = {1: "k", 2: "hw", 3: "dhw"}
OPTIONS = {"layouts": {"w": sc.Convolution("oihw", stride=(1, 2))}}


def kernel(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def followed(weights, layouts, n_iter, **options):
    return sc.iterate(weights, sc.init(weights, layouts=layouts, **options), n_iter=n_iter)


def term(weight, layout, state):
    """Return the gradient of σ that a step adds."""
    grads, _ = sc.add_gradient(
        {"w": weight}, {"w": np.zeros_like(weight)}, state, factor=1.0, power=1, n_iter=1
    )
    return grads["w"]


@st.composite
def convolutions(draw):
    n = draw(st.sampled_from([1, 1, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2]))
    shape = (groups * draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    sizes = tuple(draw(st.integers(1, 4 if n < 3 else 3)) for _ in range(n))
    geometry = {
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(n)),
        "dilation": tuple(draw(st.integers(1, 3)) for _ in range(n)),
    }
    layout = sc.Convolution("(go)i" + KERNEL[n], groups, waves=8, **geometry)
    return kernel((*shape, *sizes), draw(st.integers(0, 999))), layout, geometry


@given(convolutions())
def test_sigma_converges_to_the_norm_of_the_map(case):
    weight, layout, geometry = case
    state = followed({"w": weight}, {"w": layout}, 60)
    norm = sc.convolution_norm(weight, sc.Layout(layout.axes, layout.groups), tol=1e-9, **geometry)
    found = float(np.max(state.sigma["w"]))
    assert found <= norm.upper * (1 + 1e-12)
    assert found >= 0.98 * norm.lower  # a peak may be missed for some steps


def test_every_group_has_its_own_norm():
    weight = kernel((6, 2, 3, 3))
    state = followed({"w": weight}, {"w": sc.Convolution("(go)ihw", 3, waves=8)}, 80)
    for group in range(3):
        part = weight[2 * group : 2 * group + 2]
        norm = sc.convolution_norm(part, "oihw", tol=1e-9)
        np.testing.assert_allclose(state.sigma["w"][group], norm.lower, rtol=1e-6)


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), ((2, 1), (3, 1))])
def test_term_is_the_derivative_of_the_norm(stride, dilation):
    """Compare with the derivative of σ₁ of the symbol at the frequency that was found."""
    weight = kernel((5, 4, 3, 3), seed=1)
    layout = sc.Convolution("oihw", stride=stride, dilation=dilation)
    state = followed({"w": weight}, {"w": layout}, 150)
    found = term(weight, layout, state)
    ω = np.asarray(state.v["w"])[0, -2:]

    def symbol(weight):
        s, d = (np.broadcast_to(x, 2) for x in (stride, dilation))
        taps = np.array([*np.ndindex(3, 3)]) * np.where(s > 1, d, 1)
        phases = np.exp(-1j * (taps // s) @ ω)
        kinds, kind = np.unique(taps % s, axis=0, return_inverse=True)
        spread = np.zeros((9, len(kinds)), complex)
        spread[np.arange(9), kind.reshape(-1)] = phases
        return (weight.reshape(5, 4, 9) @ spread).reshape(5, -1)

    U, values, Vh = np.linalg.svd(symbol(weight))
    np.testing.assert_allclose(float(state.sigma["w"]), values[0], rtol=1e-12)
    for axis in range(4):
        direction = kernel(weight.shape, seed=axis + 1)
        # The derivative of a simple singular value, from the dense SVD.
        expected = (U[:, 0].conj() @ symbol(direction) @ Vh[0].conj()).real
        np.testing.assert_allclose(np.sum(found * direction), expected, atol=1e-8)


def test_gradient_at_the_peak_is_stationary_in_the_frequency():
    weight = kernel((5, 4, 3, 3), seed=1)
    state = followed({"w": weight}, {"w": sc.Convolution("oihw")}, 100)
    ω = np.asarray(state.v["w"])[0, -2:]

    def sigma(ω):
        phases = np.exp(-1j * np.array([*np.ndindex(3, 3)]) @ ω)
        return np.linalg.norm(weight.reshape(5, 4, 9) @ phases, 2)

    for axis in np.eye(2):
        slope = (sigma(ω + 1e-5 * axis) - sigma(ω - 1e-5 * axis)) / 2e-5
        assert abs(slope) < 1e-7


@pytest.mark.thorough("jax-cpu", "jax-gpu")  # each operation compiles: tests/jax has a jitted step
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_backends_and_layouts_agree(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend} has no {dtype}")
    weight = kernel((8, 3, 3, 3))
    weights = backend.tree({"a": weight, "b": weight.transpose(2, 3, 1, 0).copy()}, dtype)
    layouts = {
        "a": sc.Convolution("oihw", stride=(1, 2)),
        "b": sc.Convolution("hwio", stride=(1, 2)),
    }
    state = followed(weights, layouts, 40)
    norm = sc.convolution_norm(weight, "oihw", stride=(1, 2), tol=1e-9)
    rtol = 1e-4 if dtype == "float32" else 1e-6
    for name in weights:
        found = float(backend.to_numpy(state.sigma[name]))
        np.testing.assert_allclose(found, norm.lower, rtol=rtol)
    grads = backend.tree({n: np.zeros_like(w) for n, w in backend.tree_to_numpy(weights).items()})
    grads, _ = sc.add_gradient(weights, grads, state, factor=1.0, power=1)
    a, b = (backend.to_numpy(grads[name]) for name in "ab")
    np.testing.assert_allclose(np.abs(a), np.abs(b.transpose(3, 2, 0, 1)), atol=30 * rtol)


@pytest.mark.parametrize("dtype", ["float16"])
def test_half_precision_is_iterated_in_float32(dtype):
    weight = kernel((8, 3, 3, 3)).astype(dtype)
    state = followed({"w": weight}, OPTIONS["layouts"], 30)
    assert state.v["w"].dtype == np.float32
    norm = sc.convolution_norm(weight, "oihw", stride=(1, 2))
    np.testing.assert_allclose(state.sigma["w"], norm.lower, rtol=1e-4)


def test_bound_holds_for_the_map():
    weights = {"w": kernel((8, 6, 3, 3))}
    state = followed(weights, {"w": sc.Convolution("oihw")}, 60)
    weights, state = sc.constrain(weights, state, bound=1.5)
    np.testing.assert_allclose(state.sigma["w"], 1.5)
    assert sc.convolution_norm(weights["w"], "oihw").upper < 1.5 * 1.001


def test_hinge_and_zero_iterations():
    weights, zeros = {"w": kernel((4, 3, 3, 3))}, {"w": np.zeros((4, 3, 3, 3))}
    state = followed(weights, OPTIONS["layouts"], 20)
    grads, _ = sc.add_gradient(weights, zeros, state, target=1e6)
    assert not grads["w"].any()
    first, after = sc.add_gradient(weights, zeros, state, factor=0.1)
    again, last = sc.add_gradient(weights, zeros, after, factor=0.1, n_iter=0)
    np.testing.assert_array_equal(first["w"], again["w"])
    np.testing.assert_array_equal(after.v["w"], last.v["w"])
    # (λ/2)σ² has the derivative λσ² along W itself.
    np.testing.assert_allclose(np.sum(first["w"] * weights["w"]), 0.1 * after.sigma["w"] ** 2)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_weights_without_a_norm_leave_the_waves_alone(value):
    weights = {"w": np.full((4, 3, 3, 3), value)}
    good = {"w": kernel((4, 3, 3, 3))}
    state = followed(good, OPTIONS["layouts"], 3)
    with np.errstate(all="ignore"):
        after = sc.iterate(weights, state, n_iter=2)
    np.testing.assert_array_equal(after.v["w"], state.v["w"])
    assert not float(after.sigma["w"]) > 0 or math.isinf(float(after.sigma["w"]))
    recovered = sc.iterate(good, after, n_iter=40)
    norm = sc.convolution_norm(good["w"], "oihw", stride=(1, 2))
    np.testing.assert_allclose(recovered.sigma["w"], norm.lower, rtol=1e-5)


def test_resumes_bit_for_bit_while_explorers_move():
    weights = {"w": kernel((12, 8, 3, 3))}
    state = followed(weights, {"w": sc.Convolution("oihw")}, 7)
    saved = {key: np.array(x) for key, x in sc.state_dict(state).items()}
    assert set(saved) == {"w.waves", "w.sigma", "w.u"}
    fresh = sc.init(weights, layouts={"w": sc.Convolution("oihw")}, seed=5)
    resumed = sc.load_state_dict(fresh, saved)
    one, other = (sc.iterate(weights, s, n_iter=25) for s in (state, resumed))
    for key, array in sc.state_dict(one).items():
        np.testing.assert_array_equal(array, sc.state_dict(other)[key])
    assert not np.array_equal(saved["w.waves"][-1, -2:], one.v["w"][-1, -2:])


def test_state_of_another_norm_is_refused_with_a_remedy():
    weights = {"w": kernel((4, 3, 3, 3))}
    flat, waves = sc.init(weights), sc.init(weights, layouts=OPTIONS["layouts"])
    with pytest.raises(sc.NamesError, match='norm="flattened"'):
        sc.load_state_dict(waves, sc.state_dict(flat))
    with pytest.raises(sc.NamesError, match='norm="operator"'):
        sc.load_state_dict(flat, sc.state_dict(waves))
    broken = {**sc.state_dict(waves), "w.waves": np.full_like(waves.v["w"], np.nan)}
    with pytest.raises(sc.ArgumentError):
        sc.load_state_dict(waves, broken)


def test_norm_chooses_convolutions_and_says_what_it_assumed():
    weights = {"conv": kernel((4, 3, 3)), "point": kernel((4, 3, 1)), "dense": kernel((4, 3))}
    with pytest.warns(sc.SpectralWarning, match=r"stride.*conv.*Convolution\(\"oik\""):
        state = sc.init(weights, norm="operator")
    assert isinstance(state.layouts["conv"], sc.Convolution)
    for name in ("point", "dense"):
        np.testing.assert_array_equal(state.v[name], sc.init(weights).v[name])
    with pytest.raises(sc.ArgumentError, match="norm must be"):
        sc.init(weights, norm="true")


def test_engine_that_does_not_know_waves_is_passed_over():
    weights, grads = {"w": kernel((4, 3, 3, 3))}, {"w": np.zeros((4, 3, 3, 3))}
    state = followed(weights, OPTIONS["layouts"], 10)
    expected, _ = sc.add_gradient(weights, grads, state)
    sc.add_gradient_(weights, grads, state)  # Numba's engine, and NumPy's
    np.testing.assert_allclose(grads["w"], expected["w"], rtol=1e-12)


@pytest.mark.parametrize("taps", [(1.0, -1.0), (1.0, -2.0, 1.0), (1.0, -3.0, 3.0, -1.0)])
def test_derivatives_whose_symbol_is_zero_somewhere_stay_finite(taps):
    weights = {"w": np.array([[taps]], np.float32)}
    state = sc.init(weights, layouts={"w": sc.Convolution("oik")})
    for _ in range(60):
        state = sc.iterate(weights, state)
    assert np.isfinite(state.v["w"]).all()
    norm = sc.convolution_norm(weights["w"], "oik").upper
    assert float(state.sigma["w"]) == pytest.approx(norm, rel=1e-4)
