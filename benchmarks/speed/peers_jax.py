"""What is timed in JAX: all compiled beforehand, all donating what they replace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import spectral_jax

from .cases import Case, filled
from .report import OURS
from .timing import LeftOutError, Step, require_memory

STACKED = "spectral_jax, layers stacked"
LOOP = "jitted loop"
NORMALIZATION = "nnx.SpectralNorm"
FLOOR = "add_decayed_weights"

FACTOR = 0.01
BLOCKS = (12, 96)  # of GPT-2, that are compiled
GPT_2 = {"qkv": (768, 2304), "proj": (768, 768), "fc": (768, 3072), "out": (3072, 768)}
REPEATS, SLOW_SECONDS = 3, 10.0

Tree = dict[str, Any]


class Shared:
    """The gradients that all peers take turns to replace: a donated array is gone."""

    def __init__(self, grads: Tree) -> None:
        self.grads = grads


def peers(case: Case, device: str, group: str) -> dict[str, Callable[[], Step]]:
    """Return a function for each peer that prepares its step, or raises `LeftOutError`."""
    del group
    if (jax.default_backend() == "cpu") != (device == "cpu"):
        raise LeftOutError(f"this JAX computes on the {jax.default_backend()}")
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    require_memory(2 * case.size, device)
    params, shared = tree(case, 0), Shared(tree(case, 1))
    return {
        OURS["jax"]: partial(optax_update, ours(), params, shared),
        LOOP: partial(by_hand, case, params, shared),
        NORMALIZATION: partial(normalization, case, params, shared, device),
        FLOOR: partial(optax_update, optax.add_decayed_weights(FACTOR), params, shared),
    }


def ours(**options: Any) -> optax.GradientTransformation:
    return spectral_jax.add_spectral_norm_regularization(factor=FACTOR, **options)


def tree(case: Case, seed: int) -> Tree:
    """Return the weights in JAX's order of axes: kernel, input, output."""
    leaves = {}
    for name, (output, inputs, *window) in case.shapes.items():
        values = filled((*window, inputs, output), seed)
        leaves[name.replace(".", "_")] = {"kernel": jnp.array(values, case.dtype, copy=True)}
    return leaves


def optax_update(tx: optax.GradientTransformation, params: Tree, shared: Shared) -> Step:
    update, state = jax.jit(tx.update, donate_argnums=(0, 1)), tx.init(params)

    def step() -> None:
        nonlocal state
        shared.grads, state = jax.block_until_ready(update(shared.grads, state, params))

    step()  # compiles
    return step


def by_hand(case: Case, params: Tree, shared: Shared) -> Step:
    vectors = start_vectors(params, case.dtype)
    update = jax.jit(loop_step, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal vectors
        shared.grads, vectors = jax.block_until_ready(update(shared.grads, vectors, params))

    step()
    return step


def start_vectors(params: Any, dtype: str) -> dict[str, jax.Array]:
    wide = jnp.float32 if dtype == "bfloat16" else dtype
    return {name: jnp.ones(leaf["kernel"].shape[-1], wide) for name, leaf in params.items()}


def loop_step(grads: Tree, vectors: Tree, params: Tree) -> tuple[Tree, Tree]:
    """Do Algorithm 1 in our precision, without our care for unusual input."""
    new_grads, new_vectors = {}, {}
    for name, leaf in params.items():
        w, u, grad = leaf["kernel"], vectors[name], grads[name]["kernel"]
        W = w.reshape(-1, w.shape[-1]).astype(u.dtype)
        with jax.default_matmul_precision("highest"):
            v = W @ u
            v /= jnp.linalg.norm(v)
            u = v @ W
        sigma = jnp.linalg.norm(u)
        u /= sigma
        term = (FACTOR * sigma * v[:, None] * u).reshape(w.shape)
        total = (grad.astype(term.dtype) + term).astype(grad.dtype)
        new_grads[name], new_vectors[name] = {"kernel": total}, u
    return new_grads, new_vectors


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

    step()
    return step


def compile_times(counts: tuple[int, ...] = BLOCKS) -> dict[str, dict[str, dict[str, float]]]:
    """Return seconds to trace and to compile a step for so many blocks of GPT-2; nothing runs."""
    jax.config.update("jax_enable_x64", False)
    stacks = ours(layouts={"*/kernel": "sio"})  # one leaf a kind for all blocks, as in nn.scan
    decay, start = optax.add_decayed_weights(FACTOR), partial(start_vectors, dtype="float32")
    makers: dict[str, Callable[[int], tuple[Callable[..., Any], Any, Any]]] = {
        OURS["jax"]: lambda count: traceable(ours(), blocks(count)),
        STACKED: lambda count: traceable(stacks, blocks(count, stacked=True)),
        LOOP: lambda count: (loop_step, blocks(count), jax.eval_shape(start, blocks(count))),
        FLOOR: lambda count: traceable(decay, blocks(count)),
    }
    return {
        who: {str(count): compile_time(*make(count)) for count in counts}
        for who, make in makers.items()
    }


def blocks(count: int, *, stacked: bool = False) -> Tree:
    """Return shapes: each weight a leaf, or stacked in one leaf a kind."""
    copies = {"": (count,)} if stacked else {f"{k}_": () for k in range(count)}
    return {
        f"{prefix}{name}": {"kernel": jax.ShapeDtypeStruct((*axes, *shape), jnp.float32)}
        for prefix, axes in copies.items()
        for name, shape in GPT_2.items()
    }


def traceable(tx: optax.GradientTransformation, params: Tree) -> tuple[Any, Any, Any]:
    return tx.update, params, jax.eval_shape(tx.init, params)


def compile_time(function: Callable[..., Any], params: Tree, state: Any) -> dict[str, float]:
    taken: list[tuple[float, float]] = []
    while len(taken) < REPEATS and sum(map(sum, taken)) < SLOW_SECONDS:
        jax.clear_caches()
        start = perf_counter()
        lowered = jax.jit(function, donate_argnums=(0, 1)).lower(params, state, params)
        middle = perf_counter()
        lowered.compile()
        taken.append((middle - start, perf_counter() - middle))
    trace, compiling = (median(column) for column in zip(*taken, strict=True))
    return {"trace_s": trace, "compile_s": compiling, "sum_s": median(map(sum, taken))}
