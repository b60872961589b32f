"""Bound the Lipschitz constant of a PyTorch model, from above and below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import spectral_core as sc
from spectral_core.errors import check_int, listed, shown

from ._gains_of_maps import HANDLERS
from ._walk import Walk, tensors_in


def lipschitz_bound(
    model: nn.Module,
    example: Tensor | Sequence[Tensor],
    *,
    gains: Mapping[str, float] | None = None,
    eclipse: bool = True,
    max_iter: int = 100,
    tol: float = 1e-6,
) -> sc.NetworkBound:
    """Bound how far the outputs of a model move when its input moves, in Euclidean norms.

    The model runs once on ``example``, in evaluation mode, and every function that it calls is
    followed. Gains multiply along a path, and add where paths meet. A convolution counts with its
    norm as a map of images of any size, a batch normalization as part of the linear map before it.

    Parameters
    ----------
    model : torch.nn.Module
        In evaluation mode, if it has batch normalization. Dropout counts as nothing.
    example : tensor, or sequence of tensors
        Floating-point inputs with an axis of samples. The bound holds for all inputs of this size.
    gains : mapping of name to float, optional
        Lipschitz constants that you know of modules, by name: the walk does not look into these.
        1.0 leaves one out.
    eclipse : bool
        Whether to compute the bound by quadratic forms too, for a chain of layers of at most 2048
        elements of a sample: see `spectral_core.chain_bound`.
    max_iter : int
        Products with the Jacobian at the example for the lower bound. With 0 there is none.
    tol : float
        Relative distance of a convolution's bounds.

    Returns
    -------
    spectral_core.NetworkBound
        What has no bound is in ``unbounded`` with the reason: attention, products of two values
        that depend on the input, and every function that the walk does not know. The bound is then
        infinite. A layer, group or RMS normalization counts with max|γ|/√eps.

    Raises
    ------
    spectral_core.ArgumentError
        If a batch normalization is in training mode, or an option is out of its range.
    spectral_core.DTypeError
        If an input is not floating-point.
    spectral_core.NamesError
        If ``gains`` names no module.

    Notes
    -----
    The bound holds for exact arithmetic on the stored numbers, and its own rounding is accounted
    for. Softplus counts with slopes in [0, 1], although PyTorch jumps by 2e-9 at its threshold. A
    branch of Python code that depends on values of the input is found, and named.

    The mode, the buffers, the gradients and the random numbers are as before when it returns.

    Examples
    --------
    >>> import torch, spectral_torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    >>> for layer in (model[0], model[2]):
    ...     _ = layer.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> bound = spectral_torch.lipschitz_bound(model, torch.ones(1, 2))
    >>> round(bound.upper, 4), round(bound.lower, 1) <= 9.0
    (9.0, True)
    """
    inputs = [example] if isinstance(example, Tensor) else list(example)
    model = _unwrapped(model)
    given = _checked(model, inputs, gains)
    max_iter = check_int(max_iter, "max_iter", 0)
    walk = Walk(model, HANDLERS, given)
    walk.tol = tol
    with torch.inference_mode(False), _as_evaluated(model, inputs):
        with torch.no_grad():
            copies = [x.detach().clone() for x in inputs]
            outputs = list(tensors_in(walk.run(model, copies)))
        if not outputs:
            raise sc.ArgumentError("the model gives no tensor that the walk can find in its output")
        values = walk.outputs(outputs)
        note = ""
        lower = None
        if max_iter:
            lower, note = _jacobian(model, inputs, max_iter)
    if note:
        walk.ledger.notes.append(note)
    return walk.ledger.result(values, lower=lower, eclipse=eclipse)


def _unwrapped(model: Any) -> nn.Module:
    """Return the plain model of `torch.compile` and of the parallel wrappers."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    if not isinstance(model, nn.Module):
        raise sc.DTypeError(f"model is a {type(model).__name__}: it must be a torch.nn.Module")
    return model


def _checked(
    model: nn.Module, inputs: Sequence[Any], gains: Mapping[str, float] | None
) -> dict[str, float]:
    """Check the arguments; return the gains."""
    for x in inputs:
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise sc.DTypeError(
                f"example is {kind}: it must be floating-point; of a model that starts with an "
                "embedding, give the part behind it"
            )
    if not inputs or any(x.numel() == 0 for x in inputs):
        raise sc.ShapeError("example is empty: give one sample at least")
    names = {name for name, _ in model.named_modules()}
    given = {name: float(value) for name, value in (gains or {}).items()}
    if unknown := sorted(set(given) - names):
        raise sc.NamesError(f"gains names {listed(unknown)}, but the model has no such module")
    for name, value in given.items():
        if not 0 <= value < inf:
            raise sc.ArgumentError(f"gains[{name!r}] must be a number ≥ 0, not {shown(value)}")
    batch_norms = [
        name or type(model).__name__
        for name, module in model.named_modules()
        if module.training and _differs_in_training(module)
    ]
    if batch_norms:
        raise sc.ArgumentError(
            f"{listed(batch_norms)} are in training mode, where they normalize by the statistics "
            "of the batch or the sample, not by those they keep: call model.eval() before, and "
            "model.train() after"
        )
    return given


def _differs_in_training(module: nn.Module) -> bool:
    """Return True for a normalization that uses other statistics in evaluation."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    return isinstance(module, nn.modules.batchnorm._NormBase)


@contextmanager
def _as_evaluated(model: nn.Module, inputs: Sequence[Tensor]) -> Iterator[None]:
    """Run the model in evaluation mode; restore its modes, buffers and the random numbers."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {x.device for x in inputs if x.device.type == "cuda"}
    try:
        for module, _ in modes:
            module.training = False
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _jacobian(
    model: nn.Module, inputs: Sequence[Tensor], max_iter: int
) -> tuple[float | None, str]:
    """Return the largest singular value of the Jacobian at the inputs, or why there is none."""
    sizes = [x.numel() for x in inputs]

    def flat(x: Tensor) -> Tensor:
        parts = torch.split(x, sizes)
        out = model(*(part.reshape(y.shape) for part, y in zip(parts, inputs, strict=True)))
        return torch.cat([y.reshape(-1) for y in tensors_in(out) if y.dtype.is_floating_point])

    point = torch.cat([x.detach().reshape(-1) for x in inputs])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(point.shape, generator=generator, dtype=torch.float64).to(point)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the one with a second derivative
            out, pull = torch.func.vjp(flat, point)  # type: ignore[misc]
            # The derivative of w ↦ Jᵀw is J: not every function has a forward derivative.
            zero = torch.zeros_like(out)
            _, push = torch.func.vjp(lambda w: pull(w)[0], zero)  # type: ignore[misc]
            found = sc.operator_norm(
                lambda v: push(v)[0].detach(),
                lambda w: pull(w)[0].detach(),
                start,
                tol=1e-6,
                max_iter=max_iter,
            )
    except (RuntimeError, NotImplementedError, sc.SpectralError) as error:
        reason = str(error).partition("\n")[0]
        return None, f"No Jacobian: {reason}"
    return float(found.sigma), ""
