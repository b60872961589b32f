"""The CuPy adapter: on a GPU against NumPy, and what it says where there is no CuPy."""

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


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_one_kernel_equals_the_core(dtype):
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
        state = sc.add_gradient_(host, expected, state, factor=0.1)
        on_gpu = spectral_cupy.add_gradient_(weights, grads, on_gpu, factor=0.1)
    for name in shapes:
        np.testing.assert_allclose(
            cp.asnumpy(grads[name]), expected[name], rtol=tolerance, atol=tolerance
        )
        np.testing.assert_allclose(cp.asnumpy(on_gpu.sigma[name]), state.sigma[name], rtol=1e-5)
