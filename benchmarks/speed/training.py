"""The regularizer's share of whole training steps, and its step as a replayed CUDA graph."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import models
from spectral_torch import SpectralNormRegularizer

from .cases import Case
from .peers_torch import regularizer_of, tensors
from .timing import WARM_UPS, Budget, Step, clock_of, interleaved


class Training(NamedTuple):
    name: str
    title: str
    make: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    batch: int


def images(side: int, classes: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda count: (torch.randn(count, 3, side, side), torch.randint(classes, (count,)))


def texts(count: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(50257, (count, 257))
    return text[:, :-1].contiguous(), text[:, 1:].flatten()


SMALL, LARGE = images(32, 10), images(224, 1000)
TRAININGS = (
    Training("densenet-40", "DenseNet-40, 32² images", models.densenet, SMALL, 64),
    Training("vgg-16", "VGG-16, 32² images", models.vgg_16, SMALL, 64),
    Training("gpt2-small", "GPT-2 small, 256 tokens", models.GPT2, texts, 2),
    Training("resnet-50", "ResNet-50, 224² images", models.resnet_50, LARGE, 32),
)


def share(training: Training, device: str, budget: Budget) -> dict[str, Any]:
    """Time a training step with the regularizer and without, and the regularizer in between."""
    torch.manual_seed(0)
    model = training.make().to(device)
    data, target = (tensor.to(device) for tensor in training.draw(training.batch))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    regularizer = SpectralNormRegularizer(model, factor=1e-4, warmup_iters=1)

    def step(before: Step) -> None:
        optimizer.zero_grad()
        cross_entropy(model(data), target).backward()
        before()  # where `attach` would call the regularizer
        optimizer.step()

    steps = {
        "without": lambda: step(lambda: None),
        "with": lambda: step(regularizer.add_gradients_),
        # After a whole training step, which has put other things into the caches.
        "regularizer": regularizer.add_gradients_,
    }
    timings = interleaved(steps, budget, clock_of(device))
    own, whole = timings["regularizer"]["median_ms"], timings["with"]["median_ms"]
    about = {"title": f"{training.title}, batch {training.batch}"}
    about |= {"weights": len(regularizer.sigmas()), "steps": timings}
    return {**about, "regularizer_ms": own, "share": own / whole}


def replayed(budget: Budget) -> dict[str, Any]:
    """Time the step for DenseNet-40 as a CUDA graph, where launching kernels costs nothing."""
    case = Case("graph", "DenseNet-40", models.weight_shapes(models.densenet))
    regularizer = regularizer_of(tensors(case, "cuda", 0), tensors(case, "cuda", 1))
    try:
        graph = captured(regularizer.add_gradients_)
    except RuntimeError as error:
        return {"left_out": f"no capture: {str(error).splitlines()[0]}"}
    steps = {"replay": graph.replay, "launched": regularizer.add_gradients_}
    timings = interleaved(steps, budget, clock_of("cuda"))
    return {"weights": len(case.shapes), "steps": timings}


def captured(step: Step) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # a capture needs warm-ups on another stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
