"""The examples of README run."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples_for_each_framework():
    for package in ("spectral_torch", "spectral_jax", "spectral_core"):
        assert sum(package in block for block in BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_an_example_runs(block):
    for module in re.findall(r"\b(?:torch|jax|optax)\b", block.splitlines()[0]):
        pytest.importorskip(module, reason=f"{module} is not installed")
    if "numba_step" in block:
        pytest.importorskip("numba", reason="Numba is not installed")
    exec(block, {})


def test_its_numbers_are_those_of_the_committed_results():
    from benchmarks.readme import written

    assert written(README) == README
