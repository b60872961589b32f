"""Keras 3, on PyTorch or JAX: the regularizer is an optimizer around yours. Run
`python examples/with_keras.py`, or `KERAS_BACKEND=jax python examples/with_keras.py`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")  # before keras is imported

import keras
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spectral_keras


def network():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False, name="conv1"),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", use_bias=False, name="conv2"),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(10, name="out"),
        ]
    )


def main(epochs=10, factor=0.01):
    keras.utils.set_random_seed(0)
    digits = load_digits()
    x, x_test, y, y_test = train_test_split(
        digits.images[..., None] / 16, digits.target, test_size=0.2, random_state=0
    )
    model = network()
    optimizer = spectral_keras.SpectralNormRegularizer(
        keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), model, factor=factor
    )
    model.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    return optimizer.sigmas(), accuracy


if __name__ == "__main__":
    sigmas, accuracy = main()
    for path, sigma in sigmas.items():
        print(f"{path}: σ = {sigma:.3f}")
    print(f"accuracy {accuracy:.3f}")
