"""Networks whose weights and training steps are timed, written short: the usual architectures."""

from collections import OrderedDict
from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(i: int, o: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)


def activated(i: int, o: int, kernel: int) -> nn.Sequential:
    """Batch normalization and activation before the convolution, as in DenseNet."""
    return nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(inplace=True), conv(i, o, kernel))


def normalized(i: int, o: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Batch normalization after the convolution, as in VGG and ResNet."""
    return [conv(i, o, kernel, stride), nn.BatchNorm2d(o)]


class Dense(nn.Module):
    """A layer of DenseNet: what it computes joins what it got."""

    def __init__(self, channels: int, growth: int, bottleneck: bool) -> None:
        super().__init__()
        inner = 4 * growth if bottleneck else channels
        self.layers = activated(inner, growth, 3)
        if bottleneck:
            self.layers = nn.Sequential(activated(channels, inner, 1), self.layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def dense_net(
    stem: nn.Module, channels: int, blocks: list[int], growth: int, classes: int, bottleneck: bool
) -> nn.Sequential:
    """Return a DenseNet (Huang et al., 2017)."""
    layers = [stem]
    for block, count in enumerate(blocks):
        if block:
            narrow = channels // 2 if bottleneck else channels
            layers += [activated(channels, narrow, 1), nn.AvgPool2d(2)]
            channels = narrow
        for _ in range(count):
            layers.append(Dense(channels, growth, bottleneck))
            channels += growth
    features = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    parts = {"features": features, "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts, head=nn.Linear(channels, classes)))


def densenet(
    channels: int = 3, classes: int = 10, _: int = 32, width: float = 1.0, depth: int = 40
) -> nn.Sequential:
    """Return the one for small images: three blocks, 16 channels to start with, as in the paper."""
    start, blocks = scaled(16, width), [(depth - 4) // 3] * 3
    first = conv(channels, start, 3)
    return dense_net(first, start, blocks, scaled(12, width), classes, False)


def densenet_121() -> nn.Sequential:
    """For 224 × 224 images."""
    return dense_net(nn.Sequential(*stem()), 64, [6, 12, 24, 16], 32, 1000, True)


def stem() -> list[nn.Module]:
    """The first layers for large images, as in DenseNet and ResNet."""
    return [*normalized(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]


class Residual(nn.Module):
    """A block of a small ResNet: two convolutions beside a shortcut."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*normalized(i, o, 3, stride), nn.ReLU(), *normalized(o, o, 3))
        same = i == o and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.layers(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    def __init__(self, i: int, width: int, stride: int) -> None:
        super().__init__()
        o = 4 * width
        self.layers = nn.Sequential(
            *normalized(i, width, 1),
            nn.ReLU(inplace=True),
            *normalized(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *normalized(width, o, 1),
        )
        same = i == o and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*normalized(i, o, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.layers(x) + self.shortcut(x))


def resnet_50() -> nn.Sequential:
    """He et al., 2016, for 224 × 224 images."""
    layers, channels = stem(), 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for k in range(count):
            layers.append(Bottleneck(channels, width, 2 if k == 0 and width > 64 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def vgg_16(
    channels: int = 3, classes: int = 10, size: int = 32, width: float = 1.0, hidden: int = 512
) -> nn.Sequential:
    """Simonyan & Zisserman, 2015: 13 convolutions, here with batch normalization, and 3 layers."""
    layers: list[nn.Module] = []
    for published, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        wide = scaled(published, width)
        for _ in range(count):
            layers += [*normalized(channels, wide, 3), nn.ReLU(inplace=True)]
            channels = wide
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        size = ceil(size / 2)
    layers.append(nn.Flatten())
    features, hidden = channels * size**2, scaled(hidden, width)
    for _ in range(2):
        layers += [nn.Linear(features, hidden), nn.ReLU(inplace=True)]
        features = hidden
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


# Of each block of Network in Network the side of its first kernel, and the channels of its
# convolutions; all but the first are 1 × 1. One more after the last block gives the classes.
NIN_BLOCKS = ((5, (192, 160, 96)), (5, (192, 192, 192)), (3, (192, 192)))


def nin(channels: int = 3, classes: int = 10, _: int = 32, width: float = 1.0) -> nn.Sequential:
    """Return Network in Network (Lin et al., 2014): no batch normalization, but dropout."""
    layers: list[nn.Module] = []
    pools = ([], [nn.MaxPool2d(3, 2, 1), nn.Dropout()], [nn.AvgPool2d(3, 2, 1), nn.Dropout()])
    for (first, widths), pool in zip(NIN_BLOCKS, pools, strict=True):
        layers += pool
        for k, published in enumerate(widths):
            wide, side = scaled(published, width), 1 if k else first
            layers += [nn.Conv2d(channels, wide, side, padding=side // 2), nn.ReLU(inplace=True)]
            channels = wide
    last = nn.Conv2d(channels, classes, 1)
    return nn.Sequential(*layers, last, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def scaled(published: int, width: float) -> int:
    return max(1, round(published * width))


class GPT2(nn.Module):
    """Radford et al., 2019: 12 blocks of width 768; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(50257, 768), nn.Embedding(1024, 768)
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        block = nn.TransformerEncoderLayer(768, 12, 3072, **options)
        self.blocks = nn.TransformerEncoder(block, 12, nn.LayerNorm(768), False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, x.device)
        x = self.blocks(x, mask, is_causal=True)
        return functional.linear(x, self.tokens.weight).flatten(0, 1)


def weight_shapes(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights but embeddings, by name; they are never allocated."""
    with torch.device("meta"):
        weights = dict(make().named_parameters())
    layers = {name: w for name, w in weights.items() if not name.startswith(("tokens", "pos"))}
    return {name: tuple(weight.shape) for name, weight in layers.items() if weight.ndim > 1}
