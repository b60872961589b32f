"""Live models: each framework's layers say their own layouts."""

import sys

import numpy as np
import pytest

import spectral_core as sc


def axes_of(report):
    return {name: (row.layout, row.rows, row.columns) for name, row in report.items()}


def test_equinox():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
    key = jax.random.key(0)

    class Model(eqx.Module):
        grouped: eqx.nn.Conv2d
        up: eqx.nn.ConvTranspose2d
        table: eqx.nn.Embedding
        layers: list

        def __init__(self):
            self.grouped = eqx.nn.Conv2d(4, 8, 3, groups=2, key=key)
            self.up = eqx.nn.ConvTranspose2d(4, 6, 3, key=key)
            self.table = eqx.nn.Embedding(10, 4, key=key)
            self.layers = [eqx.nn.Linear(3, 4, key=key), jax.nn.relu]

    model = Model()
    report = sc.report(model)
    assert axes_of(report) == {
        "grouped/weight[0]": ("(go)ikk:2", 4, 18),
        "grouped/weight[1]": ("(go)ikk:2", 4, 18),
        "up/weight": ("oikk", 6, 36),
        "table/weight": ("io", 4, 10),
        "layers/0/weight": ("oi", 4, 3),
    }
    assert not any(row.guessed for row in report.values())
    assert report.skipped["up/bias"] == "a bias"
    exact = np.linalg.norm(np.asarray(model.layers[0].weight, float), 2)
    assert report["layers/0/weight"].sigma == pytest.approx(exact)


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.grouped = nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=rngs)
            self.up = nnx.ConvTranspose(4, 6, (3, 3), rngs=rngs)
            self.table = nnx.Embed(10, 4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs, decode=False)
            self.drop = nnx.Dropout(0.1, rngs=rngs)

    report = sc.report(Model(nnx.Rngs(0)))
    assert axes_of(report) == {
        "attention/key/kernel": ("ioo", 8, 8),
        "attention/out/kernel": ("iio", 8, 8),
        "attention/query/kernel": ("ioo", 8, 8),
        "attention/value/kernel": ("ioo", 8, 8),
        "grouped/kernel[0]": ("kki(go):2", 4, 18),
        "grouped/kernel[1]": ("kki(go):2", 4, 18),
        "table/embedding": ("io", 4, 10),
        "up/kernel": ("kkio", 6, 36),
    }
    assert not any(row.guessed for row in report.values())


def test_flax_linen():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    linen = pytest.importorskip("flax.linen", reason="Flax is not installed")
    model = linen.Sequential([linen.Conv(8, (3, 3)), linen.Dense(5)])
    variables = model.init(jax.random.key(0), jax.numpy.ones((1, 8, 8, 4)))
    expected = {
        "params/layers_0/kernel": ("kkio", 8, 36),
        "params/layers_1/kernel": ("io", 5, 8),
    }
    assert axes_of(sc.report(variables)) == expected
    with pytest.raises(sc.SpectralError, match=r"flax\.linen"):
        sc.report(model)
    # The same tree of NumPy arrays is told by its names.
    host = jax.tree.map(np.asarray, variables)
    assert {x: y[1:] for x, y in axes_of(sc.report(host)).items()} == {
        x: y[1:] for x, y in expected.items()
    }


def test_arrays_of_jax_without_its_adapter(monkeypatch):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    monkeypatch.setitem(sys.modules, "spectral_jax._live", None)
    params = {"Dense_0": {"kernel": jax.numpy.ones((3, 5))}}
    assert axes_of(sc.report(params)) == {"Dense_0/kernel": ("io", 5, 3)}


def test_lazy_layers_of_pytorch_are_named():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LazyLinear(4))
    report = sc.report(model)
    assert list(report) == ["0.weight"]
    assert "not initialized" in report.skipped["1.weight"]


def test_tensors_without_values_are_named():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4, device="meta"))
    for source in (model, model.state_dict()):
        report = sc.report(source)
        assert list(report) == ["0.weight"]
        assert "'meta'" in report.skipped["1.weight"]


def test_a_model_within_a_mapping_is_named():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    report = sc.report({"parts": [torch.nn.Linear(3, 2)], "w": np.eye(2)})
    assert list(report) == ["w"]
    assert "pass it alone" in report.skipped["parts/0"]


def test_mappings_that_are_no_trees_of_jax():
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    assert list(sc.report({"w": np.eye(2), 3: {"v": jax.numpy.eye(2)}})) == ["w", "3/v"]
    endless = {"w": np.eye(2)}
    endless["again"] = [endless]
    with pytest.raises(sc.SpectralError, match="holds itself"):
        sc.report(endless)


def test_keras_layers_of_one_name_keep_a_row_each():
    keras = pytest.importorskip("keras", reason="Keras is not installed")

    class Model(keras.Model):
        def __init__(self):
            super().__init__(name="m")
            self.one, self.other = (keras.layers.Dense(n, name="d") for n in (3, 4))

        def call(self, x):
            return self.other(self.one(x))

    model = Model()
    model(np.ones((2, 5)))
    report = sc.report(model)
    assert axes_of(report) == {
        "m/d/kernel": ("io", 3, 5),
        "m/d/kernel (2)": ("io", 4, 3),
    }
    assert not any(row.guessed for row in report.values())


def test_keras():
    keras = pytest.importorskip("keras", reason="Keras is not installed")
    model = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            keras.layers.Conv2DTranspose(6, 3, name="up"),
            keras.layers.DepthwiseConv2D(3, name="each"),
            keras.layers.Flatten(),
            keras.layers.Dense(5, name="out"),
        ],
        name="m",
    )
    report = sc.report(model)
    found = axes_of(report)
    (up,) = [x for name, x in found.items() if "up" in name]
    assert up == ("kkoi", 6, 36)
    each = [x for name, x in found.items() if "each" in name]
    assert each == [("kk(gi)o:6", 1, 9)] * 6
    (out,) = [x for name, x in found.items() if "out" in name]
    assert out[0] == "io"
    assert not any(row.guessed for row in report.values())


def test_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    nn = torch.nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.ConvTranspose2d(4, 6, 3)
            self.b = nn.Conv2d(6, 6, 3, groups=6)
            self.c = nn.Embedding(10, 4)
            self.d = nn.Linear(4, 10)
            self.d.weight = self.c.weight
            self.e = nn.Conv1d(3, 5, 40)

    report = sc.report(Model().half())
    found = axes_of(report)
    assert found["a.weight"] == ("iokk", 6, 36)
    assert found["b.weight[5]"] == ("(go)ikk:6", 1, 9)
    assert found["c.weight"] == ("io", 4, 10)
    assert found["e.weight"] == ("oik", 5, 120)
    assert report.skipped["d.weight"] == "the same tensor as c.weight"
    assert not any(row.guessed for row in report.values())


def test_live_models_are_compared():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    before = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ConvTranspose1d(3, 2, 3))
    state = {name: x.detach().clone() for name, x in before.state_dict().items()}
    state["0.weight"] += 1
    found = sc.compare(before, state)
    assert found["0.weight"].sigma == pytest.approx(12**0.5, rel=1e-5)
    assert found["1.weight"].drift == 0
    assert found["1.weight"].layout == "iok"


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}
OWN = {"n_embd": 32, "hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 99}
GATED = {"num_key_value_heads": 2, "pad_token_id": 0}
MODELS = {
    "GPT2": ("LMHeadModel", OWN),
    "OPT": ("ForCausalLM", {**TINY, "ffn_dim": 64, "word_embed_proj_dim": 16}),
    "Bloom": ("ForCausalLM", OWN),
    "T5": (
        "ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 99},
    ),
    "Bert": ("ForMaskedLM", TINY),
    "ViT": ("ForImageClassification", {**TINY, "image_size": 32}),
    "Llama": ("ForCausalLM", TINY),
    "Mixtral": ("ForCausalLM", {**TINY, **GATED, "num_local_experts": 4}),
    "Qwen3Moe": (
        "ForCausalLM",
        {**TINY, **GATED, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "Phi3": ("ForCausalLM", {**TINY, **GATED}),
    "GPTNeoX": ("ForCausalLM", TINY),
    "Mpt": ("ForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 99}),
    "ConvNext": (
        "ForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "ResNet": ("ForImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 1]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_names_say_what_the_layers_of_transformers_are(name):
    """Compare the layouts from names, as for a file, with those from the modules."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from spectral_core._report.layouts import layout_of
    from spectral_core._report.live import listed

    suffix, settings = MODELS[name]
    if not hasattr(transformers, f"{name}{suffix}"):
        pytest.skip("not in this version of transformers")
    with torch.device("meta"):
        model = getattr(transformers, f"{name}{suffix}")(
            getattr(transformers, f"{name}Config")(**settings)
        )
    found = listed(model)
    entries = [x for x in found.entries if "'meta'" in x.skip and len(x.shape) > 1]
    assert len(entries) >= 5
    for entry in entries:
        by_name = layout_of(entry.name, entry.shape, "torch", {})
        by_layer = layout_of(entry.name, entry.shape, "torch", {}, found.layouts)
        if by_name.layout is None or entry.name not in found.layouts:
            assert "token" in entry.name or "bias" in entry.name or by_name.guessed
        else:
            assert by_name.layout == by_layer.layout, entry.name
