"""The regularizer's step as a CUDA graph, replayed: what it costs where launching costs nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks import models
from spectral_torch import SpectralNormRegularizer

from .cases import Case
from .device import clock_of
from .peers_torch import tensors
from .timing import Budget, interleaved

WARM_UPS = 3  # on a stream of its own, as a capture needs


def replayed(budget: Budget) -> dict[str, Any]:
    """DenseNet-40, with gradients that stay where they are."""
    case = Case("graph", "DenseNet-40", models.weight_shapes(models.densenet_40))
    weights, grads = tensors(case, "cuda", 0), tensors(case, "cuda", 1)
    parameters = {name: nn.Parameter(w) for name, w in weights.items()}
    for name, parameter in parameters.items():
        parameter.grad = grads[name]
    regularizer = SpectralNormRegularizer(parameters, warmup_iters=1)
    try:
        graph = captured(regularizer)
    except RuntimeError as error:
        return {"left_out": f"no capture: {str(error).splitlines()[0]}"}
    steps = {"replay": graph.replay, "launched": regularizer.add_gradients_}
    timings = interleaved(steps, budget, clock_of("cuda"))
    return {
        "weights": len(weights),
        "steps": {name: timing.as_json() for name, timing in timings.items()},
    }


def captured(regularizer: SpectralNormRegularizer) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            regularizer.add_gradients_()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        regularizer.add_gradients_()
    return graph
