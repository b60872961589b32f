"""Flax NNX needs no wrapper: the regularizer is a link of the optax chain that `nnx.Optimizer`
takes. Run `python examples/with_flax_nnx.py`.
"""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spectral_jax


class Network(nnx.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), use_bias=False, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, x):
        """The logits."""
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.out(x.reshape(x.shape[0], -1))


def cross_entropy(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model, optimizer, x, y):
    optimizer.update(model, nnx.grad(cross_entropy)(model, x, y))


def main(epochs=10, factor=0.01, batch_size=64):
    digits = load_digits()
    x, x_test, y, y_test = train_test_split(
        digits.images[..., None] / 16, digits.target, test_size=0.2, random_state=0
    )
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model,
        optax.chain(
            spectral_jax.add_spectral_norm_regularization(factor=factor),
            optax.sgd(0.1, momentum=0.9, nesterov=True),
        ),
        wrt=nnx.Param,
    )
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x) - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            train_step(model, optimizer, x[batch], y[batch])
    model.eval()
    accuracy = float((model(x_test).argmax(-1) == y_test).mean())
    sigmas = spectral_jax.sigmas(optimizer.opt_state)
    return {path: float(sigma) for path, sigma in sigmas.items()}, accuracy


if __name__ == "__main__":
    sigmas, accuracy = main()
    for path, sigma in sigmas.items():
        print(f"{path}: σ = {sigma:.3f}")
    print(f"accuracy {accuracy:.3f}")
