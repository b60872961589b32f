"""Network in Network in JAX, as in PyTorch but for the random numbers and the Hessian."""

from collections.abc import Callable
from math import isfinite, prod
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import spectral_core as sc
import spectral_jax
from benchmarks.common import machine, rounded
from benchmarks.models import NIN_BLOCKS, scaled

from .data import Data, batches
from .runs import DIGITS, MEASURED, MOMENTUM, Result, Run, RunError

# Flax's `he_normal` is truncated, PyTorch's is not. Made once: nnx.jit compiles anew with another.
HE = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")

CHUNK = 256  # images at a time, where nothing is trained

METHODS: dict[str, Callable[[Run], optax.GradientTransformation]] = {
    "vanilla": lambda _: optax.identity(),
    "decay": lambda run: optax.add_decayed_weights(run.strength),
    "spectral": lambda run: spectral_jax.add_spectral_norm_regularization(
        factor=run.strength, seed=run.seed
    ),
}

Labelled = tuple[jax.Array, jax.Array]  # images, (n, height, width, channels), and labels


class NIN(nnx.Module):
    """Lin et al., 2014. Images have their channels last."""

    def __init__(self, channels: int, classes: int, width: float, *, rngs: nnx.Rngs) -> None:
        convs = []
        for side, widths in NIN_BLOCKS:
            for k, published in enumerate(widths):
                wide = scaled(published, width)
                convs.append(conv(channels, wide, 1 if k else side, rngs))
                channels = wide
        self.convs = nnx.List([*convs, conv(channels, classes, 1, rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for k, layer in enumerate(self.convs[:-1]):
            x = jax.nn.relu(layer(x))
            if k in (2, 5):
                pool = nnx.max_pool if k == 2 else nnx.avg_pool
                x = self.dropout(pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
        return self.convs[-1](x).mean((1, 2))


def conv(channels: int, features: int, side: int, rngs: nnx.Rngs) -> nnx.Conv:
    kernel = (side, side)
    return nnx.Conv(channels, features, kernel, padding=side // 2, kernel_init=HE, rngs=rngs)


def train_in_jax(run: Run, data: Data, advance: Callable[[], object] = lambda: None) -> Result:
    """Train one network; `RunError` for what only the runs in PyTorch have."""
    if run.model != "nin" or run.method not in METHODS or data.augmented:
        raise RunError(f"JAX trains NIN only, by {', '.join(METHODS)}, on images as they are")
    model = NIN(data.train_images.shape[1], data.classes, run.width, rngs=nnx.Rngs(run.seed))
    train_set, test_set = labelled(*data[:2]), labelled(*data[2:4])
    count = len(data.train_labels)
    tx = transformation(run, steps=count // run.batch)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    weights = jax.tree.leaves(nnx.state(model, nnx.Param))
    result = Result(run, rounded(machine("cpu"), DIGITS), sum(leaf.size for leaf in weights))
    start = perf_counter()
    while result.epochs < run.epochs and not result.diverged:
        chosen = batches(count, run.batch, run.seed, result.epochs)
        # Read at the end of the epoch only: a step need not wait for the one before.
        losses = [train_step(model, optimizer, train_set, batch) for batch in chosen]
        measured = {"loss": float(jnp.stack(losses).mean())}
        weights = jax.tree.leaves(nnx.state(model, nnx.Param))
        finite = isfinite(measured["loss"]) and all(jnp.isfinite(w).all() for w in weights)
        result.diverged = not finite
        result.record(measured | (measures(model, train_set, test_set) if finite else {}))
        advance()
    result.seconds = rounded(perf_counter() - start, DIGITS)
    if not result.diverged:
        result.spectra = rounded(spectra(model), DIGITS)
    return result


def labelled(images: np.ndarray, labels: np.ndarray) -> Labelled:
    """Return them on the device, in Flax's order of axes."""
    return jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.asarray(labels, jnp.int32)


def transformation(run: Run, steps: int) -> optax.GradientTransformation:
    """Chain the method and SGD, whose rate falls at a half and at three quarters of the epochs."""
    falls = jnp.array([run.epochs // 2, 3 * run.epochs // 4])

    def rate(count: jax.Array) -> jax.Array:
        return run.rate * 0.1 ** (count // steps >= falls).sum()

    return optax.chain(METHODS[run.method](run), optax.sgd(rate, MOMENTUM, nesterov=True))


@nnx.jit
def train_step(
    model: NIN, optimizer: nnx.Optimizer, train_set: Labelled, batch: jax.Array
) -> jax.Array:
    images, labels = train_set

    def mean_loss(model: NIN) -> jax.Array:
        return losses_of(model(images[batch]), labels[batch]).mean()

    loss, grads = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, grads)
    return loss


losses_of = optax.softmax_cross_entropy_with_integer_labels


def measures(model: NIN, train_set: Labelled, test_set: Labelled) -> dict[str, float]:
    """Return what is measured after an epoch."""
    model.eval()  # no dropout
    found = {"sigma_product": prod(values[0] for values in spectra(model).values())}
    for part, (x, y) in {"train": train_set, "test": test_set}.items():
        found[part] = mean_of(are_right, model, x, y)
        found[f"{part}_gradient"] = mean_of(gradient_norms, model, x[:MEASURED], y[:MEASURED])
    model.train()
    return found


def mean_of(function: Callable[..., jax.Array], model: NIN, x: jax.Array, y: jax.Array) -> float:
    """Return the mean over images, in chunks: a wide network needs much memory for each."""
    starts = range(0, len(x), CHUNK)
    parts = [function(model, x[i : i + CHUNK], y[i : i + CHUNK]) for i in starts]
    return float(np.concatenate(parts).mean())


@nnx.jit
def are_right(model: NIN, images: jax.Array, labels: jax.Array) -> jax.Array:
    return model(images).argmax(1) == labels


@nnx.jit
def gradient_norms(model: NIN, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return ‖∇ₓ loss‖₂ of each image."""

    def total(images: jax.Array) -> jax.Array:
        return losses_of(model(images), labels).sum()

    gradients = jax.grad(total)(images)
    return jnp.linalg.norm(gradients.reshape(len(images), -1), axis=1)


def spectra(model: NIN) -> dict[str, list[float]]:
    """Return all singular values of each weight, the largest first."""
    kernels = (np.asarray(layer.kernel[...], np.float64) for layer in model.convs)
    values = (np.linalg.svdvals(sc.as_matrix(kernel, "hwio")).tolist() for kernel in kernels)
    return {f"convs/{k}/kernel": some for k, some in enumerate(values)}
