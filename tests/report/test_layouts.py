import pytest

import spectral_core as sc
from spectral_core import Layout
from spectral_core._report.layouts import layout_of, parsed

RULES = [
    ("torch", "fc.weight", (3, 4), "oi", False),
    ("torch", "conv.weight", (3, 4, 5, 5), "oikk", False),
    ("torch", "wte.weight", (50, 4), "io", False),
    ("torch", "embeddings.word_embeddings.weight", (50, 4), "io", False),
    ("torch", "h.0.mlp.c_fc.weight", (4, 16), "io", False),
    ("torch", "layers.0.attn.in_proj_weight", (12, 4), "(go)i", False),
    ("torch", "blocks.0.attn.qkv.weight", (12, 4), "(go)i", False),
    ("torch", "qkv_proj.weight", (8, 4), "oi", True),
    ("torch", "mlp.experts.gate_up_proj", (8, 4, 6), "soi", True),
    ("torch", "up.deconv.weight", (3, 4, 5, 5), "iokk", True),
    ("torch", "block.dwconv.weight", (6, 1, 3, 3), "(go)ikk", True),
    ("torch", "layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), "io", False),
    ("torch", "embeddings.position_embeddings", (1, 5, 4), "sio", False),
    ("torch", "positional_embedding", (5, 4), "io", False),
    ("torch", "mlp.gate_up_proj.weight", (16, 4), "(go)i", False),
    ("torch", "conv.weight_v", (3, 4, 5), "oik", True),
    ("torch", "conv.parametrizations.weight.original1", (3, 4, 5), "oik", True),
    ("torch", "params/Dense_0/kernel", (3, 4), "io", True),
    ("numpy", "params/Conv_0/kernel", (5, 5, 3, 4), "hwio", True),
    ("numpy", "params/Embed_0/embedding", (50, 4), "io", True),
    ("torch", "strange", (3, 4, 100), "oik", True),
    ("numpy", "w", (3, 4), "oi", True),
    ("flax", "params/Dense_0/kernel", (3, 4), "io", False),
    ("flax", "params/Conv_0/kernel", (5, 5, 3, 4), "hwio", False),
    ("flax", "params/attention/query/kernel", (8, 2, 4), "ioo", False),
    ("flax", "params/attention/out/kernel", (2, 4, 8), "iio", False),
    ("keras", "layers/conv2d/vars/0", (5, 5, 3, 4), "hwio", False),
    ("keras", "up/vars/0", (3, 3, 8, 4), "hwio", True),
    ("keras", "layers/separable_conv2d/vars/0", (3, 3, 8, 1), "hwio", True),
    ("keras", "layers/multi_head_attention/query_dense/vars/0", (8, 2, 4), "ioo", False),
    ("keras", "layers/multi_head_attention/output_dense/vars/0", (2, 4, 8), "iio", False),
    ("keras", "multi_head_attention/attention_output/kernel", (2, 4, 8), "iio", False),
    ("keras", "layers/depthwise_conv2d/vars/0", (3, 3, 8, 1), "kk(gi)o", True),
    ("keras", "layers/conv2d_transpose/vars/0", (3, 3, 8, 4), "kkoi", True),
]


@pytest.mark.parametrize(("kind", "name", "shape", "axes", "guessed"), RULES)
def test_rules(kind, name, shape, axes, guessed):
    found = layout_of(name, shape, kind, {})
    assert (found.layout.axes, found.guessed) == (axes, guessed)
    assert found.layout.ndim == len(shape)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("optimizer.state.0.exp_avg", (3, 4), "state of an optimizer"),
        ("opt_state/mu/kernel", (3, 4), "state of an optimizer"),
        ("fc.weight_scale_inv", (3, 4), "scales of a quantized weight"),
        ("x", (1,) * 7, "7 axes: give a layout"),
        ("h.0.attn.bias", (1, 1, 8, 8), "a bias, not the matrix of a layer"),
        ("experts.gate_up_proj_bias", (4, 8), "a bias, not the matrix of a layer"),
        ("relative_position_bias_table", (9, 2), "a bias, not the matrix of a layer"),
        ("params/query/bias", (2, 4), "a bias, not the matrix of a layer"),
        ("embeddings.cls_token", (1, 1, 8), "a token, not the matrix of a layer"),
        ("mixer.A_log", (8, 4), "logarithms of a state space, not the matrix of a layer"),
        ("conv.weight_g", (1, 1, 8), "lengths of a weight normalization"),
    ],
)
def test_what_has_no_layout(name, shape, reason):
    assert layout_of(name, shape, "torch", {}) == (None, False, reason)


def test_layers_of_a_live_model_say_their_axes_but_not_what_is_fused():
    known = {"up": Layout("iokk"), "h.0.attn.c_attn.weight": Layout("io")}
    assert layout_of("up", (3, 4, 5, 5), "torch", {}, known) == (Layout("iokk"), False, "")
    fused = layout_of("h.0.attn.c_attn.weight", (4, 12), "torch", {}, known)
    assert fused.layout == Layout("i(go)", 3)
    assert layout_of("up", (3, 4, 5, 5), "torch", {"up": "oihw"}, known).layout.axes == "oihw"


def test_patterns_come_first():
    own = {"*.qkv.weight": Layout("(go)i", 2), "a.*": "io", "*": None}
    assert layout_of("x.qkv.weight", (4, 3), "torch", own).layout == Layout("(go)i", 2)
    assert layout_of("a.w", (4, 3), "numpy", own) == (Layout("io"), False, "")
    assert layout_of("b", (4, 3), "torch", own).layout is None
    with pytest.raises(sc.ArgumentError, match="does not fit"):
        layout_of("a.w", (4, 3, 2), "torch", own)


@pytest.mark.parametrize("text", ["oihw", "=oi", "*=", "*=xy", "*=(go)i:x"])
def test_bad_patterns(text):
    with pytest.raises(sc.ArgumentError):
        parsed(text)
