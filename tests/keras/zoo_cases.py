"""Models that people train with Keras, each against a list of its matrices.

`test_optimizer.py` runs this on one backend: what is chosen does not depend on it.
"""

import re
import warnings

import keras
import numpy as np
import pytest
from keras import layers as kl

import spectral_core as sc
from backends import svd_norm
from spectral_keras import Layout, SpectralNorm, SpectralNormRegularizer, SpectralWarning


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


class Own(kl.Layer):
    """A layer that the library does not know."""

    def __init__(self, shape, weight="kernel", **options):
        super().__init__(**options)
        self.kernel = self.add_weight(shape=shape, name=weight)

    def call(self, x):
        return keras.ops.matmul(x, self.kernel)

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.kernel.shape[-1])


class TunedDense(kl.Dense):
    """A subclass of a known layer, with a matrix of its own."""

    def build(self, shape):
        super().build(shape)
        self.gate = self.add_weight(shape=(shape[-1], self.units), name="gate")


class Block(kl.Layer):
    """A layer of known layers, which Keras finds in attributes and lists."""

    def __init__(self, width, **options):
        super().__init__(**options)
        self.attend = kl.MultiHeadAttention(2, 3, name="attend")
        self.norm = kl.LayerNormalization(axis=(1, 2), name="norm")
        self.feed = [kl.EinsumDense("abc,cd->abd", (None, width), bias_axes="d"), kl.Dense(width)]

    def call(self, x):
        x = self.norm(x + self.attend(x, x))
        for layer in self.feed:
            x = layer(x)
        return x


def mlp():
    hidden = [kl.Dense(7, "relu", name="one"), kl.BatchNormalization(), kl.PReLU(name="prelu")]
    return keras.Sequential([keras.Input((5,)), *hidden, kl.Dense(3, name="two")], name="mlp")


def cnn():
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            kl.Conv2D(4, 3, name="conv"),
            kl.GroupNormalization(2),
            kl.SeparableConv2D(6, 3, name="separable"),
            kl.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
            kl.Conv2D(8, 1, groups=4, name="grouped"),
            kl.PReLU(name="slopes"),
            kl.Conv2DTranspose(5, 2, name="up"),
            kl.Flatten(),
            kl.Dense(2, name="head"),
        ],
        name="cnn",
    )


def recurrent():
    tokens = keras.Input((6,), dtype="int32")
    x = kl.Embedding(9, 4, name="embed")(tokens)
    x = kl.Bidirectional(kl.LSTM(5, return_sequences=True), name="both")(x)
    cells = kl.StackedRNNCells([kl.GRUCell(3, name="low"), kl.SimpleRNNCell(4, name="high")])
    x = kl.RNN(cells, return_sequences=True, name="stack")(x)
    x = kl.TimeDistributed(kl.Dense(3, name="each"), name="time")(x)
    return keras.Model(tokens, kl.GRU(2, name="gru")(x), name="recurrent")


def transformer():
    tokens = keras.Input((6,), dtype="int32")
    embed = kl.ReversibleEmbedding(9, 8, tie_weights=True, name="embed")
    x = Block(8, name="block")(embed(tokens))
    x = kl.GroupQueryAttention(3, 4, 2, name="group")(x, x)
    return keras.Model(tokens, embed(x, reverse=True), name="transformer")


def untied():
    tokens = keras.Input((6,), dtype="int32")
    embed = kl.ReversibleEmbedding(9, 8, tie_weights=False, name="embed")
    return keras.Model(tokens, embed(embed(tokens), reverse=True), name="untied")


def video():
    return keras.Sequential(
        [
            keras.Input((3, 6, 6, 2)),
            kl.ConvLSTM2D(3, 2, name="memory", return_sequences=True),
            kl.Conv3D(4, 2, name="conv"),
            kl.Conv3DTranspose(2, 2, name="up"),
        ],
        name="video",
    )


def nested():
    trunk = keras.Sequential([kl.Dense(4, name="inner")], name="trunk")
    shared, left, right = kl.Dense(4, name="shared"), keras.Input((5,)), keras.Input((5,))
    joined = kl.Add()([trunk(shared(left)), trunk(shared(right))])
    return keras.Model([left, right], TunedDense(2, name="tuned")(joined), name="nested")


def own():
    return keras.Sequential(
        [keras.Input((6,)), Own((6, 5), name="mine"), kl.Dense(2, name="stock")], name="own"
    )


def lora():
    words = keras.Input((6,), dtype="int32")
    layers = {
        "embed": kl.Embedding(9, 8, name="embed"),
        "dense": kl.Dense(8, name="dense"),
        "heads": kl.EinsumDense("abc,cde->abde", (None, 2, 4), name="heads"),
        "back": kl.EinsumDense("abde,def->abf", (None, 7), name="back"),
        "turned": kl.EinsumDense("abc,dc->abd", (None, 6), name="turned"),
        "conv": kl.Conv1D(5, 3, name="conv"),
    }
    x = words
    for layer in layers.values():
        x = layer(x)
    model = keras.Model(words, kl.Dense(2, name="head")(x), name="lora")
    for layer in layers.values():
        layer.enable_lora(2)
    return model


def quantized():
    model = keras.Sequential(
        [keras.Input((6,)), kl.Dense(5, name="small"), kl.Dense(2, name="head")], name="quantized"
    )
    model.get_layer("small").quantize("int8")
    return model


def rows(*axes):
    """Return a function that makes these axes the rows of a matrix, and the others its columns."""

    def plane(W):
        W = np.moveaxis(W, axes, range(len(axes)))
        return W.reshape(int(np.prod(W.shape[: len(axes)])), -1)

    return plane


last = rows(-1)


def channels(W):
    return np.stack([last(W[..., channel, :]) for channel in range(W.shape[-2])])


def quarters(W):
    return np.stack([last(part) for part in np.split(W, 4, axis=-1)])


def both(prefix, kernels=("kernel", "recurrent_kernel")):
    return {f"{prefix}/{kernel}": last for kernel in kernels}


ATTENTION = {"query": rows(1, 2), "key": rows(1, 2), "value": rows(1, 2), "attention_output": last}
ZOO = {
    mlp: {"one/kernel": last, "two/kernel": last},
    cnn: {
        "conv/kernel": last,
        "separable/depthwise_kernel": channels,
        "separable/pointwise_kernel": last,
        "depthwise/kernel": channels,
        "grouped/kernel": quarters,
        "up/kernel": rows(2),
        "head/kernel": last,
    },
    recurrent: {
        **both("forward_lstm/lstm_cell"),
        **both("backward_lstm/lstm_cell"),
        **both("low"),
        **both("high"),
        **both("gru/gru_cell"),
        "each/kernel": last,
    },
    transformer: {
        **{f"attend/{part}/kernel": rows_of for part, rows_of in ATTENTION.items()},
        **{f"group/{part}/kernel": rows_of for part, rows_of in ATTENTION.items()},
        "block/einsum_dense/kernel": last,
        "block/dense/kernel": last,
    },
    untied: {"embed/reverse_embeddings": last},
    video: {**both("memory/conv_lstm_cell"), "conv/kernel": last, "up/kernel": rows(3)},
    nested: {
        "inner/kernel": last,
        "shared/kernel": last,
        "tuned/kernel": last,
        "tuned/gate": last,
    },
    own: {"mine/kernel": last, "stock/kernel": last},
    lora: {
        **{
            f"{name}/lora_kernel_{part}": last
            for name in ("dense", "back", "turned", "conv")
            for part in "ab"
        },
        "heads/lora_kernel_a": rows(1, 2),
        "heads/lora_kernel_b": last,
        "head/kernel": last,
    },
    quantized: {"head/kernel": last},
}
LEFT_OUT = {
    "mlp": {},
    "cnn": {"slopes/alpha": "a scale"},
    "recurrent": {"embed/embeddings": "an embedding", "bias": "a bias"},
    "transformer": {"embed/embeddings": "an embedding", "norm/gamma": "a scale", "bias": "a bias"},
    "lora": {
        "dense/kernel": "frozen",
        "conv/kernel": "frozen",
        "embed/lora_embeddings_a": "an embedding",
    },
    "quantized": {"small/kernel": "quantized (int8)"},
}
GUESSED = {"own": ["mine/kernel"], "nested": ["tuned/gate"]}


def ends(path, end):
    return f"/{path}".endswith(f"/{end}")


@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
def test_the_matrices_of_a_model(make):
    if make in (transformer, untied) and not hasattr(kl, "ReversibleEmbedding"):
        pytest.skip("this Keras has no ReversibleEmbedding")
    expected, model = ZOO[make], make()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer = SpectralNormRegularizer("sgd", model)
    weights = optimizer._weights
    assert len(weights.layouts) == len(expected), list(weights.layouts)
    rng = np.random.default_rng(0)
    for path, layout in weights.layouts.items():
        (read,) = [read for end, read in expected.items() if ends(path, end)]
        # Of rank one nearly: each other matrix of the same numbers has another norm.
        W = rng.standard_normal(tuple(weights.variables[path].shape)) + 1
        state = sc.iterate({path: W}, sc.init({path: W}, layouts=layout), n_iter=40)
        np.testing.assert_allclose(state.sigma[path], svd_norm(read(W)), rtol=1e-6)
    # Every other variable with two axes is told.
    matrices = {v.path for v in model.weights if len(v.shape) > 1}
    assert matrices == {*weights.layouts, *weights.left_out}
    for end, reason in LEFT_OUT.get(model.name, {}).items():
        found = [why for path, why in weights.left_out.items() if ends(path, end)]
        assert {why.startswith(reason) for why in found} == {True}, (end, weights.left_out)
    guesses = [w for w in told if issubclass(w.category, SpectralWarning)]
    assert len(guesses) == (model.name in GUESSED)
    for end in GUESSED.get(model.name, []):
        assert re.search(
            f'{end} .* as \'io\'.*layouts={{"[^"]*{end}": "io"}}', str(guesses[0].message)
        )
        assert guesses[0].filename == __file__


def test_a_kernel_with_three_axes_of_an_unknown_layer_is_refused():
    model = keras.Sequential([keras.Input((4, 6)), Own((4, 6, 5), name="stack")], name="net")
    with pytest.raises(
        sc.NamesError, match=r'stack/kernel.*\(4, 6, 5\).*layouts=.*exclude=\["stack/kernel"\]'
    ):
        SpectralNormRegularizer("sgd", model)
    with pytest.raises(sc.NamesError, match="layouts="):
        SpectralNormRegularizer("sgd", model, include="stack")
    optimizer = SpectralNormRegularizer("sgd", model, layouts={"stack": "sio"})
    assert optimizer.sigmas()["stack/kernel"].shape == (4,)


@pytest.mark.filterwarnings("error::spectral_core.SpectralWarning")
def test_a_layout_or_an_exclusion_settles_a_guess():
    model = own()
    assert len(SpectralNormRegularizer("sgd", model, layouts={"mine": "io"}).sigmas()) == 2
    assert len(SpectralNormRegularizer("sgd", model, exclude=Own).sigmas()) == 1


def chosen(model, **options):
    paths = SpectralNormRegularizer("sgd", model, **options)._weights.layouts
    return [path.split("/", 1)[1] for path in paths]


def test_ways_to_choose():
    model = cnn()
    everything = chosen(model)
    for include in (
        kl.Conv2D,
        [kl.Conv2D],
        ["conv", "grouped"],
        re.compile(r"/(conv|grouped)/"),
        ["cnn/conv/kernel", "grouped/kernel"],
        [model.get_layer("conv"), model.get_layer("grouped").kernel],
        lambda path, v: "conv/" in path or v.shape == (1, 1, 3, 8),
        ["con?/*", re.compile("grouped")],
    ):
        assert chosen(model, include=include) == ["conv/kernel", "grouped/kernel"], include
        rest = [path for path in everything if path not in ("conv/kernel", "grouped/kernel")]
        assert chosen(model, exclude=include) == rest, include
    lstm = chosen(recurrent(), include=kl.LSTM)
    assert len(lstm) == 4
    assert all("lstm_cell" in path for path in lstm)
    tokens = keras.Input((6, 8))
    attention = keras.Model(tokens, Block(8, name="block")(tokens), name="attention")
    assert len(chosen(attention, include=kl.MultiHeadAttention)) == 4
    assert len(chosen(nested(), include="shared")) == 1


def test_factors_by_layer():
    optimizer = SpectralNormRegularizer(
        "sgd", cnn(), {"conv*": 0.1, "head": 0.2, "cnn/up/kernel": 0.3, "*": 0.4, "up": 0.5}
    )
    factors = {path.split("/")[1]: x for path, x in optimizer.factor.items()}
    assert factors == {
        "conv": 0.1,
        "head": 0.2,
        "up": 0.3,
        **dict.fromkeys(("separable", "depthwise", "grouped"), 0.4),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": kl.LSTM}, "no layer of class LSTM .*Conv2D"),
        ({"include": kl.Dense(2, name="other")}, "the layer 'other' holds no weight of the model"),
        ({"include": "hed"}, "did you mean"),
        ({"exclude": 3}, "exclude"),
        ({"factor": {"hed": 0.1}}, "did you mean"),
        ({"factor": {"head": 0.1}}, "no entry for .*conv.*'\\*' for all others"),
    ],
)
def test_wrong_choices(options, message):
    with pytest.raises(sc.NamesError, match=message):
        SpectralNormRegularizer("sgd", cnn(), **options)


def test_a_layer_under_spectral_normalization_is_told():
    layers = [kl.SpectralNormalization(kl.Dense(4, name="normed"), name="wrap"), kl.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *layers], name="net")
    with pytest.warns(SpectralWarning, match="leaves out.*wrap.*kernel"):
        optimizer = SpectralNormRegularizer("sgd", model)
    assert len(optimizer.sigmas()) == 1
    (reason,) = [why for path, why in optimizer.summary().left_out.items() if "kernel" in path]
    assert "SpectralNormalization" in reason
    with pytest.warns(SpectralWarning, match="no effect on.*wrap.*kernel"):
        SpectralNormRegularizer("sgd", model, include="*kernel")


def test_a_bias_is_known_by_its_name_alone_in_an_unknown_layer():
    layers = [Own((3, 3), name="one"), Own((3, 3), weight="bias", name="two")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    with pytest.warns(SpectralWarning, match="for their names alone.*two/bias"):
        optimizer = SpectralNormRegularizer("sgd", model, layouts={"one": "io"})
    assert list(optimizer.sigmas()) == ["one/kernel"]
    both = SpectralNormRegularizer("sgd", model, include=Own)
    assert list(both.sigmas()) == ["one/kernel", "two/bias"]


def test_a_model_s_name_may_be_left_out_of_a_path():
    model = keras.Sequential([keras.Input((3,)), kl.Dense(3, name="one"), kl.Dense(3, name="two")])
    named = f"{model.name}/one/kernel"
    for name in ("one/kernel", "one/*", "one", named):
        assert SpectralNormRegularizer("sgd", model, include=name)._weights.layouts.keys() == {
            named
        }
        numbers = SpectralNormRegularizer("sgd", model, {name: 0.1, "*": 0.2}).factor
        assert [numbers[named], numbers[f"{model.name}/two/kernel"]] == [0.1, 0.2]


def test_a_kernel_regularizer_on_the_same_kernel_is_told():
    layers = [kl.Dense(3, kernel_regularizer=SpectralNorm(0.1), name="twice"), kl.Dense(2)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    with pytest.warns(
        SpectralWarning, match="kernel_regularizer SpectralNorm acts on.*twice"
    ) as told:
        SpectralNormRegularizer("sgd", model)
    assert told[0].filename == __file__


def test_layers_that_are_not_built_are_told():
    class Half(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.two = kl.Dense(3, name="one"), kl.LSTM(3, name="two")
            self.one.build((None, 2))

    with pytest.warns(SpectralWarning, match="'two'.* not built"):
        SpectralNormRegularizer("sgd", Half())


def test_a_long_list_is_cut():
    layers = [Own((3, 3), name=f"own{i}") for i in range(14)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    with pytest.warns(SpectralWarning) as told:
        SpectralNormRegularizer("sgd", model)
    assert "own9" in str(told[0].message)
    assert "own10" not in str(told[0].message)


def test_layouts_of_layers_that_are_known():
    model = keras.Sequential([keras.Input((6,)), kl.Dense(6, name="out")], name="net")
    groups = SpectralNormRegularizer("sgd", model, layouts={"out": Layout("i(go)", groups=3)})
    assert groups.sigmas()["net/out/kernel"].shape == (3,)
