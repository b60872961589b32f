"""Keras on each backend: that is chosen when it is imported, and so each has its own process."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("keras") is None:  # importing it would import its backend
    pytest.skip("keras is not installed", allow_module_level=True)

CASES = [Path(__file__).with_name(f"{name}_cases.py") for name in ("keras", "machine", "operator")]
ZOO = Path(__file__).with_name("zoo_cases.py")  # the choice does not depend on the backend


def run(backend, *args):
    env = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "SPECTRAL_BACKENDS": "numpy",  # what the cases need of conftest
        "OMP_NUM_THREADS": "1",  # the matrices are small
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # to compile is most of the time
    }
    done = subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_backend(backend):
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    options = ("-q", "--import-mode=importlib", "-p", "no:cacheprovider")
    files = [*CASES, ZOO] if backend == "torch" else CASES
    code, output = run(backend, "-m", "pytest", *options, *map(str, files))
    print(output)
    assert code == 0, output


def test_other_backends_have_the_faces_without_a_state_alone():
    code = """
import keras, spectral_keras
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
layer = keras.layers.Dense(2, kernel_constraint=spectral_keras.SpectralNormBound(1.0, n_iter=50))
layer.build((3,))
kernel = layer.kernel_constraint(10 * layer.kernel)
print("bounded", abs(keras.ops.norm(kernel, 2) - 1) < 0.01)
spectral_keras.SpectralNormRegularizer(keras.optimizers.SGD(), model)
"""
    code, output = run("numpy", "-c", code)
    assert code == 1
    assert "bounded True" in output
    assert "ArgumentError: the Keras backend is 'numpy'" in output
    assert "set KERAS_BACKEND to 'torch' or 'jax'" in output
