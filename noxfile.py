"""Sessions: tests, lint, documentation, the demonstration, benchmarks. `nox -l` lists them."""

from __future__ import annotations

import os
import shutil
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
# One process a core. More than four compile the same JAX programs more often than they help.
PARALLEL = ("-n", "auto", "--maxprocesses=4", "--dist=worksteal")
# Each process has one core: threads of its own would only wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
THOROUGH = {"SPECTRAL_PROFILE": "thorough"}
# Sessions of their own run these, with the packages that they need.
APART = tuple(
    f"--ignore=tests/{name}"
    for name in ("integrations", "keras", "benchmarks", "examples", "test_docs.py")
)

# Triton has wheels for Linux alone. Without a GPU its kernels are interpreted.
TORCH = ["torch", "numba", *(["triton"] if sys.platform == "linux" else [])]

# backend: the packages it installs, and the entries of the backend table that it runs
BACKENDS = {
    "numpy": (["numba"], ("numpy", "numpy-readonly")),
    "strict": (["array-api-strict"], ("array-api-strict", "array-api-strictest")),
    "torch": (TORCH, ("torch-cpu", "torch-cuda")),
    "jax": (["jax", "optax", "flax", "equinox", "dm-haiku"], ("jax-cpu", "jax-gpu")),
    "cupy": (["cupy-cuda13x"], ("cupy",)),
}
# CuPy's wheel is of no use without a GPU; its tests are skipped with that reason.
HERE = [name for name in BACKENDS if name != "cupy"]

# Modules of spectral_torch that need Triton, Lightning and transformers.
NEED_MORE = (
    "engines/triton_kernels",
    "engines/triton_row_kernels",
    "engines/triton_rows",
    "lightning",
    "transformers",
)

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
    """Install the tested versions: the library's own ranges are wide."""
    session.install("-c", "constraints.txt", *packages)


def group(name: str) -> tuple[str, ...]:
    """The packages of a dependency group of pyproject.toml."""
    return nox.project.dependency_groups(PYPROJECT, name)


def lowest(extra: str | None = None) -> list[str]:
    """The library's dependencies, or those of an extra, each at the lowest version it admits."""
    project = PYPROJECT["project"]
    needed = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return [requirement.replace(">=", "==") for requirement in needed]


def run_tests(
    session: nox.Session, names: list[str], *options: str, env: dict[str, str] | None = None
) -> None:
    """Run the suite with the packages of these backends installed."""
    packages = [package for name in names for package in BACKENDS[name][0]]
    install(session, "-e", ".", *group("test"), *packages)
    options = (*PARALLEL, *APART, *options, *session.posargs)
    session.run(*PYTEST, *options, env={**ONE_THREAD, **(env or {})})


@nox.session(name="tests-all")
def tests_all(session: nox.Session) -> None:
    """The suite on every backend that installs without a GPU; SPECTRAL_PROFILE=thorough for all."""
    run_tests(session, HERE)


@nox.session(python=PYTHONS)
@nox.parametrize("backend", list(BACKENDS), ids=list(BACKENDS))
def tests(session: nox.Session, backend: str) -> None:
    """The suite with one backend alone installed."""
    run_tests(session, [backend], env={"SPECTRAL_BACKENDS": ",".join(BACKENDS[backend][1])})


@nox.session(name="tests-lowest", python="3.11")
def tests_lowest(session: nox.Session) -> None:
    """The suite with the lowest versions that pyproject.toml admits, but for PyTorch and CuPy."""
    # PyTorch before the tested version has no Linux wheel on PyPI without gigabytes of CUDA. Its
    # lowest version, 2.6.0, passed the one-process tests of its adapter, run by hand.
    extras = ("numba", "jax", "keras", "report")
    session.install("-e", ".", *lowest(), *(package for name in extras for package in lowest(name)))
    install(session, *group("test"))
    session.run(*PYTEST, *PARALLEL, *APART, *session.posargs, env=ONE_THREAD)


@nox.session
def integrations(session: nox.Session) -> None:
    """Real training stacks: trainers, many processes, meshes; kill and resume; the examples."""
    install(session, "-e", ".[torch,jax]", *group("test"), *group("integrations"))
    # One process a file: processes that talk to each other start once a file.
    options = (
        *PARALLEL[:-1],
        "--dist=loadfile",
        "tests/keras",  # the longest file first
        "tests/integrations",
        "tests/test_docs.py",
    )
    optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    session.run(*PYTEST, *options, *session.posargs, env={**ONE_THREAD, **THOROUGH, **optimized})


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
    """Ruff, mypy (strict on the core and the adapters), and the form of CITATION.cff."""
    install(session, "-e", ".", *group("lint"), "torch", "jax", "optax")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run(
        "mypy", *(f"adapters/spectral_{name}" for name in ("torch", "jax", "cupy", "keras"))
    )
    session.run("cffconvert", "--validate")


@nox.session
def docs(session: nox.Session) -> None:
    """Run the examples of the docstrings, and build the site: docs/_build/html/index.html."""
    install(session, "-e", ".[torch,jax,keras,numba]", *group("test"), *group("docs"))
    session.run(
        *PYTEST[:3],
        "--doctest-modules",
        *(f"--ignore=adapters/spectral_torch/{name}.py" for name in NEED_MORE),
        "spectral_core",
        "adapters/spectral_torch",
        "adapters/spectral_jax",
        env=ONE_THREAD,
    )
    site = Path("docs/_build")
    shutil.rmtree(site, ignore_errors=True)
    session.run(
        "python",
        "-m",
        "sphinx",
        "-W",
        "-b",
        "html",
        "-d",
        f"{site}/doctrees",
        "docs",
        f"{site}/html",
    )


@nox.session
def page(session: nox.Session) -> None:
    """The page of a report in headless Chromium, its accessibility, and the plot."""
    install(session, "-e", ".[report]", *group("test"), *group("page"))
    browsers = ("chromium", "chromium-browser", "google-chrome")
    is_missing = not any(map(shutil.which, browsers))
    if is_missing and "CI" in os.environ and shutil.which("apt-get") and os.geteuid() == 0:
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            # Without a browser its tests are skipped, with that reason.
            session.run("apt-get", "-q", *command, external=True, success_codes=range(256))
    session.run(*PYTEST, "-rs", "tests/report/test_page.py", "tests/report/test_browser.py")


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the sdist, the wheel from it, install that alone, and run Algorithm 1 from it."""
    install(session, "build")
    built = Path(session.create_tmp())
    shutil.rmtree(built)
    session.run("python", "-m", "build", "--outdir", str(built), ".")
    (one,) = built.glob("*.whl")
    install(session, str(one))
    with session.chdir(built):
        session.run("python", "-c", TEN_STEPS)
        session.run("spectral-report", "--help")


@nox.session
def demo(session: nox.Session) -> None:
    """Train a small network on real digits, with and without: `nox -s demo -- --backend jax`."""
    backend = "torch"
    if "--backend" in session.posargs:
        backend = session.posargs[session.posargs.index("--backend") + 1]
    extra = {"torch": ["torch", "numba"], "jax": ["jax", "optax"]}.get(backend, [])
    install(session, "-e", ".", *group("demo"), *extra)
    session.run("python", "examples/digits.py", *session.posargs)


@nox.session
def paper(session: nox.Session) -> None:
    """The tests of the benchmarks, and a small setting of the paper's experiments end to end."""
    install(session, "-e", ".[torch,jax,numba]", *group("test"), *group("paper"))
    session.run(*PYTEST, *PARALLEL, "tests/benchmarks", "tests/examples", env=ONE_THREAD)
    session.run("python", "-m", "benchmarks.paper", *(session.posargs or ("run", "quick")))


@nox.session
def bench(session: nox.Session) -> None:
    """The cost of a step, and of other libraries' steps: `nox -s bench -- --quick` is short."""
    install(session, "-e", ".[torch,jax,numba]", *group("bench"))
    session.run("python", "-m", "benchmarks.speed", *session.posargs)
