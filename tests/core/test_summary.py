"""Summary: a table as text and as HTML, and what is left out."""

import pytest

from spectral_core import Summary
from spectral_core.engine import Row

ROWS = [
    Row("conv.weight", (8, 3, 3, 3), (8, 27), "oikk", 0.01, 1.25, "SGD", 7),
    Row("[bold]<b>", (4, 5), (4, 5), "oi", "schedule", 2.0, "", None, "no optimizer holds it"),
]
LEFT_OUT = {"embed.weight": "an embedding"}


@pytest.mark.parametrize("rich", [True, False])
def test_text_has_every_cell_and_every_reason(rich, monkeypatch):
    if not rich:
        monkeypatch.setattr("spectral_core._summary.find_spec", lambda name: None)
    text = str(Summary("two weights", ROWS, LEFT_OUT, notes=["attached to SGD"]))
    assert text.startswith("two weights")
    for cell in ("conv.weight", "8×3×3×3", "8×27", "oikk", "0.01", "1.25", "SGD", "7"):
        assert cell in text
    assert "[bold]<b>" in text
    assert "no optimizer holds it" in text
    assert "embed.weight: an embedding" in text
    assert text.endswith("attached to SGD")


def test_html_is_escaped():
    html = Summary("two weights", ROWS, LEFT_OUT)._repr_html_()
    assert html.count("<tr>") == 3
    assert "[bold]&lt;b&gt;" in html
    assert "<code>embed.weight</code>: an embedding" in html


def test_empty_columns_are_not_shown():
    rows = [Row("w", (2, 2), (2, 2), "oi")]
    assert "σ" not in str(Summary("one", rows, {}))
    assert "left out" not in str(Summary("one", rows, {}))


def test_long_names_are_not_cut():
    name = "encoder." * 60 + "weight"
    assert name in str(Summary("one", [Row(name, (2, 2), (2, 2), "oi")], {}))
