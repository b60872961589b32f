"""Test what `torch.compile` may assume of a step, so that it can capture CUDA graphs of it."""

import copy
import io

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from torch import nn  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402

from spectral_torch import SpectralNormRegularizer, _compile  # noqa: E402


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Let the CPU stand for a GPU: what is announced of a tensor is the same."""
    monkeypatch.setattr(_compile, "_GRAPHED", ("cpu", "cuda"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    return model, SpectralNormRegularizer(model, 0.1)


def test_a_graph_writes_only_into_inputs_that_stay_where_they_are():
    """`mode="reduce-overhead"` skips a graph that writes into others; gradients are its own."""
    model, reg = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.attach(optimizer)
    written = []

    def compiler(graph, inputs):
        found = torch._guards.TracingContext.get().fw_metadata
        names = {str(node.target) for node in graph.graph.nodes}
        if any("auto_functionalized" in name or "spectral_torch" in name for name in names):
            moving = {*found.mutated_inp_runtime_indices} - {*found.static_input_indices}
            written.append([tuple(inputs[i].shape) for i in sorted(moving)])
        return graph.forward

    @torch.compile(backend=aot_autograd(fw_compiler=compiler))
    def step():
        optimizer.step()

    model(torch.ones(2, 4)).sum().backward()
    for _ in range(2):
        step()
    assert len(written) > 0
    shapes = [tuple(layer.weight.shape) for layer in model]
    assert all(set(of_step) <= set(shapes) for of_step in written)  # the gradients alone


def marks(reg):
    tensors = [x for f in (reg._state.v, reg._state.sigma, reg._state.u) for x in f.values()]
    return {getattr(x, "_dynamo_static_input_type", None) for x in tensors}


def test_the_state_is_marked_wherever_it_is_made():
    model, reg = made()
    assert marks(reg) == marks(copy.deepcopy(reg)) == {"unguarded"}
    model.double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    reg.add_gradients_()
    assert reg._state.v["0.weight"].dtype == torch.float64
    assert marks(reg) == {"unguarded"}


def test_a_mark_does_not_disturb_a_checkpoint():
    _, reg = made()
    file = io.BytesIO()
    torch.save(reg.state_dict(), file)
    file.seek(0)
    other = made()[1]
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(reg.state_dict(), other.state_dict())


def test_where_nothing_is_captured_nothing_is_marked(monkeypatch):
    monkeypatch.setattr(_compile, "_GRAPHED", ("cuda",))
    assert marks(made()[1]) == {None}
