"""What is timed in PyTorch. W and G are shared: their values do not matter here."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from spectral_torch import SpectralNormConstraint, SpectralNormRegularizer

from .cases import Case, by_formula, filled
from .report import OURS
from .timing import LeftOutError, Makers, Options, Step, require_memory

Tensors = dict[str, Tensor]
MOST_WORK = 5e10  # of an SVD, m·n·min(m, n)


def tensors(case: Case, device: str, seed: int) -> Tensors:
    dtype = getattr(torch, case.dtype)
    return {
        name: torch.from_numpy(filled(shape, seed)).to(device, dtype)
        for name, shape in case.shapes.items()
    }


def arrays(case: Case, device: str, _: str) -> tuple[Tensors, Tensors]:
    """Return W and G, or raise `LeftOutError`."""
    require_memory(2 * case.size, device)
    return tensors(case, device, 0), tensors(case, device, 1)


def peers(case: Case, device: str, weights: Tensors, grads: Tensors) -> Makers:
    return {
        OURS["torch"]: partial(adapter, weights, grads),
        "kernels=False": partial(adapter, weights, grads, kernels=False),
        "paper's formula": partial(by_formula, torch, weights, grads),
        "torch spectral_norm": partial(normalization, case, device, weights, grads),
        "matrix_norm(ord=2)": partial(svd, case, weights),
        "G.add_(W)": partial(floor, weights, grads),
    }


def variants(_: Case, device: str, weights: Tensors, grads: Tensors, common: Options) -> Makers:
    """Return the options of the regularizer: `add_gradients_`, then whole optimizer steps."""
    sgd = partial(optimizer_step, weights, grads)
    found: Makers = {n: partial(adapter, weights, grads, **one) for n, one in common.items()}
    return found | {
        "bound, idle": partial(bounded, weights, 1e6),
        "bound, acting": partial(bounded, weights, lambda step: 0.999**step),
        "channels-last": partial(convolutions, weights, grads, torch.channels_last, "oihw"),
        "transposed": partial(convolutions, weights, grads, torch.contiguous_format, "iohw"),
        "torch.compile": partial(compiled, weights, grads),
        "CUDA graph": partial(replayed, device, weights, grads),
        "SGD": partial(sgd, None),
        "SGD, attached": partial(sgd, {}),
        "SGD, not restored": partial(sgd, {"restore_gradients": False}),
        "SGD, GradScaler": partial(sgd, None, scaler=device),
        "SGD, GradScaler, attached": partial(sgd, {}, scaler=device),
    }


def adapter(weights: Tensors, grads: Tensors, **options: Any) -> Step:
    options = {"warmup_iters": 1, "layouts": layouts_of(weights)} | options
    step = SpectralNormRegularizer(parameters_of(weights, grads), **options).add_gradients_
    step()  # compiles what it compiles
    return step


def parameters_of(weights: Tensors, grads: Tensors) -> dict[str, nn.Parameter]:
    parameters = {name: nn.Parameter(w) for name, w in weights.items()}
    for name, parameter in parameters.items():
        parameter.grad = grads[name]
    return parameters


def layouts_of(weights: Tensors, layout: str = "oihw") -> dict[str, str]:
    return {name: layout for name, w in weights.items() if w.ndim == 4}


def bounded(weights: Tensors, bound: Any) -> Step:
    """Bound copies: they are scaled, by a bound that falls in each step."""
    copies = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
    options = {"warmup_iters": 1, "layouts": layouts_of(weights)}
    return SpectralNormConstraint(copies, bound, **options).constrain_


def convolutions(weights: Tensors, grads: Tensors, memory_format: Any, layout: str) -> Step:
    if not (layouts := layouts_of(weights, layout)):
        raise LeftOutError("no weight is a convolution")
    arrays = (
        {n: x.contiguous(memory_format=memory_format) if n in layouts else x for n, x in one}
        for one in (weights.items(), grads.items())
    )
    return adapter(*arrays, layouts=layouts)


def compiled(weights: Tensors, grads: Tensors) -> Step:
    step = torch.compile(adapter(weights, grads))
    try:
        step()
    except RuntimeError as error:  # where there is no compiler of C++
        raise LeftOutError(str(error).splitlines()[0]) from error
    return step


def replayed(device: str, weights: Tensors, grads: Tensors) -> Step:
    if device == "cpu":
        raise LeftOutError("no GPU")
    step, stream = adapter(weights, grads), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a capture needs a warm-up on its stream
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def optimizer_step(weights: Tensors, grads: Tensors, attached: Any, scaler: str = "") -> Step:
    """Step by a fused optimizer, at a rate and a scale that leave W and G as they are."""
    parameters, layouts = parameters_of(weights, grads), layouts_of(weights)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.0, fused=True)
    if attached is not None:
        SpectralNormRegularizer(parameters, layouts=layouts, **attached).attach(optimizer)
    if not scaler:
        return optimizer.step
    scaling = torch.amp.GradScaler(scaler, init_scale=1.0, growth_interval=2**30)
    scaling.scale(torch.zeros((), device=scaler))  # makes its tensors

    def step() -> None:
        scaling.step(optimizer)
        scaling.update()

    return step


def normalization(case: Case, device: str, weights: Tensors, grads: Tensors) -> Step:
    require_memory(3 * case.size, device)
    # A layer that is nothing but its weight.
    bare = [nn.ParameterDict({"weight": nn.Parameter(w)}) for w in weights.values()]
    layers = [*map(parametrizations.spectral_norm, bare)]
    originals = [layer.parametrizations.weight.original for layer in layers]
    upstream = list(grads.values())

    def step() -> None:
        # Through autograd as in training: gradients arrive where there were none.
        for original in originals:
            original.grad = None
        torch.autograd.backward([layer.weight for layer in layers], upstream)

    return step


def svd(case: Case, weights: Tensors) -> Step:
    if case.dtype == "bfloat16":
        raise LeftOutError("PyTorch has no SVD of bfloat16")
    if sum(m * n * min(m, n) for m, n in case.matrices) > MOST_WORK:
        raise LeftOutError("a call would take longer than 5 s or so")
    return lambda: [torch.linalg.matrix_norm(w.flatten(1), ord=2) for w in weights.values()]


def floor(weights: Tensors, grads: Tensors) -> Step:
    return partial(torch._foreach_add_, list(grads.values()), list(weights.values()))
