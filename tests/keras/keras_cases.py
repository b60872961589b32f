"""Cases that `test_optimizer.py` runs for each backend of Keras, each in its own process."""

import doctest
import io
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest
from keras import layers as kl

import spectral_core as sc
from backends import svd_norm
from spectral_keras import Layout, SpectralNormRegularizer

TORCH = keras.backend.backend() == "torch"
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((24, 5)), RNG.standard_normal((24, 3))
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)]


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    keras.utils.clear_session(free_memory=False)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(0)


def perceptron():
    return keras.Sequential(
        [keras.Input((5,)), kl.Dense(7, "tanh", name="hidden"), kl.Dense(3, name="out")], name="net"
    )


def sgd(**options):
    return keras.optimizers.SGD(0.125, momentum=0.9, **options)  # a float32 in Keras


def compiled(model, inner=None, around=lambda optimizer: optimizer, **options):
    model.compile(
        around(SpectralNormRegularizer(inner or sgd(), model, **{"factor": 0.3, **options})),
        loss="mse",
    )
    return model


def fit(model, epochs=1, **options):
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **options)


def values(variables):
    return [keras.ops.convert_to_numpy(variable.value) for variable in variables]


def apply(optimizer, grads):
    """In one compilation on JAX, where each operation would take one of its own."""
    if TORCH:
        optimizer.apply([keras.ops.convert_to_tensor(grad) for grad in grads])
        return
    import jax

    variables, weights = optimizer.variables, optimizer._trainable_variables
    step = jax.jit(optimizer.stateless_apply)
    weights_after, after = step(values(variables), grads, values(weights))
    for variable, value in zip([*weights, *variables], [*weights_after, *after], strict=True):
        variable.assign(value)


def assert_close(found, expected, tolerance=1e-6):  # Keras multiplies float64 in float32
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def mse_gradients(weights, x, y):
    W1, b1, W2, b2 = weights
    h = np.tanh(x @ W1 + b1)
    d = 2 * (h @ W2 + b2 - y) / y.size
    e = d @ W2.T * (1 - h**2)
    return [x.T @ e, e.sum(0), h.T @ d, d.sum(0)]


def by_hand(
    weights, epochs=1, *, factor, lr=0.125, n_iter=1, every=1, clipnorm=None, ema=None, **penalty
):
    """SGD with momentum, in NumPy: the weights, and the σ of the last step."""
    weights = [w.copy() for w in weights]
    names = {"net/hidden/kernel": 0, "net/out/kernel": 2}
    momenta, sums = [np.zeros_like(w) for w in weights], [0] * 4
    averages, averaged = [w * 0 for w in weights], 0
    state = sc.init({name: weights[i] for name, i in names.items()}, layouts="io")
    for step, (x, y) in enumerate(BATCHES * epochs):
        grads = mse_gradients(weights, x, y)
        terms, state = sc.add_gradient(
            {name: weights[i] for name, i in names.items()},
            {name: grads[i] for name, i in names.items()},
            state,
            factor=factor(step) if callable(factor) else factor,
            n_iter=n_iter,
            **penalty,
        )
        for name, i in names.items():
            grads[i] = terms[name]
        sums = [s + g / every for s, g in zip(sums, grads, strict=True)]
        if (step + 1) % every == 0:
            for i, grad in enumerate(sums):
                if clipnorm:
                    grad = grad * min(1, clipnorm / np.linalg.norm(grad))
                momenta[i] = 0.9 * momenta[i] - lr * grad
                weights[i] = weights[i] + momenta[i]
            sums = [0] * 4
        if ema:
            keep = ema if averaged else 0
            averages = [keep * a + (1 - keep) * w for a, w in zip(averages, weights, strict=True)]
            averaged += 1
    return averages if ema else weights, state.sigma


def ramp():
    return keras.optimizers.schedules.PolynomialDecay(0.0, 4, end_learning_rate=0.75)


MAPPING = {"net/out/*": 0.1, "*": 0.4}
CASES = {
    "plain": ({}, {}, {"factor": 0.3}),
    "factors by path, two iterations": (
        {},
        {"factor": MAPPING, "n_iter": 2},
        {"factor": MAPPING, "n_iter": 2},
    ),
    "a schedule": ({}, {"factor": ramp}, {"factor": lambda step: 0.75 * min(step, 4) / 4}),
    "a hinge": ({}, {"target": 0.9}, {"factor": 0.3, "target": 0.9}),
    "a penalty in σ": ({}, {"power": 1}, {"factor": 0.3, "power": 1}),
    "a scaled loss": ({"loss_scale_factor": 8.0}, {}, {"factor": 0.3}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {}, {"factor": 0.3, "every": 2}),
    "clipped": ({"clipnorm": 0.5}, {}, {"factor": 0.3, "clipnorm": 0.5}),
    "averaged": ({"use_ema": True, "ema_momentum": 0.7}, {}, {"factor": 0.3, "ema": 0.7}),
}


@pytest.mark.parametrize("case", CASES)
def test_fit_equals_a_loop_by_hand(case):
    inner, options, hand = CASES[case]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    model = perceptron()
    expected, sigma = by_hand(values(model.weights), epochs=2, **hand)
    fit(compiled(model, sgd(**inner), **options), epochs=2)
    assert_close(values(model.weights), expected)
    found = model.optimizer.sigmas()
    assert_close(found.values(), [sigma[name] for name in found])
    assert int(model.optimizer.iterations) == 6 // hand.get("every", 1)


def test_the_learning_rate_is_the_inner_one_s():
    model = perceptron()
    halves, _ = by_hand(values(model.weights), lr=0.0625, factor=0.3)
    inner = sgd()
    compiled(model, inner)
    fit(model, callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch: 0.0625)])
    assert_close(values(model.weights), halves)
    model.optimizer.learning_rate = 0.25
    assert float(inner.learning_rate) == 0.25


def test_evaluation_counts_no_term():
    model = compiled(perceptron())
    fit(model)
    plain = np.mean((model.predict(X, verbose=0) - Y) ** 2)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(plain)


# Mixed precision


def test_a_loss_scale_around_it_changes_nothing_but_skipped_steps():
    model = perceptron()
    expected, _ = by_hand(values(model.weights), factor=0.3)
    inner = sgd(loss_scale_factor=8.0)  # which the one around takes over
    compiled(model, inner, lambda o: keras.optimizers.LossScaleOptimizer(o, initial_scale=64.0))
    fit(model)
    assert_close(values(model.weights), expected)
    before = values(model.optimizer.variables)
    apply(model.optimizer, [value * np.inf for value in values(model.trainable_variables)])
    after = {v.path: value for v, value in zip(model.optimizer.variables, before, strict=True)}
    changed = [v.path for v in model.optimizer.variables if (values([v])[0] != after[v.path]).any()]
    assert [path.split("/")[-1] for path in changed] == ["step_counter", "dynamic_scale"]
    assert_close(values(model.weights), expected)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_policies(policy):
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)
    model = perceptron()
    expected, sigma = by_hand([w.astype("float64") for w in values(model.weights)], factor=0.3)
    compiled(model)
    scaled = policy == "mixed_float16"
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == scaled
    optimizer = model.optimizer.inner_optimizer if scaled else model.optimizer
    fit(model)
    assert_close(values(model.weights), expected, 0.03)
    for name, value in optimizer.sigmas().items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, sigma[name], rtol=0.03)


# Saving


class Unnamed(keras.Model):
    """Its layers get other names in each copy that a process makes."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first, self.hidden, self.last = kl.Dense(6), kl.Dense(6), kl.Dense(3)

    def call(self, x):
        return self.last(self.hidden(self.first(x)))


def unnamed():
    model = Unnamed()
    model(X[:1])
    return model


@pytest.mark.parametrize("make", [perceptron, unnamed])
@pytest.mark.parametrize("inner", [sgd, keras.optimizers.AdamW])
def test_a_saved_model_goes_on_bit_for_bit(make, inner, tmp_path):
    model = make()
    name = model.layers[0].name  # of three alike, one is left out
    options = {"factor": {"*": ramp()}, "n_vectors": 2, "exclude": f"*{name}/kernel"}
    fit(compiled(model, inner(), **options), epochs=2)
    model.save(tmp_path / "model.keras")
    fit(model, epochs=3)
    kept = {"Unnamed": Unnamed}
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects=kept)
    assert int(loaded.optimizer.iterations) == 6
    fit(loaded, epochs=3)
    assert_equal(values(loaded.weights), values(model.weights))
    assert_equal(values(loaded.optimizer.variables), values(model.optimizer.variables))
    assert loaded.optimizer.sigmas().keys() == model.optimizer.sigmas().keys()


def test_a_model_that_was_not_fitted_yet_is_saved(tmp_path):
    model = compiled(perceptron())
    model.save(tmp_path / "model.keras")
    expected, _ = by_hand(values(model.weights), factor=0.3)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(loaded)
    assert_close(values(loaded.weights), expected)


DATA = Path(__file__).parents[1] / "data"


def test_a_model_that_0_1_0_saved_goes_on():
    """Version 0.1.0 saved v without its axis of vectors, here under the backend PyTorch."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    with zipfile.ZipFile(DATA / "state-0.1.0.keras") as file:
        saved = h5py.File(io.BytesIO(file.read("model.weights.h5")))["optimizer/vars"]
        v = {"net/hidden/kernel": saved["2"][()], "net/out/kernel": saved["3"][()]}
    model = keras.saving.load_model(DATA / "state-0.1.0.keras")
    optimizer = model.optimizer
    weights = {
        path: values([variable])[0] for path, variable in optimizer._weights.variables.items()
    }
    for path, found in optimizer._v.items():
        assert_equal(values([found]), [v[path][None]])
    state = sc.init(weights, layouts="io")
    state = sc.iterate(weights, replace(state, v={path: x[None] for path, x in v.items()}))
    model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
    assert int(optimizer.iterations) == 2
    for path, sigma in optimizer.sigmas().items():
        np.testing.assert_allclose(sigma, state.sigma[path], rtol=1e-5)


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise InterruptedError


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path):
    model = compiled(perceptron())
    start = values(model.weights)
    fit(model, epochs=4)

    def restart(*callbacks):
        keras.utils.clear_session(free_memory=False)
        model = compiled(perceptron())
        model.set_weights(start)
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        fit(model, epochs=4, callbacks=[backup, *callbacks])
        return model

    with pytest.raises(InterruptedError):
        restart(Interrupt())
    assert_equal(values(restart().weights), values(model.weights))


def test_a_config_is_of_its_variables():
    model = compiled(perceptron())
    model.optimizer.build(model.trainable_variables)
    config = model.optimizer.get_config()
    other = SpectralNormRegularizer.from_config(config)
    with pytest.raises(sc.NamesError, match="chosen among 4 variables, but here are"):
        other.build(keras.Sequential([keras.Input((5,)), kl.Dense(7)]).trainable_variables)


# Layers


def test_frozen_layers_are_left_out(tmp_path):
    model = perceptron()
    optimizer = SpectralNormRegularizer(sgd(), model, factor=MAPPING)
    model.get_layer("hidden").trainable = False
    before = values(model.get_layer("hidden").weights)
    model.compile(optimizer, loss="mse")
    fit(model)
    assert list(optimizer.sigmas()) == ["net/out/kernel"]
    assert_equal(values(model.get_layer("hidden").weights), before)
    model.save(tmp_path / "model.keras")
    assert list(keras.saving.load_model(tmp_path / "model.keras").optimizer.sigmas()) == [
        "net/out/kernel"
    ]
    model.get_layer("out").trainable = False
    with pytest.raises(sc.NamesError, match="is among the optimizer's variables"):
        SpectralNormRegularizer(sgd(), model).build(model.trainable_variables)


def plane(W, *rows):
    """The kernel as a matrix whose rows are these axes, and whose columns are the others."""
    W = np.moveaxis(W, rows, range(len(rows)))
    return W.reshape(np.prod(W.shape[: len(rows)]), -1)


def out(W):
    return plane(W, W.ndim - 1)


def each_channel(W):
    """One matrix an input channel, of its outputs and the kernel's places."""
    return np.stack([out(W[..., channel, :]) for channel in range(W.shape[-2])])


def halves(W):
    return np.stack([out(half) for half in np.split(W, 2, axis=-1)])


def heads(W):
    return plane(W, 1, 2)


def each_place(W):
    return np.stack([plane(at, 1) for at in W])


SEQUENCE, IMAGE, VIDEO = (6, 4), (6, 6, 4), (6, 6, 6, 4)
RECURRENT = {"kernel": out, "recurrent_kernel": out}
LAYERS = [
    ("Dense", (5,), SEQUENCE, {"kernel": out}),
    ("EinsumDense", ("abc,cd->abd", (None, 5)), SEQUENCE, {"kernel": out}),
    ("EinsumDense", ("...x,xy->...y", 5), SEQUENCE, {"kernel": out}),
    ("EinsumDense", ("abc,bcd->abd", (6, 5)), SEQUENCE, {"kernel": each_place}),
    ("EinsumDense", ("abc,c->abc", (6, 4)), SEQUENCE, {}),
    ("Conv1D", (6, 3), SEQUENCE, {"kernel": out}),
    ("Conv2D", (6, (2, 3), 1, "valid", "channels_first"), (4, 6, 6), {"kernel": out}),
    ("Conv2D", (6, 3, 1, "valid", None, 1, 2), IMAGE, {"kernel": halves}),
    ("Conv3D", (3, 2), VIDEO, {"kernel": out}),
    ("Conv1DTranspose", (5, 3), SEQUENCE, {"kernel": lambda W: plane(W, 1)}),
    ("Conv2DTranspose", (5, 3), IMAGE, {"kernel": lambda W: plane(W, 2)}),
    ("Conv3DTranspose", (5, 3), VIDEO, {"kernel": lambda W: plane(W, 3)}),
    ("DepthwiseConv1D", (3, 1, "valid", 2), SEQUENCE, {"kernel": each_channel}),
    ("DepthwiseConv2D", (3, 1, "valid", 2), IMAGE, {"kernel": each_channel}),
    ("DepthwiseConv2D", (3,), IMAGE, {"kernel": each_channel}),
    (
        "SeparableConv1D",
        (5, 3),
        SEQUENCE,
        {"depthwise_kernel": each_channel, "pointwise_kernel": out},
    ),
    ("SeparableConv2D", (5, 3), IMAGE, {"depthwise_kernel": each_channel, "pointwise_kernel": out}),
    ("SimpleRNN", (5,), SEQUENCE, RECURRENT),
    ("GRU", (5,), SEQUENCE, RECURRENT),
    ("LSTM", (5,), SEQUENCE, RECURRENT),
    ("ConvLSTM1D", (3, 2), (3, *SEQUENCE), RECURRENT),
    ("BatchNormalization", (), SEQUENCE, {}),
    ("LayerNormalization", ((1, 2),), SEQUENCE, {}),
]


def assert_weights(model, expected):
    """Just these weights are chosen, and each gets the term of the matrices that it is."""
    optimizer = SpectralNormRegularizer(keras.optimizers.SGD(1.0), model, factor=0.5, n_iter=15)
    variables = {variable.path: variable for variable in model.trainable_variables}
    for variable in variables.values():
        variable.assign(variable.value + 1)  # which is of rank one: σ₁ is far from σ₂
    before = {path: values([variable])[0] for path, variable in variables.items()}
    optimizer.build(list(variables.values()))
    apply(optimizer, [0 * value for value in values(variables.values())])
    found = optimizer.sigmas()
    matrices_of = {
        path: next(m for end, m in expected.items() if f"/{path}".endswith(f"/{end}"))
        for path in found
    }
    assert len(found) == len(expected), list(found)
    for path, matrices in matrices_of.items():
        W, moved = matrices(before[path]), matrices(values([variables[path]])[0])
        np.testing.assert_allclose(found[path], svd_norm(W), rtol=1e-10)
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
        term = S[..., :1, None] * U[..., :, :1] * Vt[..., :1, :]
        np.testing.assert_allclose(W - moved, 0.5 * term, atol=1e-6)
    for path in variables.keys() - found.keys():
        assert_equal(values([variables[path]]), [before[path]])


@pytest.mark.parametrize(("kind", "args", "shape", "expected"), LAYERS)
def test_layers(kind, args, shape, expected):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, getattr(kl, kind)(*args)(inputs))
    if expected:
        assert_weights(model, expected)
    else:
        with pytest.raises(sc.NamesError, match="nothing to regularize"):
            SpectralNormRegularizer(sgd(), model)


def test_layers_in_layers():
    tokens = keras.Input((6,), dtype="int32")
    x = kl.Embedding(9, 8, name="embed")(tokens)
    x = kl.MultiHeadAttention(2, 3, name="attend")(x, x)
    x = kl.GroupQueryAttention(3, 4, 2, name="group")(x, x)
    x = kl.TimeDistributed(kl.Dense(8), name="each")(x)
    x = keras.Sequential([kl.Conv1D(8, 3, name="conv")], name="inner")(x)
    model = keras.Model(tokens, kl.Bidirectional(kl.GRU(5), name="both")(x))
    projections = {f"{part}/kernel": heads for part in ("query", "key", "value")}
    projections["attention_output/kernel"] = out
    attention = {
        f"{name}/{part}": m for name in ("attend", "group") for part, m in projections.items()
    }
    gru = [
        f"{way}_gru/gru_cell/{kernel}" for way in ("forward", "backward") for kernel in RECURRENT
    ]
    rest = dict.fromkeys(["each/dense/kernel", "conv/kernel", *gru], out)
    rest["attend/attention_output/kernel"] = rest["group/attention_output/kernel"] = out
    outer = keras.Sequential([model], name="outer")
    outer(np.zeros((1, 6), "int32"))
    assert_weights(outer, {**attention, **rest})


def test_include_exclude_and_layouts():
    model = perceptron()

    def chosen(**options):
        optimizer = SpectralNormRegularizer(sgd(), model, **options)
        optimizer.build(model.trainable_variables)
        return {path: sigma.shape for path, sigma in optimizer.sigmas().items()}

    both = {"net/hidden/kernel": (), "net/out/kernel": ()}
    assert chosen() == both
    assert chosen(include="*/out/*") == {"net/out/kernel": ()}
    assert chosen(include=lambda path, v: v.shape == (5, 7)) == {"net/hidden/kernel": ()}
    assert chosen(exclude=["*/out/kernel"]) == {"net/hidden/kernel": ()}
    groups = {"net/out/*": Layout("i(go)", groups=3)}
    assert chosen(layouts=groups) == {**both, "net/out/kernel": (3,)}
    embedding = keras.Sequential([keras.Input((2,)), kl.Embedding(9, 4), kl.Dense(2)])
    optimizer = SpectralNormRegularizer(sgd(), embedding, layouts={"*/embeddings": "io"})
    optimizer.build(embedding.trainable_variables)
    assert [path.split("/")[-1] for path in optimizer.sigmas()] == ["embeddings", "kernel"]


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"factor": -0.1}, sc.ArgumentError, "factor"),
        ({"factor": {"*/out/kernel": 0.1}}, sc.NamesError, "no entry for .*hidden"),
        ({"factor": {"*/outt/*": 0.1}}, sc.NamesError, "factor: .*matches none"),
        ({"n_iter": 0}, sc.ArgumentError, "n_iter"),
        ({"seed": -1}, sc.ArgumentError, "seed"),
        ({"include": "hiden"}, sc.NamesError, "include: 'hiden' matches none"),
        ({"exclude": "*"}, sc.NamesError, "nothing to regularize"),
        ({"layouts": {"head": "io"}}, sc.NamesError, "layouts: 'head' matches none"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        SpectralNormRegularizer(sgd(), perceptron(), **options)


def test_a_model_that_is_not_built():
    with pytest.raises(sc.NamesError, match="not built"):
        SpectralNormRegularizer(sgd(), keras.Sequential([kl.Dense(3)]))
    optimizer = SpectralNormRegularizer(sgd(), perceptron())
    with pytest.raises(sc.ArgumentError, match="not built yet"):
        optimizer.sigmas()
    with pytest.raises(sc.ArgumentError, match="trainable_variables"):
        optimizer.apply([np.ones((5, 7))])


def test_a_scaled_loss_within_is_refused():
    with pytest.raises(sc.ArgumentError, match="around this one"):
        SpectralNormRegularizer(keras.optimizers.LossScaleOptimizer(sgd()), perceptron())


def test_two_variables_of_one_path():
    a, b = kl.Dense(3, name="same"), kl.Dense(3, name="same")
    model = SimpleNamespace(weights=[])
    for layer in (a, b):
        layer.build((5,))
        model.weights += layer.weights
    with pytest.raises(sc.NamesError, match=r"several variables have the path \['same/kernel'\]"):
        SpectralNormRegularizer(sgd(), model)


# Compilation


def test_a_compiled_step_is_as_an_eager_one():
    outcomes = []
    for how in ("eager", "compiled"):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        model = perceptron()
        optimizer = SpectralNormRegularizer(sgd(), model, factor=0.3)
        optimizer.build(model.trainable_variables)
        grads = [0.1 * np.cos(value) for value in values(model.weights)]
        if TORCH:
            import torch

            grads = [torch.from_numpy(grad) for grad in grads]
            apply = optimizer.apply
            if how == "compiled":
                apply = torch.compile(optimizer.apply, backend="eager")
            for _ in range(3):
                apply(grads)
            outcomes.append(values([*model.weights, *optimizer.variables]))
        else:
            import jax

            traces = []

            def step(*state, optimizer=optimizer, traces=traces):
                traces.append(1)
                return optimizer.stateless_apply(*state)

            apply = jax.jit(step) if how == "compiled" else step
            weights, state = values(model.weights), values(optimizer.variables)
            for _ in range(3):
                weights, state = apply(state, grads, weights)
            assert len(traces) == (1 if how == "compiled" else 3)
            outcomes.append([*weights, *state])
    assert_close(*outcomes)


@pytest.mark.skipif(TORCH, reason="Keras has no steps_per_execution on PyTorch")
def test_several_steps_an_execution():
    model = perceptron()
    expected, _ = by_hand(values(model.weights), epochs=2, factor=0.3)
    optimizer = SpectralNormRegularizer(sgd(), model, factor=0.3)
    model.compile(optimizer, loss="mse", steps_per_execution=3)
    fit(model, epochs=2)
    assert_close(values(model.weights), expected)


# Examples


def test_the_docstring_s():
    assert doctest.testmod(sys.modules[SpectralNormRegularizer.__module__]).failed == 0


def test_digits():
    import with_keras

    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    plain, _ = with_keras.main(epochs=2, factor=0.0)
    sigmas, accuracy = with_keras.main(epochs=2, factor=0.05)
    assert accuracy > 0.8
    assert [path.split("/", 1)[1] for path in sigmas] == [
        f"{layer}/kernel" for layer in ("conv1", "conv2", "out")
    ]
    assert sum(sigmas.values()) < sum(plain.values())


@pytest.mark.skipif(not TORCH, reason="arrays of JAX cannot be written into")
def test_stateless_apply_leaves_its_arguments_alone():
    model = perceptron()
    optimizer = SpectralNormRegularizer(sgd(), model, factor=0.3, layouts={"*kernel": "oi"})
    optimizer.build(model.trainable_variables)
    variables = [variable.value.detach().clone() for variable in optimizer.variables]
    weights = [variable.value.detach().clone() for variable in model.trainable_variables]
    own = {id(x) for x in (*optimizer._v.values(), *optimizer._sigma.values())}
    # Not the others: Keras writes into its momenta.
    places = [i for i, variable in enumerate(optimizer.variables) if id(variable) in own]
    before = [variables[place].clone() for place in places]
    grads = [keras.ops.ones_like(weight) for weight in weights]
    _, after = optimizer.stateless_apply(variables, grads, weights)
    for place, value in zip(places, before, strict=True):
        assert bool((variables[place] == value).all())
    assert any(bool((after[place] != old).any()) for place, old in zip(places, before, strict=True))
