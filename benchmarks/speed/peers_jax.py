"""What is timed in JAX: all compiled beforehand, all donating what they replace."""

from functools import partial
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import spectral_jax

from .cases import Case, filled
from .report import OURS
from .timing import LeftOutError, Makers, Options, Step, require_memory

FACTOR = 0.01
GPT_2 = {"qkv": (768, 2304), "proj": (768, 768), "fc": (768, 3072), "out": (3072, 768)}

Tree = dict[str, Any]


def arrays(case: Case, device: str, _: str) -> tuple[Tree, SimpleNamespace]:
    """Return W and G, or raise `LeftOutError`."""
    if (jax.default_backend() == "cpu") != (device == "cpu"):
        raise LeftOutError(f"this JAX computes on the {jax.default_backend()}")
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    require_memory(2 * case.size, device)
    # All peers take turns to replace the gradients: a donated array is gone.
    return tree(case, 0), SimpleNamespace(grads=tree(case, 1))


def peers(case: Case, device: str, params: Tree, shared: SimpleNamespace) -> Makers:
    """Return a function for each peer that prepares its step, or raises `LeftOutError`."""
    known = transformations(params)
    found = {name: partial(timed, tx, params, shared) for name, tx in known.items()}
    return found | {"nnx.SpectralNorm": partial(normalization, case, params, shared, device)}


def variants(
    _: Case, device: str, params: Tree, shared: SimpleNamespace, common: Options
) -> Makers:
    """Return the options of the transformation."""
    bound = partial(spectral_jax.constrain_spectral_norm, layouts=layouts_of(params))
    # XLA compiles eight vectors of many weights for minutes; the kernels of the CPU are compiled.
    many = len(params) > 1 and device != "cpu"
    wanted = {name: one for name, one in common.items() if not many or one.get("n_vectors") != 8}
    changed = {name: ours(params, **options) for name, options in wanted.items()}
    changed |= {"bound, idle": bound(1e6), "bound, acting": bound(lambda step: 0.999**step)}
    return {name: partial(timed, tx, params, shared) for name, tx in changed.items()}


def transformations(params: Tree) -> dict[str, optax.GradientTransformation]:
    return {
        OURS["jax"]: ours(params),
        "jitted loop": optax.GradientTransformation(start_vectors, loop_step),
        "add_decayed_weights": optax.add_decayed_weights(FACTOR),
    }


def ours(params: Tree, **options: Any) -> optax.GradientTransformation:
    options = {"factor": FACTOR, "layouts": layouts_of(params)} | options
    return spectral_jax.add_spectral_norm_regularization(**options)


def layouts_of(params: Tree) -> dict[str, str]:
    return {f"{name}/kernel": "hwio" for name, one in params.items() if one["kernel"].ndim == 4}


def tree(case: Case, seed: int) -> Tree:
    """Return the weights in JAX's order of axes: kernel, input, output."""
    leaves = {}
    for name, (output, inputs, *window) in case.shapes.items():
        values = filled((*window, inputs, output), seed)
        leaves[name.replace(".", "_")] = {"kernel": jnp.array(values, case.dtype, copy=True)}
    return leaves


def timed(tx: optax.GradientTransformation, params: Tree, shared: SimpleNamespace) -> Step:
    update, state = jax.jit(tx.update, donate_argnums=(0, 1)), tx.init(params)

    def step() -> None:
        nonlocal state
        shared.grads, state = jax.block_until_ready(update(shared.grads, state, params))

    step()  # compiles
    return step


def start_vectors(params: Tree) -> Tree:
    kernels = {name: leaf["kernel"] for name, leaf in params.items()}
    wide = {name: jnp.promote_types(W.dtype, jnp.float32) for name, W in kernels.items()}
    return {name: jnp.ones(W.shape[-1], wide[name]) for name, W in kernels.items()}


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


def normalization(case: Case, params: Tree, shared: SimpleNamespace, device: str) -> Step:
    require_memory(3 * case.size, device)
    wide = jnp.promote_types(case.dtype, jnp.float32)
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


def compile_times(counts: tuple[int, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """Return seconds to trace and to compile a step for so many blocks of GPT-2; nothing runs."""
    jax.config.update("jax_enable_x64", False)
    compile_time(ours({}), blocks(1))  # imports what it imports
    makers = {who: (tx, blocks) for who, tx in transformations({}).items()}
    if jax.default_backend() == "cpu":  # elsewhere, for minutes
        makers[f"{OURS['jax']}, n_vectors=4"] = ours({}, n_vectors=4), blocks
    stacks = ours({}, layouts={"*/kernel": "sio"})  # one leaf a kind for all blocks, as in nn.scan
    makers[f"{OURS['jax']}, layers stacked"] = (stacks, partial(blocks, stacked=True))
    return {
        who: {str(count): compile_time(tx, make(count)) for count in counts}
        for who, (tx, make) in makers.items()
    }


def blocks(count: int, *, stacked: bool = False) -> Tree:
    """Return shapes: each weight a leaf, or stacked in one leaf a kind."""
    copies = {"": (count,)} if stacked else {f"{k}_": () for k in range(count)}
    return {
        f"{prefix}{name}": {"kernel": jax.ShapeDtypeStruct((*axes, *shape), jnp.float32)}
        for prefix, axes in copies.items()
        for name, shape in GPT_2.items()
    }


def compile_time(tx: optax.GradientTransformation, params: Tree) -> dict[str, float]:
    jax.clear_caches()
    state, start = jax.eval_shape(tx.init, params), perf_counter()
    lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params)
    middle = perf_counter()
    lowered.compile()
    end = perf_counter()
    return {"trace_s": middle - start, "compile_s": end - middle, "sum_s": end - start}
