"""The norm of Keras's convolutions as maps: `test_optimizer.py` runs these for each backend."""

import keras
import numpy as np
import pytest
from keras import layers as kl

import spectral_core as sc
from spectral_keras import (
    SpectralNorm,
    SpectralNormConstraint,
    SpectralNormRegularizer,
    SpectralWarning,
)

TORCH = keras.backend.backend() == "torch"
X = np.random.default_rng(0).standard_normal((8, 6, 6, 2))
Y = np.ones((8, 3))


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    keras.utils.clear_session(free_memory=False)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(0)


def network():
    layers = [kl.Conv2D(4, 3, strides=2, name="conv"), kl.Flatten(), kl.Dense(3, name="out")]
    return keras.Sequential([keras.Input((6, 6, 2)), *layers], name="net")


def kernel_of(model, name="conv"):
    return keras.ops.convert_to_numpy(model.get_layer(name).weights[0])


def sgd():
    return keras.optimizers.SGD(0.125)


LAYERS = {
    "conv": (lambda: kl.Conv2D(4, 3, strides=2, padding="same"), (6, 6, 2)),
    "one axis": (lambda: kl.Conv1D(3, 3, dilation_rate=2), (7, 2)),
    "three axes": (lambda: kl.Conv3D(2, 2, strides=(1, 2, 1)), (3, 4, 3, 2)),
    "groups": (lambda: kl.Conv2D(4, 3, groups=2), (6, 6, 2)),
    "transposed": (lambda: kl.Conv2DTranspose(3, 3, strides=2), (4, 4, 2)),
    "depthwise": (lambda: kl.DepthwiseConv2D(3, strides=2, depth_multiplier=2), (7, 7, 2)),
}


# On JAX, waves are compiled for seconds: one test shows that its engines follow them.
on_torch = pytest.mark.skipif(not TORCH, reason="what is chosen does not depend on the backend")


@on_torch
@pytest.mark.parametrize("name", LAYERS)
def test_norm_of_a_layer_is_that_of_its_map(name):
    make, shape = LAYERS[name]
    layer = make()
    model = keras.Sequential([keras.Input(shape), layer])
    optimizer = SpectralNormRegularizer(sgd(), model, norm="operator", warmup_iters=60)
    (sigma,) = optimizer.sigmas().values()
    n = int(np.prod(shape))
    zero = np.zeros((1, *shape))
    images = np.concatenate([np.eye(n).reshape(n, *shape), zero])
    columns = keras.ops.convert_to_numpy(model(images)).reshape(n + 1, -1)
    exact = np.linalg.norm(columns[:-1] - columns[-1], 2)  # without the bias
    (layout,) = optimizer._weights.layouts.values()
    plain = sc.Layout(layout.axes, layout.groups)
    kernel = keras.ops.convert_to_numpy(layer.weights[0])
    options = {"stride": layout.stride, "dilation": layout.dilation}
    lower, upper, _ = sc.convolution_norm(kernel, plain, **options)
    assert 0.75 * upper <= exact <= upper
    assert np.max(sigma) == pytest.approx(lower, rel=0.01)
    assert np.max(sigma) <= upper


@on_torch
def test_a_step_is_that_of_the_core():
    model = network()
    before = {"conv": kernel_of(model), "out": kernel_of(model, "out")}
    optimizer = SpectralNormRegularizer(
        sgd(), model, norm="operator", factor=0.3, warmup_iters=0, n_iter=2
    )
    layouts = {"conv": sc.Convolution("kkio", stride=2), "out": "io"}
    assert (
        dict(zip(layouts, optimizer._weights.layouts.values(), strict=True))["conv"]
        == (layouts["conv"])
    )
    optimizer.build(model.trainable_variables)
    state = sc.init(before, layouts=layouts)
    v = dict(
        zip(before, (keras.ops.convert_to_numpy(x) for x in optimizer._v.values()), strict=True)
    )
    state = sc.SpectralState(v, state.sigma, state.layouts, {})
    zeros = {name: np.zeros_like(W) for name, W in before.items()}
    grads, state = sc.add_gradient(before, zeros, state, factor=0.3, n_iter=2)
    optimizer.apply([keras.ops.zeros(v.shape, v.dtype) for v in model.trainable_variables])
    for name, W in before.items():
        expected = W - 0.125 * grads[name]
        np.testing.assert_allclose(kernel_of(model, name), expected, rtol=1e-7, atol=1e-9)
    for mine, theirs in zip(optimizer.sigmas().values(), state.sigma.values(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-7)


def optimizer_of(model, **options):
    regularizer = SpectralNormRegularizer(
        sgd(), model, norm="operator", factor=0.01, warmup_iters=3, **options
    )
    if not TORCH:  # each optimizer compiles for seconds on JAX
        return regularizer
    return SpectralNormConstraint(regularizer, model, 0.9, norm="operator", warmup_iters=3)


@pytest.mark.parametrize("every_n_steps", [1, 2] if TORCH else [2])
def test_a_saved_model_goes_on_bit_for_bit(every_n_steps, tmp_path):
    model = network()
    model.compile(optimizer_of(model, every_n_steps=every_n_steps), loss="mse")
    options = {"batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(X, Y, epochs=3, **options)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        one.fit(X, Y, epochs=2, **options)
    assert loaded.optimizer.norm == "operator"
    assert loaded.optimizer._weights.layouts == model.optimizer._weights.layouts
    for a, b in ((model.weights, loaded.weights), (model.optimizer, loaded.optimizer)):
        for mine, theirs in zip(
            getattr(a, "variables", a), getattr(b, "variables", b), strict=True
        ):
            mine, theirs = map(keras.ops.convert_to_numpy, (mine, theirs))
            np.testing.assert_array_equal(mine, theirs)
    found = sc.convolution_norm(kernel_of(model), "kkio", stride=2)
    if TORCH:
        assert found.upper <= 0.9 * 1.02
    else:
        assert model.optimizer.sigmas()["net/conv/kernel"] == pytest.approx(found.upper, rel=0.1)


@on_torch
def test_a_layout_chooses_it_for_one_weight():
    model = network()
    layout = sc.Convolution("kkio", stride=2, waves=4)
    optimizer = SpectralNormRegularizer(sgd(), model, layouts={"conv": layout}, warmup_iters=1)
    optimizer.build(model.trainable_variables)
    assert optimizer._v["net/conv/kernel"].shape[0] == 4
    again = SpectralNormRegularizer.from_config(optimizer.get_config())
    assert again._weights.layouts["net/conv/kernel"] == layout


class Own(kl.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(3, 3, shape[-1], 4), name="own")

    def call(self, x):
        return keras.ops.conv(x, self.kernel)


def test_a_stride_that_nobody_says_is_told():
    model = keras.Sequential([keras.Input((6, 6, 2)), Own(name="mine")])
    with pytest.warns(SpectralWarning, match=r"takes the stride of .*mine/own.* to be 1"):
        SpectralNormRegularizer(sgd(), model, norm="operator", layouts={"mine": "kkio"})


@on_torch
def test_errors():
    with pytest.raises(sc.ArgumentError, match="norm must be"):
        SpectralNormRegularizer(sgd(), network(), norm="true")
    model = network()
    optimizer = SpectralNormRegularizer(sgd(), model, layouts={"out": sc.Convolution("kio")})
    with pytest.raises(sc.ShapeError, match="axes"):
        optimizer.build(model.trainable_variables)
    with pytest.raises(sc.ArgumentError, match=r'norm="operator"'):
        SpectralNorm(0.1, layout=sc.Convolution("kkio"))
