"""Cases that `test_optimizer.py` runs for each backend of Keras, each in its own process."""

import doctest
import io
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers as kl

import spectral_core as sc
import spectral_keras
from backends import svd_norm
from spectral_keras import (
    Layout,
    SpectralNorm,
    SpectralNormBound,
    SpectralNormConstraint,
    SpectralNormLogger,
    SpectralNormRegularizer,
    SpectralWarning,
)

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
        around(
            SpectralNormRegularizer(
                inner or sgd(), model, **{"factor": 0.3, "warmup_iters": 0, **options}
            )
        ),
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
    optimizer = SpectralNormRegularizer(sgd(), model)
    assert optimizer._weights.left_out == {"net/hidden/kernel": "frozen"}
    model.get_layer("out").trainable = False
    with pytest.raises(sc.NamesError, match=r"is among the optimizer's variables.*frozen"):
        optimizer.build(model.trainable_variables)
    with pytest.raises(sc.NamesError, match=r"nothing to regularize.*net/out/kernel: frozen"):
        SpectralNormRegularizer(sgd(), model)


def test_a_layer_that_is_thawed_later_is_told():
    model = perceptron()
    model.get_layer("hidden").trainable = False
    optimizer = SpectralNormRegularizer(sgd(), model)
    model.get_layer("hidden").trainable = True
    with pytest.warns(SpectralWarning, match="net/hidden/kernel.*was frozen"):
        optimizer.build(model.trainable_variables)


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
    optimizer = SpectralNormRegularizer(
        keras.optimizers.SGD(1.0), model, factor=0.5, n_iter=15, warmup_iters=0
    )
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


@pytest.mark.skipif(not TORCH, reason="the choice does not depend on the backend")
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
        ({"layouts": "io"}, sc.ArgumentError, "layouts must be a mapping"),
        ({"factor": "0.1"}, sc.ArgumentError, "factor must be a finite number"),
        ({"factor": [0.1]}, sc.ArgumentError, "factor must be a finite number"),
        ({"target": lambda step: -1.0}, sc.ArgumentError, "target must be a finite number"),
        ({"power": 3}, sc.ArgumentError, "power"),
        ({"every_n_steps": 0}, sc.ArgumentError, "every_n_steps"),
        ({"warmup_iters": -1}, sc.ArgumentError, "warmup_iters"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        SpectralNormRegularizer(sgd(), perceptron(), **options)


def test_a_model_that_is_not_built():
    with pytest.raises(sc.ArgumentError, match=r"'raw' is not built.*model\.build"):
        SpectralNormRegularizer(sgd(), keras.Sequential([kl.Dense(3)], name="raw"))
    optimizer = SpectralNormRegularizer(sgd(), perceptron())
    with pytest.raises(sc.ArgumentError, match="trainable_variables"):
        optimizer.apply([np.ones((5, 7))])


def test_a_scaled_loss_within_is_refused():
    with pytest.raises(sc.ArgumentError, match="around this one"):
        SpectralNormRegularizer(keras.optimizers.LossScaleOptimizer(sgd()), perceptron())


def test_two_variables_of_one_path():

    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.one, self.other = kl.Dense(3, name="same"), kl.Dense(3, name="same")
            self.one.build((5,))
            self.other.build((5,))

    with pytest.raises(sc.NamesError, match=r"several variables have the path \['same/kernel'\]"):
        SpectralNormRegularizer(sgd(), Twins())


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
    optimizer = SpectralNormRegularizer(sgd(), model, factor=0.3, warmup_iters=0)
    model.compile(optimizer, loss="mse", steps_per_execution=3)
    lines = []
    logger = SpectralNormLogger(lambda _, step: lines.append(step), every_n_steps=2)
    fit(model, epochs=2, callbacks=[logger])
    assert_close(values(model.weights), expected)
    assert lines == [2, 5]  # the ends of the executions with the steps 0 and 2, and 4


# Examples


@pytest.mark.parametrize("public", spectral_keras.__all__ if TORCH else ["SpectralNormRegularizer"])
def test_the_docstring_s(public):
    found = getattr(spectral_keras, public)
    if str(getattr(found, "__module__", "")).startswith("spectral_keras"):
        assert doctest.testmod(sys.modules[found.__module__]).failed == 0


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


# Several numbers, schedules, steps without an iteration


def half(step):
    return 0.5 / (step + 1.0)


@keras.saving.register_keras_serializable(package="tests")
def growing(step):
    return 0.1 * (step + 1.0)


def plain_model():
    layers = [kl.Dense(7, use_bias=False, name="one"), kl.Dense(3, use_bias=False, name="two")]
    return keras.Sequential([keras.Input((5,)), *layers], name="net")


def steps(optimizer, model, n):
    for _ in range(n):
        apply(optimizer, [np.cos(value) for value in values(model.trainable_variables)])


@pytest.mark.parametrize("every", [1, 3] if TORCH else [3])
def test_schedules_by_path_and_steps_without_an_iteration(every):
    model = plain_model()
    start = dict(zip(["net/one/kernel", "net/two/kernel"], values(model.weights), strict=True))
    numbers = {"one": half, "two": 0.25}
    targets = {"one": 0.0, "two": lambda step: 0.1 * step}
    optimizer = SpectralNormRegularizer(
        keras.optimizers.SGD(0.125),
        model,
        numbers,
        target=targets,
        every_n_steps=every,
        warmup_iters=3,
    )
    optimizer.build(model.trainable_variables)
    steps(optimizer, model, 4)
    weights = start
    state = sc.iterate(weights, sc.init(weights, layouts="io"), n_iter=3)
    for step in range(4):
        grads, state = sc.add_gradient(
            weights,
            {name: np.cos(w) for name, w in weights.items()},
            state,
            factor={"net/one/kernel": half(step), "net/two/kernel": 0.25},
            target={"net/one/kernel": 0.0, "net/two/kernel": 0.1 * step},
            n_iter=int(step % every == 0),
        )
        weights = {name: w - 0.125 * grads[name] for name, w in weights.items()}
    assert_close(values(model.weights), weights.values())
    assert_close(optimizer.sigmas().values(), state.sigma.values())
    expected = sc.penalty(
        state.sigma,
        factor={"net/one/kernel": half(4), "net/two/kernel": 0.25},
        target={"net/one/kernel": 0.0, "net/two/kernel": 0.4},
    )
    assert optimizer.penalty() == pytest.approx(float(expected))


def test_steps_without_an_iteration_go_on_after_loading(tmp_path):
    model = plain_model()
    optimizer = SpectralNormRegularizer(
        keras.optimizers.SGD(0.125), model, growing, every_n_steps=3, warmup_iters=0
    )
    model.compile(optimizer, loss="mse")
    fit(model)  # three steps
    steps(optimizer, model, 1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.every_n_steps == 3
    for one in (model, loaded):
        steps(one.optimizer, one, 3)
    assert_equal(values(loaded.weights), values(model.weights))
    assert loaded.optimizer.summary().rows[0].last_step == 6


def test_steps_without_an_iteration_follow_an_assigned_count():
    """As callbacks restore a run: by assigning to the variables."""
    runs = [plain_model(), plain_model()]
    optimizers = [
        SpectralNormRegularizer(
            keras.optimizers.SGD(0.125), model, growing, every_n_steps=3, warmup_iters=0
        )
        for model in runs
    ]
    for optimizer, model in zip(optimizers, runs, strict=True):
        optimizer.build(model.trainable_variables)
    steps(optimizers[0], runs[0], 1)
    for own, other in (
        (optimizers[1].variables, optimizers[0].variables),
        (runs[1].weights, runs[0].weights),
    ):
        for variable, value in zip(own, values(other), strict=True):
            variable.assign(value)
    for optimizer, model in zip(optimizers, runs, strict=True):
        steps(optimizer, model, 3)
    assert_equal(values(runs[1].weights), values(runs[0].weights))


def test_a_number_can_be_set_anew():
    model = compiled(perceptron(), factor=0.1)
    optimizer = model.optimizer
    assert optimizer.factor == 0.1
    optimizer.factor = {"hidden": 0.2, "*": 0.4}
    assert optimizer.factor == {"net/hidden/kernel": 0.2, "net/out/kernel": 0.4}
    optimizer.factor = 0.3
    expected, _ = by_hand(values(model.weights), factor=0.3)
    fit(model)
    assert_close(values(model.weights), expected)
    if TORCH:
        optimizer.factor = 0.0
    else:
        with pytest.warns(SpectralWarning, match="call model.compile again"):
            optimizer.factor = 0.0
    with pytest.raises(sc.ArgumentError, match="factor"):
        optimizer.factor = -1.0
    with pytest.raises(sc.ArgumentError, match=r"target.*is a keras.Variable"):
        optimizer.target = keras.Variable(0.1)


# What happened


def test_repr_and_summary():
    model = compiled(perceptron(), factor={"hidden": 0.1, "out": half})
    optimizer = model.optimizer
    assert (
        repr(optimizer)
        == "SpectralNormRegularizer(SGD, factor={0.1, half}, n_iter=1, 2 weights, not built)"
    )
    before = optimizer.summary()
    assert "no step yet" in str(before)
    assert before.rows[0].last_step is None
    fit(model)
    summary = optimizer.summary()
    assert repr(optimizer).endswith("2 weights)")
    row = summary.rows[1]
    assert row[:4] == ("net/out/kernel", (7, 3), (3, 7), "io")
    assert row.factor == pytest.approx(half(3))
    assert row.last_step == 2
    assert row.sigma == float(optimizer.sigmas()["net/out/kernel"])
    assert row.attached == "SGD"


def test_sigmas_before_the_first_step():
    model = perceptron()
    optimizer = SpectralNormRegularizer(sgd(), model, warmup_iters=30)
    for path, sigma in optimizer.sigmas().items():
        W = values([optimizer._weights.variables[path]])[0]
        np.testing.assert_allclose(sigma, np.linalg.norm(W, 2), rtol=1e-2)
    assert optimizer.penalty() > 0
    assert not optimizer.built
    other = SpectralNormRegularizer.from_config(optimizer.get_config())
    with pytest.raises(sc.ArgumentError, match=r"optimizer\.build"):
        other.sigmas()


def test_an_optimizer_that_is_passed_by_is_told():
    model = perceptron()
    inner = sgd()
    optimizer = SpectralNormRegularizer(inner, model)
    model.compile(inner, loss="mse")
    fit(model)
    with pytest.warns(SpectralWarning, match="has made 3 steps without SpectralNormRegularizer"):
        optimizer.sigmas()
    again = SpectralNormRegularizer(inner, model)  # whose steps before are no matter
    again.sigmas()


def test_two_regularizers_of_one_weight_are_told():
    model = perceptron()
    inner = SpectralNormRegularizer(sgd(), model, include="hidden")
    with pytest.warns(SpectralWarning, match="two SpectralNormRegularizers act on .*hidden"):
        SpectralNormRegularizer(inner, model)
    SpectralNormRegularizer(inner, model, include="out")
    SpectralNormConstraint(inner, model)


@pytest.mark.skipif(TORCH, reason="PyTorch's variables are always there")
def test_sigmas_within_an_epoch():
    model = compiled(perceptron())
    found = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            with pytest.raises(sc.ArgumentError, match="jax_state_sync"):
                model.optimizer.sigmas()
            model.jax_state_sync()
            found.append(model.optimizer.sigmas())

    fit(model, callbacks=[Look()])
    assert len(found) == 3


@pytest.mark.skipif(not TORCH, reason="the errors do not depend on the backend")
def test_arguments_of_other_kinds():
    import torch

    model = perceptron()
    for arguments, message in [
        ((model, sgd()), r"SpectralNormRegularizer\(optimizer, model\): swap"),
        ((torch.optim.SGD([torch.zeros(2)], 0.1), model), "keras.optimizers.SGD.*spectral_torch"),
        ((None, model), "must be a Keras optimizer, not builtins.NoneType"),
        ((sgd(), model.trainable_variables), "pass the model itself"),
        ((sgd(), None), "must be a keras.Model"),
    ]:
        with pytest.raises(sc.ArgumentError, match=message):
            SpectralNormRegularizer(*arguments)
    assert isinstance(SpectralNormRegularizer("adam", model).inner_optimizer, keras.optimizers.Adam)
    with pytest.raises(sc.ArgumentError, match="around this one"):
        SpectralNormRegularizer(
            SpectralNormConstraint(keras.optimizers.LossScaleOptimizer(sgd()), model), model
        )


# The bound


def test_a_bound_equals_a_loop_by_hand():
    model = plain_model()
    weights = dict(zip(["net/one/kernel", "net/two/kernel"], values(model.weights), strict=True))
    bounds = {"one": 0.75, "*": lambda step: 0.5 + 0.125 * step}
    optimizer = SpectralNormConstraint(
        keras.optimizers.SGD(0.125), model, bound=bounds, n_iter=2, warmup_iters=3
    )
    optimizer.build(model.trainable_variables)
    steps(optimizer, model, 3)
    state = sc.iterate(weights, sc.init(weights, layouts="io"), n_iter=3)
    for step in range(3):
        weights = {name: w - 0.125 * np.cos(w) for name, w in weights.items()}
        bound = {"net/one/kernel": 0.75, "net/two/kernel": 0.5 + 0.125 * step}
        weights, state = sc.constrain(weights, state, bound=bound, n_iter=2)
    assert_close(values(model.weights), weights.values())
    assert_close(optimizer.sigmas().values(), state.sigma.values())
    assert "bound={0.75, <lambda>}" in repr(optimizer)
    assert optimizer.summary().rows[0].factor == "σ ≤ 0.75"


def test_a_bound_around_a_regularizer_is_saved_with_the_model(tmp_path):
    model = perceptron()
    inner = SpectralNormRegularizer(keras.optimizers.Adam(0.05), model, factor=0.1)
    model.compile(SpectralNormConstraint(inner, model, bound={"hidden": 0.5, "*": 1.0}), loss="mse")
    fit(model, epochs=3)
    for i, bound in ((0, 0.5), (2, 1.0)):
        assert np.linalg.norm(values(model.weights)[i], 2) < 1.05 * bound
    assert len(inner.sigmas()) == 2
    model.save(tmp_path / "model.keras")
    fit(model)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.bound == {"net/hidden/kernel": 0.5, "net/out/kernel": 1.0}
    fit(loaded)
    assert_equal(values(loaded.weights), values(model.weights))
    assert_equal(values(loaded.optimizer.variables), values(model.optimizer.variables))
    repr(loaded.optimizer)


def test_a_bound_of_other_kinds():
    with pytest.raises(sc.ArgumentError, match="bound"):
        SpectralNormConstraint(sgd(), perceptron(), bound=-1.0)
    with pytest.raises(sc.NamesError, match="bound has no entry"):
        SpectralNormConstraint(sgd(), perceptron(), bound={"out": 1.0})


# Logs


def test_the_logger(tmp_path):
    model = perceptron()
    compiled(model, around=lambda optimizer: SpectralNormConstraint(optimizer, model))
    lines = []
    logger = SpectralNormLogger(lambda *line: lines.append(line), every_n_steps=2)
    csv = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(model, epochs=2, callbacks=[logger, csv]).history
    reg = model.optimizer.inner_optimizer
    sigma = {f"spectral/sigma/{path}": float(s) for path, s in reg.sigmas().items()}
    for name, value in sigma.items():
        assert history[name][-1] == pytest.approx(value)
    product = np.log10(list(sigma.values())).sum()
    assert history["spectral/log10_sigma_product"][-1] == pytest.approx(product)
    assert history["spectral/penalty"][-1] == pytest.approx(reg.penalty())
    assert "spectral/penalty" in (tmp_path / "log.csv").read_text()
    assert [step for _, step in lines] == [0, 2, 4]
    assert lines[0][0].keys() == {*sigma, "spectral/log10_sigma_product", "spectral/penalty"}
    assert lines[1][0]["spectral/penalty"] == pytest.approx(history["spectral/penalty"][0])
    plain = perceptron()
    plain.compile("sgd", loss="mse")
    with pytest.raises(sc.ArgumentError, match="SpectralNormRegularizer"):
        fit(plain, callbacks=[SpectralNormLogger()])


# One kernel


def test_a_kernel_regularizer(tmp_path):
    regularizer = SpectralNorm(0.3, n_iter=40)
    layers = [
        kl.Conv1D(4, 3, kernel_regularizer=SpectralNorm(0.2, layout="kio", target=0.1, n_iter=40)),
        kl.Flatten(),
        kl.Dense(3, kernel_regularizer=regularizer, name="out"),
    ]
    model = keras.Sequential([keras.Input((5, 2)), *layers])
    model.compile(keras.optimizers.SGD(1.0), loss="mse")
    before = values(model.trainable_variables)
    conv, _, dense, _ = before
    norms = np.linalg.norm(conv.reshape(6, 4), 2), np.linalg.norm(dense, 2)
    expected = 0.1 * (norms[0] - 0.1) ** 2 + 0.15 * norms[1] ** 2
    assert sum(float(x) for x in model.losses) == pytest.approx(expected, rel=1e-3)
    x = np.zeros((4, 5, 2))  # no part of the loss but the penalty moves the kernels
    y = model.predict(x, verbose=0)
    model.fit(x, y, epochs=1, verbose=0)
    U, S, Vt = np.linalg.svd(dense)
    after = values(model.trainable_variables)
    np.testing.assert_allclose(
        dense - after[2], 0.3 * S[0] * np.outer(U[:, 0], Vt[0]), atol=0.02 * S[0]
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    found = loaded.layers[0].kernel_regularizer
    assert found.get_config() == layers[0].kernel_regularizer.get_config()
    assert float(found(conv)) == float(layers[0].kernel_regularizer(conv))


def test_a_kernel_constraint(tmp_path):
    layers = [
        kl.Conv2D(4, 2, kernel_constraint=SpectralNormBound(0.5, layout="kkio"), name="conv"),
        kl.Flatten(),
        kl.Dense(3, kernel_constraint=SpectralNormBound(0.25, n_iter=30), name="out"),
    ]
    model = keras.Sequential([keras.Input((3, 3, 2)), *layers])
    model.compile("sgd", loss="mse")
    model.fit(np.ones((4, 3, 3, 2)), np.ones((4, 3)), verbose=0)
    conv, _, dense, _ = values(model.trainable_variables)
    assert np.linalg.norm(conv.reshape(8, 4), 2) == pytest.approx(0.5, rel=0.03)
    assert np.linalg.norm(dense, 2) == pytest.approx(0.25, rel=0.03)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("out").kernel_constraint.get_config() == {
        "bound": 0.25,
        "layout": None,
        "normalize": False,
        "n_iter": 30,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SpectralNorm(half), sc.ArgumentError, "factor must be a number here"),
        (lambda: SpectralNorm({"*": 0.1}), sc.ArgumentError, "factor must be"),
        (lambda: SpectralNormBound(-1), sc.ArgumentError, "bound"),
        (lambda: SpectralNorm(n_iter=0), sc.ArgumentError, "n_iter"),
        (lambda: SpectralNorm()(np.ones((2, 2, 3, 4))), sc.ShapeError, '"kkio".*Conv2DTranspose'),
        (lambda: SpectralNormBound()(np.ones((2, 2, 3))), sc.ShapeError, 'layout="kio"'),
        (lambda: SpectralNorm()(np.ones(3)), sc.ShapeError, "use it on kernels"),
    ],
)
def test_a_face_of_one_kernel_with_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()
