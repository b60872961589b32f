"""The bound of the usual architectures, in small: above Jacobians and differences, or named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from spectral_torch import lipschitz_bound  # noqa: E402


def jacobian_norm(model, x):
    J = torch.func.jacrev(lambda y: model(y).reshape(-1))(x)
    return float(torch.linalg.matrix_norm(J.detach().reshape(len(J), -1), 2))


def check(model, x, points=2):
    """Check the bound against Jacobians, and differences of near and of far points."""
    found = lipschitz_bound(model, x, max_iter=5)
    assert not found.unbounded, found
    assert found.lower <= found.upper
    for i in range(points):
        y = x if i == 0 else 2 * torch.randn_like(x)
        assert jacobian_norm(model, y) <= found.upper * (1 + 1e-9), found
        for size in (1e-4, 1.0):
            step = size * torch.randn_like(x)
            with torch.no_grad():
                moved = torch.linalg.vector_norm(model(y + step) - model(y))
            assert moved <= found.upper * torch.linalg.vector_norm(step) * (1 + 1e-9)
    return found


def conv(n, m, k=3, stride=1, **options):
    return nn.Conv2d(n, m, k, stride, k // 2, bias=False, **options)


class Block(nn.Module):
    """The block of a ResNet."""

    def __init__(self, n, m, stride):
        super().__init__()
        self.inner = nn.Sequential(
            conv(n, m, 3, stride),
            nn.BatchNorm2d(m),
            nn.ReLU(inplace=True),
            conv(m, m),
            nn.BatchNorm2d(m),
        )
        self.down = nn.Identity()
        if stride > 1 or n != m:
            self.down = nn.Sequential(conv(n, m, 1, stride), nn.BatchNorm2d(m))

    def forward(self, x):
        out = self.inner(x)
        out += self.down(x)
        return F.relu(out, inplace=True)


def resnet():
    stages = [Block(4, 4, 1), Block(4, 4, 1), Block(4, 8, 2), Block(8, 8, 1)]
    stem = [conv(3, 4, 7, 2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(
        *stem, *stages, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(1), nn.Linear(8, 3)
    )


def vgg():
    return nn.Sequential(
        *[conv(3, 4), nn.ReLU(True), conv(4, 4), nn.ReLU(True), nn.MaxPool2d(2)],
        *[conv(4, 8), nn.ReLU(True), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten()],
        *[nn.Linear(32, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 3)],
    )


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        layers = [(nn.BatchNorm2d(n), nn.ReLU(), conv(n, 2)) for n in (3, 5, 7)]
        self.layers = nn.ModuleList(nn.Sequential(*layer) for layer in layers)
        self.transition = nn.Sequential(nn.BatchNorm2d(9), nn.ReLU(), conv(9, 4, 1))

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.avg_pool2d(self.transition(torch.cat(features, 1)), 2)
        return x.mean([2, 3])


class ConvNeXt(nn.Module):
    """Depthwise convolution, a norm over channels that are last, two linear maps, a scale."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 4, 2, 2), conv(4, 4, 7, groups=4)
        self.norm, self.up, self.down = norm, nn.Linear(4, 16), nn.Linear(16, 4)
        self.gamma = nn.Parameter(0.1 * torch.ones(4))

    def forward(self, x):
        x = self.stem(x)
        y = self.depthwise(x)
        if isinstance(self.norm, nn.LayerNorm):
            y = self.norm(y.permute(0, 2, 3, 1))
        else:
            y = self.norm(y).permute(0, 2, 3, 1)
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class UNet(nn.Module):
    def __init__(self, up):
        super().__init__()
        self.first, self.second = conv(3, 4), conv(4, 8)
        self.up, self.last = up, conv(8 if isinstance(up, nn.ConvTranspose2d) else 12, 2)

    def forward(self, x):
        a = torch.relu(self.first(x))
        b = torch.relu(self.second(F.max_pool2d(a, 2)))
        return self.last(torch.cat([a, self.up(b)], dim=1))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 4, 4)
        self.tokens = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.channels = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(x)
        return x.mean(dim=1)


def autoencoder():
    return nn.Sequential(
        *[nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 2, 3, 2, 1), nn.Tanh()],
        *[nn.ConvTranspose2d(2, 4, 3, 2, 1, output_padding=1), nn.BatchNorm2d(4), nn.ReLU()],
        *[nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Sigmoid()],
    )


def channels_norm():
    return nn.LayerNorm(4, eps=1e-2)


MODELS = {
    "ResNet": resnet,
    "VGG": vgg,
    "DenseNet": DenseNet,
    "ConvNeXt": lambda: ConvNeXt(channels_norm()),
    "ConvNeXt, GroupNorm": lambda: ConvNeXt(nn.GroupNorm(2, 4, eps=1e-2)),
    "U-Net": lambda: UNet(nn.ConvTranspose2d(8, 4, 2, 2)),
    "U-Net, resized": lambda: UNet(nn.Upsample(scale_factor=2, mode="bilinear")),
    "Mixer": Mixer,
    "autoencoder": autoencoder,
}


@pytest.mark.parametrize("name", MODELS)
def test_bound_of_an_architecture(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.3, 2.0)
            module.weight.data.normal_()
    check(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))


class Encoder(nn.Module):
    """One block of a ViT, its attention written out or not."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.qkv, self.norm = fused, nn.Linear(4, 12), nn.LayerNorm(4)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        if self.fused:
            return x + F.scaled_dot_product_attention(q, k, v)
        return x + (q @ k.transpose(1, 2) / 2).softmax(-1) @ v


class Recurrent(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        out = self.cell(x)
        return out[0] if isinstance(out, tuple) else out


UNBOUNDED = {
    "attention": (Encoder(True), (1, 3, 4), "attention"),
    "attention, spelled out": (Encoder(False), (1, 3, 4), "both depend on the input"),
    "GRU": (Recurrent(nn.GRU(4, 3)), (2, 1, 4), "gru"),
    "LSTM": (Recurrent(nn.LSTM(4, 3)), (2, 1, 4), "lstm"),
    "GRU cell": (Recurrent(nn.GRUCell(4, 3)), (1, 4), "gru_cell"),
    "LSTM cell": (Recurrent(nn.LSTMCell(4, 3)), (1, 4), "lstm_cell"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_has_no_bound_is_named(name):
    model, shape, reason = UNBOUNDED[name]
    found = lipschitz_bound(model.eval(), torch.randn(shape), max_iter=0)
    assert found.upper == float("inf")
    assert reason in str(dict(found.unbounded)), found


def square(W, n):
    return W.reshape(-1)[: n * n].reshape(n, n)


STEPS = {
    "conv": lambda x, W: F.conv2d(x, W, padding=1),
    "residual": lambda x, W: x + F.conv2d(x, W, padding=1).tanh(),
    "concat": lambda x, W: torch.cat([F.relu(x), F.conv2d(x, W, padding=1)], 1)[:, ::2],
    "stack": lambda x, W: torch.stack([x, 2 * x.flip(1)], 1).amax(1),
    "max pool": lambda x, W: F.pad(F.max_pool2d(x, 3, 2, 1), (0, 1, 1, 0)),
    "mean pool": lambda x, W: F.interpolate(F.avg_pool2d(x, 2, ceil_mode=True), scale_factor=2),
    "turned": lambda x, W: x.transpose(1, 3).reshape(x.shape).roll(1, 2),
    "shuffled": lambda x, W: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)[:, torch.arange(4) // 2],
    "split": lambda x, W: sum(x.chunk(2, 1)).repeat(1, 2, 1, 1),
    "added": lambda x, W: x.add(W[:, :, :1, :1].sum(), alpha=2).sub_(x.mean(1, keepdim=True)),
    "expanded": lambda x, W: x.mean((2, 3), keepdim=True).expand_as(x) + 0.5 * x,
    "larger": lambda x, W: torch.maximum(x[:, :1], x).clamp(-1, 1),
    "linear": lambda x, W: x @ square(W, x.shape[-1]),
    "norm": lambda x, W: F.group_norm(x, 2, eps=0.1),
}


@st.composite
def graphs(draw):
    """Return a random graph of steps on images of four channels, whose results may be added."""
    seed = draw(st.integers(0, 10_000))
    names = draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5))
    joins = draw(st.lists(st.integers(0, 4), min_size=5, max_size=5))
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(4, 4, 3, 3, generator=generator, dtype=torch.float64) / 3 for _ in names]

    class Graph(nn.Module):
        def forward(self, x):
            values = [x]
            for name, join, W in zip(names, joins, weights, strict=False):
                x = STEPS[name](x, W)
                earlier = values[join % len(values)]
                if join < 3 and earlier.shape == x.shape:
                    x = x - earlier
                values.append(x)
            return x.flatten(1)

    return Graph()


@given(graphs())
@settings(max_examples=6, deadline=None)
def test_random_graphs(graph):
    torch.manual_seed(0)
    check(graph, torch.randn(1, 4, 4, 4, dtype=torch.float64))


@pytest.mark.thorough
@given(graphs())
@settings(max_examples=400, deadline=None)
def test_many_random_graphs(graph):
    torch.manual_seed(0)
    check(graph, torch.randn(1, 4, 4, 4, dtype=torch.float64), points=4)
