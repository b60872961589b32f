"""The network by hand in NumPy, its gradient derived on paper: the core without a framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

import spectral_core

from .data import Images, Labels
from .net import LAYOUTS, MOMENTUM, SHAPES, Plan, initial_weights

Array = NDArray[Any]


class NumpyNet:
    layouts = LAYOUTS

    def __init__(self, plan: Plan) -> None:
        self._plan, self._steps = plan, 0
        self._weights = initial_weights(plan.seed)
        self._biases = {layer: np.zeros(shape[0], np.float32) for layer, shape in SHAPES.items()}
        self._velocity: dict[str, list[Array]] = {
            layer: [np.zeros_like(self._weights[layer]), np.zeros_like(self._biases[layer])]
            for layer in SHAPES
        }
        self._state = spectral_core.init(self._weights) if plan.factor else None

    def step(self, images: Images, labels: Labels) -> None:
        weight_grads, bias_grads = gradient(self._weights, self._biases, images, labels)
        if self._state is not None:
            self._state = spectral_core.add_gradient_(
                self._weights, weight_grads, self._state, factor=self._plan.factor
            )
        rate = self._plan.rate * 0.1 ** sum(self._steps >= m for m in self._plan.milestones)
        self._steps += 1
        for layer, (weight_velocity, bias_velocity) in self._velocity.items():
            nesterov_(self._weights[layer], weight_grads[layer], weight_velocity, rate)
            nesterov_(self._biases[layer], bias_grads[layer], bias_velocity, rate)

    def wait(self) -> None:
        pass

    def predict(self, images: Images) -> Labels:
        return forward(self._weights, self._biases, images)[0].argmax(axis=1)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        return {layer: weight.copy() for layer, weight in self._weights.items()}

    def sigmas(self) -> dict[str, float]:
        return {} if self._state is None else {k: float(s) for k, s in self._state.sigma.items()}


def nesterov_(parameter: Array, grad: Array, velocity: Array, rate: float) -> None:
    velocity *= MOMENTUM
    velocity += grad
    parameter -= rate * (grad + MOMENTUM * velocity)


def forward(W: Mapping[str, Array], b: Mapping[str, Array], images: Array) -> tuple[Array, ...]:
    """The logits, and what the gradient needs: the rows that each layer's matrix multiplies."""
    columns1 = patches(images[..., None], stride=1)
    hidden1 = relu(columns1 @ matrix(W["conv1"]).T + b["conv1"])
    columns2 = patches(hidden1, stride=2)
    hidden2 = relu(columns2 @ matrix(W["conv2"]).T + b["conv2"])
    features = hidden2.transpose(0, 3, 1, 2).reshape(len(images), -1)
    hidden3 = relu(features @ W["dense1"].T + b["dense1"])
    logits = hidden3 @ W["dense2"].T + b["dense2"]
    return logits, hidden3, features, columns2, hidden1, columns1


def gradient(
    W: Mapping[str, Array], b: Mapping[str, Array], images: Array, labels: Labels
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Of the mean cross-entropy, in the weights and in the biases."""
    logits, hidden3, features, columns2, hidden1, columns1 = forward(W, b, images)
    error = softmax(logits)
    error[np.arange(len(labels)), labels] -= 1
    error /= len(labels)
    errors, rows = {"dense2": error}, {"dense2": hidden3}
    error = (error @ W["dense2"]) * (hidden3 > 0)
    errors["dense1"], rows["dense1"] = error, features
    error = (error @ W["dense1"]) * (features > 0)
    n, h, w, _ = columns2.shape
    error = error.reshape(n, -1, h, w).transpose(0, 2, 3, 1)
    errors["conv2"], rows["conv2"] = error, columns2
    error = unpatch(error @ matrix(W["conv2"]), hidden1.shape, stride=2) * (hidden1 > 0)
    errors["conv1"], rows["conv1"] = error, columns1
    # A convolution is its matrix times the patches, so every layer's gradient is errorᵀ · rows.
    flat = {layer: error.reshape(-1, error.shape[-1]) for layer, error in errors.items()}
    weight_grads = {
        layer: (error.T @ rows[layer].reshape(len(error), -1)).reshape(W[layer].shape)
        for layer, error in flat.items()
    }
    return weight_grads, {layer: error.sum(axis=0) for layer, error in flat.items()}


def matrix(kernel: Array) -> Array:
    """The paper's b × (a·kh·kw) matrix: the very one that multiplies the patches."""
    return spectral_core.as_matrix(kernel, "oihw")


def patches(x: Array, stride: int) -> Array:
    """(n, h, w, c) → (n, h/stride, w/stride, c·3·3), the borders padded with zeros."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
    return windows.reshape(*windows.shape[:3], -1)


def unpatch(columns: Array, shape: tuple[int, ...], stride: int) -> Array:
    """The adjoint of `patches`: each pixel sums what the patches that hold it say."""
    n, height, width, channels = shape
    h, w = columns.shape[1:3]
    windows = columns.reshape(n, h, w, channels, 3, 3)
    padded = np.zeros((n, height + 2, width + 2, channels), columns.dtype)
    for y in range(3):
        for x in range(3):
            pixels = padded[:, y : y + stride * h : stride, x : x + stride * w : stride]
            pixels += windows[..., y, x]
    return padded[:, 1:-1, 1:-1]


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
