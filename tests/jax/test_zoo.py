"""A zoo of models: their weights against lists written by hand, σ against SVD.

Each entry is (params, expected). ``expected`` maps a path to the axes of the leaf, one letter an
axis: o output, i input, k kernel, s stack. `svd_norms` reads them independently of the library.
"""

import warnings

import numpy as np
import pytest

import spectral_core as sc

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402

import spectral_jax  # noqa: E402
from jax_params import run  # noqa: E402


def svd_norms(weight, axes):
    """The spectral norm of each matrix of a leaf, in float64."""
    W = np.asarray(weight, np.float64)
    order = [[i for i, axis in enumerate(axes) if axis in letters] for letters in ("s", "o", "ik")]
    stack, rows = [W.shape[i] for i in order[0]], [W.shape[i] for i in order[1]]
    W = W.transpose([i for group in order for i in group])
    return np.linalg.norm(W.reshape(*stack, int(np.prod(rows)), -1), 2, axis=(-2, -1))


def leaves_of(params):
    flat = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    return {name.removesuffix("/value"): leaf for name, (_, leaf) in zip(names, flat, strict=True)}


def linen(make, *inputs):
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed")
    return make(nn).init(jax.random.key(0), *inputs)["params"]


def nnx_state(make):
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    return nnx.state(make(nnx, nnx.Rngs(0)), nnx.Param)


def haiku(forward, *inputs):
    hk = pytest.importorskip("haiku", reason="Haiku is not installed")
    transformed = hk.transform(lambda *x: forward(hk, *x))
    return transformed.init(jax.random.key(0), *inputs)


def linen_transformer():
    def make(nn):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.LayerNorm()(x))
                h = nn.gelu(nn.Dense(12, name="wi")(nn.LayerNorm()(x)))
                return x + nn.Dense(6, name="wo")(h)

        class Model(nn.Module):
            @nn.compact
            def __call__(self, tokens):
                x = nn.Embed(7, 6, name="tokens")(tokens)
                x = Block(name="posterior")(Block(name="normalizer")(x))
                return nn.Dense(7, use_bias=False, name="embed_head")(x)

        return Model()

    attention = "MultiHeadDotProductAttention_0"
    expected = {"embed_head/kernel": "io"}
    for block in ("normalizer", "posterior"):
        expected |= {f"{block}/{attention}/{x}/kernel": "ioo" for x in ("query", "key", "value")}
        expected |= {f"{block}/{attention}/out/kernel": "iio"}
        expected |= {f"{block}/{x}/kernel": "io" for x in ("wi", "wo")}
    return linen(make, jnp.zeros((1, 3), int)), expected


def linen_convolutions():
    def make(nn):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Conv(4, (3, 3), use_bias=False)(x)
                x = nn.BatchNorm(use_running_average=False)(x)
                x = nn.ConvTranspose(6, (2, 2), name="up")(x)
                x = nn.ConvTranspose(5, (2, 2), transpose_kernel=True, name="out")(x)
                return nn.ConvLocal(2, (2, 2))(x)

        return Model()

    return linen(make, jnp.ones((1, 4, 4, 3))), {
        "Conv_0/kernel": "kkio",
        "up/kernel": "kkio",
        "out/kernel": "kkoi",
        "ConvLocal_0/kernel": "ssio",
    }


def linen_convolutions_named_as_attention():
    def make(nn):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                q, k, v = (nn.Conv(5, (3,), name=name)(x) for name in ("query", "key", "value"))
                return nn.Conv(2, (3,), name="out")(q + k + v)

        return Model()

    names = ("query", "key", "value", "out")
    return linen(make, jnp.ones((1, 8, 4))), {f"{name}/kernel": "kio" for name in names}


def linen_dense_general():
    def make(nn):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.DenseGeneral((2, 4), name="split")(x)
                return nn.DenseGeneral(5, axis=(-2, -1), name="join")(x)

        return Model()

    return linen(make, jnp.ones((1, 6))), {"split/kernel": "ioo", "join/kernel": "iio"}


def linen_scan():
    def make(nn):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = nn.LayerNorm()(nn.Dense(4)(x))
                return nn.MultiHeadDotProductAttention(2)(x), None

        return nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()

    attention = "MultiHeadDotProductAttention_0"
    expected = {f"{attention}/{x}/kernel": "sioo" for x in ("query", "key", "value")}
    expected |= {f"{attention}/out/kernel": "siio", "Dense_0/kernel": "sio"}
    return linen(make, jnp.ones((1, 2, 4)), None), expected


def linen_experts():
    def make(nn):
        class Expert(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(6)(nn.relu(nn.Dense(9)(x)))

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                gates = nn.softmax(nn.Dense(4, use_bias=False, name="router")(x))
                experts = nn.vmap(
                    Expert,
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    in_axes=None,
                    out_axes=-1,
                    axis_size=4,
                )
                return (experts(name="experts")(x) * gates[..., None, :]).sum(-1)

        return Model()

    return linen(make, jnp.ones((1, 6))), {
        "router/kernel": "io",
        "experts/Dense_0/kernel": "sio",
        "experts/Dense_1/kernel": "sio",
    }


def linen_recurrent():
    def make(nn):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(2)(nn.RNN(nn.GRUCell(4))(nn.RNN(nn.OptimizedLSTMCell(5))(x)))

        return Model()

    params = linen(make, jnp.ones((1, 3, 2), jnp.float32))
    expected = {n: "io" for n in leaves_of(params) if n.endswith("kernel")}
    assert len(expected) == 8 + 6 + 1
    return params, expected


def nnx_mixed():
    def make(nnx, rngs):
        class Model(nnx.Module):
            def __init__(self):
                self.convs = nnx.List([nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)])
                self.query = nnx.Conv(3, 5, (3,), rngs=rngs)
                self.attend = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
                self.up = nnx.ConvTranspose(3, 4, (2, 2), transpose_kernel=True, rngs=rngs)
                self.embed = nnx.Embed(5, 8, rngs=rngs)
                self.norm = nnx.LayerNorm(8, rngs=rngs)
                self.prior = nnx.LinearGeneral(3, (2, 4), rngs=rngs)

        return Model()

    expected = {f"attend/{x}/kernel": "ioo" for x in ("query", "key", "value")}
    expected |= {"attend/out/kernel": "iio", "prior/kernel": "ioo"}
    expected |= {"convs/0/kernel": "kkio", "query/kernel": "kio", "up/kernel": "kkoi"}
    return nnx_state(make), expected


def nnx_modules():
    """A tree that holds its modules tells groups and axes that a state does not."""
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    rngs = nnx.Rngs(0)

    class Up(nnx.ConvTranspose):
        pass

    class Model(nnx.Module):
        def __init__(self):
            self.up = Up(3, 3, (2, 2), transpose_kernel=True, rngs=rngs)
            self.join = nnx.LinearGeneral((4, 2), 5, axis=(-2, -1), use_bias=False, rngs=rngs)
            self.one = nnx.Conv(4, 4, (3,), use_bias=False, rngs=rngs)
            self.embed = nnx.Embed(5, 3, rngs=rngs)

    expected = {"up/kernel": "kkoi", "join/kernel": "iio", "one/kernel": "kio"}
    return Model(), expected


def nnx_lora():
    def make(nnx, rngs):
        class Model(nnx.Module):
            def __init__(self):
                self.adapted = nnx.LoRALinear(6, 5, lora_rank=2, rngs=rngs)
                self.cell = nnx.OptimizedLSTMCell(5, 4, rngs=rngs)

        return Model()

    names = ("adapted/kernel", "adapted/lora/lora_a", "adapted/lora/lora_b")
    params, expected = nnx_state(make), dict.fromkeys(names, "io")
    expected |= dict.fromkeys(("cell/dense_i/kernel", "cell/dense_h/kernel"), "io")
    values = iter(jax.random.split(jax.random.key(1), 20))  # lora_b begins at zero
    return jax.tree.map(lambda x: jax.random.normal(next(values), x.shape), params), expected


def equinox_modules():
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")

    class Convolution(eqx.nn.Conv2d):
        pass

    class Dense(eqx.nn.Linear):
        pass

    keys = iter(jax.random.split(jax.random.key(0), 16))
    model = {
        "norm": Convolution(3, 5, 3, key=next(keys)),
        "embedding": Dense(4, 6, key=next(keys)),
        "up": eqx.nn.ConvTranspose2d(3, 5, 2, key=next(keys)),
        "b": eqx.nn.MLP(4, 3, 5, 1, key=next(keys)),
        "cell": eqx.nn.LSTMCell(3, 4, key=next(keys)),
        "attend": eqx.nn.MultiheadAttention(2, 8, key=next(keys)),
        "tokens": eqx.nn.Embedding(7, 3, key=next(keys)),
        "layers": eqx.nn.LayerNorm((3, 4)),
        "slopes": eqx.nn.PReLU(jnp.ones((3, 4))),
        "stack": eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 5, key=key))(
            jax.random.split(next(keys), 3)
        ),
        "convs": eqx.filter_vmap(lambda key: eqx.nn.Conv1d(4, 5, 3, key=key))(
            jax.random.split(next(keys), 2)
        ),
    }
    expected = {f"attend/{x}_proj/weight": "oi" for x in ("query", "key", "value", "output")}
    expected |= {"norm/weight": "oikk", "up/weight": "oikk", "embedding/weight": "oi"}
    expected |= {"cell/weight_ih": "oi", "cell/weight_hh": "oi", "stack/weight": "soi"}
    expected |= {"b/layers/0/weight": "oi", "b/layers/1/weight": "oi", "convs/weight": "soik"}
    return eqx.filter(model, eqx.is_inexact_array), expected


def haiku_transformer():
    def forward(hk, x):
        init = hk.initializers.RandomNormal()
        x = x + hk.MultiHeadAttention(2, 4, w_init=init, model_size=6)(x, x, x)
        x = hk.LayerNorm(-1, True, True)(x)
        x = hk.nets.MLP([9, 6], name="norm_mlp")(x)
        return x + hk.Embed(5, 6)(jnp.zeros((1,), int))

    attention = [f"multi_head_attention/{x}/w" for x in ("query", "key", "value", "linear")]
    names = [*attention, "norm_mlp/~/linear_0/w", "norm_mlp/~/linear_1/w"]
    return haiku(forward, jnp.ones((1, 3, 6))), dict.fromkeys(names, "io")


def haiku_convolutions():
    def forward(hk, x):
        x = hk.Conv2D(4, 3)(x)
        x = hk.Conv2DTranspose(6, 2, name="decoder")(x)
        x = hk.Conv2DTranspose(6, 2, name="conv_transpose")(x)
        return hk.Conv2D(2, 3, data_format="NCHW", name="first")(x)

    return haiku(forward, jnp.ones((1, 4, 4, 3))), {
        "conv2_d/w": "kkio",
        "decoder/w": "kkoi",
        "conv_transpose/w": "kkoi",
        "first/w": "kkio",
    }


def haiku_recurrent():
    def forward(hk, x):
        x, _ = hk.LSTM(5)(x, hk.LSTM(5).initial_state(1))
        x, _ = hk.GRU(4)(x, hk.GRU(4).initial_state(1))
        return hk.Linear(2, name="positions")(x)

    names = ("lstm/linear/w", "gru/w_i", "gru/w_h", "positions/w")
    return haiku(forward, jnp.ones((1, 3))), dict.fromkeys(names, "io")


QUICK = [linen_dense_general]
SLOW = [
    linen_convolutions_named_as_attention,
    nnx_mixed,
    linen_transformer,
    linen_convolutions,
    linen_scan,
    linen_experts,
    linen_recurrent,
    nnx_lora,
    nnx_modules,
    equinox_modules,
    haiku_transformer,
    haiku_convolutions,
    haiku_recurrent,
]


@pytest.mark.parametrize(
    "make", [*QUICK, *(pytest.param(make, marks=pytest.mark.thorough) for make in SLOW)]
)
def test_the_weights_of_a_model_and_their_norms(make):
    params, expected = make()
    tx = spectral_jax.add_spectral_norm_regularization(0.1, n_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sc.SpectralWarning)
        state = tx.init(params)
    assert state.v.keys() == expected.keys()
    if make is not nnx_modules:
        _, state = run(tx, params, steps=1)
    else:
        _, state = tx.update(params, state, params)
    leaves = leaves_of(params)
    for name, sigma in spectral_jax.sigmas(state).items():
        norms = svd_norms(leaves[name], expected[name])
        np.testing.assert_allclose(sigma, norms, rtol=1e-3, err_msg=name)
