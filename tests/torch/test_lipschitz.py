"""A model's bound is above its Jacobians, exact where it is linear, and names what has none."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812
from torch.nn.utils import parametrizations, prune  # noqa: E402

import spectral_core as sc  # noqa: E402
from spectral_torch import lipschitz_bound  # noqa: E402


def jacobian_norm(model, x):
    """Return the largest singular value of the dense Jacobian at a batch."""
    J = torch.func.jacrev(lambda y: model(y).reshape(-1))(x.double())
    return float(torch.linalg.matrix_norm(J.detach().reshape(len(J), -1), 2))


def settled(model, *shape):
    """Return the model in float64 and evaluation mode, its batch norms with random statistics."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_var is not None:
            module.running_var.uniform_(0.2, 2.0)
            module.running_mean.normal_()
            if module.affine:
                module.weight.data.normal_()
    return model.eval()


def check(model, x, points=2, **options):
    """Check the bound against Jacobians at random points; return it."""
    found = lipschitz_bound(model, x, **options)
    assert not found.unbounded, found
    for i in range(points):
        exact = jacobian_norm(model, x if i == 0 else 3 * torch.randn_like(x))
        assert exact <= found.upper * (1 + 1e-9), found
        if i == 0 and found.lower is not None:
            assert found.lower <= exact * (1 + 1e-9)
    return found


class Calls(nn.Module):
    """A function of tensors as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Residual(nn.Module):
    def __init__(self, inner, shortcut, in_place):
        super().__init__()
        self.inner, self.shortcut, self.in_place = inner, shortcut, in_place

    def forward(self, x):
        y = self.inner(x)
        if self.in_place:
            y += self.shortcut(x)
            return F.relu(y, inplace=True)
        return torch.relu(y + self.shortcut(x))


class Concat(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts], dim=1)


def _in_place(activation):
    return getattr(activation, "inplace", False)


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.2),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.ELU(1.5),
    nn.SELU(),
    nn.CELU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.Hardsigmoid(),
    nn.Hardtanh(-1, 2),
    nn.ReLU6(),
    nn.PReLU(init=-1.5),
    nn.RReLU(),
    nn.Softsign(),
    nn.LogSigmoid(),
    nn.Tanhshrink(),
    nn.Softshrink(),
    nn.Threshold(0.5, 0.5),
    nn.Identity(),
    nn.Dropout(0.5),
]
# PyTorch has no gradient where a ReLU in place follows an activation that keeps its result.
SAFE = [one for one in ACTIVATIONS if not isinstance(one, nn.RReLU) and not _in_place(one)]
MODES = ["zeros", "circular", "reflect", "replicate"]


@st.composite
def image_models(draw):
    """Return a random model of 6×6 images, with its seed."""
    torch.manual_seed(draw(st.integers(0, 10_000)))
    channels, parts = 2, []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["conv", "residual", "concat", "transposed", "depthwise"]))
        width = draw(st.sampled_from([2, 4]))
        mode = draw(st.sampled_from(MODES))
        options = {"padding": 1, "padding_mode": mode, "bias": draw(st.booleans())}
        if kind == "transposed":
            parts += [
                nn.ConvTranspose2d(
                    channels, width, 3, padding=1, groups=draw(st.sampled_from([1, 2]))
                )
            ]
        elif kind == "depthwise":
            width = channels
            parts += [nn.Conv2d(channels, width, 3, groups=channels, **options)]
        else:
            conv = nn.Conv2d(channels, width, 3, **options)
            if kind == "conv":
                parts += [conv]
            elif kind == "residual":
                shortcut = nn.Identity() if width == channels else nn.Conv2d(channels, width, 1)
                parts += [Residual(conv, shortcut, draw(st.booleans()))]
            else:
                parts += [Concat(conv, nn.Conv2d(channels, width, 1))]
                width *= 2
        channels = width
        if draw(st.booleans()):
            parts += [nn.BatchNorm2d(channels)]
        parts += [copy.deepcopy(draw(st.sampled_from(SAFE)))]
    parts += [
        draw(
            st.sampled_from(
                [
                    nn.MaxPool2d(2),
                    nn.MaxPool2d(3, 2, 1),
                    nn.AvgPool2d(3, 2, 1),
                    nn.AdaptiveAvgPool2d(1),
                    nn.AdaptiveMaxPool2d(4),
                    nn.Identity(),
                ]
            )
        )
    ]
    parts += [nn.Flatten()]
    features = nn.Sequential(*parts).eval()
    with torch.no_grad():
        n = features(torch.zeros(1, 2, 6, 6)).shape[1]
    return settled(nn.Sequential(*features, nn.Linear(n, 3)))


@given(image_models())
@settings(max_examples=12, deadline=None)
def test_bound_is_above_every_jacobian(model):
    check(model, torch.randn(1, 2, 6, 6, dtype=torch.float64), max_iter=5)


@pytest.mark.thorough
@given(image_models())
@settings(max_examples=500, deadline=None)
def test_bound_is_above_every_jacobian_of_many_models(model):
    check(model, torch.randn(1, 2, 6, 6, dtype=torch.float64), points=8, max_iter=5)


@given(
    st.integers(0, 10_000),
    st.lists(st.integers(1, 8), min_size=2, max_size=5),
    st.lists(st.sampled_from(ACTIVATIONS), min_size=4, max_size=4),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_chain_of_dense_layers(seed, widths, activations, normalized):
    torch.manual_seed(seed)
    parts = []
    for n, m, activation in zip(widths, widths[1:], activations, strict=False):
        parts += [
            nn.Linear(n, m),
            *([nn.BatchNorm1d(m)] if normalized else []),
            copy.deepcopy(activation),
        ]
    model = settled(nn.Sequential(*parts))
    found = check(model, torch.randn(2, widths[0], dtype=torch.float64), points=6, max_iter=5)
    assert found.eclipse is not None
    assert found.log10_upper <= found.log10_product + 1e-9


def test_linear_model_has_its_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, stride=2),
        nn.BatchNorm2d(3),
        nn.AvgPool2d(2),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.BatchNorm1d(8),
        nn.Linear(8, 4),
    )
    model, x = settled(model), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    found = check(model, x, points=1)
    exact = jacobian_norm(model, x[:1])
    assert found.upper == pytest.approx(exact, rel=1e-8)
    assert found.lower == pytest.approx(exact, rel=1e-4)
    assert "BatchNorm" in str(found)


def test_batch_norm_is_part_of_the_layer_before():
    """A batch norm that cancels its layer's scale leaves no trace, however large the scale is."""
    layer, norm = nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, eps=0.0)
    layer.weight.data = torch.diag(torch.tensor([1.0, 100.0]))
    norm.running_var.copy_(torch.tensor([1.0, 1e4]))
    found = lipschitz_bound(nn.Sequential(layer, norm).eval(), torch.randn(1, 2))
    assert found.upper == pytest.approx(1.0, rel=1e-6)
    alone = lipschitz_bound(nn.Sequential(nn.Identity(), norm).eval(), torch.randn(1, 2))
    assert alone.upper == pytest.approx(1.0, rel=1e-6)


def test_residual_and_concatenation():
    class Model(nn.Module):
        def forward(self, x):
            y = 3 * x + x / 2
            return torch.stack([y, x, torch.ones_like(x)])

    assert lipschitz_bound(Model(), torch.randn(1, 4)).upper == pytest.approx((3.5**2 + 1) ** 0.5)


def spread(x, size):
    """Return a sample near which a normalization is steep, and one far from it."""
    return torch.cat([size * x, 1 + 1e-4 * x])


NORMS = [
    (nn.LayerNorm(6), 6),
    (nn.LayerNorm([3, 2], elementwise_affine=False), (3, 2)),
    (nn.GroupNorm(2, 6), (6, 5)),
    (nn.InstanceNorm1d(3, affine=True), (3, 5)),
    (nn.RMSNorm(6), 6),
    (nn.RMSNorm(6, eps=1e-3), 6),
    (Calls(lambda x: F.layer_norm(x, normalized_shape=(6,), eps=1e-3)), 6),
    (Calls(lambda x: F.group_norm(x, num_groups=2, eps=1e-3)), (6, 5)),
    (Calls(lambda x: torch.layer_norm(x, [6], None, None, 1e-3)), 6),
    (Calls(lambda x: torch.instance_norm(x, *[None] * 4, True, 0.1, 1e-3, False)), (3, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), NORMS, ids=lambda p: type(p).__name__)
def test_normalization_by_a_sample_has_its_steepest_slope(layer, shape):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    for weight in layer.parameters():
        weight.data.normal_()
    shape = (shape,) if isinstance(shape, int) else shape
    x = torch.randn(1, *shape, dtype=torch.float64)
    found = check(layer, spread(x, 1.0), points=1)
    assert "max|γ|/√eps" in str(found)
    # At a sample without deviation the slope is that of the bound, but for the mean.
    flat = 0 * x if isinstance(layer, nn.RMSNorm) else 0 * x + 3.0
    exact = jacobian_norm(layer, flat)
    assert exact <= found.upper * (1 + 1e-9)
    assert exact >= found.upper * 0.5


def test_batch_norm_in_the_order_of_torch():
    scale, mean, var = (torch.tensor(x).double() for x in ([2.0, 3.0], [0.1, 0.2], [4.0, 0.25]))
    arguments = scale, scale, mean, var, False, 0.1, 0.0, False
    found = check(Calls(lambda x: torch.batch_norm(x, *arguments)), torch.randn(2, 2).double())
    assert found.upper == pytest.approx(6.0)


def test_constants_that_are_added_keep_the_chain():
    torch.manual_seed(0)
    W, b = torch.randn(6, 6).double(), torch.randn(6).double()

    def network(x):
        x = b + x @ W + 1
        x -= b
        x = torch.relu(x)
        return (x @ W.T).sub(b, alpha=3)

    found = check(Calls(network), torch.randn(2, 6, dtype=torch.float64))
    expected = sc.chain_bound([W.numpy().T, W.numpy()])
    assert found.log10_eclipse == pytest.approx(expected.log10_upper, abs=1e-9)
    mixed = {
        "broadcast": lambda x: x[:, :1] + b,
        "swapped": lambda x: torch.sub(b, x @ W, alpha=3),
        "scaled": lambda x: torch.add(b, x, alpha=3),
    }
    for function in mixed.values():
        check(Calls(function), torch.randn(1, 6, dtype=torch.float64))


PLACES = {
    "twice": (lambda x: x[:, torch.tensor([0, 0, 2])], 2**0.5),
    "list": (lambda x: x[:, [2, 0, 1]], 1.0),
    "mask": (lambda x: x[:, torch.tensor([True, False, True])], 1.0),
    "index_select": (lambda x: x.index_select(1, torch.tensor([1, 1, 1])), 3**0.5),
    "gather": (lambda x: torch.gather(x, 1, torch.tensor([[1, 1], [0, 2]])), 2**0.5),
    "sort": (lambda x: x.sort(dim=1).values, 1.0),
    "topk": (lambda x: torch.topk(x, 2, dim=1)[0], 1.0),
    "median": (lambda x: x.median(dim=1).values, 1.0),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_and_orders(name):
    function, gain = PLACES[name]
    x = torch.randn(2, 3, dtype=torch.float64)
    assert check(Calls(function), x, points=4).upper == pytest.approx(gain)


def test_product_of_a_chain_counts_what_repeats():
    """For a chain, the product of the rows of the table is a bound too."""
    functions = [
        lambda x: F.pad(x[:, None], (2, 2), mode="circular").relu(),
        lambda x: x[:, None].expand(1, 4, 3),
        lambda x: x[:, torch.tensor([0, 0, 0])],
    ]
    for function in functions:
        found = check(Calls(function), torch.randn(1, 3, dtype=torch.float64))
        assert found.log10_product >= found.log10_upper - 1e-12


POOLS = [
    (nn.MaxPool2d(2), 1.0),
    (nn.MaxPool2d(3, 1), 3.0),
    (nn.MaxPool2d(3, 2), 2.0),
    (nn.AvgPool2d(2), 0.5),
    (nn.AdaptiveAvgPool2d(1), 1 / 8),
    (nn.Upsample(scale_factor=2), 2.0),
    (nn.ZeroPad2d(1), 1.0),
    (nn.ReplicationPad2d(1), 2.0),
    (nn.PixelShuffle(2), 1.0),
    (nn.LogSoftmax(dim=1), 2.0),
    (nn.Softmax(dim=1), 0.5),
]


@pytest.mark.parametrize(("layer", "gain"), POOLS, ids=lambda p: type(p).__name__)
def test_closed_forms(layer, gain):
    found = check(layer, torch.randn(1, 4, 8, 8, dtype=torch.float64), points=1)
    assert found.upper == pytest.approx(gain, rel=1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_slopes_of_activations(activation):
    activation = copy.deepcopy(activation).double().eval()
    found = lipschitz_bound(activation, torch.randn(1, 4, dtype=torch.float64), max_iter=0)
    x = torch.cat([torch.linspace(-9, 9, 40_001), torch.tensor([-1e-9, 1e-9])]).double()
    x = x.sort().values
    y = activation(x.clone()).detach()
    steepest = float((y.diff() / x.diff()).abs().max())
    assert found.upper * (1 - 1e-3) <= steepest <= found.upper * (1 + 1e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_each_dimension(n, transposed):
    torch.manual_seed(n)
    name = f"Conv{'Transpose' if transposed else ''}{n}d"
    for groups, stride, dilation in [(1, 1, 1), (2, 2, 1), (2, 1, 2)]:
        layer = getattr(nn, name)(2, 4, 3, stride, 1, groups=groups, dilation=dilation)
        norm = getattr(nn, f"BatchNorm{n}d")(4)
        model = settled(nn.Sequential(layer, norm))
        x = torch.randn(1, 2, *[9 - 2 * n] * n, dtype=torch.float64)
        found = check(model, x, points=1, max_iter=0)
        # The chain's bound is that of the matrix at this size, the product that of all sizes.
        assert found.eclipse == pytest.approx(jacobian_norm(model, x), rel=1e-9)
        assert found.upper <= 10**found.log10_product


@pytest.mark.parametrize("number", [0.3, -3.3, 1e39])
def test_numbers_of_python_are_not_rounded_to_the_default_dtype(number):
    found = lipschitz_bound(Calls(lambda x: x * number), torch.ones(1, 2, dtype=torch.float64))
    assert abs(number) <= found.upper <= abs(number) * (1 + 1e-12)


def test_circular_padding_has_the_norm_at_the_size():
    layer = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    found = check(layer, x, eclipse=False)
    assert found.upper == pytest.approx(jacobian_norm(layer, x), rel=1e-5)


def test_weights_are_those_that_layers_use():
    torch.manual_seed(0)
    normalized = parametrizations.spectral_norm(nn.Linear(6, 6), n_power_iterations=50)
    with torch.no_grad():
        normalized.parametrizations.weight.original.mul_(40)
    pruned = nn.Linear(6, 6)
    pruned.weight.data.fill_(1.0)
    prune.l1_unstructured(pruned, "weight", amount=35)
    old = nn.utils.spectral_norm(nn.Linear(6, 6), n_power_iterations=50)
    old(torch.randn(1, 6))
    for layer, expected in [(normalized, 1.0), (pruned, 1.0), (old, 1.0)]:
        found = check(layer.double().eval(), torch.randn(1, 6, dtype=torch.float64))
        assert found.upper == pytest.approx(expected, rel=1e-2)


def test_functional_forms():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 12))
            self.kernel = nn.Parameter(torch.randn(3, 2, 3, 3))
            self.register_buffer("mask", torch.rand(3, 4, 4) > 0.5)

        def forward(self, x):
            x = F.conv2d(x, self.kernel, padding=1)
            x = torch.where(self.mask, F.relu(x), x * 0.5)
            x = F.max_pool2d(F.leaky_relu(x, 0.1), 2).permute(0, 2, 3, 1).reshape(len(x), -1)
            if x.shape[0] > 0:
                x = x - 1
            a, b = (x @ self.weight.T).clamp(-1, 1).split([2, 3], dim=1)
            return torch.cat(
                [a.tanh(), 2 - b, a.mean(1, keepdim=True), b[:, 1:].sum(1)[:, None]], 1
            )

    torch.manual_seed(0)
    check(Model().double(), torch.randn(2, 2, 4, 4, dtype=torch.float64), points=8)


OPTIONS = {
    "add": lambda x: torch.add(x, x, alpha=5),
    "sub": lambda x: x.sub(x, alpha=-5),
    "vector norm": lambda x: torch.linalg.vector_norm(x, ord=1).reshape(1, 1),
    "repeats": lambda x: x.repeat_interleave(repeats=torch.tensor([9, 1, 1]), dim=1),
    "softplus": lambda x: F.softplus(x, 1.0, 0.5),
    "celu": lambda x: F.celu(x, -1.0),
    "padded, then changed": lambda x: _padded_then_changed(x),
}


def _padded_then_changed(x):
    x = x[None] * 1.0
    y = F.pad(x, (1, 1), mode="circular")
    x.mul_(0.01)
    return F.conv1d(y, torch.ones(1, 1, 3, dtype=x.dtype))[0]


@pytest.mark.parametrize("name", list(OPTIONS))
def test_options_by_keyword_count(name):
    model, x = Calls(OPTIONS[name]), torch.randn(1, 3, dtype=torch.float64)
    found = lipschitz_bound(model, x)
    exact = max(jacobian_norm(model, c * x) for c in (1.0, 4.0))
    assert found.unbounded or exact <= found.upper * (1 + 1e-9), found


def test_constant_model_has_the_bound_zero():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[2].weight)
    found = lipschitz_bound(model, torch.ones(1, 3, dtype=torch.float64))
    assert found.lower == found.upper == 0


def test_runs_under_inference_mode():
    model = nn.Linear(3, 2).double()
    with torch.inference_mode():
        found = lipschitz_bound(model, torch.ones(1, 3, dtype=torch.float64))
    exact = torch.linalg.matrix_norm(model.weight.detach(), 2)
    assert found.upper == pytest.approx(float(exact))


def test_several_inputs_and_outputs():
    class Model(nn.Module):
        def forward(self, x, y):
            return x + 2 * y, {"y": y}

    x = torch.randn(2, 3, dtype=torch.float64)
    found = lipschitz_bound(Model(), (x, x))
    assert found.lower <= found.upper == pytest.approx(10**0.5)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(2 * x.detach().numpy())


def branch(x):
    return x * 100 if x.sum() > 0 else x


def through_a_view(x):
    y = x.clone()
    view = y.view(-1)
    y.mul_(5)
    return view


def into_a_constant(x):
    y = torch.zeros_like(x)
    y.add_(x)
    return y


def into_a_part(x):
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 0]
    return y


UNKNOWN = {
    "exp": (torch.exp, "does not know the function"),
    "square": (lambda x: x * x, "both depend"),
    "quotient": (lambda x: 1 / x, "reciprocal|divides"),
    "branch": (branch, "branch may jump"),
    "numpy": (Double.apply, "values that depend"),
    "view": (through_a_view, "another view"),
    "constant": (into_a_constant, "in place"),
    "part": (into_a_part, "setitem"),
    "gather": (lambda x: x[:, (x[0] * 0).long()], "int64|long|places"),
    "dropout": (lambda x: F.dropout(x), "training=self.training"),
    "argmax": (lambda x: x.argmax(1), "argmax"),
    "where": (lambda x: torch.where(x > 0, x, -5 * x), "gt"),
    "threshold": (nn.Threshold(0.1, 20.0), "jumps"),
    "layer norm": (nn.LayerNorm(4, eps=0.0), "deviation"),
    "group norm": (nn.GroupNorm(2, 4, eps=0.0), "deviation"),
    "bits": (lambda x: x.view(torch.bfloat16), "bits"),
    "GRU": (nn.GRU(4, 4), "recurrent layers (gru)"),
    "LSTM cell": (nn.LSTMCell(4, 4), "recurrent layers (lstm_cell)"),
    "batch statistics": (nn.BatchNorm1d(4, track_running_stats=False), "statistics of the batch"),
    "script": (torch.jit.script(nn.Sequential(nn.Linear(4, 4))), "cannot see|does not know"),
    "infinite": (lambda x: x * float("inf"), "not finite"),
    "complex": (lambda x: (x * 2j).imag, "complex"),
    "slope": (lambda x: F.prelu(x, torch.tensor([float("nan")])), "not finite"),
    "alpha": (lambda x: F.elu(x, float("nan")), "alpha"),
    "out": (lambda x: torch.add(x, x, out=torch.empty_like(x)), "form of add|in place"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_parts_are_named(name):
    function, reason = UNKNOWN[name]
    model = function if isinstance(function, nn.Module) else Calls(function)
    found = lipschitz_bound(
        nn.Sequential(nn.Identity(), model).eval(), torch.randn(3, 4), max_iter=0
    )
    assert found.upper == float("inf")
    text = " ".join(f"{where}: {why}" for where, why in found.unbounded.items())
    assert any(part in text for part in reason.split("|")), found
    assert "unbounded" in str(found)


@pytest.mark.parametrize(
    "function",
    [
        nn.Parameter,
        lambda x: torch.Tensor._make_subclass(torch.Tensor, x),
        lambda x: torch.vmap(lambda row: row.unsqueeze(0).squeeze(0))(x),
    ],
    ids=["parameter", "subclass", "vmap"],
)
@pytest.mark.filterwarnings("ignore")
def test_another_tensor_on_the_memory_of_the_input_is_no_constant(function):
    model = nn.Sequential(Calls(function), nn.Linear(4, 4)).eval()
    found = lipschitz_bound(model, torch.randn(3, 4), max_iter=0)
    assert "cannot see" in " ".join(found.unbounded.values()), found


def test_attention_is_named_and_can_be_given():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    found = lipschitz_bound(layer, x)
    assert {"self_attn"} == set(found.unbounded)
    assert found.lower > 0
    gains = {"self_attn": 2.0, "norm1": 1.0, "norm2": 1.0}
    found = lipschitz_bound(layer, x, gains=gains)
    assert not found.unbounded
    inner = np.prod([row.upper for row in found.layers if row.name.startswith("linear")])
    assert found.upper == pytest.approx(3 * (1 + inner), rel=1e-6)


def test_state_is_as_before():
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(1, 2, 3)),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    model[4].weight.grad = torch.ones(2, 8)
    x = torch.randn(1, 1, 4, 4)
    model.train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    kept = x.clone()
    lipschitz_bound(model, x)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, kept)
    assert torch.equal(model[4].weight.grad, torch.ones(2, 8))
    assert model[0].bias.grad is None


def test_buffers_that_a_model_counts_in_are_restored():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return super().forward(x)

    model = Counting()
    lipschitz_bound(model, torch.randn(1, 2))
    assert model.count == 0


@pytest.mark.parametrize(
    ("model", "example", "options", "error", "message"),
    [
        (nn.Sequential(nn.BatchNorm1d(2)), torch.ones(2, 2), {}, sc.ArgumentError, r"model\.eval"),
        (nn.Identity(), torch.ones(2, 2).int(), {}, sc.DTypeError, "floating"),
        (nn.Identity(), torch.ones(0, 2), {}, sc.ShapeError, "empty"),
        (torch.relu, torch.ones(2, 2), {}, sc.DTypeError, "Module"),
        (nn.Identity(), torch.ones(1), {"gains": {"a": 1}}, sc.NamesError, "no such module"),
        (nn.Sequential(nn.ReLU()), torch.ones(1), {"gains": {"0": -1}}, sc.ArgumentError, "≥ 0"),
        (nn.Identity(), torch.ones(1), {"max_iter": -1}, sc.ArgumentError, "max_iter"),
    ],
)
def test_misfits_are_errors(model, example, options, error, message):
    with pytest.raises(error, match=message):
        lipschitz_bound(model, example, **options)
