"""The network in JAX: the regularizer is one more transformation in an optax chain."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

import spectral_core
import spectral_jax

from .data import Images, Labels
from .net import LAYOUTS, MOMENTUM, SHAPES, Plan, initial_weights

Params = dict[str, dict[str, jax.Array]]


class JaxNet:
    layouts: Mapping[str, str] = {
        "conv1": "hwio",
        "conv2": "hwio",
        "dense1": "io",
        "dense2": "io",
    }

    def __init__(self, plan: Plan) -> None:
        self._params: Params = {
            layer: {
                "kernel": jnp.asarray(reordered(weight, LAYOUTS[layer], self.layouts[layer])),
                "bias": jnp.zeros(SHAPES[layer][0]),
            }
            for layer, weight in initial_weights(plan.seed).items()
        }
        rate = optax.piecewise_constant_schedule(plan.rate, dict.fromkeys(plan.milestones, 0.1))
        sgd = optax.sgd(rate, MOMENTUM, nesterov=True)
        regularizer = spectral_jax.add_spectral_norm_regularization(plan.factor)
        self._regularized = plan.factor > 0
        self._tx = optax.chain(regularizer, sgd) if self._regularized else sgd
        self._opt_state = self._tx.init(self._params)

    def step(self, images: Images, labels: Labels) -> None:
        self._params, self._opt_state = train_step(
            self._tx, self._params, self._opt_state, images, labels
        )

    def wait(self) -> None:
        jax.block_until_ready(self._params)

    def predict(self, images: Images) -> Labels:
        return np.asarray(classes(self._params, images))

    def weights(self) -> dict[str, NDArray[np.float32]]:
        return {layer: np.asarray(params["kernel"]) for layer, params in self._params.items()}

    def sigmas(self) -> dict[str, float]:
        if not self._regularized:
            return {}
        sigmas = spectral_jax.sigmas(self._opt_state)
        return {layer: float(sigmas[f"{layer}/kernel"]) for layer in SHAPES}


def reordered(weight: NDArray[np.float32], given: str, layout: str) -> NDArray[np.float32]:
    """The same matrix in another framework's order of axes."""
    shape = tuple(weight.shape[given.index(axis)] for axis in layout)
    return spectral_core.from_matrix(spectral_core.as_matrix(weight, given), layout, shape)


@partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(
    tx: optax.GradientTransformation, params: Params, opt_state: Any, images: Any, labels: Any
) -> tuple[Params, Any]:
    grads = jax.grad(loss)(params, images, labels)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@jax.jit
def classes(params: Params, images: Any) -> jax.Array:
    return forward(params, images).argmax(axis=1)


def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = forward(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def forward(params: Params, images: jax.Array) -> jax.Array:
    x = jax.nn.relu(conv(images[..., None], params["conv1"], stride=1))
    x = jax.nn.relu(conv(x, params["conv2"], stride=2))
    x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # channels first, as the other backends have it
    x = jax.nn.relu(x @ params["dense1"]["kernel"] + params["dense1"]["bias"])
    return x @ params["dense2"]["kernel"] + params["dense2"]["bias"]


def conv(x: jax.Array, params: Mapping[str, jax.Array], stride: int) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x,
        params["kernel"],
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + params["bias"]
