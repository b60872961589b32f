"""Equinox needs no wrapper: the regularizer is a link of the optax chain, whose state is made from
the model's arrays. Run `python examples/with_equinox.py`.
"""

import equinox as eqx
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spectral_jax


def network(key):
    keys = jax.random.split(key, 3)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 16, 3, padding=1, use_bias=False, key=keys[0]),
            eqx.nn.GroupNorm(4, 16),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(16, 32, 3, padding=1, use_bias=False, key=keys[1]),
            eqx.nn.GroupNorm(4, 32),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jax.numpy.ravel),
            eqx.nn.Linear(512, 10, key=keys[2]),
        ]
    )


def cross_entropy(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


@eqx.filter_jit
def train_step(model, state, tx, x, y):
    grads = eqx.filter_grad(cross_entropy)(model, x, y)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state


def main(epochs=10, factor=0.01, batch_size=64):
    digits = load_digits()
    x, x_test, y, y_test = train_test_split(
        digits.images[:, None] / 16, digits.target, test_size=0.2, random_state=0
    )
    model = network(jax.random.key(0))
    tx = optax.chain(
        spectral_jax.add_spectral_norm_regularization(factor=factor),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    )
    state = tx.init(eqx.filter(model, eqx.is_array))
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            model, state = train_step(model, state, tx, x[batch], y[batch])
    accuracy = float((jax.vmap(model)(x_test).argmax(-1) == y_test).mean())
    return {path: float(sigma) for path, sigma in spectral_jax.sigmas(state).items()}, accuracy


if __name__ == "__main__":
    sigmas, accuracy = main()
    for path, sigma in sigmas.items():
        print(f"{path}: σ = {sigma:.3f}")
    print(f"accuracy {accuracy:.3f}")
