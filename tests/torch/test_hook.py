"""Test what a penalty and a bound share: the state beside an optimizer."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import spectral_core as sc  # noqa: E402
from spectral_torch import SpectralNormRegularizer  # noqa: E402

SAVED = Path(__file__).parents[1] / "data" / "state-0.1.0-torch.pt"


def net():
    """The model whose state version 0.1.0 saved."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    )
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel()).sin().mul(i + 1).reshape(p.shape))
    return model


@pytest.mark.parametrize("steps", [1, 3])
def test_a_state_of_version_0_1_0_loads_and_continues(steps):
    saved = torch.load(SAVED, weights_only=True)
    assert saved["0.weight.v"].ndim == 1  # the axis of vectors is missing
    regs = []
    for state in (
        saved,
        {k: x.unsqueeze(-2) if k.endswith(".v") else x for k, x in saved.items()},
    ):
        model = net()
        reg = SpectralNormRegularizer(model, factor=0.1, every_n_steps=2, seed=9)
        reg.load_state_dict(state)
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            reg.add_gradients_()
        regs.append((reg.state_dict(), model[0].weight.grad))
    (found, grad), (expected, other) = regs
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad, other, rtol=0, atol=0)
    assert grad.any()
    if steps == 1:  # three steps were made before: this one repeats the last term
        assert torch.equal(found["0.weight.v"].flatten(), saved["0.weight.v"])


@pytest.mark.parametrize("spoil", ["zeros", "nan", "numpy", "list", "sparse", "complex", "int"])
def test_a_bad_entry_in_the_middle_of_a_state_loads_nothing(spoil):
    model = net()
    reg = SpectralNormRegularizer(model, seed=1)
    state = {
        key: value.clone() for key, value in SpectralNormRegularizer(net()).state_dict().items()
    }
    before = {key: value.clone() for key, value in reg.state_dict().items()}
    v = state["2.weight.v"]
    state["2.weight.v"] = {
        "zeros": torch.zeros_like(v),
        "nan": v * float("nan"),
        "numpy": v.numpy(),
        "list": v.tolist(),
        "sparse": v.to_sparse(),
        "complex": v.to(torch.complex64),
        "int": v.to(torch.int64),
    }[spoil]
    if spoil == "numpy":
        reg.load_state_dict(state)
        assert torch.equal(reg.state_dict()["2.weight.v"], v)
        return
    with pytest.raises(sc.SpectralError, match=r"2\.weight\.v"):
        reg.load_state_dict(state)
    for key, value in reg.state_dict().items():
        assert torch.equal(value, before[key])
