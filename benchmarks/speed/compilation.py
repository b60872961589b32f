"""How long JAX takes to trace and compile a step, for few and for many equal blocks."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import optax

import spectral_jax

from .bars import STACKED
from .peers_jax import FACTOR, FLOOR, LOOP, OURS, loop_step, ours, start_vectors

NOTE = (
    "GPT-2 blocks (qkv, proj, fc, out); seconds to trace and to compile. Each weight a leaf, but "
    "where stacked: there all blocks are one leaf a kind, as nn.scan makes them"
)
BLOCKS = (12, 96)
REPEATS, SLOW_SECONDS = 3, 10.0

SHAPES = {"qkv": (768, 2304), "proj": (768, 768), "fc": (768, 3072), "out": (3072, 768)}


def compile_times(counts: tuple[int, ...] = BLOCKS) -> dict[str, dict[str, dict[str, float]]]:
    """By who and number of blocks. The arrays are shapes only: nothing runs."""
    jax.config.update("jax_enable_x64", False)
    return {
        who: {str(count): measured(make, count) for count in counts}
        for who, make in (
            (OURS, lambda count: updates(ours(), blocks(count))),
            (STACKED, lambda count: updates(of_stacks(), stacks(count))),
            (LOOP, lambda count: by_hand(blocks(count))),
            (FLOOR, lambda count: updates(optax.add_decayed_weights(FACTOR), blocks(count))),
        )
    }


def blocks(count: int) -> dict[str, Any]:
    return {
        f"block_{k}_{name}": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
        for k in range(count)
        for name, shape in SHAPES.items()
    }


def stacks(count: int) -> dict[str, Any]:
    return {
        name: {"kernel": jax.ShapeDtypeStruct((count, *shape), jnp.float32)}
        for name, shape in SHAPES.items()
    }


def of_stacks() -> optax.GradientTransformation:
    return spectral_jax.add_spectral_norm_regularization(FACTOR, layouts={"*/kernel": "sio"})


def updates(
    tx: optax.GradientTransformation, params: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return tx.update, (params, jax.eval_shape(tx.init, params), params)


def by_hand(params: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    vectors = jax.eval_shape(lambda: start_vectors(params, "float32"))
    return loop_step, (params, vectors, params)


def measured(
    make: Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]], count: int
) -> dict[str, float]:
    function, arguments = make(count)
    taken: list[tuple[float, float]] = []
    while len(taken) < REPEATS and sum(map(sum, taken)) < SLOW_SECONDS:
        taken.append(traced_and_compiled(function, arguments))
    trace, compiling = (median(column) for column in zip(*taken, strict=True))
    return {"trace_s": trace, "compile_s": compiling, "sum_s": median(map(sum, taken))}


def traced_and_compiled(
    function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[float, float]:
    jax.clear_caches()
    start = perf_counter()
    lowered = jax.jit(function, donate_argnums=(0, 1)).lower(*arguments)
    middle = perf_counter()
    lowered.compile()
    return middle - start, perf_counter() - middle
