"""The code blocks of README and of docs/ run, and the pages name what there is."""

import ast
import importlib
import os
import re
import sys
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")  # before Keras is imported

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#{2,3} (.*)$", flags=re.MULTILINE)
EXAMPLE = re.compile(r"\{literalinclude\} \S*examples/(\w+)\.py")
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What a module needs beside itself. The need is looked up, not imported: importing Keras would
# choose its backend for the whole run.
NEEDS = {
    "spectral_torch": ("torch",),
    "spectral_jax": ("jax", "optax"),
    "spectral_keras": ("keras", "torch"),
    "spectral_cupy": ("cupy",),
    "spectral_core.numba": ("numba",),
    "torch.utils.tensorboard": ("tensorboard",),
}


class Snippet(NamedTuple):
    """Code that a reader copies and runs as one piece."""

    place: str
    code: str

    def imports(self) -> set[str]:
        """Return the modules that the code imports."""
        found: set[str] = set()
        for node in ast.walk(ast.parse(self.code)):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
        return found


def sections(text: str) -> list[tuple[str, str]]:
    """Cut a page at its headings of the second and third level: titles and texts."""
    cuts = list(HEADING.finditer(text))
    starts = [0, *(cut.start() for cut in cuts)]
    titles = ["top", *(cut[1] for cut in cuts)]
    ends = [*starts[1:], len(text)]
    return [(title, text[i:j]) for title, i, j in zip(titles, starts, ends, strict=True)]


def snippets() -> list[Snippet]:
    """Return each block of README by itself, and the blocks of a page section by section."""
    found = [Snippet(f"README.md:{i}", block) for i, block in enumerate(FENCE.findall(README))]
    for page in PAGES:
        name = page.relative_to(ROOT / "docs")
        for title, text in sections(page.read_text(encoding="utf-8")):
            blocks = FENCE.findall(text)
            if blocks:
                found.append(Snippet(f"{name}:{title}", "\n".join(blocks)))
    return found


def examples() -> list[str]:
    """Return the scripts of examples/ that the pages include."""
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    return sorted(set(EXAMPLE.findall(pages)))


def skip_without(modules: set[str]) -> None:
    """Skip the test if a module that the code needs is not installed."""
    needed = {root for module in modules for root in NEEDS.get(module, ())}
    needed |= {module.partition(".")[0] for module in modules if not module.startswith("spectral_")}
    for module in sorted(needed):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if "cupy" in needed:
        import cupy

        if not cupy.is_available():
            pytest.skip("CuPy finds no GPU")


@pytest.fixture
def one_process(monkeypatch):
    """Set what ``torchrun --nproc-per-node 1`` sets, so that a distributed script runs alone."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")


@pytest.mark.parametrize("snippet", snippets(), ids=lambda snippet: snippet.place)
@pytest.mark.usefixtures("one_process")
def test_a_snippet_runs(snippet):
    skip_without(snippet.imports())
    exec(compile(snippet.code, snippet.place, "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("example", examples())
def test_the_example_of_a_how_to_runs(example, monkeypatch, tmp_path):
    code = (ROOT / "examples" / f"{example}.py").read_text(encoding="utf-8")
    skip_without(Snippet(example, code).imports())
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)  # TensorBoard's script writes into a folder
    main = importlib.import_module(example).main
    short = {"epochs": 1, "steps": 5}
    main(**{name: short[name] for name in signature(main).parameters if name in short})


def test_readme_shows_each_framework():
    blocks = FENCE.findall(README)
    for package in ("spectral_torch", "spectral_jax", "spectral_keras", "spectral_core"):
        assert any(f"import {package}" in block or f", {package}" in block for block in blocks)


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_relative_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "package", ["spectral_core", "spectral_torch", "spectral_jax", "spectral_keras"]
)
def test_the_api_page_lists_each_public_name(package):
    skip_without({package})
    page = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    _, _, rest = page.partition(f".. currentmodule:: {package}\n")
    listed = set(re.findall(r"^   (\w+)$", rest.partition(".. currentmodule::")[0], re.MULTILINE))
    # An adapter also exports names of the core, which the core's own list has.
    own = {
        name
        for name in importlib.import_module(package).__all__
        if not name.startswith("__")
        and (
            package == "spectral_core"
            or not getattr(sys.modules[package], name).__module__.startswith("spectral_core")
        )
    }
    assert own == listed


def test_the_compatibility_page_has_the_versions_that_are_tested():
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    stated = re.findall(r"\b([a-z][a-z-]+) (\d+\.\d+\.\d+)\b", page)
    assert stated
    assert [(name, pinned[name]) for name, _ in stated] == stated
