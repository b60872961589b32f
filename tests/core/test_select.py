"""Weights and their settings are chosen by name or pattern."""

import numpy as np
import pytest

import spectral_core as sc
from spectral_core import Layout
from spectral_core._select import by_name, choose, choose_layouts, matches

NAMES = ["encoder.in", "encoder.out", "head", "block[0]"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"head": 1}, {"head": 1}),
        ({"encoder.*": 1}, {"encoder.in": 1, "encoder.out": 1}),
        ({"encoder.*": 1, "encoder.out": 2}, {"encoder.in": 1, "encoder.out": 2}),
        ({"*.in": 1, "*": 2}, {"encoder.in": 1, "encoder.out": 2, "head": 2, "block[0]": 2}),
        ({"*": 2, "*.in": 1}, dict.fromkeys(NAMES, 2)),
        ({"block[0]": 3}, {"block[0]": 3}),
    ],
    ids=str,
)
def test_own_name_wins_over_the_first_pattern(settings, expected):
    assert by_name(settings, NAMES, "factor") == expected


@pytest.mark.parametrize("pattern", ["heads", "Head", "encoder", "decoder.*"])
def test_pattern_that_matches_nothing_raises(pattern):
    with pytest.raises(
        sc.NamesError, match=r"factor: .*matches none of the names.*'head'"
    ) as error:
        by_name({"head": 1, pattern: 2}, NAMES, "factor")
    assert repr(pattern) in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a.*", "a.b", True),
        ("a.?", "a.b", True),
        ("A.*", "a.b", False),
        ("a", "a.b", False),
        ("block[0]", "block[0]", True),
        ("block[0]", "block0", True),
    ],
)
def test_pattern_matches_its_names_and_itself(pattern, name, expected):
    assert matches(pattern, name) is expected


CANDIDATES = {
    "conv.weight": np.ones((2, 3, 4, 4)),
    "conv.bias": np.ones(2),
    "out.weight": np.ones((5, 2)),
    "embedding": np.ones((9, 3)),
}
KNOWN = {"conv.weight": Layout("oihw"), "out.weight": Layout("oi")}


def axes_of(**options):
    """Return the axes of the chosen weights."""
    options = {"include": None, "exclude": None, "layouts": None, **options}
    default = options.pop("default", lambda weight: Layout("oi" + "k" * (weight.ndim - 2)))
    chosen = choose(CANDIDATES, KNOWN, **options, default=default)
    return {name: layout.axes for name, layout in chosen.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"conv.weight": "oihw", "out.weight": "oi"}),
        ({"exclude": "conv*"}, {"out.weight": "oi"}),
        ({"exclude": ["conv.*", "embedding"]}, {"out.weight": "oi"}),
        ({"include": "embedding"}, {"embedding": "oi"}),
        ({"include": ["out*", "embedding"]}, {"out.weight": "oi", "embedding": "oi"}),
        ({"include": "*", "exclude": ["*.bias", "conv*"]}, {"out.weight": "oi", "embedding": "oi"}),
        ({"include": lambda name, weight: weight.ndim == 4}, {"conv.weight": "oihw"}),
        ({"exclude": lambda name, weight: name.startswith("out")}, {"conv.weight": "oihw"}),
        ({"layouts": {"out.*": "io"}}, {"conv.weight": "oihw", "out.weight": "io"}),
        (
            {"layouts": {"embedding": Layout("io")}},  # a name with a layout is chosen
            {"conv.weight": "oihw", "out.weight": "oi", "embedding": "io"},
        ),
        ({"include": "out*", "layouts": {"embedding": "io"}}, {"out.weight": "oi"}),
    ],
)
def test_weights_are_chosen_in_the_order_of_the_candidates(options, expected):
    found = axes_of(**options)
    assert found == expected
    assert list(found) == [name for name in CANDIDATES if name in expected]


@pytest.mark.parametrize("option", ["include", "exclude", "layouts"])
def test_choice_that_matches_no_candidate_raises(option):
    value = {"absent": "oi"} if option == "layouts" else "absent"
    with pytest.raises(sc.NamesError, match=f"{option}: 'absent' matches none of the names"):
        axes_of(**{option: value})


def test_default_layout_is_asked_only_where_none_is_known():
    asked = []
    axes_of(include=["out*", "emb*"], default=lambda w: asked.append(w.shape) or Layout("io"))
    assert asked == [(9, 3)]


@pytest.mark.parametrize(
    ("layouts", "expected"),
    [
        (None, {"a": "oi", "b": "oikk"}),
        ("io", {"a": "io", "b": "io"}),
        (Layout("io"), {"a": "io", "b": "io"}),
        ({"a": "io"}, {"a": "io", "b": "oikk"}),
        ({"*": "hwio", "a": "io"}, {"a": "io", "b": "hwio"}),
    ],
    ids=str,
)
def test_layouts_default_to_output_input_kernel(layouts, expected):
    found = choose_layouts({"a": 2, "b": 4}, layouts)
    assert {name: layout.axes for name, layout in found.items()} == expected


def test_vector_has_no_layout():
    with pytest.raises(sc.ShapeError, match="weight 'bias' has 1 axes"):
        choose_layouts({"w": 2, "bias": 1}, None)
