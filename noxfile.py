"""Sessions: tests by backend, lint, doctests, the demo, benchmarks. `nox -l` lists them."""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["tests-all", "lint", "docs", "demo"]
nox.options.error_on_missing_interpreters = False

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = ["3.11", "3.12", "3.13"]
PYTEST = ("python", "-m", "pytest", "--durations=5")
PLAIN = ("numpy", "numpy-readonly")
STRICT = ("array-api-strict", "array-api-strictest")

# Triton has wheels for Linux alone. Without a GPU its kernels are interpreted.
TORCH = ["torch", "numba", *(["triton"] if sys.platform == "linux" else [])]

# backend: what it installs, and the entries of tests/backends.py that it runs
BACKENDS = {
    "numpy": (["numba"], PLAIN),
    "strict": (["array-api-strict"], STRICT),
    "torch": (TORCH, ("torch-cpu", "torch-cuda")),
    "jax": (["jax", "optax", "flax", "equinox", "dm-haiku"], ("jax-cpu", "jax-gpu")),
    "cupy": (["cupy-cuda13x"], ("cupy",)),
}
# CuPy's wheel is of no use without a GPU; its tests say so where they are skipped.
HERE = [name for name in BACKENDS if name != "cupy"]

TEN_STEPS = """
import importlib.util, sys
import numpy as np
import spectral_core as sc
assert not {"torch", "jax", "cupy"} & set(sys.modules)
for package in ("spectral_torch", "spectral_jax", "spectral_cupy", "spectral_keras"):
    assert importlib.util.find_spec(package), package
rng = np.random.default_rng(0)
weights = {"w": rng.standard_normal((4, 3))}
state = sc.init(weights)
for _ in range(10):
    grads, state = sc.add_gradient(weights, {"w": np.zeros((4, 3))}, state, factor=0.1)
print("sigma", state.sigma["w"], "of", np.linalg.norm(weights["w"], 2), "from", sc.__file__)
"""


def install(session: nox.Session, *packages: str) -> None:
    """Install tested versions: the library's own ranges are wide."""
    session.install("-c", "constraints.txt", *packages)


def group(name: str) -> tuple[str, ...]:
    """The packages of a dependency group of pyproject.toml."""
    return nox.project.dependency_groups(PYPROJECT, name)


def run_tests(session: nox.Session, names: list[str], *, restrict: bool) -> None:
    packages = [package for name in names for package in BACKENDS[name][0]]
    install(session, "-e", ".", *group("test"), *packages)
    chosen = ",".join(entry for name in names for entry in BACKENDS[name][1])
    apart = "--ignore=tests/integrations"  # a session of its own
    session.run(
        *PYTEST, apart, *session.posargs, env={"SPECTRAL_BACKENDS": chosen} if restrict else {}
    )


@nox.session(python=PYTHONS)
@nox.parametrize("backend", list(BACKENDS))
def tests(session: nox.Session, backend: str) -> None:
    """The suite with one backend installed, on each interpreter there is."""
    run_tests(session, [backend], restrict=True)


@nox.session(name="tests-all")
def tests_all(session: nox.Session) -> None:
    """The suite with every backend that installs without a GPU, in this interpreter."""
    run_tests(session, HERE, restrict=False)


@nox.session
def integrations(session: nox.Session) -> None:
    """Real training stacks: many processes, meshes, trainers, the examples; kill and resume."""
    install(session, "-e", ".[torch,jax]", *group("test"), *group("integrations"))
    session.run(*PYTEST, "tests/integrations", "tests/test_readme.py", *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """The suite on the GPU backends of this interpreter, which must have them; installs nothing."""
    gpus = ",".join(("torch-cuda", "jax-gpu", "cupy"))
    paths = {"PYTHONPATH": ".:adapters", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    session.run(
        sys.executable, *PYTEST[1:], *session.posargs, env={"SPECTRAL_BACKENDS": gpus, **paths}
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, and mypy: strict on the core and the adapters."""
    install(session, "-e", ".", *group("lint"), "torch", "jax", "optax")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run(
        "mypy", *(f"adapters/spectral_{name}" for name in ("torch", "jax", "cupy", "keras"))
    )


@nox.session
def docs(session: nox.Session) -> None:
    """Run the examples of the docstrings and of README."""
    install(session, "-e", ".[torch,jax,numba]", *group("test"))
    session.run(
        *PYTEST[:3],
        "--doctest-modules",
        "--ignore=adapters/spectral_torch/triton_kernels.py",  # needs Triton
        "spectral_core",
        "adapters/spectral_torch",
        "adapters/spectral_jax",
        "tests/test_readme.py",
    )


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it alone, and run Algorithm 1 from it."""
    session.run("python", "-m", "pip", "wheel", "--no-deps", "-w", session.create_tmp(), ".")
    built = max(Path(session.create_tmp()).glob("*.whl"), key=lambda path: path.stat().st_mtime)
    install(session, str(built))
    with session.chdir(session.create_tmp()):
        session.run("python", "-c", TEN_STEPS)


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small network on real digits, with and without: `nox -s demo -- --backend jax`."""
    backend = "torch"
    if "--backend" in session.posargs:
        backend = session.posargs[session.posargs.index("--backend") + 1]
    extra = {"torch": ["torch", "numba"], "jax": ["jax", "optax"]}.get(backend, [])
    install(session, "-e", ".", *group("demo"), *extra)
    session.run("python", "-m", "benchmarks.demo", *session.posargs)


@nox.session
def paper(session: nox.Session) -> None:
    """The tests of the paper's experiments, and a small setting of them from end to end."""
    install(session, "-e", ".[torch,jax,numba]", *group("test"), *group("paper"))
    session.run(*PYTEST, "-n", "2", "tests/benchmarks")
    session.run("python", "-m", "benchmarks.paper", *(session.posargs or ("run", "quick")))


@nox.session
def bench(session: nox.Session) -> None:
    """What a step costs beside its peers: `nox -s bench -- --quick` is the short one."""
    install(session, "-e", ".[torch,jax,numba]", *group("bench"))
    session.run("python", "-m", "benchmarks.speed", *session.posargs)
