import doctest
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import spectral_core as sc
from spectral_core import errors

FRAMEWORKS = ("array_api_strict", "cupy", "jax", "scipy", "torch")
FUNCTIONS = [name for name in sc.__all__ if inspect.isfunction(getattr(sc, name))]
MODULES = [module.name for module in pkgutil.walk_packages(sc.__path__, "spectral_core.")]


def python(code):
    """Return what a fresh interpreter prints, with the same package as this one."""
    env = {**os.environ, "PYTHONPATH": str(Path(sc.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_import_and_use_with_numpy_import_no_framework():
    found = python(
        f"""
import sys
import numpy as np
import spectral_core as sc
print(sorted(set(sys.modules) & set({FRAMEWORKS})))
w = {{"w": np.eye(3)}}
state = sc.add_gradient(w, {{"w": np.zeros((3, 3))}}, sc.init(w))[1]
sc.spectral_norm(w["w"])
print(sorted(set(sys.modules) & set({FRAMEWORKS})), "numba" in sys.modules)
sc.add_gradient_(w, {{"w": np.zeros((3, 3))}}, state)
print(sorted(set(sys.modules) & set({FRAMEWORKS}) - {{"scipy"}}))  # Numba imports SciPy
"""
    )
    assert found.splitlines() == ["[]", "[] False", "[]"]


# An adapter works with these, but only its user imports them.
STACKS = ("accelerate", "equinox", "flax", "haiku", "keras", "lightning", "numba", "skorch")
STACKS += ("orbax", "tensorboard", "torch", "transformers", "jax", "matplotlib")


@pytest.mark.parametrize(
    ("adapter", "needs"),
    [("spectral_torch", {"torch", "numba"}), ("spectral_jax", {"jax"})],
)
def test_adapter_imports_only_its_own_framework(adapter, needs):
    pytest.importorskip(adapter.replace("spectral_", ""), reason=f"{adapter} needs its framework")
    adapters = Path(sc.__file__).parents[1] / "adapters"
    code = f"""
import sys
sys.path.append({str(adapters)!r})
import {adapter}
print(*set(sys.modules) & set({STACKS}))
"""
    assert set(python(code).split()) <= needs


def test_import_loads_numpy_and_array_api_compat_alone():
    """A slow import is one that loads much: benchmarks/ measures the seconds."""
    code = """
import sys
import numpy
before = set(sys.modules)
import spectral_core
print(*set(sys.modules) - before)
"""
    loaded = {name.partition(".")[0] for name in python(code).split()}
    assert loaded - sys.stdlib_module_names == {"spectral_core", "array_api_compat"}
    assert not loaded & {"asyncio", "concurrent", "multiprocessing", "unittest", "urllib"}


def test_all_is_complete_and_sorted():
    public = {
        name
        for name, value in vars(sc).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(sc.__all__) == public
    assert list(sc.__all__) == sorted(sc.__all__)


def test_every_name_is_defined_in_this_package():
    for name in sc.__all__:
        assert getattr(sc, name).__module__.startswith("spectral_core.")


def test_version_is_a_number():
    assert all(part.isdigit() for part in sc.__version__.split(".")[:2])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_has_its_sections(name):
    doc = inspect.getdoc(getattr(sc, name))
    for section in ("Parameters", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in doc
    described = doc.split("\nParameters\n")[1].split("\n--")[0]
    for parameter in inspect.signature(getattr(sc, name)).parameters:
        assert parameter in described


@pytest.mark.parametrize("name", sorted(set(sc.__all__) - set(FUNCTIONS)))
def test_classes_are_documented(name):
    assert inspect.getdoc(getattr(sc, name))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    if ".numba" in name:
        pytest.importorskip("numba", reason="Numba is not installed")
    if name == "spectral_core._report.result":
        pytest.importorskip("jinja2", reason="the example of a page needs Jinja2")
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_an_example(name):
    (found, *_) = doctest.DocTestFinder(recurse=False).find(getattr(sc, name), name)
    assert found.examples


def test_errors_derive_from_built_in_errors():
    found = [
        cls for cls in vars(errors).values() if getattr(cls, "__module__", "") == errors.__name__
    ]
    found = [cls for cls in found if inspect.isclass(cls) and not issubclass(cls, Warning)]
    assert len(found) == 6
    assert set(found) <= {getattr(sc, name) for name in sc.__all__}
    for cls in found:
        assert issubclass(cls, sc.SpectralError)
        assert cls is sc.SpectralError or issubclass(cls, ValueError | TypeError)


def test_package_is_typed():
    assert (Path(sc.__file__).parent / "py.typed").exists()
