"""The weights of each library's parameter trees, and their layouts."""

import re
import warnings

import numpy as np
import pytest

import spectral_core as sc

jax = pytest.importorskip("jax", reason="JAX is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
import jax.numpy as jnp  # noqa: E402

import spectral_jax  # noqa: E402
from jax_params import params_of, run  # noqa: E402
from spectral_jax import add_spectral_norm_regularization  # noqa: E402
from spectral_jax import constrain_spectral_norm as constrain  # noqa: E402


def test_a_tree_without_weights_is_refused_and_an_empty_one_is_not():
    with pytest.raises(sc.NamesError, match=r"nothing to regularize.*'norm/scale: a scale'"):
        add_spectral_norm_regularization(factor=0.1).init({"norm": {"scale": jnp.ones((3, 3))}})
    nothing = optax.masked(
        add_spectral_norm_regularization(factor=0.1), {"conv": False, "dense": False}
    )
    updates, state = run(nothing, params_of())
    assert not updates["dense"]["kernel"].any()
    assert spectral_jax.sigmas(state) == {}


def test_a_name_for_two_leaves_is_refused():
    params = {"a/b": jnp.ones((3, 2)), "a": {"b": jnp.ones((4, 3))}}
    with pytest.raises(sc.NamesError, match=r"several leaves have the path \['a/b'\]"):
        add_spectral_norm_regularization(factor=0.1).init(params)


def test_layouts_by_pattern_reach_scanned_and_left_out_leaves():
    params = {
        "blocks": {
            "kernel": jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 5)), "float32")
        }
    }
    params["embed"] = {"embedding": jnp.ones((7, 3))}
    tx = add_spectral_norm_regularization(factor=0.1, layouts={"blocks/*": "sio", "embed/*": "io"})
    _, state = run(tx, params, steps=100)
    exact = np.linalg.svd(np.asarray(params["blocks"]["kernel"]), compute_uv=False)[:, 0]
    np.testing.assert_allclose(spectral_jax.sigmas(state)["blocks/kernel"], exact, rtol=1e-4)
    assert "embed/embedding" in spectral_jax.sigmas(state)
    with pytest.raises(sc.NamesError, match="'block/\\*' matches none"):
        add_spectral_norm_regularization(factor=0.1, layouts={"block/*": "sio"}).init(params)


def test_hand_written_trees():
    params = [(jnp.ones((4, 3)), jnp.zeros(3)), (jnp.ones((3, 2)), jnp.zeros(2))]
    _, state = run(add_spectral_norm_regularization(factor=0.1), params)
    assert sorted(spectral_jax.sigmas(state)) == ["0/0", "1/0"]
    named = {
        "W1": jnp.ones((4, 3)),
        "b1": jnp.zeros(3),
        "pos_embedding": jnp.ones((9, 4)),
        "layer": {"W": jnp.ones((3, 2)), "bias": jnp.ones((1, 2)), "b": jnp.ones((1, 2))},
        "b": [jnp.ones((2, 2))],  # a branch, not a bias
    }
    with pytest.warns(sc.SpectralWarning, match=r"b/0 \(2, 2\) as io.*left out: \['pos_embedding"):
        _, state = run(add_spectral_norm_regularization(factor=0.1), named)
    assert sorted(spectral_jax.sigmas(state)) == ["W1", "b/0", "layer/W"]


def matrices(state):
    return {name: v.shape for name, v in state.v.items()}


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (2, 5), rngs=rngs)
            self.attend = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.embed = nnx.Embed(5, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(8, 6, rngs=rngs)])

    model = Model(nnx.Rngs(0))
    expected = {
        "conv/kernel": (1, 30),
        "attend/key/kernel": (1, 8),
        "attend/query/kernel": (1, 8),
        "attend/value/kernel": (1, 8),
        "attend/out/kernel": (1, 8),
        "layers/0/kernel": (1, 8),
    }
    tx = add_spectral_norm_regularization(factor=0.01)
    assert matrices(tx.init(nnx.state(model, nnx.Param))) == expected


def test_flax_nnx_optimizer_lowers_sigma():
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    tx = optax.chain(add_spectral_norm_regularization(factor=0.01), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = np.asarray(model.kernel[...])

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: 0.0 * jnp.sum(m(jnp.ones((1, 8)))))(model)
        optimizer.update(model, grads)

    for _ in range(60):
        step(model, optimizer)
    after = np.asarray(model.kernel[...])
    assert np.linalg.norm(after, 2) < np.linalg.norm(before, 2)
    sigma = spectral_jax.sigmas(optimizer.opt_state)["kernel"]
    assert float(jnp.asarray(sigma)) == pytest.approx(float(np.linalg.norm(after, 2)), rel=0.01)


@pytest.mark.thorough
def test_flax_linen():
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3))(x)
            x = nn.ConvTranspose(6, (2, 2))(x)
            x = nn.LayerNorm()(x).reshape(x.shape[0], -1)
            x = nn.RNN(nn.LSTMCell(5))(x[:, None, :])
            return nn.Dense(2)(x)

    params = Model().init(jax.random.key(0), jnp.ones((1, 4, 4, 3), jnp.float32))["params"]
    _, state = run(add_spectral_norm_regularization(factor=0.1), params)
    shapes = matrices(state)
    assert shapes["Conv_0/kernel"] == (1, 27)
    assert shapes["ConvTranspose_0/kernel"] == (1, 16)
    assert shapes["Dense_0/kernel"] == (1, 5)
    assert len([name for name in shapes if "LSTM" in name]) == 8
    assert all(name.endswith("kernel") for name in shapes)


def test_flax_scan():
    nn = pytest.importorskip("flax.linen", reason="Flax is not installed")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(4)(x), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    params = stack.init(jax.random.key(0), jnp.ones((1, 4)), None)["params"]
    tx = add_spectral_norm_regularization(factor=0.1, layouts={"Dense_0/kernel": "sio"})
    updates, state = run(tx, params, steps=200)
    exact = np.linalg.svd(np.asarray(params["Dense_0"]["kernel"]), compute_uv=False)[:, 0]
    np.testing.assert_allclose(spectral_jax.sigmas(state)["Dense_0/kernel"], exact, rtol=1e-4)
    lengths = np.linalg.norm(np.asarray(updates["Dense_0"]["kernel"]), axis=(1, 2))
    np.testing.assert_allclose(lengths, 0.1 * exact, rtol=1e-4)


@pytest.mark.thorough
def test_equinox():
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")
    keys = iter(jax.random.split(jax.random.key(0), 8))
    model = {
        "mlp": eqx.nn.MLP(3, 2, 4, 1, key=next(keys)),
        "conv": eqx.nn.Conv2d(4, 6, 3, groups=2, key=next(keys)),
        "up": eqx.nn.ConvTranspose1d(4, 6, 3, key=next(keys)),
        "cell": eqx.nn.GRUCell(3, 5, key=next(keys)),
        "embed": eqx.nn.Embedding(7, 3, key=next(keys)),
        "norm": eqx.nn.LayerNorm((3, 4)),
        "attend": eqx.nn.MultiheadAttention(2, 8, key=next(keys)),
    }
    params = eqx.filter(model, eqx.is_inexact_array)
    _, state = run(add_spectral_norm_regularization(factor=0.1), params)
    assert matrices(state) == {
        "mlp/layers/0/weight": (1, 3),
        "mlp/layers/1/weight": (1, 4),
        "conv/weight": (2, 1, 18),
        "up/weight": (1, 12),
        "cell/weight_ih": (1, 3),
        "cell/weight_hh": (1, 5),
        "attend/query_proj/weight": (1, 8),
        "attend/key_proj/weight": (1, 8),
        "attend/value_proj/weight": (1, 8),
        "attend/output_proj/weight": (1, 8),
    }


@pytest.mark.thorough
def test_haiku():
    hk = pytest.importorskip("haiku", reason="Haiku is not installed")

    def forward(x):
        x = hk.Conv2D(4, 3)(x)
        x = hk.Conv2DTranspose(6, 2)(x)
        return hk.Linear(2)(x.reshape(x.shape[0], -1))

    params = hk.transform(forward).init(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
    _, state = run(add_spectral_norm_regularization(factor=0.1), params)
    assert matrices(state) == {
        "conv2_d/w": (1, 27),
        "conv2_d_transpose/w": (1, 16),
        "linear/w": (1, 96),
    }


def chosen(params, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", sc.SpectralWarning)
        state = add_spectral_norm_regularization(0.1, **options).init(params)
    return set(spectral_jax.sigmas(state)), [str(one.message) for one in said]


def ones(**shapes):
    return {name: jnp.ones(shape) for name, shape in shapes.items()}


def test_matrices_of_any_name_are_taken_and_a_guess_is_said_once():
    params = {
        "ssm": ones(A=(3, 3), B=(3, 2), b=(2, 3)),
        "vae": ones(posterior=(3, 4), prior=(4, 3), normal_flow=(4, 4), embedder_out=(4, 2)),
        "proposal": ones(w=(3, 3), bias=(3,)),
    }
    names, said = chosen(params)
    assert len(names) == 8
    assert len(said) == 1
    for part in ("ssm/A (3, 3) as io", "vae/posterior", 'layouts={"ssm/A": "io"}', 'exclude=["ssm'):
        assert part in said[0]
    assert "proposal/w" not in said[0]
    every = dict.fromkeys(("ssm/*", "vae/*"), "io")
    assert chosen(params, layouts=every) == (names, [])
    assert chosen(params, exclude=["ssm", "vae"]) == ({"proposal/w"}, [])


def test_a_name_that_leaves_a_matrix_out_is_told():
    params = {
        "wte": jnp.ones((5, 3)),
        "layer_norm": ones(gain=(3, 3)),
        "token_embedding": {"weight": jnp.ones((5, 3))},
        "embedding": {"kernel": jnp.ones((3, 3))},  # a layer of this name
    }
    names, said = chosen(params)
    assert names == {"embedding/kernel"}
    for part in (
        "wte: an embedding, by its name",
        "layer_norm/gain: a norm",
        "token_embedding/wei",
    ):
        assert part in said[0]
    assert 'layouts={"layer_norm/gain": "io"}' in said[0]
    names, said = chosen(params, layouts={"wte": "io", "layer_norm/gain": "io"}, exclude="weight")
    assert names == {"embedding/kernel", "wte", "layer_norm/gain"}
    assert said == []


def test_biases_with_two_axes():
    params = {
        "row": ones(W=(3, 2), b=(1, 2)),
        "stack": ones(w=(3, 4, 2), b=(3, 2)),
        "matrix": ones(W=(3, 2), b=(4, 5)),
        "heads": ones(kernel=(6, 2, 4), bias=(2, 4)),
    }
    names, said = chosen(params)
    assert names == {"row/W", "stack/w", "matrix/W", "matrix/b", "heads/kernel"}
    assert "matrix/b" in said[0]


@pytest.mark.parametrize(
    "leaf",
    [
        {"experts": {"w1": (4, 3, 2)}},
        {"stem": {"kernel": (3, 4, 5)}},
        {"layer": {"kernel": (4, 4, 5), "bias": (4, 5)}},  # a stack, or two axes of outputs
        {"depthwise_conv": {"kernel": (3, 3, 1, 4), "bias": (4,)}},
    ],
)
def test_a_tensor_of_unknown_axes_is_refused_with_the_line_to_write(leaf):
    params = jax.tree.map(jnp.ones, leaf, is_leaf=lambda x: isinstance(x, tuple))
    params["head"] = {"kernel": jnp.ones((3, 2))}
    ((place, leaves),) = leaf.items()
    name = f"{place}/{next(iter(leaves))}"
    with pytest.raises(sc.NamesError, match=rf'layouts={{"{name}": ".*exclude=\["{name}"\]'):
        add_spectral_norm_regularization(0.1).init(params)
    assert chosen(params, exclude=name) == ({"head/kernel"}, [])
    axes = "sio" if len(leaves[next(iter(leaves))]) == 3 else "sskio"[-4:]
    assert chosen(params, layouts={name: axes}) == ({"head/kernel", name}, [])


@pytest.mark.parametrize("make", [add_spectral_norm_regularization, constrain])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "encoder"}, {"encoder/0/query/kernel", "encoder/1/key/kernel"}),
        ({"include": "query"}, {"encoder/0/query/kernel"}),
        ({"include": ["*/key/*", re.compile("^head")]}, {"encoder/1/key/kernel", "head/kernel"}),
        ({"include": lambda name, w: w.shape[0] == 7}, {"tokens/embedding"}),
        ({"exclude": "encoder/0"}, {"encoder/1/key/kernel", "head/kernel"}),
        ({"include": "encoder", "exclude": re.compile("query")}, {"encoder/1/key/kernel"}),
        ({"layouts": {"tokens": "io"}, "exclude": "encoder"}, {"tokens/embedding", "head/kernel"}),
    ],
)
def test_include_and_exclude(make, options, expected):
    params = {
        "encoder": [{"query": ones(kernel=(3, 3))}, {"key": ones(kernel=(3, 3))}],
        "head": ones(kernel=(3, 2), bias=(2,)),
        "tokens": ones(embedding=(7, 3)),
    }
    tx = make(0.1, **options)
    state = tx.init(params)
    assert set(spectral_jax.sigmas(state)) == expected
    _, state = tx.update(params, state, params)
    assert set(spectral_jax.sigmas(state)) == expected


def test_choices_that_cannot_be():
    params = {"head": ones(kernel=(3, 2))}
    with pytest.raises(sc.NamesError, match="did you mean 'head'"):
        add_spectral_norm_regularization(0.1, include="haed").init(params)
    with pytest.raises(sc.NamesError, match="dict is a class, but params hold no modules"):
        add_spectral_norm_regularization(0.1, exclude=[dict]).init(params)
    with pytest.raises(sc.ArgumentError, match="mask, or include and exclude"):
        add_spectral_norm_regularization(0.1, mask=params, include="head")


def test_classes_of_layers_in_a_tree_with_modules():
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed")

    class Low(eqx.Module):
        base: eqx.nn.Linear
        A: jax.Array
        B: jax.Array
        pos_embedding: jax.Array

    class Mine(eqx.nn.Linear):
        pass

    key = jax.random.key(0)
    low = Low(Mine(4, 6, key=key), *(jnp.ones(shape) for shape in ((2, 4), (6, 2), (9, 4))))
    params = eqx.filter({"low": low, "norm": eqx.nn.Linear(4, 4, key=key)}, eqx.is_array)
    names, said = chosen(params)
    assert names == {"low/base/weight", "low/A", "low/B", "norm/weight"}
    assert "low/A (2, 4) as oi" in said[0]
    assert "low/pos_embedding: an embedding, by its name" in said[0]
    assert chosen(params, include=Mine) == ({"low/base/weight"}, [])
    assert chosen(params, exclude=[Low]) == ({"low/base/weight", "norm/weight"}, [])
    assert chosen(params, include=eqx.nn.Linear, layouts={Mine: "io"})[0] == {
        "low/base/weight",
        "norm/weight",
    }
    stack = eqx.tree_at(lambda m: m.A, low, jnp.ones((2, 3, 4)))
    with pytest.raises(sc.NamesError, match=r'layouts={"A": "sio"}'):
        add_spectral_norm_regularization(0.1).init(eqx.filter(stack, eqx.is_array))
    wrapped = eqx.nn.SpectralNorm(eqx.nn.Linear(4, 4, key=key), "weight", key=key)
    params = eqx.filter(wrapped, eqx.is_inexact_array)
    with pytest.raises(sc.NamesError, match=r"nothing to regularize.*SpectralNorm"):
        add_spectral_norm_regularization(0.1).init(params)


def test_a_mask_still_tells_an_attention_by_its_neighbors():
    params = {"key": ones(kernel=(6, 2, 4), bias=(2, 4)), "up": ones(w=(2, 2, 3, 5), b=(3,))}
    tx = add_spectral_norm_regularization(0.1, mask=jax.tree.map(lambda x: x.ndim > 2, params))
    assert {name: v.shape for name, v in tx.init(params).inner_state.v.items()} == {
        "key/kernel": (1, 6),
        "up/w": (1, 20),
    }


def test_leaves_that_are_no_weights():
    from jax.experimental import sparse

    params = {
        "ids": {"w": jnp.ones((3, 3), int)},
        "keys": jax.random.split(jax.random.key(0), (2, 2)),
        "activation": jax.nn.relu,
        "cls": jnp.ones((1, 1, 5)),
        "head": ones(kernel=(3, 2)),
    }
    assert chosen(params) == ({"head/kernel"}, [])
    with pytest.raises(sc.DTypeError, match=r"'ids/w'.*int"):
        add_spectral_norm_regularization(0.1, include="ids").init(params)
    with pytest.raises(sc.DTypeError, match="the mask marks 'activation'"):
        add_spectral_norm_regularization(0.1, mask=lambda p: jax.tree.map(lambda _: True, p)).init(
            {"activation": jax.nn.relu, "head": params["head"]}
        )
    params["sparse"] = {"w": sparse.BCOO.fromdense(jnp.eye(3))}
    with pytest.raises(sc.DTypeError, match=r"'sparse/w' .*BCOO.*exclude=\[\"sparse/w\"\]"):
        add_spectral_norm_regularization(0.1).init(params)
    assert chosen(params, exclude="sparse/w") == ({"head/kernel"}, [])
