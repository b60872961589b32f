"""The network of ``digits.py`` in PyTorch, JAX and NumPy: what a user writes in each framework.

All three start from the given layers and minimize the mean cross-entropy by SGD with Nesterov
momentum. ``factor`` is λ of the spectral term, ``decay`` the coefficient of weight decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import spectral_core as sc

Array = NDArray[Any]

RATE, MOMENTUM = 0.1, 0.9


class Layer(NamedTuple):
    """A dense layer: ``W`` of shape (outputs, inputs), ``b`` of shape (outputs,)."""

    W: Array
    b: Array


class Net(NamedTuple):
    """A network in training, as each framework offers it."""

    step: Callable[[Array, Array], None]  # one step on images and labels
    predict: Callable[[Array], Array]
    matrices: Callable[[], list[Array]]  # W of each layer


def torch_net(
    layers: list[Layer],
    *,
    factor: float,
    decay: float,
    batch_norm: bool = False,
    n_vectors: int = 1,
) -> Net:
    """Build the network in PyTorch: the regularizer is one line, the loop does not change."""
    import torch
    from torch import nn

    from spectral_torch import SpectralNormRegularizer

    dense = [nn.Linear(layer.W.shape[1], layer.W.shape[0]) for layer in layers]
    with torch.no_grad():
        for linear, (W, b) in zip(dense, layers, strict=True):
            linear.weight.copy_(torch.from_numpy(W))
            linear.bias.copy_(torch.from_numpy(b))
    hidden: list[nn.Module] = []
    for linear in dense[:-1]:
        norm = [nn.BatchNorm1d(linear.out_features)] if batch_norm else []
        hidden += [linear, *norm, nn.ReLU()]
    model = nn.Sequential(*hidden, dense[-1])
    optimizer = torch.optim.SGD(
        model.parameters(), lr=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=decay
    )
    if factor:
        SpectralNormRegularizer(model, factor=factor, n_vectors=n_vectors).attach(optimizer)

    def step(images: Array, labels: Array) -> None:
        model.train()
        optimizer.zero_grad()
        logits = model(torch.from_numpy(images))
        nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        optimizer.step()

    @torch.no_grad()
    def predict(images: Array) -> Array:
        model.eval()
        return model(torch.from_numpy(images)).argmax(dim=1).numpy()

    return Net(step, predict, lambda: [linear.weight.detach().numpy().copy() for linear in dense])


def jax_net(layers: list[Layer], *, factor: float, decay: float) -> Net:
    """Build the network in JAX: the regularizer is one more transformation in an optax chain."""
    import jax
    import jax.numpy as jnp
    import optax

    from spectral_jax import add_spectral_norm_regularization

    params = [{"kernel": jnp.array(W.T), "bias": jnp.array(b)} for W, b in layers]
    sgd = optax.sgd(RATE, MOMENTUM, nesterov=True)
    term = (
        add_spectral_norm_regularization(factor=factor)
        if factor
        else optax.add_decayed_weights(decay)
    )
    tx = optax.chain(term, sgd)
    opt_state = tx.init(params)

    def forward(params: Any, x: Any) -> Any:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    def loss(params: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y).mean()

    @jax.jit
    def update(params: Any, opt_state: Any, x: Any, y: Any) -> Any:
        updates, opt_state = tx.update(jax.grad(loss)(params, x, y), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def step(images: Array, labels: Array) -> None:
        nonlocal params, opt_state
        params, opt_state = update(params, opt_state, images, labels)

    def predict(images: Array) -> Array:
        return np.asarray(forward(params, images).argmax(axis=1))

    return Net(step, predict, lambda: [np.asarray(layer["kernel"]).T for layer in params])


def numpy_net(layers: list[Layer], *, factor: float, decay: float) -> Net:
    """Build the network in NumPy, with the gradient by hand: the core without a framework."""
    weights = {f"W{i}": layer.W.copy() for i, layer in enumerate(layers)}
    biases = {f"b{i}": layer.b.copy() for i, layer in enumerate(layers)}
    params = weights | biases
    velocity = {name: np.zeros_like(value) for name, value in params.items()}
    state = sc.init(weights)
    last = len(layers) - 1

    def forward(x: Array) -> list[Array]:
        inputs = [x]
        for i in range(last):
            inputs.append(np.maximum(inputs[-1] @ weights[f"W{i}"].T + biases[f"b{i}"], 0))
        return [*inputs, inputs[-1] @ weights[f"W{last}"].T + biases[f"b{last}"]]

    def gradient(images: Array, labels: Array) -> dict[str, Array]:
        *inputs, logits = forward(images)
        error = np.exp(logits - logits.max(axis=1, keepdims=True))
        error /= error.sum(axis=1, keepdims=True)
        error[np.arange(len(labels)), labels] -= 1
        error /= len(labels)
        grads = {}
        for i in reversed(range(len(layers))):
            grads |= {f"W{i}": error.T @ inputs[i], f"b{i}": error.sum(axis=0)}
            error = (error @ weights[f"W{i}"]) * (inputs[i] > 0)
        return grads

    def step(images: Array, labels: Array) -> None:
        nonlocal state
        grads = gradient(images, labels)
        if factor:
            state = sc.add_gradient_(
                weights, {name: grads[name] for name in weights}, state, factor=factor
            )
        for name, value in params.items():
            grad = grads[name] + decay * value
            velocity[name] = MOMENTUM * velocity[name] + grad
            value -= RATE * (grad + MOMENTUM * velocity[name])

    return Net(
        step,
        lambda images: forward(images)[-1].argmax(axis=1),
        lambda: [W.copy() for W in weights.values()],
    )


NETS: dict[str, Callable[..., Net]] = {"torch": torch_net, "jax": jax_net, "numpy": numpy_net}
