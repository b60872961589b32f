"""Jobs for the tests of the Triton engine, and what they compare it with.

On a CUDA machine the kernels run. Elsewhere Triton interprets them, on CPU tensors.
"""

import importlib
from dataclasses import replace

import pytest
import torch

from spectral_core.engine import (
    AT_MOST,
    Bound,
    Job,
    ReferenceEngine,
    Triplet,
    array_namespace,
    plan_of,
)

triton_engine = importlib.import_module("spectral_torch.engines.triton")
triton_device = importlib.import_module("spectral_torch.engines.triton_device")
triton_group = importlib.import_module("spectral_torch.engines.triton_group")
triton_tables = importlib.import_module("spectral_torch.engines.triton_tables")
graph_tables = importlib.import_module("spectral_torch.engines.graph_tables")
TritonEngine = triton_engine.TritonEngine
REFERENCE = ReferenceEngine(in_place=True)

CUDA = torch.cuda.is_available()
INTERPRETED = not CUDA and triton_device.interpreted()
DEVICE = torch.device("cuda" if CUDA else "cpu")
runs = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="no GPU: runs in the process of the interpreter's test"
)
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def job(
    shape,
    dtype=f32,
    *,
    grad=None,
    layout=None,
    factor=0.1,
    rule=None,
    scale=1.0,
    last=True,
    seed=0,
    k=1,
):
    """Return a job of its own random numbers, on the device."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=f64)

    plan = plan_of(layout or "oi" + "k" * (len(shape) - 2), shape, "w")
    iterated = f64 if dtype == f64 else f32
    V = draw(plan.rows(k))
    V = (V / V.norm(dim=-1, keepdim=True)).to(DEVICE, iterated)
    weight = (draw(shape) * scale).to(DEVICE, dtype)
    sigma, u = (torch.full(s, 0.5).to(V) for s in (plan.stack, plan.left))
    gradient = draw(shape).to(DEVICE, grad or dtype)
    triplet = Triplet(sigma, u, V) if last else None
    return Job("w", weight, gradient, V, factor, rule, plan, array_namespace(weight), triplet)


def bounded(shape, limit, dtype=f32, *, code=AT_MOST, **options):
    """Return a job whose weight is scaled to a bound."""
    one = job(shape, dtype, rule=Bound(limit, code), **options)
    return replace(one, grad=one.weight)


def in_channels_last(one):
    """Return the same job with weight and gradient in the channels-last format."""
    form = {4: torch.channels_last, 5: torch.channels_last_3d}[one.weight.dim()]
    weight, grad = (x.contiguous(memory_format=form) for x in (one.weight, one.grad))
    return replace(one, weight=weight, grad=grad)


def copy(one):
    """Return the same job, in memory of its own."""
    V, last = one.V.clone(), one.last
    if one.grad is one.weight:
        weight = one.weight.clone()
        one = replace(one, weight=weight, grad=weight)
    if last is not None:
        last = Triplet(last.sigma.clone(), last.u.clone(), V)
    grad = None if one.grad is None else one.grad.clone()
    return replace(one, grad=grad, V=V, last=last)


def close(found, expected, rtol, atol):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


def check(jobs, n_iter=1, engine=None):
    """Run the jobs beside the reference on copies of them, and return what the engine gave."""
    engine = engine or TritonEngine()
    assert all(engine.accepts(one) for one in jobs)
    expected = REFERENCE.run([copy(one) for one in jobs], n_iter)
    found = engine.run(jobs, n_iter)
    for one, grad, triplet, grad_, triplet_ in zip(
        jobs, found.grads, found.triplets, expected.grads, expected.triplets, strict=True
    ):
        assert grad is one.grad
        rtol = 1e-12 if one.V.dtype == f64 else 2e-5
        atol = 1e-13 if one.V.dtype == f64 else 2e-6
        if one.V.shape[-2] > 1:  # the last rows are what is left of differences
            rtol, atol = 5 * rtol, 5 * atol
        for x, y, scale in zip(triplet, triplet_, (0, 1, 1), strict=True):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            close(x, y, rtol, atol * scale)
        if grad is None:
            continue
        half = {bf16: 2**-7, f16: 2**-10}.get(grad.dtype, 0)  # a tie may go the other way
        size = float(
            one.factor * triplet_.sigma.nan_to_num().max()
        )  # the term may cancel the gradient
        close(grad, grad_, rtol + half, 5 * atol * max(1.0, size))
    return found


def check_others_stay(shape, k, atol):
    """Zero and what is not finite change no other matrix, and not their own V."""
    jobs = [job(shape, seed=i, k=k) for i in range(5)]
    jobs[0].weight.zero_()
    jobs[1].weight[2, 3] = torch.nan
    jobs[2].weight[2, 3] = torch.inf
    jobs[3].weight.fill_(3e38)
    before = [one.V.clone() for one in jobs]
    grads = [one.grad.clone() for one in jobs]
    found = TritonEngine().run(jobs, 2)
    for one, V in zip(jobs[:4], before[:4], strict=True):
        close(one.V, V, 0, 0)
    close(found.grads[0], grads[0], 0, 0)
    assert found.triplets[0].sigma == 0
    assert not found.triplets[0].u.any()
    assert not any(found.triplets[i].sigma.isfinite() for i in (1, 2, 3))
    expected = REFERENCE.run([job(shape, seed=4, k=k)], 2)
    close(found.grads[4], expected.grads[0], 1e-5, atol)
