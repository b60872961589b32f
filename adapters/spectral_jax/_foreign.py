"""An engine for the CPU: a step's weights in one call of the kernels that Numba compiles.

XLA compiles about ten kernels for each weight, and reads a bfloat16 weight through a float32 copy.
The call is one instruction of XLA's program, for up to 64 weights.

The step is a primitive of JAX. What a trace does not know is decided when it is lowered: on another
platform, on several devices or for export, it becomes the operations of `XlaEngine`. So does its
derivative, and its batched form.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from spectral_core.engine import AT_MOST, Bound, Engine, Job, Plan, Result, Slope, Triplet
from spectral_core.numba import ForeignMatrix, foreign_function, foreign_table

from ._engine import XlaEngine

_KINDS = ("float32", "float64", "bfloat16", "float16")

# Weights of a call: XLA's time to compile one grows with the square of the number of its arrays.
_MOST = 64

# Before, an array does not know whether a `shard_map` divides it.
_KNOWS_ITS_MESH = hasattr(jax, "typeof")


class _Spec(NamedTuple):
    """What is static of a job: all but its arrays and numbers."""

    plan: Plan
    code: int  # 0 for the paper's penalty
    changes: bool
    vectors: int

    @property
    def has_gradient(self) -> bool:
        """True if an operand of its own changes.

        A bound changes the weight. As two operands, XLA would copy it: the kernels write into one.
        """
        return self.changes and self.code < AT_MOST


class NumbaXlaEngine:
    """Run jobs by Numba's kernels where the step is compiled for the CPU.

    The engine accepts real weights whose memory is that of their matrix or of its transpose, as JAX
    keeps kernels. Outside of ``jax.jit`` it accepts jobs without a gradient alone: JAX could not
    write into the gradient's memory. It compiles a call for them.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import spectral_core as sc
    >>> from spectral_jax import NumbaXlaEngine, XlaEngine
    >>> weights, grads = {"w": jnp.array([[3.0, 4.0]])}, {"w": jnp.zeros((1, 2))}
    >>> state, engines = sc.init(weights), [NumbaXlaEngine(), XlaEngine()]
    >>> step = jax.jit(lambda w, g, state: sc.add_gradient(w, g, state, engines=engines))
    >>> grads, state = step(weights, grads, state)
    >>> float(state.sigma["w"])
    5.0
    """

    in_place = False

    def accepts(self, job: Job) -> bool:
        """Return True for a job that the kernels can run."""
        if job.xp is not jnp or job.wave is not None or not _KNOWS_ITS_MESH:
            return False
        if str(job.weight.dtype) not in _KINDS:
            return False
        if not (_is_traced(job.weight) or _is_compiled_alone(job)):
            return False
        arrays = [x for x in (job.weight, job.grad, job.V) if x is not None]
        if any(map(_is_divided, arrays)) or _across(job.plan) is None:
            return False
        grad_fits = job.grad is None or job.grad.dtype == job.weight.dtype
        return grad_fits and _kernels_for(*_kind(job))

    def run(self, jobs: Sequence[Job], n_iter: int) -> Result:
        """Run all jobs, in one call those of one dtype with one vector, and those with several."""
        if n_iter == 0:
            return XlaEngine().run(jobs, n_iter)
        kinds: dict[tuple[str, bool], list[int]] = {}
        for place, job in enumerate(jobs):
            kinds.setdefault(_kind(job), []).append(place)
        grads: list[Any] = [None] * len(jobs)
        triplets: list[Any] = [None] * len(jobs)
        groups = [
            places[start : start + _MOST]
            for places in kinds.values()
            for start in range(0, len(places), _MOST)
        ]
        for places in groups:
            results = _together([jobs[place] for place in places], n_iter)
            for place, (grad, triplet) in zip(places, results, strict=True):
                grads[place], triplets[place] = grad, triplet
        return Result(grads, triplets)


def _is_traced(x: jax.Array) -> bool:
    return isinstance(x, jax.core.Tracer)


def _is_compiled_alone(job: Job) -> bool:
    """Return True for a job outside of a trace that is worth a compiled call of its own.

    XLA compiles every operation of the iteration anew for each shape: for the first state of a
    DenseNet, that is a minute. Where a GPU is the default, arrays on the CPU are on their way to
    it: the kernels would be compiled for this call alone.
    """
    if job.grad is not None or _is_traced(job.V) or jax.default_backend() != "cpu":
        return False
    return len(job.weight.devices() | job.V.devices()) == 1


def _is_divided(x: jax.Array) -> bool:
    """Return True if a mesh of several devices divides an array, or may do so."""
    kind = jax.typeof(x)
    return bool(getattr(kind, "vma", ())) or not kind.sharding.mesh.empty


def _across(plan: Plan) -> tuple[bool, int] | None:
    """Return whether memory holds the transpose, and the kernel positions before the channels.

    None stands for a layout with neither.
    """
    kinds, window = plan.contiguous
    if plan.stack:
        return None
    if plan.reshapes:
        return False, 1
    return (True, window) if kinds in ("io", "kio") else None


def _kind(job: Job) -> tuple[str, bool]:
    """Return the name of a job's dtype, and whether it has several vectors."""
    return str(job.weight.dtype), job.V.shape[-2] > 1


@lru_cache
def _kernels_for(kind: str, several: bool) -> bool:
    """Register the kernels of a dtype with XLA; return False without Numba."""
    if find_spec("numba") is None:
        return False
    try:
        address = foreign_function(kind, several=several)
    except ImportError:  # Numba was told not to compile
        return False
    capsule = jax.ffi.pycapsule(ctypes.c_void_p(address))  # type: ignore[no-untyped-call]
    jax.ffi.register_ffi_target(_name(kind, several), capsule, platform="cpu")
    return True


def _name(kind: str, several: bool) -> str:
    return f"spectral_step_{'block_' * several}{kind}"


def _together(jobs: Sequence[Job], n_iter: int) -> list[tuple[Any, Triplet]]:
    """Return gradient and triplet of each job."""
    specs, operands = [], [_numbers(jobs)]
    for job in jobs:
        changes = job.grad is not None
        code = 0 if job.rule is None else job.rule.code
        specs.append(_Spec(job.plan, code, changes, job.V.shape[-2]))
        gradient = [job.grad] * specs[-1].has_gradient
        operands += [job.weight, job.V.astype(operands[0].dtype), *gradient]
    found = iter(_bind(*operands, specs=tuple(specs), n_iter=n_iter))
    results = []
    for spec in specs:
        V, u, sigma = next(found), next(found), next(found)
        results.append((next(found) if spec.changes else None, Triplet(sigma, u, V)))
    return results


def _numbers(jobs: Sequence[Job]) -> jax.Array:
    """Return λ and target of each job."""
    rows = [(job.factor, 0.0 if job.rule is None else job.rule.target) for job in jobs]
    dtype = jnp.float64 if jobs[0].weight.dtype == jnp.float64 else jnp.float32
    if all(isinstance(x, float) for row in rows for x in row):
        return jnp.asarray(rows, dtype)  # one constant; below are operations for each number
    return jnp.stack([jnp.asarray(x, dtype) for row in rows for x in row]).reshape(-1, 2)


_step = Primitive("spectral_norm_step")
_step.multiple_results = True
_bind: Callable[..., list[Any]] = _step.bind


def _shapes(numbers: Any, *operands: Any, specs: tuple[_Spec, ...], n_iter: int) -> list[Any]:  # noqa: ARG001
    shapes, place = [], 0
    for spec in specs:
        weight, V = operands[place : place + 2]
        shapes += [V.update(), V.update(shape=spec.plan.left), V.update(shape=())]
        shapes += [weight.update()] * spec.changes
        place += 2 + spec.has_gradient
    return shapes


def _compiled(*operands: Any, specs: tuple[_Spec, ...], n_iter: int) -> list[Any]:
    found: list[Any] = _jitted(specs, n_iter)(*operands)
    return found


@lru_cache(16)
def _jitted(specs: tuple[_Spec, ...], n_iter: int) -> Callable[..., Any]:
    """Return the jitted step: the same function for the same jobs, which JAX then compiles once."""
    return jax.jit(partial(_bind, specs=specs, n_iter=n_iter))


def _by_xla(numbers: Any, *operands: Any, specs: tuple[_Spec, ...], n_iter: int) -> list[Any]:
    """Run the step by XLA's own operations."""
    jobs, place = [], 0
    for k, spec in enumerate(specs):
        weight, V = operands[place : place + 2]
        changed = operands[place + 2] if spec.has_gradient else weight
        grad = changed if spec.changes else None
        place += 2 + spec.has_gradient
        factor, target = numbers[k]
        slope = None
        if spec.code:
            slope = (Bound if spec.code >= AT_MOST else Slope)(target, spec.code)
        jobs.append(Job("", weight, grad, V, factor, slope, spec.plan, jnp, None))
    grads, triplets = XlaEngine().run(jobs, n_iter)
    results = []
    for spec, grad, triplet in zip(specs, grads, triplets, strict=True):
        results += [triplet.V, triplet.u, triplet.sigma, *[grad] * spec.changes]
    return results


def _by_kernels(numbers: Any, *operands: Any, specs: tuple[_Spec, ...], n_iter: int) -> list[Any]:
    """Run the step by one call of the kernels."""
    parts, results, place = [], [], 0
    for spec in specs:
        parts.append(operands[place : place + 2 + spec.has_gradient])
        place += 2 + spec.has_gradient
    matrices = [_matrix(spec) for spec in specs]
    table, order, room = foreign_table(matrices, n_iter)
    arguments: list[Any] = []
    shapes, aliases = [_like(numbers, (room,))], {}
    for k in order:
        weight, V, *grad = parts[k]
        first = len(arguments) + 1  # the factors come before all
        aliases[first + 1] = len(shapes)
        arguments += [weight, V, *grad]
        shapes += [_like(V, V.shape), _like(V, specs[k].plan.left), _like(V, ())]
        if specs[k].changes:
            aliases[first + 2 if grad else first] = len(shapes)
            shapes.append(_like(weight, weight.shape))
    numbers = numbers[jnp.asarray(order)] if order != sorted(order) else numbers
    name = _name(str(parts[0][0].dtype), specs[0].vectors > 1)
    call = jax.ffi.ffi_call(name, shapes, input_output_aliases=aliases)
    found = iter(call(numbers, *arguments, table=table)[1:])
    of_each = {k: [next(found) for _ in range(3 + specs[k].changes)] for k in order}
    for k in range(len(specs)):
        results += of_each[k]
    return results


def _matrix(spec: _Spec) -> ForeignMatrix:
    m, n = spec.plan.matrix
    across, window = _across(spec.plan) or (False, 1)
    rows, columns = (n, m) if across else (m, n)
    return ForeignMatrix(rows, columns, across, window, *spec[1:])


def _like(x: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype)  # type: ignore[no-untyped-call]


def _lowered_for_cpu(context: Any, *operands: Any, **static: Any) -> Any:
    """Lower to a call where one CPU runs the whole program; otherwise to XLA's operations."""
    module = context.module_context
    alone = getattr(module.axis_context, "num_devices", None) == 1
    exported = getattr(module.lowering_parameters, "for_export", True)
    way = _by_kernels if alone and not exported and len(module.platforms) == 1 else _by_xla
    return mlir.lower_fun(partial(way, **static), multiple_results=True)(context, *operands)


def _batched(operands: Any, axes: Any, **static: Any) -> Any:
    found = jax.vmap(partial(_by_xla, **static), in_axes=tuple(axes))(*operands)
    return found, [0] * len(found)


def _derivative(primals: Any, tangents: Any, **static: Any) -> Any:
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(partial(_by_xla, **static), tuple(primals), tangents)


_step.def_abstract_eval(_shapes)  # type: ignore[no-untyped-call]
_step.def_impl(_compiled)  # type: ignore[no-untyped-call]
mlir.register_lowering(_step, mlir.lower_fun(_by_xla, multiple_results=True))
mlir.register_lowering(_step, _lowered_for_cpu, platform="cpu")
batching.primitive_batchers[_step] = _batched
ad.primitive_jvps[_step] = _derivative


ENGINES: Sequence[Engine] = NumbaXlaEngine(), XlaEngine()
"""The engines of the transformations, in order of preference."""
