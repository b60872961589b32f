"""Test the CuPy adapter: on a GPU against NumPy, and its error where there is no CuPy."""

import subprocess
import sys

import numpy as np
import pytest

import spectral_core as sc
from backends import get


def test_the_import_error_says_what_to_install():
    code = "import sys; sys.modules['cupy'] = None; import spectral_cupy"
    paths = f"import sys; sys.path[:0] = {sys.path!r}; "
    done = subprocess.run(
        [sys.executable, "-c", paths + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "spectral_cupy needs CuPy" in done.stderr
    assert 'pip install "spectral-core[cupy]"' in done.stderr


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_equals_the_core(dtype):
    get("cupy")  # or a skip that says why
    import cupy as cp

    import spectral_cupy

    rng = np.random.default_rng(0)
    shapes = {"dense": (6, 5), "conv": (8, 3, 2, 2), "grouped": (8, 3, 2)}
    layouts = {"grouped": sc.Layout("(go)ik", 4)}
    host = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    expected = {name: np.zeros_like(weight) for name, weight in host.items()}
    state = sc.init(host, layouts=layouts)
    weights = {name: cp.asarray(weight) for name, weight in host.items()}
    grads = {name: cp.zeros_like(weight) for name, weight in weights.items()}
    on_gpu = spectral_cupy.init(weights, layouts=layouts)
    tolerance = {"float16": 2e-3, "float64": 1e-12}.get(dtype, 1e-5)
    for _ in range(5):
        state = sc.add_gradient_(host, expected, state, factor=0.1, engines=())
        on_gpu = spectral_cupy.add_gradient_(weights, grads, on_gpu, factor=0.1)
    for name in shapes:
        np.testing.assert_allclose(
            cp.asnumpy(grads[name]), expected[name], rtol=tolerance, atol=tolerance
        )
        np.testing.assert_allclose(cp.asnumpy(on_gpu.sigma[name]), state.sigma[name], rtol=1e-5)


class CountingLaunches:
    """CuPy's runtime, which also notes the names of the kernels that it launched."""

    def __init__(self, runtime):
        self.runtime, self.launches = runtime, []

    def __getattr__(self, name):
        return getattr(self.runtime, name)

    def launch(self, kernels, name, blocks, arguments):
        self.launches.append(name)
        self.runtime.launch(kernels, name, blocks, arguments)


def on_gpu(cp, shapes, dtype="float32", seed=0):
    """Return weights and gradients on the GPU, and the same on the host."""
    rng = np.random.default_rng(seed)
    host = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    grads = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return (
        {name: cp.asarray(x) for name, x in host.items()},
        {name: cp.asarray(x) for name, x in grads.items()},
        host,
        grads,
    )


@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_many_shapes_equal_the_core(dtype, n_iter):
    get("cupy")
    import cupy as cp

    import spectral_cupy

    shapes = {"row": (1, 700), "column": (900, 1), "one": (1, 1), "conv": (12, 12, 3, 3)}
    shapes |= {"dense": (300, 500), "large": (1024, 4096), "wide": (3, 20000), "hwio": (3, 3, 4, 8)}
    weights, grads, host, expected = on_gpu(cp, shapes, dtype)
    layouts, factor = {"hwio": "hwio"}, {"dense": 0.5, "*": 0.1}
    factors = {**factor, "conv": cp.asarray(0.25, dtype="float32")}
    core = sc.init(host, layouts=layouts)
    state = spectral_cupy.init(weights, layouts=layouts)
    engine = spectral_cupy.CudaEngine()
    for kept in (None, engine, engine):
        core = sc.add_gradient_(
            host, expected, core, factor={**factor, "conv": 0.25}, n_iter=n_iter
        )
        state = spectral_cupy.add_gradient_(
            weights, grads, state, factor=factors, n_iter=n_iter, engine=kept
        )
    tolerance = {"float16": 4e-3, "float32": 1e-4, "float64": 1e-11}[dtype]
    for name in shapes:
        for found, wanted in (
            (grads[name], expected[name]),
            (state.sigma[name], core.sigma[name]),
            (state.u[name], core.u[name]),
            (state.v[name], core.v[name]),
        ):
            assert found.dtype == np.asarray(wanted).dtype
            np.testing.assert_allclose(
                cp.asnumpy(found), wanted, rtol=tolerance, atol=tolerance, err_msg=name
            )


@pytest.mark.parametrize(
    "options",
    [{"target": 30.0}, {"power": 1}, {"target": 1e6}, {"target": {"dense": 1e6, "*": 1.0}}],
    ids=str,
)
def test_hinges_and_power_one_equal_the_core(options):
    get("cupy")
    import cupy as cp

    import spectral_cupy

    shapes = {"conv": (12, 12, 3, 3), "dense": (300, 500), "hwio": (3, 3, 4, 8)}
    weights, grads, host, expected = on_gpu(cp, shapes)
    core = sc.init(host, layouts={"hwio": "hwio"})
    state = spectral_cupy.init(weights, layouts={"hwio": "hwio"})
    engine = spectral_cupy.CudaEngine()
    on_device = dict(options)
    if "target" in options and not isinstance(options["target"], dict):
        on_device["target"] = cp.asarray(options["target"], dtype="float32")
    for chosen in (options, on_device):
        core = sc.add_gradient_(host, expected, core, factor=0.1, engines=(), **options)
        state = spectral_cupy.add_gradient_(
            weights, grads, state, factor=0.1, engine=engine, **chosen
        )
    for name in shapes:
        np.testing.assert_allclose(
            cp.asnumpy(grads[name]), expected[name], rtol=1e-4, atol=1e-4, err_msg=name
        )


def test_zero_nan_inf_and_the_ends_of_the_range_on_the_gpu():
    get("cupy")
    import cupy as cp

    import spectral_cupy

    shapes = dict.fromkeys(("zero", "nan", "inf", "small", "great", "sound"), (40, 300))
    weights, grads, _, _ = on_gpu(cp, shapes)
    weights["zero"][...] = 0
    weights["nan"][3, 5] = cp.nan
    weights["inf"][39, 299] = cp.inf
    weights["small"] *= np.float32(4e-19)
    weights["great"] *= np.float32(4e17)
    start = spectral_cupy.init(weights)
    state = start
    for _ in range(3):
        state = spectral_cupy.add_gradient_(weights, grads, state, factor=0.1, n_iter=5)
    for name in ("small", "great", "sound"):
        exact = np.linalg.norm(cp.asnumpy(weights[name]).astype(float), 2)
        np.testing.assert_allclose(float(state.sigma[name]), exact, rtol=2e-2)
        assert bool(cp.isfinite(grads[name]).all())
    assert float(state.sigma["zero"]) == 0
    for name in ("nan", "inf"):
        assert not bool(cp.isfinite(state.sigma[name]))
    for name in ("zero", "nan", "inf"):
        assert bool((state.v[name] == start.v[name]).all())


def test_two_runs_agree_in_every_bit():
    get("cupy")
    import cupy as cp

    import spectral_cupy

    results = []
    for _ in range(2):
        weights, grads, _, _ = on_gpu(cp, {"dense": (500, 700), "conv": (12, 12, 3, 3)})
        state = spectral_cupy.init(weights)
        spectral_cupy.add_gradient_(weights, grads, state, factor=0.1, n_iter=3)
        results.append({name: cp.asnumpy(grad) for name, grad in grads.items()})
    for name, first in results[0].items():
        np.testing.assert_array_equal(first, results[1][name])


def test_launches_do_not_depend_on_the_number_of_weights():
    get("cupy")
    import cupy as cp

    import spectral_cupy

    counts = []
    for n in (1, 40):
        weights, grads, _, _ = on_gpu(cp, {f"layer {i}": (12, 20 + i) for i in range(n)})
        engine = spectral_cupy.CudaEngine()
        engine._runtime = counting = CountingLaunches(engine._runtime)
        spectral_cupy.add_gradient_(weights, grads, spectral_cupy.init(weights), engine=engine)
        counts.append(len(counting.launches))
    assert counts == [3, 3]


@pytest.mark.parametrize("kept", [False, True])
def test_a_step_returns_before_the_device_is_ready_for_it(kept):
    get("cupy")
    import cupy as cp

    import spectral_cupy

    busy = cp.RawKernel(
        'extern "C" __global__ void busy(long long cycles)'
        "{ for (long long start = clock64(); clock64() - start < cycles;) {} }",
        "busy",
    )
    weights, grads, _, _ = on_gpu(cp, {f"layer {i}": (12, 20 + i) for i in range(40)})
    engine = spectral_cupy.CudaEngine() if kept else None
    with cp.cuda.Stream(non_blocking=True) as stream:
        state = spectral_cupy.init(weights)
        busy((1,), (1,), (np.int64(1),))
        for _ in range(3):  # compiles, and fills the pools: to allocate would wait
            state = spectral_cupy.add_gradient_(weights, grads, state, engine=engine)
        stream.synchronize()
        busy((1,), (1,), (np.int64(3_000_000_000),))  # more than a second
        state = spectral_cupy.add_gradient_(weights, grads, state, engine=engine)
        assert not stream.done
        stream.synchronize()
    assert bool(cp.isfinite(state.sigma["layer 0"]))


def test_an_engine_may_go_from_stream_to_stream():
    get("cupy")
    import cupy as cp

    import spectral_cupy

    weights, grads, host, expected = on_gpu(cp, {"dense": (300, 500), "conv": (12, 12, 3, 3)})
    core, state, engine = sc.init(host), spectral_cupy.init(weights), spectral_cupy.CudaEngine()
    for _ in range(2):
        for stream in (cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)):
            cp.cuda.Device().synchronize()
            with stream:
                state = spectral_cupy.add_gradient_(
                    weights, grads, state, factor=0.1, engine=engine
                )
            core = sc.add_gradient_(host, expected, core, factor=0.1)
    cp.cuda.Device().synchronize()
    for name, wanted in expected.items():
        np.testing.assert_allclose(cp.asnumpy(grads[name]), wanted, rtol=1e-4, atol=1e-4)


def test_the_examples_of_the_docstrings():
    get("cupy")
    import doctest

    import spectral_cupy

    for module in (spectral_cupy, sys.modules[spectral_cupy.CudaEngine.__module__]):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0
