"""Who is timed against whom in JAX: all compiled beforehand, all donating what they replace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import spectral_jax

from .cases import Case, Shape, filled
from .forecast import require_memory
from .timing import LeftOutError, Step

OURS = "spectral_jax"
LOOP = "jitted loop"
NORMALIZATION = "nnx.SpectralNorm"
FLOOR = "add_decayed_weights"

NOTES = {
    OURS: "add_spectral_norm_regularization(…).update under jit",
    LOOP: "the same algorithm written by hand, under jit",
    NORMALIZATION: "flax.nnx.SpectralNorm around a layer that returns its weights, and a fixed "
    "gradient taken back through it; a plain layer spends nothing",
    FLOOR: "optax.add_decayed_weights under jit",
}

FACTOR = 0.01
Tree = dict[str, Any]


def compiled(step: Step) -> Step:
    """Called once, so that no timing contains a compilation."""
    step()
    return step


class Shared:
    """The gradients that all peers take turns to replace: a donated array is gone."""

    def __init__(self, grads: Tree) -> None:
        self.grads = grads


def peers(case: Case, device: str, patience: float) -> dict[str, Callable[[], Step]]:
    del patience
    if (jax.default_backend() == "cpu") != (device == "cpu"):
        raise LeftOutError(f"this JAX computes on the {jax.default_backend()}")
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    require_memory(2 * case.size, device)
    params, shared = tree(case, 0), Shared(tree(case, 1))
    return {
        OURS: partial(optax_update, ours(), params, shared),
        LOOP: partial(hand_written, case, params, shared),
        NORMALIZATION: partial(normalization, case, params, shared, device),
        FLOOR: partial(optax_update, optax.add_decayed_weights(FACTOR), params, shared),
    }


def ours() -> optax.GradientTransformation:
    return spectral_jax.add_spectral_norm_regularization(FACTOR)


def tree(case: Case, seed: int) -> Tree:
    return {
        name.replace(".", "_"): {"kernel": kernel(shape, case.dtype, seed)}
        for name, shape in case.shapes.items()
    }


def kernel(shape: Shape, dtype: str, seed: int) -> jax.Array:
    """In JAX's order of axes: kernel, input, output."""
    output, inputs, *window = shape
    return jnp.array(filled((*window, inputs, output), seed), dtype, copy=True)


def optax_update(tx: optax.GradientTransformation, params: Tree, shared: Shared) -> Step:
    update, state = jax.jit(tx.update, donate_argnums=(0, 1)), tx.init(params)

    def step() -> None:
        nonlocal state
        shared.grads, state = jax.block_until_ready(update(shared.grads, state, params))

    return compiled(step)


def hand_written(case: Case, params: Tree, shared: Shared) -> Step:
    vectors = start_vectors(params, case.dtype)
    update = jax.jit(loop_step, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal vectors
        shared.grads, vectors = jax.block_until_ready(update(shared.grads, vectors, params))

    return compiled(step)


def start_vectors(params: Any, dtype: str) -> dict[str, jax.Array]:
    wide = jnp.float32 if dtype == "bfloat16" else dtype
    return {name: jnp.ones(leaf["kernel"].shape[-1], wide) for name, leaf in params.items()}


def loop_step(grads: Tree, vectors: Tree, params: Tree) -> tuple[Tree, Tree]:
    """Algorithm 1 in the precision of ours, without its care for unusual input."""
    new_grads, new_vectors = {}, {}
    for name, leaf in params.items():
        u, term = iterated(leaf["kernel"], vectors[name])
        grad = grads[name]["kernel"]
        total = (grad.astype(term.dtype) + term).astype(grad.dtype)
        new_grads[name], new_vectors[name] = {"kernel": total}, u
    return new_grads, new_vectors


def iterated(w: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The next left vector, and λσuvᵀ in the kernel's shape."""
    W = w.reshape(-1, w.shape[-1]).astype(u.dtype)
    with jax.default_matmul_precision("highest"):
        v = W @ u
        v /= jnp.linalg.norm(v)
        u = v @ W
    sigma = jnp.linalg.norm(u)
    u /= sigma
    return u, (FACTOR * sigma * v[:, None] * u).reshape(w.shape)


class Bare(nnx.Module):
    """A layer that is nothing but its weights."""

    def __init__(self, params: Tree) -> None:
        for name, leaf in params.items():
            setattr(self, f"of_{name}", nnx.Param(leaf["kernel"]))
        self.names = nnx.static(tuple(params))

    def __call__(self, _: Any) -> Tree:
        return {name: {"kernel": getattr(self, f"of_{name}")[...]} for name in self.names}


def normalization(case: Case, params: Tree, shared: Shared, device: str) -> Step:
    require_memory(3 * case.size, device)
    wide = jnp.float64 if case.dtype == "float64" else jnp.float32
    layer = nnx.SpectralNorm(Bare(params), rngs=nnx.Rngs(0), dtype=case.dtype, param_dtype=wide)
    graph, weights, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def normalized(weights: Any, stats: Any) -> tuple[Tree, Any]:
        module = nnx.merge(graph, weights, stats, copy=True)
        return module(None), nnx.state(module, nnx.BatchStat)

    @partial(jax.jit, donate_argnums=1)
    def there_and_back(weights: Any, stats: Any, upstream: Tree) -> tuple[Any, Any]:
        _, pull_back, stats = jax.vjp(lambda w: normalized(w, stats), weights, has_aux=True)
        return pull_back(upstream), stats

    def step() -> None:
        nonlocal stats
        _, stats = jax.block_until_ready(there_and_back(weights, stats, shared.grads))

    return compiled(step)
