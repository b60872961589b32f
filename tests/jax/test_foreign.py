"""NumbaXlaEngine: the kernels in a compiled step, and XLA's operations where they do not fit."""

import os
import subprocess
import sys

import numpy as np
import pytest

import spectral_core as sc

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
pytest.importorskip("numba", reason="Numba is not installed")
import jax.numpy as jnp  # noqa: E402
from jax import export  # noqa: E402

from spectral_jax import (  # noqa: E402
    NumbaXlaEngine,
    XlaEngine,
    _foreign,
    add_spectral_norm_regularization,
    constrain_spectral_norm,
)

if not hasattr(jax, "typeof") or jax.default_backend() != "cpu":
    pytest.skip("the kernels need JAX 0.6 and a CPU", allow_module_level=True)

THOROUGH = pytest.mark.thorough
SHAPES = {"io": (5, 7), "kkio": (3, 2, 4, 6), "oikk": (6, 4, 2, 3), "oi": (8, 3), "kio": (2, 3, 1)}
# Several chunks, so that threads share them: in rows and in columns.
LARGE = {"io": (601, 700), "oi": (999, 301), "kkio": (3, 3, 65, 300)}


def arrays(shapes, dtype=np.float64, *, scale=1.0):
    """Return weights by name, and gradients."""
    rng = np.random.default_rng(0)
    trees = [
        {name: scale * rng.standard_normal(shape) for name, shape in shapes.items()}
        for _ in range(2)
    ]
    return [{name: jnp.asarray(x, dtype) for name, x in tree.items()} for tree in trees]


def compiled(function, *arguments):
    """Return True if the function runs the kernels, when compiled."""
    fresh = jax.jit(lambda *x: function(*x))  # JAX keeps the traces of a function
    return "spectral_step_" in fresh.lower(*arguments).as_text()


def step(weights, grads, state, **options):
    return sc.add_gradient(weights, grads, state, **{"factor": 0.3, **options})


def kernels(weights, grads, state, **options):
    return step(weights, grads, state, engines=[NumbaXlaEngine(), XlaEngine()], **options)


def assert_equal(found, expected, rtol):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, np.float32),
        ({"n_iter": 3}, np.float32),
        ({"target": 1.5}, np.float32),
        pytest.param({"power": 1, "target": 0.5}, np.float32, marks=THOROUGH),
        pytest.param({"n_iter": 2}, np.float64, marks=THOROUGH),
        pytest.param({}, jnp.bfloat16, marks=THOROUGH),
        pytest.param({}, np.float16, marks=THOROUGH),
    ],
    ids=str,
)
def test_the_step_is_the_core_s(shapes, options, dtype):
    weights, grads = arrays(shapes, dtype, scale=0.1)
    assert_the_step_is_the_core_s(weights, grads, options)


SEVERAL = {"io": (9, 11), "kkio": (3, 2, 4, 10), "oikk": (10, 4, 2, 3), "oi": (13, 8)}


@pytest.mark.parametrize("shapes", [SEVERAL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("n_vectors", "options", "dtype"),
    [
        (4, {"n_iter": 2}, np.float32),
        (3, {"target": 1.5}, np.float32),
        pytest.param(2, {}, np.float32, marks=THOROUGH),
        pytest.param(7, {"power": 1, "target": 0.5}, np.float32, marks=THOROUGH),
        pytest.param(8, {}, np.float32, marks=THOROUGH),
        pytest.param(4, {"n_iter": 2}, np.float64, marks=THOROUGH),
        pytest.param(5, {}, np.float64, marks=THOROUGH),
        pytest.param(4, {}, jnp.bfloat16, marks=THOROUGH),
        pytest.param(4, {}, np.float16, marks=THOROUGH),
    ],
    ids=str,
)
def test_the_step_of_several_vectors_is_the_core_s(shapes, n_vectors, options, dtype):
    weights, grads = arrays(shapes, dtype, scale=0.1)
    assert_the_step_is_the_core_s(weights, grads, options, n_vectors=n_vectors)


def assert_the_step_is_the_core_s(weights, grads, options, **of_state):
    state = sc.init(weights, layouts={name: name for name in weights}, **of_state)
    assert compiled(kernels, weights, grads, state)
    before = jax.tree.map(np.array, grads)
    found, after = jax.jit(lambda *a: kernels(*a, **options))(weights, grads, state)
    expected, reference = step(wide(weights), wide(grads), wide_state(state), **options)
    dtype = next(iter(weights.values())).dtype
    rtol = 1e-11 if dtype == np.float64 else 2e-5
    if dtype == np.float64:
        assert_equal([dict(after.v), dict(after.u)], [dict(reference.v), dict(reference.u)], rtol)
    assert_equal(dict(after.sigma), dict(reference.sigma), rtol)
    coarse = {"bfloat16": 2e-2, "float16": 2e-3}.get(str(dtype), rtol)
    assert_equal(found, expected, coarse)
    assert_equal(grads, before, 0)  # not donated, so they must not change


def wide(arrays):
    return {name: np.asarray(x, np.float64) for name, x in arrays.items()}


def wide_state(state):
    return sc.SpectralState(wide(state.v), wide(state.sigma), state.layouts, wide(state.u))


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)], ids=str)
@pytest.mark.parametrize("layout", ["io", "oi"])
def test_more_vectors_than_the_rank_find_sigma(shape, layout):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((shape[0], 2)) @ rng.standard_normal((2, shape[1]))
    weights, grads = {"w": jnp.asarray(W, np.float32)}, {"w": jnp.zeros(shape, np.float32)}
    state = sc.init(weights, layouts=layout, n_vectors=4)
    jitted = jax.jit(kernels)
    for _ in range(8):
        found, state = jitted(weights, grads, state)
    U, sigmas, Vh = np.linalg.svd(W)
    np.testing.assert_allclose(state.sigma["w"], sigmas[0], rtol=1e-5)
    expected = 0.3 * sigmas[0] * np.outer(U[:, 0], Vh[0])
    np.testing.assert_allclose(found["w"], expected, atol=1e-4 * sigmas[0])
    V = np.asarray(state.v["w"], np.float64)
    np.testing.assert_allclose(V[:2] @ V[:2].T, np.eye(2), atol=1e-4)


def test_weights_of_one_and_of_several_vectors_are_two_calls():
    weights, grads = arrays(SEVERAL, np.float32)
    names = {name: name for name in SEVERAL}
    many, one = sc.init(weights, layouts=names, n_vectors=4), sc.init(weights, layouts=names)
    mixed = {name: (one if name == "io" else many) for name in weights}
    state = sc.SpectralState(
        *({name: getattr(mixed[name], what)[name] for name in weights} for what in ("v", "sigma")),
        one.layouts,
        {name: mixed[name].u[name] for name in weights},
    )
    text = jax.jit(kernels).lower(weights, grads, state).as_text()
    assert text.count("custom_call @spectral_step_float32") == 1
    assert text.count("custom_call @spectral_step_block_float32") == 1
    found, _ = jax.jit(kernels)(weights, grads, state)
    expected, _ = step(wide(weights), wide(grads), wide_state(state))
    assert_equal(found, expected, 2e-5)


def test_many_weights_are_several_calls(monkeypatch):
    monkeypatch.setattr(_foreign, "_MOST", 2)
    weights, grads = arrays(SHAPES, np.float32)
    state = sc.init(weights, layouts={name: name for name in SHAPES})
    text = jax.jit(kernels).lower(weights, grads, state).as_text()
    assert text.count("custom_call @spectral_step_float32") == 3
    found, _ = jax.jit(kernels)(weights, grads, state)
    expected, _ = step(wide(weights), wide(grads), wide_state(state))
    assert_equal(found, expected, 2e-5)


@pytest.mark.parametrize("n_vectors", [1, 4])
def test_the_first_state_is_the_core_s(n_vectors, monkeypatch):
    seen = []
    monkeypatch.setattr(_foreign, "_bind", lambda *a, **b: seen.append(b) or bind(*a, **b))
    bind = _foreign._step.bind
    weights, _ = arrays(SEVERAL, np.float32)
    names = {name: name for name in SEVERAL}
    tx = add_spectral_norm_regularization(0.1, layouts=names, n_vectors=n_vectors)
    state = tx.init(weights)
    assert seen  # by the kernels, in one call
    expected = sc.init(weights, layouts=names, n_vectors=n_vectors)
    assert_equal(state.v, dict(expected.v), 1e-4)
    assert_equal(state.sigma, dict(expected.sigma), 2e-5)
    assert_equal(weights, arrays(SEVERAL, np.float32)[0], 0)


def test_all_weights_are_one_call():
    weights, grads = arrays(LARGE, np.float32)
    tx = add_spectral_norm_regularization(0.1, layouts={name: name for name in LARGE})
    state = tx.init(weights)
    text = jax.jit(tx.update).lower(grads, state, weights).as_text()
    assert text.count("stablehlo.custom_call @spectral_step_float32") == 1
    assert "stablehlo.dot_general" not in text


def test_donated_gradients_are_written_into():
    weights, grads = arrays(LARGE, np.float32)
    state = sc.init(weights, layouts={name: name for name in LARGE})
    jitted = jax.jit(kernels, donate_argnums=1)
    text = jitted.lower(weights, grads, state).compile().as_text()
    copies = [line for line in text.splitlines() if " copy(" in line]
    assert not [line for line in copies if "601,700" in line]
    expected, _ = step(weights, grads, state)
    found, _ = jitted(weights, grads, state)
    assert_equal(found, expected, 2e-5)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("layout", ["io", "oi"])
@pytest.mark.parametrize("n_vectors", [1, 3])
def test_unusual_weights_keep_their_vector(value, layout, n_vectors):
    weights = {"w": jnp.full((4, 5), value, np.float32)}
    grads = {"w": jnp.ones((4, 5), np.float32)}
    state = sc.init(weights, layouts=layout, n_vectors=n_vectors)
    found, after = jax.jit(kernels)(weights, grads, state)
    expected, reference = jax.jit(lambda *a: step(*a, engines=[XlaEngine()]))(weights, grads, state)
    np.testing.assert_array_equal(after.v["w"], state.v["w"])
    assert np.isfinite(after.sigma["w"]) == np.isfinite(reference.sigma["w"])
    np.testing.assert_array_equal(np.isnan(found["w"]), np.isnan(expected["w"]))


@pytest.mark.parametrize("n_vectors", [1, 2])
def test_a_bound_scales_the_weights(n_vectors):
    weights, updates = arrays({"io": (20, 30), "oi": (7, 5)}, np.float32)
    layouts = {name: name for name in weights}
    cap = constrain_spectral_norm(1.0, layouts=layouts, n_vectors=n_vectors)
    zeros = jax.tree.map(jnp.zeros_like, updates)
    state = cap.init(weights)
    assert compiled(cap.update, zeros, state, weights)
    jitted = jax.jit(cap.update)
    for _ in range(60):
        change, state = jitted(zeros, state, weights)
        weights = optax.apply_updates(weights, change)
    norms = [np.linalg.norm(weight, 2) for weight in weights.values()]
    np.testing.assert_allclose(norms, 1, rtol=1e-3)
    np.testing.assert_allclose(list(state.sigma.values()), 1, rtol=1e-3)


def test_other_uses_go_without_the_kernels():
    weights, grads = arrays({"io": (5, 7)}, np.float32)
    state = sc.init(weights, layouts="io")
    expected = step(weights, grads, state)
    exported = export.export(jax.jit(kernels), platforms=["cpu"])(weights, grads, state)
    assert "spectral_step_" not in exported.mlir_module()

    def several(grads):
        return jax.vmap(lambda grad: kernels(weights, grad, state)[0])(grads)

    twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), grads)
    assert not compiled(several, twice)
    found = jax.jit(several)(twice)
    assert_equal(jax.tree.map(lambda x: x[0], found), expected[0], 2e-5)

    def value(engines, factor):
        new, _ = step(weights, grads, state, factor=factor, engines=engines)
        return jnp.sum(new["io"] ** 2)

    ways = [NumbaXlaEngine(), XlaEngine()], [XlaEngine()]
    slopes = [jax.jit(jax.grad(lambda x, way=way: value(way, x)))(0.3) for way in ways]
    np.testing.assert_allclose(*slopes, rtol=1e-5)


def test_only_jobs_that_fit_are_accepted():
    assert_kernels = {
        "one vector": (True, {"io": (4, 5)}, np.float32, 1),
        "two vectors": (True, {"io": (4, 5)}, np.float32, 2),
        "a stack": (False, {"sio": (2, 4, 5)}, np.float32, 1),
        "complex": (False, {"io": (4, 5)}, np.complex64, 1),
        "kernel positions last": (False, {"iokk": (4, 5, 2, 2)}, np.float32, 1),
    }
    for what, (expected, shapes, dtype, k) in assert_kernels.items():
        weights, grads = arrays(shapes, dtype)
        state = sc.init(weights, layouts=next(iter(shapes)), n_vectors=k)
        assert compiled(kernels, weights, grads, state) == expected, what


def test_a_step_outside_of_jit_is_xla_s():
    seen = []

    class Spy(NumbaXlaEngine):
        def accepts(self, job):
            seen.append(super().accepts(job))
            return seen[-1]

    weights, grads = arrays({"io": (4, 5)})
    state = sc.init(weights, layouts="io")
    step(weights, grads, state, engines=[Spy(), XlaEngine()])
    assert seen == [False]


def test_without_numba_xla_runs_the_step(monkeypatch):
    weights, grads = arrays({"io": (5, 7)}, np.float32)
    state = sc.init(weights, layouts="io")
    _foreign._kernels_for.cache_clear()
    monkeypatch.setattr(_foreign, "find_spec", lambda _: None)
    try:
        assert not compiled(kernels, weights, grads, state)
    finally:
        _foreign._kernels_for.cache_clear()


ON_TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, spectral_jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

devices = jax.devices()
mesh = Mesh(np.array(devices), ("x",))
weights = {"io": jax.device_put(jnp.ones((6, 8)), NamedSharding(mesh, P("x")))}
tx = spectral_jax.add_spectral_norm_regularization(0.1, layouts={"io": "io"})
update, state = jax.jit(tx.update), jax.jit(tx.init)(weights)
text = update.lower(weights, state, weights).as_text()
assert "spectral_step_" not in text
whole = jax.tree.map(lambda x: jax.device_put(np.asarray(x), devices[1]), (weights, state))
arguments = whole[0], whole[1], whole[0]
assert "spectral_step_" in update.lower(*arguments).as_text()
found, expected = update(*arguments)[0], update(weights, state, weights)[0]
np.testing.assert_allclose(found["io"], expected["io"], rtol=1e-5)
"""


def test_divided_weights_go_without_the_kernels():
    flags = "--xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "error", "-c", ON_TWO_DEVICES], env=env, check=True)
