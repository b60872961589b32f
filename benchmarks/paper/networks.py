"""The paper's models by name, with weights that depend on the seed alone."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import models

from .data import Data

MODELS = ("vgg", "nin", "densenet-40", "densenet-22")


def build(name: str, data: Data, width: float, seed: int) -> nn.Module:
    """A model for these images, initialized after He et al., 2015; biases start at zero."""
    _, channels, size, _ = data.train_images.shape
    model = construct(name, channels, size, data.classes, width)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    return model


def construct(name: str, channels: int, size: int, classes: int, width: float) -> nn.Module:
    """VGGNet, NIN or a DenseNet."""
    if name == "vgg":
        return models.vgg_16(channels, size, classes, width)
    if name == "nin":
        return models.nin(channels, classes, width)
    kind, _, depth = name.partition("-")
    if kind != "densenet" or name not in MODELS:
        raise ValueError(f"no model is called {name!r}: {', '.join(MODELS)}")
    return models.densenet(int(depth), channels, classes, width)
