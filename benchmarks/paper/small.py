"""Small networks for images of one channel, which two cores train to the end within minutes.

The first two have no batch normalization, so σ of their weights bounds what they amplify.
"""

from itertools import pairwise
from math import ceil

from torch import nn

from benchmarks.models import normalized, scaled


def dense(sizes: list[int]) -> list[nn.Module]:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    return layers[:-1]


def mlp(channels: int, classes: int, size: int, width: float = 1.0) -> nn.Sequential:
    """Return a perceptron with two hidden layers of 256."""
    wide = scaled(256, width)
    return nn.Sequential(nn.Flatten(), *dense([channels * size**2, wide, wide, classes]))


def lenet(channels: int, classes: int, size: int, width: float = 1.0) -> nn.Sequential:
    """Return a network of LeNet's size: two convolutions with stride 2, and three layers.

    Strides in place of pooling: on a CPU, LeNet-5's pooled planes cost more than its products.
    """
    first, second, side = scaled(8, width), scaled(16, width), ceil(ceil(size / 2) / 2)
    layers: list[nn.Module] = []
    for inputs, outputs in ((channels, first), (first, second)):
        layers += [nn.Conv2d(inputs, outputs, 5, 2, 2), nn.ReLU(inplace=True)]
    sizes = [second * side**2, scaled(120, width), scaled(84, width), classes]
    return nn.Sequential(*layers, nn.Flatten(), *dense(sizes))


def nin_bn(channels: int, classes: int, _: int, width: float = 1.0) -> nn.Sequential:
    """Return a small Network in Network with batch normalization in place of dropout."""
    layers: list[nn.Module] = []
    for published, side in ((192, 5), (192, 5), (192, 3)):
        wide = scaled(published, width)
        layers += [*normalized(channels, wide, side, 2), nn.ReLU(inplace=True)]
        layers += [*normalized(wide, wide, 1), nn.ReLU(inplace=True)]
        channels = wide
    head = [nn.Conv2d(channels, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head)


def vgg_7(channels: int, classes: int, size: int, width: float = 1.0) -> nn.Sequential:
    """Return four convolutions with batch normalization, as in VGG, and three layers."""
    layers: list[nn.Module] = []
    for published, count in ((64, 1), (128, 1), (256, 2)):
        wide = scaled(published, width)
        for _ in range(count):
            layers += [*normalized(channels, wide, 3), nn.ReLU(inplace=True)]
            channels = wide
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        size = ceil(size / 2)
    hidden = scaled(512, width)
    return nn.Sequential(
        *layers, nn.Flatten(), *dense([channels * size**2, hidden, hidden, classes])
    )
