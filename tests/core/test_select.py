"""Weights and their settings are chosen by name or pattern."""

import re

import numpy as np
import pytest

import spectral_core as sc
from spectral_core import Layout
from spectral_core._select import by_name, choose, choose_layouts, matching

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


@pytest.mark.parametrize("pattern", ["heads", "Head", "enco", "decoder.*", "in.encoder"])
def test_pattern_that_matches_nothing_raises(pattern):
    with pytest.raises(
        sc.NamesError, match=r"factor: .*matches none of the names.*'head'"
    ) as error:
        by_name({"head": 1, pattern: 2}, NAMES, "factor")
    assert repr(pattern) in str(error.value)


LAYERS = [f"encoder.{i}.{part}.weight" for i in (0, 1, 10) for part in ("attn.query", "mlp.fc")]
PATHS = ["encoder/query/kernel", "head/kernel"]


@pytest.mark.parametrize(
    ("pattern", "names", "expected"),
    [
        ("a.*", ["a.b"], "a.b"),
        ("a.?", ["a.b"], "a.b"),
        ("A.*", ["a.b"], ""),
        ("block[0]", ["block[0]", "block0"], "block[0]"),
        ("block[0]", ["block0"], "block0"),
        ("block[0]", ["block[0].weight"], "block[0].weight"),
        ("a", ["a", "a.b"], "a"),
        ("encoder.1", LAYERS, "encoder.1.attn.query.weight encoder.1.mlp.fc.weight"),
        ("fc", LAYERS, " ".join(LAYERS[1::2])),
        ("mlp.fc", LAYERS, " ".join(LAYERS[1::2])),
        ("fc.weight", LAYERS, " ".join(LAYERS[1::2])),
        ("mlp", LAYERS, " ".join(LAYERS[1::2])),
        ("10.mlp", LAYERS, LAYERS[5]),
        ("weight", LAYERS, " ".join(LAYERS)),
        ("uery", LAYERS, ""),
        (re.compile(r"\.1\d"), LAYERS, " ".join(LAYERS[4:])),
        (re.compile("FC"), LAYERS, ""),
        ("encoder", PATHS, PATHS[0]),
        ("query/kernel", PATHS, PATHS[0]),
        ("kernel", PATHS, " ".join(PATHS)),
        ("encoder", ["x/encoder/w", "encoder/w", "encoders/w"], "encoder/w"),
    ],
    ids=str,
)
def test_pattern_means_the_first_reading_that_finds_a_name(pattern, names, expected):
    assert matching(pattern, names) == expected.split()


CANDIDATES = {
    "conv.weight": np.ones((2, 3, 4, 4)),
    "conv.bias": np.ones(2),
    "out.weight": np.ones((5, 2)),
    "embedding": np.ones((9, 3)),
}
KNOWN = {
    "conv.weight": Layout("oihw"),
    "out.weight": Layout("oi"),
    "embedding": "an embedding",
    "conv.bias": "a vector",
}


def select(candidates=CANDIDATES, known=KNOWN, **options):
    options = {"include": None, "exclude": None, "layouts": None, **options}
    default = options.pop("default", lambda weight: Layout("oi" + "k" * (weight.ndim - 2)))
    return choose(candidates, known, **options, default=default)


def axes_of(**options):
    """Return the axes of the chosen weights."""
    return {name: layout.axes for name, layout in select(**options).layouts.items()}


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
        ({"include": "conv.weight"}, {"conv.weight": "oihw"}),
        ({"include": re.compile("^out|^emb")}, {"out.weight": "oi", "embedding": "oi"}),
        ({"include": {"out", "embedding"}}, {"out.weight": "oi", "embedding": "oi"}),
        ({"include": []}, {}),
        ({"exclude": []}, {"conv.weight": "oihw", "out.weight": "oi"}),
        (
            {"include": [re.compile("out"), lambda name, w: w.ndim == 4]},
            {"conv.weight": "oihw", "out.weight": "oi"},
        ),
        ({"layouts": {re.compile("out"): "io"}}, {"conv.weight": "oihw", "out.weight": "io"}),
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


def test_every_other_candidate_is_left_out_with_a_reason():
    found = select(exclude="conv.weight")
    assert found.left_out == {
        "conv.weight": "excluded",
        "conv.bias": "a vector",
        "embedding": "an embedding",
    }
    assert select(include="out").left_out == dict.fromkeys(
        ["conv.weight", "conv.bias", "embedding"], "not included"
    )


UNKNOWN = {"known": np.ones((2, 3)), "matrix": np.ones((4, 3)), "experts": np.ones((5, 4, 3))}


@pytest.mark.parametrize(
    ("options", "chosen", "guessed"),
    [
        ({"exclude": "experts"}, ["known", "matrix"], ("matrix",)),
        ({"layouts": {"experts": "soi"}}, ["known", "matrix", "experts"], ("matrix",)),
        ({"layouts": {"experts": "soi", "matrix": "io"}}, ["known", "matrix", "experts"], ()),
        ({"include": "matrix"}, ["matrix"], ()),
        (
            {"include": ["known", "experts"], "layouts": {"experts": "soi"}},
            ["known", "experts"],
            (),
        ),
    ],
)
def test_matrix_of_an_unknown_layer_is_chosen_and_told(options, chosen, guessed):
    found = select(UNKNOWN, {"known": Layout("oi")}, **options)
    assert (list(found.layouts), found.guessed) == (chosen, guessed)


@pytest.mark.parametrize("known", [{}, {"experts": "an embedding"}])
@pytest.mark.parametrize("include", [None, "experts", lambda name, weight: True])
def test_tensor_of_an_unknown_layer_needs_a_layout(known, include):
    if known and include is None:
        assert "experts" in select(UNKNOWN, known).left_out
        return
    with pytest.raises(sc.NamesError) as error:
        select(UNKNOWN, known, include=include)
    for part in ("experts: (5, 4, 3)", 'layouts={"experts": "sio"}', 'exclude=["experts"]'):
        assert part in str(error.value)


class Layer:
    pass


class Narrow(Layer):
    pass


class Absent:
    pass


OWNERS = {"known": Layer(), "matrix": Narrow(), "experts": object()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": Layer}, ["known", "matrix"]),
        ({"include": [Narrow, "experts"]}, ["matrix", "experts"]),
        ({"include": (Layer,), "exclude": Narrow}, ["known"]),
        ({"exclude": [Layer, Absent]}, ["experts"]),
        ({"layouts": {Layer: "io"}, "exclude": "experts"}, ["known", "matrix"]),
    ],
)
def test_classes_choose_what_their_objects_hold(options, expected):
    options = {"layouts": {"experts": "soi"}, **options}
    assert list(select(UNKNOWN, {}, owners=OWNERS, **options).layouts) == expected


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("a", ["a.w"]),
        (Layer, ["a.w"]),
        ("a.*", ["a.w", "a.bias"]),
        (re.compile("^a"), ["a.w", "a.bias"]),
        ("a.bias", ["a.bias"]),
        ("bias", ["a.bias"]),
        ("table", ["table"]),
        (Narrow, ["table"]),
        ("w", ["a.w"]),
        ("late", ["late.w"]),
    ],
    ids=str,
)
def test_module_means_its_weights_or_else_all_that_it_holds(include, expected):
    candidates = dict.fromkeys(["a.w", "a.bias", "table", "late.w"], np.ones((2, 3)))
    known = {"a.w": Layout("oi"), "a.bias": "a bias", "table": "an embedding"}
    known["late.w"] = Layout("oi")
    layer = Layer()
    found = select(
        candidates,
        known,
        include=include,
        owners={"a.w": layer, "a.bias": layer, "table": Narrow()},
        reasons={"late.w": "frozen"},
    )
    assert list(found.layouts) == expected


def test_layers_and_arrays_of_the_model_choose_themselves():
    layer = OWNERS["matrix"]
    options = {"known": {}, "owners": OWNERS, "layouts": {"experts": "soi"}}
    assert list(select(UNKNOWN, include=layer, **options).layouts) == ["matrix"]
    assert list(select(UNKNOWN, exclude=[layer], **options).layouts) == ["known", "experts"]
    arrays = [UNKNOWN["known"], UNKNOWN["experts"]]
    assert list(select(UNKNOWN, include=arrays, **options).layouts) == ["known", "experts"]
    with pytest.raises(sc.NamesError, match=r"an array of shape \(2, 3\) is none of the weights"):
        select(UNKNOWN, include=np.ones((2, 3)), **options)


def test_reason_leaves_a_known_weight_out_unless_it_is_named():
    candidates = {"w": np.ones((2, 3, 4)), "v": np.ones((2, 3))}
    known, reasons = {"w": Layout("ioo"), "v": Layout("oi")}, {"w": "frozen"}
    assert select(candidates, known, reasons=reasons).left_out == {"w": "frozen"}
    for options in ({"include": "w"}, {"layouts": {"w": "ioo"}, "exclude": "v"}):
        found = select(candidates, known, reasons=reasons, **options)
        assert found.layouts == {"w": Layout("ioo")}


@pytest.mark.parametrize("owners", [OWNERS, {}])
def test_class_that_holds_no_weight_raises(owners):
    with pytest.raises(sc.NamesError, match="include: no weight is held by a Absent"):
        select(UNKNOWN, {}, owners=owners, include=Absent)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exclude": "head.weight"}, ["out"]),
        ({"exclude": "head"}, ["out"]),
        ({"include": "head.*"}, ["embedding"]),
        ({"layouts": {"head": "io"}}, ["out", "embedding"]),
    ],
)
def test_each_name_of_a_tied_weight_means_it(options, expected):
    candidates = {"out": np.ones((2, 3)), "embedding": np.ones((4, 3))}
    known = {"out": Layout("oi"), "embedding": "an embedding (tied)"}
    aliases = {"embedding": ["head.weight"]}
    assert list(select(candidates, known, aliases=aliases, **options).layouts) == expected


@pytest.mark.parametrize("choice", [3, b"out", ["out", 3], [None]])
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_what_is_no_choice_is_refused(option, choice):
    with pytest.raises(sc.NamesError, match=f"{option} must be names, patterns, classes"):
        select(**{option: choice})


def test_message_names_ten_at_most_and_the_one_meant():
    names = [f"encoder.layer.{i}.attention.query.weight" for i in range(500)]
    with pytest.raises(sc.NamesError, match=r"490 more.*did you mean 'attention'\?") as error:
        by_name({"atention": 1}, names, "factor")
    assert len(str(error.value)) < 700


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


@pytest.mark.parametrize("layouts", ["io", Layout("io"), ["io"], {"io"}], ids=["0", "1", "2", "3"])
def test_layouts_that_are_no_mapping_are_explained(layouts):
    with pytest.raises(sc.ArgumentError, match=r'layouts must be a mapping.*write layouts=\{"'):
        select(layouts=layouts)
