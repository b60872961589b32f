"""Say which jobs the Triton kernels can run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_core.engine import Job, last_of

from . import triton_device
from .memory_format import window
from .triton_device import ITERATED, MOST_VECTORS

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)  # a subclass may have no memory of its own


def accepts(job: Job) -> bool:
    """Return True if the kernels can run this job: see `TritonEngine`."""
    weight, plan = job.weight, job.plan
    dtype = ITERATED.get(weight.dtype)
    # The device first: `available` starts CUDA and imports Triton.
    if (
        dtype is None
        or weight.is_cuda == triton_device.interpreted()
        or not triton_device.available()
    ):
        return False
    device = weight.get_device()
    return (
        type(weight) in _PLAIN_TENSORS
        and (found := window_of(job)) != 0
        and (positions := max(found, 1)) > 0
        and _fits(weight, weight.shape, weight.dtype, device, positions=positions)
        and _fits_grad(job.grad, weight.shape, device, positions)
        and (n_vectors := job.V.shape[-2]) <= MOST_VECTORS
        and (n_vectors == 1 or triton_device.has_tuples())
        and (
            plan.matrix[-1] <= triton_device.most_columns(weight.dtype, weight.device)
            or triton_device.has_tuples()
        )
        and _fits(job.V, plan.rows(n_vectors), dtype, device)
        and (job.last is None or _fits_last(job, dtype, device))
        and _fits_number(job.factor, device)
        and (job.rule is None or _fits_number(job.rule.target, device))
    )


def window_of(job: Job) -> int:
    """Return the `window` of a job's weight, or 0 where the kernels cannot find its rows.

    The number is negative for a layer with inputs before outputs: the length of a run of a row.
    """
    form = job.plan.form(window(job.weight))
    if form is None:
        return 0
    if job.plan.reshapes:
        return form.window if form.kinds == "oki" else 1
    return -form.window if form.kinds in ("io", "iok") else 0


def _fits(
    x: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: int,
    *,
    positions: int = 1,
) -> bool:
    return (
        x.dtype is dtype
        and x.get_device() == device
        and x.shape == shape
        and x.layout is torch.strided
        and window(x) == positions
        and not x.is_neg()
    )


def _fits_grad(grad: Tensor | None, shape: Sequence[int], device: int, positions: int) -> bool:
    return grad is None or (
        type(grad) in _PLAIN_TENSORS
        and grad.dtype in ITERATED
        and not grad.requires_grad  # autograd must see what is written
        and _fits(grad, shape, grad.dtype, device, positions=positions)
    )


def _fits_last(job: Job, dtype: torch.dtype, device: int) -> bool:
    last, plan = last_of(job), job.plan
    return (
        (last.V is job.V or _fits(last.V, job.V.shape, dtype, device))
        and _fits(last.u, plan.left, dtype, device)
        and _fits(last.sigma, plan.stack, dtype, device)
    )


def _fits_number(x: Any, device: int) -> bool:
    """Return True for a number, or a real tensor of shape () on the device or on the CPU."""
    if not isinstance(x, Tensor):
        return isinstance(x, (float, int))
    if x.is_cpu:  # read in each step, without waiting for the device
        return x.shape == () and not x.is_complex()
    return type(x) in _PLAIN_TENSORS and x.dtype in ITERATED and _fits(x, (), x.dtype, device)
