"""Every parameter with two axes or more is chosen, left out for a reason, or refused."""

import re
import warnings

import pytest

import spectral_core as sc

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, prune, weight_norm  # noqa: E402

from spectral_torch import SpectralNormConstraint, SpectralNormRegularizer  # noqa: E402
from spectral_torch._select import choose_parameters  # noqa: E402


@pytest.fixture(autouse=True)
def _nothing_is_guessed_unless_told(request):
    """Make an unexpected warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", sc.SpectralWarning)
        yield


def choose(model, include=None, exclude=None, layouts=None):
    return choose_parameters(model, include, exclude, layouts)


def axes(model, **options):
    """Return the layout of each chosen parameter, and the reason for each other one."""
    chosen = choose(model, **options)
    assert chosen.parameters.keys() == chosen.layouts.keys()
    return {name: layout.axes for name, layout in chosen.layouts.items()} | chosen.left_out


class Holder(nn.Module):
    """A module of one's own with parameters."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


class OwnLinear(nn.Linear):
    pass


class Loras(nn.Linear):
    """A linear layer with low-rank factors of its own."""

    def __init__(self):
        super().__init__(6, 4)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.ones(2, 6))
        self.lora_B = nn.Parameter(torch.zeros(4, 2))


def lora_embedding():
    layer = nn.ModuleDict({"base_layer": nn.Embedding(7, 4).requires_grad_(False)})
    layer["lora_embedding_A"] = nn.ParameterDict({"default": torch.ones(2, 7)})
    layer["lora_embedding_B"] = nn.ParameterDict({"default": torch.ones(4, 2)})
    return layer


def tied():
    embed, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    return nn.ModuleDict({"embed": embed, "head": head, "out": nn.Linear(5, 3)})


LENGTHS = "lengths of a weight normalization"
MODELS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm((2, 3)), nn.RMSNorm((2, 3))),
        {"0.weight": "oi", "1.weight": "a scale", "1.bias": "a scale", "2.weight": "a scale"},
    ),
    "embeddings": (
        lambda: nn.Sequential(nn.Embedding(5, 4), nn.EmbeddingBag(5, 4), OwnLinear(4, 1)),
        {"0.weight": "an embedding", "1.weight": "an embedding", "2.weight": "oi"},
    ),
    "tied": (tied, {"embed.weight": "an embedding (tied)", "out.weight": "oi"}),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, kdim=3, vdim=5, add_bias_kv=True),
        dict.fromkeys(["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"], "oi")
        | {"bias_k": "a vector", "bias_v": "a vector"},
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6),
        dict.fromkeys(
            [
                "self_attn.in_proj_weight",
                "self_attn.out_proj.weight",
                "linear1.weight",
                "linear2.weight",
            ],
            "oi",
        ),
    ),
    "adaptive softmax": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5], div_value=2.0),
        dict.fromkeys(["head.weight", "tail.0.0.weight", "tail.0.1.weight"], "oi"),
    ),
    "weight norm of a recurrent layer": (
        lambda: weight_norm(nn.LSTM(3, 4), "weight_hh_l0"),
        {"weight_ih_l0": "oi", "weight_hh_l0_v": "oi", "weight_hh_l0_g": LENGTHS},
    ),
    "weight norm of attention": (
        lambda: weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"),
        {"in_proj_weight_v": "oi", "in_proj_weight_g": LENGTHS, "out_proj.weight": "oi"},
    ),
    "parametrized recurrent layer": (
        lambda: parametrizations.weight_norm(nn.GRU(1, 4), "weight_ih_l0"),
        {
            "weight_hh_l0": "oi",
            "parametrizations.weight_ih_l0.original0": LENGTHS,
            "parametrizations.weight_ih_l0.original1": "oi",
        },
    ),
    "weight norm over the kernel": (
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 3, groups=2), dim=2),
        {
            "parametrizations.weight.original0": LENGTHS,
            "parametrizations.weight.original1": "(go)ik",
        },
    ),
    "vectors": (
        lambda: nn.Sequential(nn.Linear(3, 3), Holder(gate=(1, 1, 6), scale_2=(6, 1))),
        {"0.weight": "oi", "1.gate": "a vector", "1.scale_2": "a vector"},
    ),
    "low-rank factors": (
        lambda: nn.Sequential(Loras(), nn.Linear(3, 3).requires_grad_(False)),
        {"0.weight": "frozen", "0.lora_A": "oi", "0.lora_B": "oi", "1.weight": "frozen"},
    ),
    "low-rank factors of an embedding": (
        lora_embedding,
        {
            "base_layer.weight": "an embedding",
            "lora_embedding_A.default": "an embedding",
            "lora_embedding_B.default": "oi",
        },
    ),
    "frozen for now": (
        lambda: nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2)),
        {"0.weight": "oi", "1.weight": "oi"},
    ),
    "constants of an unknown layer": (
        lambda: nn.Sequential(nn.Linear(3, 2), Holder(w=(3, 4, 5), m=(3, 4)).requires_grad_(False)),
        {"0.weight": "oi", "1.w": "frozen", "1.m": "frozen"},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_known_layers(kind):
    make, expected = MODELS[kind]
    assert axes(make()) == expected


@pytest.mark.parametrize("make", [SpectralNormRegularizer, SpectralNormConstraint])
def test_matrix_of_an_unknown_layer_is_told_once(make):
    model = nn.Sequential(nn.Linear(3, 3), Holder(mixer=(4, 5), token_mixer=(3, 3)))
    with pytest.warns(sc.SpectralWarning, match=r"1\.mixer: \(4, 5\)") as told:
        reg = make(model)
    assert list(reg.sigmas()) == ["0.weight", "1.mixer", "1.token_mixer"]
    assert len(told) == 1
    assert told[0].filename == __file__
    assert 'layouts={"1.mixer": "oi"}' in str(told[0].message)


@pytest.mark.parametrize(
    "options",
    [
        {"exclude": "1"},
        {"layouts": {"1": "oi"}},
        {"layouts": {Holder: "oi"}},
        {"include": "*"},
        {"include": re.compile("")},
        {"include": (nn.Linear, Holder)},
        {"exclude": Holder},
    ],
    ids=str,
)
def test_a_choice_settles_a_guess(options):
    choose(nn.Sequential(nn.Linear(3, 3), Holder(mixer=(4, 5))), **options)


def many(n):
    return nn.Sequential(*(Holder(w=(2, 2)) for _ in range(n)))


def test_a_warning_names_ten_at_most():
    with pytest.warns(sc.SpectralWarning, match=r"30 more") as told:
        choose(many(40))
    assert len(str(told[0].message)) < 500


@pytest.mark.parametrize(
    "name", ["pos_embed", "cls_tokens", "rel_pos_h", "relative_position_bias_table", "gamma"]
)
def test_a_reason_from_a_name_is_told(name):
    model = nn.Sequential(nn.Linear(3, 3), Holder(**{name: (2, 7, 3)}))
    with pytest.warns(sc.SpectralWarning, match=rf"because of their names.*1\.{name}: a"):
        assert list(choose(model).parameters) == ["0.weight"]
    assert list(choose(model, exclude=f"1.{name}").parameters) == ["0.weight"]
    found = choose(model, layouts={f"1.{name}": "soi"}).layouts
    assert list(found) == ["0.weight", f"1.{name}"]


def test_names_in_a_dict_of_parameters_are_read():
    shapes = {"pos_embed": (4, 5), "mixer": (4, 5)}
    model = nn.ModuleDict({"own": nn.ParameterDict({k: torch.ones(v) for k, v in shapes.items()})})
    with pytest.warns(sc.SpectralWarning):
        assert axes(model) == {"own.pos_embed": "an embedding", "own.mixer": "oi"}
    model = nn.ModuleDict({"pos_embed": nn.ParameterList([torch.ones(4, 5)]), "a": nn.Linear(2, 2)})
    with pytest.warns(sc.SpectralWarning):
        assert axes(model)["pos_embed.0"] == "an embedding"


class Stack(nn.Linear):
    """A linear layer whose weight is a stack."""

    def __init__(self):
        super().__init__(3, 3)
        self.weight = nn.Parameter(torch.ones(5, 3, 3))


@pytest.mark.parametrize("layer", [Holder(w=(3, 4, 5)), Holder(weight=(2, 3, 4, 5)), Stack()])
@pytest.mark.parametrize("include", [None, "1", lambda name, weight: True])
def test_tensor_of_an_unknown_layer_needs_a_layout(layer, include):
    model = nn.Sequential(nn.Linear(3, 3), layer)
    name, weight = next((n, p) for n, p in model.named_parameters() if p.ndim > 2)
    with pytest.raises(sc.NamesError) as error:
        choose(model, include)
    for part in (f"{name}: {tuple(weight.shape)}", f'layouts={{"{name}"', f'exclude=["{name}"]'):
        assert part in str(error.value)
    assert list(choose(model, exclude=[name]).parameters) == ["0.weight"]
    stacked = choose(model, layouts={name: "s" * (weight.ndim - 2) + "oi"})
    assert list(stacked.parameters) == ["0.weight", name]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 4)})
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.Conv1d(8, 4, 1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = OwnLinear(4, 2)


NAMES = [name for name, p in Net().named_parameters() if p.ndim > 1]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("query", r"query"),
        (["query", "value"], r"query|value"),
        ("blocks.0", r"^blocks\.0"),
        ("mlp.0", r"mlp\.0"),
        ("attn", r"attn"),
        (nn.Conv1d, r"mlp\.1"),
        ([nn.Conv1d, "head"], r"mlp\.1|head"),
        (OwnLinear, r"head"),
        (nn.Linear, r"attn|mlp\.0|head"),
        (Block, r"blocks"),
        (nn.Sequential, r"mlp"),
        (re.compile(r"1\.mlp"), r"1\.mlp"),
        (("*.attn.*", re.compile("head")), r"attn|head"),
        ({"head.weight"}, r"head"),
        (lambda name, weight: weight.shape[0] == 2, r"head"),
    ],
)
def test_choice_by_name_module_suffix_class_and_pattern(choice, expected):
    meant = [name for name in NAMES if re.search(expected, name)]
    assert list(choose(Net(), include=choice).parameters) == meant
    others = [name for name in NAMES if name not in meant]
    assert list(choose(Net(), exclude=choice).parameters) == others


def test_low_rank_factors_are_meant_by_the_name_of_their_layer():
    model = nn.ModuleDict({"query": Loras(), "value": Loras()})
    assert list(choose(model, include="query").parameters) == ["query.lora_A", "query.lora_B"]
    assert list(choose(model, include=Loras, exclude="value").left_out) == [
        *("query.weight", "value.weight", "value.lora_A", "value.lora_B"),
    ]
    assert list(choose(model, include="query.weight").parameters) == ["query.weight"]


def test_a_class_that_holds_nothing_is_refused():
    with pytest.raises(sc.NamesError, match=r"no weight is held by a LSTM.*'Linear', 'Conv1d'"):
        choose(Net(), include=nn.LSTM)
    assert list(choose(Net(), exclude=nn.LSTM).parameters) == NAMES


@pytest.mark.parametrize("name", ["embed.weight", "head.weight", "head"])
def test_each_name_of_a_tied_weight_means_it(name):
    assert list(choose(tied(), include=name).parameters) == ["embed.weight"]
    assert list(choose(tied(), layouts={name: "io"}).parameters) == ["embed.weight", "out.weight"]
    assert choose(tied(), exclude=name).left_out == {"embed.weight": "excluded"}


@pytest.mark.parametrize(
    "reparametrize",
    [parametrizations.spectral_norm, weight_norm, lambda x: prune.identity(x, "weight")],
)
def test_the_plain_name_means_a_reparametrized_weight(reparametrize):
    model = nn.Sequential(nn.Linear(4, 3), reparametrize(nn.Linear(3, 2)))
    (name,) = choose(model, include="1.weight").parameters
    assert name.startswith(("1.parametrizations.weight.original", "1.weight_"))
    assert list(choose(model, exclude="1").parameters) == ["0.weight"]


class Product(nn.Module):
    """Hold a weight as a product of two matrices, or as a direction and lengths."""

    def forward(self, left, right):
        return left @ right if right.shape[-1] == 6 else left * right


class Rank(Product):
    def right_inverse(self, weight):
        return weight[:, :2], weight[:2]


class Lengths(Product):
    def right_inverse(self, weight):
        lengths = weight.norm(dim=1, keepdim=True)
        return weight / lengths, lengths


def test_the_lengths_of_an_own_normalization_are_no_weight():
    layer = nn.Linear(5, 8)
    nn.utils.parametrize.register_parametrization(layer, "weight", Lengths())
    original = "parametrizations.weight.original"
    assert axes(layer) == {f"{original}0": "oi", f"{original}1": "a vector"}


def test_the_factors_of_an_own_parametrization_are_told():
    layer = nn.Linear(6, 8)
    nn.utils.parametrize.register_parametrization(layer, "weight", Rank())
    with pytest.warns(sc.SpectralWarning, match=r"original1: \(2, 6\)"):
        assert list(axes(layer).values()) == ["oi", "oi"]


def test_layers_and_parameters_of_the_model_choose_themselves():
    model = Net()
    assert list(choose(model, include=model.blocks[0]).parameters) == NAMES[:4]
    assert list(choose(model, exclude=[model.blocks, model.blocks[0]]).parameters) == NAMES[-1:]
    assert list(choose(model, include=[model.head.weight]).parameters) == NAMES[-1:]
    assert list(choose(model, include=model.head.parameters()).parameters) == NAMES[-1:]


class Module(nn.Module):
    """A model with a child of this name is no wrapper."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 3)


class Compiled(nn.Module):
    """Hold a model as `torch.compile` does, whose import takes seconds."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize(
    "wrap",
    [
        Compiled,
        nn.DataParallel,
        lambda m: nn.DataParallel(Compiled(m)),
        torch.optim.swa_utils.AveragedModel,
        lambda m: nn.Sequential(Compiled(m[0]), nn.DataParallel(m[1])),
    ],
    ids=["compiled", "parallel", "both", "averaged", "parts"],
)
def test_wrapped_models_have_the_names_of_the_plain_model(wrap):
    expected = ["0.weight", "1.module.weight"]
    model = nn.Sequential(nn.Linear(4, 3), Module())
    assert list(choose(model).parameters) == expected
    wrapped = choose(wrap(model))
    assert list(wrapped.parameters) == expected
    plain, whole = SpectralNormRegularizer(model), SpectralNormRegularizer(wrap(model))
    for name, sigma in plain.sigmas().items():
        assert torch.equal(whole.sigmas()[name], sigma)


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_a_sparse_parameter_is_refused_by_name(convert):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model[0].weight = nn.Parameter(convert(torch.eye(3, 4)))
        with pytest.raises(sc.ArgumentError, match=r"'0\.weight' is sparse.*exclude=\[\"0"):
            choose(model)
        assert list(choose(model, exclude="0").parameters) == ["1.weight"]


def test_a_lazy_parameter_can_be_left_out():
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    with pytest.raises(sc.ArgumentError, match=r"'1\.weight' is lazy"):
        choose(model)
    assert list(choose(model, exclude="1").parameters) == ["0.weight"]


LINEAR = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LINEAR.parameters(), r"has no names: pass the module itself, or model\.named_parameters"),
        (list(LINEAR.parameters()), "list has no names"),
        (LINEAR.weight, "not Parameter|Parameter has no names"),
        (torch.optim.SGD(LINEAR.parameters(), lr=0.1), "not SGD: pass the model, then attach"),
        ("model", "not str"),
        (None, "not NoneType"),
        (3, "not int"),
        (nn.Linear, "not type"),
        ([LINEAR], "not list"),
        ([("w", 3)], "not list"),
        ([(0, LINEAR.weight)], "not list"),
        ({"w": [[1.0]]}, "not dict"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(sc.ArgumentError, match=f"model must be a torch.nn.Module.*({message})"):
        choose(model)


def test_pairs_of_names_and_parameters():
    weights = {"w": torch.ones(2, 3), "bias": torch.ones(3), "index": torch.ones(2, 2).int()}
    for model in (weights, list(weights.items()), iter(weights.items())):
        assert axes(model) == {"w": "oi"}
    weights["kernel"] = torch.ones(2, 3, 4)
    with pytest.raises(sc.NamesError, match=r'layouts=\{"kernel"'):
        choose(weights)
    assert axes(weights, layouts={"kernel": "oik"}) == {"w": "oi", "kernel": "oik"}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.LayerNorm(3), {}, "has no parameter with two axes"),
        (nn.Embedding(3, 4), {}, r"left out are \['weight: an embedding'\]"),
        (LINEAR, {"include": []}, r"left out are \['weight: not included'\]"),
        (LINEAR, {"exclude": "*"}, r"left out are \['weight: excluded'\]"),
        (LINEAR, {"exclude": nn.Linear}, r"left out are \['weight: excluded'\]"),
    ],
)
def test_nothing_to_regularize_says_what_is_left_out(model, options, message):
    with pytest.raises(sc.NamesError, match=f"nothing to regularize.*{message}"):
        choose(model, **options)
