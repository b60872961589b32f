"""The benchmark of the norm of convolutions in training."""

import pytest

pytest.importorskip("torch")

from benchmarks import operator_norm


def test_errors_are_those_of_the_weights_that_sigma_belongs_to(monkeypatch):
    """With σ of another step the errors would have both signs, and be as large as a step moves."""
    pytest.importorskip("sklearn")
    monkeypatch.setattr(operator_norm, "SKIPPED", 20)
    monkeypatch.setattr(operator_norm, "EVERY", 3)
    found = operator_norm.errors("two convolutions", 12, epochs=2)
    assert len(found) >= 2
    assert all(-1e-4 < error < 0.05 for error in found)


def test_page_shows_each_choice_and_the_default():
    text = operator_norm.page()
    assert all(f"`waves={waves}`" in text for waves in operator_norm.WAVES)
    assert text.count("(the default)") == 1
