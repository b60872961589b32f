"""The generated blocks of README and docs, and what the other benchmarks compute."""

from pathlib import Path

import pytest

for _package in ("pandas", "scipy"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: nox -s paper has it")

from benchmarks import accuracy, readme  # noqa: E402

BLOCKS = readme.blocks()


@pytest.mark.parametrize("path", readme.pages(), ids=lambda path: path.name)
def test_blocks_are_what_the_committed_results_give(path):
    text = path.read_text(encoding="utf-8")
    assert readme.written(text, BLOCKS) == text


def test_every_stack_that_is_tested_is_in_the_table():
    files = (Path(__file__).parents[1] / "integrations").glob("test_*.py")
    assert sorted(f"test_{stack['test']}.py" for stack in readme.stack_list()) == sorted(
        path.name for path in files
    )


def test_results_are_small():
    sizes = [path.stat().st_size for path in readme.RESULTS.rglob("*") if path.is_file()]
    assert sum(sizes) < 1.5e6


@pytest.mark.parametrize("name", accuracy.SCHEMES)
def test_every_scheme_comes_to_the_svd(name):
    matrix = accuracy.close_pair(0.5, 0)
    found = accuracy.errors(accuracy.SCHEMES[name], [matrix] * 60, [accuracy.exact(matrix)] * 60)
    assert all(errors[-1] < 1e-6 for errors in found.values())
