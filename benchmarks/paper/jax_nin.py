"""Network in Network in JAX: as in PyTorch, but for the random numbers; without the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite, prod
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spectral_core
import spectral_jax

from .data import Data, batches
from .results import MEASURED, MOMENTUM, Result, Run

# Side of the first kernel, channels of the convolutions; all but the first are 1 × 1. The last
# block ends in one more, which gives the classes.
BLOCKS = ((5, (192, 160, 96)), (5, (192, 192, 192)), (3, (192, 192)))

# Flax's `he_normal` is truncated, PyTorch's is not. Made once: nnx.jit compiles anew with another.
HE = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")

CHUNK = 256  # images at a time, where nothing is trained

METHODS: dict[str, Callable[[Run], optax.GradientTransformation]] = {
    "vanilla": lambda _: optax.identity(),
    "decay": lambda run: optax.add_decayed_weights(run.strength),
    "spectral": lambda run: spectral_jax.add_spectral_norm_regularization(
        run.strength, seed=run.seed
    ),
}

Labelled = tuple[jax.Array, jax.Array]  # images, (n, height, width, channels), and labels


class NIN(nnx.Module):
    """Lin et al., 2014: images, channels last, to logits."""

    def __init__(self, channels: int, classes: int, width: float, *, rngs: nnx.Rngs) -> None:
        convs = []
        for side, published in BLOCKS:
            for k, count in enumerate(published):
                wide = max(1, round(width * count))
                convs.append(conv(channels, wide, 1 if k else side, rngs))
                channels = wide
        self.convs = nnx.List([*convs, conv(channels, classes, 1, rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        for k, layer in enumerate(self.convs[:-1]):
            x = jax.nn.relu(layer(x))
            if k in (2, 5):
                pool = nnx.max_pool if k == 2 else nnx.avg_pool
                x = pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
                x = self.dropout(x, deterministic=deterministic)
        return self.convs[-1](x).mean((1, 2))


def conv(channels: int, features: int, side: int, rngs: nnx.Rngs) -> nnx.Conv:
    kernel = (side, side)
    return nnx.Conv(channels, features, kernel, padding=side // 2, kernel_init=HE, rngs=rngs)


def train(run: Run, data: Data, machine: dict[str, Any]) -> Result:
    """Train one network.

    Raises
    ------
    ValueError
        If the run or its data ask for what only the runs in PyTorch have.
    """
    if run.model != "nin" or run.method not in METHODS or data.augmented:
        raise ValueError(f"JAX trains NIN alone, by {', '.join(METHODS)}, on images as they are")
    model = NIN(data.train_images.shape[1], data.classes, run.width, rngs=nnx.Rngs(run.seed))
    train_set = labelled(data.train_images, data.train_labels)
    test_set = labelled(data.test_images, data.test_labels)
    tx = transformation(run, steps=len(data.train_labels) // run.batch)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    result = Result(run, machine, parameters=sum(leaf.size for leaf in leaves(model)))
    for epoch in range(run.epochs):
        start = perf_counter()
        chosen = batches(data, run.batch, run.seed, epoch)
        loss = train_epoch(model, optimizer, train_set, chosen)
        result.diverged = not (isfinite(loss) and all(jnp.isfinite(w).all() for w in leaves(model)))
        if result.diverged:
            break
        line = {"epoch": epoch + 1, "loss": loss, **measured(model, train_set, test_set)}
        result.epochs.append({**line, "seconds": perf_counter() - start})
    result.spectra = {} if result.diverged else spectra(model)
    result.done = True
    return result


def labelled(images: np.ndarray, labels: np.ndarray) -> Labelled:
    """On the device, as Flax has images."""
    return jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.asarray(labels, jnp.int32)


def transformation(run: Run, steps: int) -> optax.GradientTransformation:
    """The method before SGD, whose rate falls at a half and at three quarters of the epochs."""

    def rate(count: jax.Array) -> jax.Array:
        epoch = count // steps
        falls = (epoch >= run.epochs // 2).astype(int) + (epoch >= 3 * run.epochs // 4)
        return run.rate * 0.1**falls

    sgd = optax.sgd(rate, MOMENTUM, nesterov=True)
    return optax.chain(METHODS[run.method](run), sgd)


def train_epoch(
    model: NIN, optimizer: nnx.Optimizer, train_set: Labelled, chosen: Iterable[np.ndarray]
) -> float:
    """One step for each batch; the mean of their losses."""
    # Made numbers at the end alone: a step need not wait for the one before.
    losses = [train_step(model, optimizer, train_set, batch) for batch in chosen]
    return float(jnp.stack(losses).mean())


@nnx.jit
def train_step(
    model: NIN, optimizer: nnx.Optimizer, train_set: Labelled, batch: jax.Array
) -> jax.Array:
    images, labels = train_set

    def mean_loss(model: NIN) -> jax.Array:
        return losses_of(model(images[batch], deterministic=False), labels[batch]).mean()

    loss, grads = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, grads)
    return loss


def losses_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def measured(model: NIN, train_set: Labelled, test_set: Labelled) -> dict[str, float]:
    """An epoch's line, but for its loss and its time."""
    some = [(x[:MEASURED], y[:MEASURED]) for x, y in (train_set, test_set)]
    return {
        "train": mean_of(are_right, model, train_set),
        "test": mean_of(are_right, model, test_set),
        "train_gradient": mean_of(gradient_norms, model, some[0]),
        "test_gradient": mean_of(gradient_norms, model, some[1]),
        "sigma_product": prod(values[0] for values in spectra(model).values()),
    }


def mean_of(function: Callable[..., jax.Array], model: NIN, images: Labelled) -> float:
    """In chunks: what a wide network computes of all images at once would fill the memory."""
    x, y = images
    starts = range(0, len(x), CHUNK)
    parts = [function(model, x[i : i + CHUNK], y[i : i + CHUNK]) for i in starts]
    return float(np.concatenate(parts).mean())


@nnx.jit
def are_right(model: NIN, images: jax.Array, labels: jax.Array) -> jax.Array:
    return model(images, deterministic=True).argmax(1) == labels


@nnx.jit
def gradient_norms(model: NIN, images: jax.Array, labels: jax.Array) -> jax.Array:
    """‖∇ₓ loss‖₂ of each image."""

    def total(images: jax.Array) -> jax.Array:
        return losses_of(model(images, deterministic=True), labels).sum()

    gradients = jax.grad(total)(images)
    return jnp.linalg.norm(gradients.reshape(len(images), -1), axis=1)


def leaves(model: NIN) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(model, nnx.Param))


def spectra(model: NIN) -> dict[str, list[float]]:
    """All singular values of each weight, the largest first."""
    found = {}
    for k, layer in enumerate(model.convs):
        matrix = spectral_core.as_matrix(np.asarray(layer.kernel[...], np.float64), "hwio")
        found[f"convs/{k}/kernel"] = np.linalg.svd(matrix, compute_uv=False).tolist()
    return found
