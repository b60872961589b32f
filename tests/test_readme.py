"""The examples of README run."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples_for_each_framework():
    for package in ("spectral_torch", "spectral_jax", "spectral_core"):
        assert sum(package in block for block in BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_an_example_runs(block):
    for module in re.findall(r"\b(?:torch|jax|optax|keras)\b", block.splitlines()[0]):
        if find_spec(module) is None:  # to import Keras would choose its backend
            pytest.skip(f"{module} is not installed")
    if "numba_step" in block:
        pytest.importorskip("numba", reason="Numba is not installed")
    exec(block, {})
