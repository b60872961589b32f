"""The paper's experiment in JAX: the network of PyTorch, trained in the same way."""

from dataclasses import replace
from math import prod

import numpy as np
import pytest

pytest.importorskip("flax", reason="Flax is not installed")
pytest.importorskip("optax", reason="optax is not installed")
torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks import models  # noqa: E402
from benchmarks.paper import jax_nin  # noqa: E402
from benchmarks.paper.data import Data, batches  # noqa: E402
from benchmarks.paper.results import Run  # noqa: E402

WIDTH = 0.1
RUN = Run("random", "nin", "vanilla", 0.0, 16, rate=0.05, epochs=3, seed=0, width=WIDTH)


def images_of(count, channels=1, size=8, seed=0):
    shape = (count, channels, size, size)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def data():
    labels = np.arange(72) % 3
    images = images_of(72) + labels[:, None, None, None].astype(np.float32)
    return Data(images[:48], labels[:48], images[48:], labels[48:], classes=3)


def trained(data, **changes):
    return jax_nin.train(replace(RUN, **changes), data, {})


@pytest.fixture(scope="module")
def plain(data):
    return jax_nin.train(RUN, data, {"gpu": None})


def without_seconds(result):
    return [{**line, "seconds": 0.0} for line in result.epochs]


def copied(source, channels, classes):
    """PyTorch's network in JAX."""
    model = jax_nin.NIN(channels, classes, WIDTH, rngs=nnx.Rngs(0))
    theirs = [module for module in source.modules() if isinstance(module, torch.nn.Conv2d)]
    for layer, conv in zip(model.convs, theirs, strict=True):
        kernel = jnp.asarray(conv.weight.detach().permute(2, 3, 1, 0).numpy())
        assert layer.kernel.shape == kernel.shape
        layer.kernel[...] = kernel
        layer.bias[...] = jnp.asarray(conv.bias.detach().numpy())
    return model


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 13), (3, 32)])
def test_the_network_is_that_of_pytorch(channels, size):
    torch.manual_seed(0)
    source = models.nin(channels=channels, classes=10, width=WIDTH).eval()
    model = copied(source, channels, 10)
    images = images_of(4, channels, size)
    with torch.no_grad():
        expected = source(torch.from_numpy(images)).numpy()
    found = model(jnp.asarray(images.transpose(0, 2, 3, 1)), deterministic=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_pytorch(data):
    torch.manual_seed(0)
    source = models.nin(channels=1, classes=3, width=WIDTH).eval()
    x = torch.from_numpy(data.test_images).requires_grad_()
    logits = source(x)
    torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(data.test_labels), reduction="sum"
    ).backward()
    expected = x.grad.flatten(1).norm(dim=1)
    test_set = jax_nin.labelled(data.test_images, data.test_labels)
    found = jax_nin.gradient_norms(copied(source, 1, 3), *test_set)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_steps_are_those_of_pytorch(data):
    """But for dropout."""
    torch.manual_seed(0)
    source = models.nin(channels=1, classes=3, width=WIDTH).eval()
    model = copied(source, 1, 3)
    model.dropout.rate = 0.0
    theirs = torch.optim.SGD(
        source.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1
    )
    tx = jax_nin.transformation(replace(RUN, method="decay", strength=0.1, epochs=8), steps=1)
    ours = nnx.Optimizer(model, tx, wrt=nnx.Param)
    train_set = jax_nin.labelled(data.train_images, data.train_labels)
    for batch in batches(data, 16, seed=0, epoch=0):
        theirs.zero_grad()
        images, labels = data.train_images[batch], data.train_labels[batch]
        logits = source(torch.from_numpy(images))
        expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        expected.backward()
        theirs.step()
        loss = jax_nin.train_step(model, ours, train_set, batch)
        assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    biases = [p.detach().numpy() for p in source.parameters() if p.ndim == 1]
    for layer, bias in zip(model.convs, biases, strict=True):
        np.testing.assert_allclose(layer.bias[...], bias, rtol=1e-4, atol=1e-6)


def test_the_weights_are_he_normal():
    model = jax_nin.NIN(3, 10, 1.0, rngs=nnx.Rngs(0))
    for layer in model.convs:
        kernel = np.asarray(layer.kernel[...])
        assert kernel.std() == pytest.approx(np.sqrt(2 / np.prod(kernel.shape[:3])), rel=0.05)
        assert not layer.bias[...].any()
    assert np.abs(model.convs[3].kernel[...]).max() > 4 * np.sqrt(2 / (25 * 96))  # not truncated


def test_the_rate_falls_at_a_half_and_at_three_quarters():
    tx = jax_nin.transformation(replace(RUN, epochs=4), steps=2)
    params = {"w": jnp.zeros(())}
    state, moved = tx.init(params), []
    for step in range(8):
        # These gradients keep the momentum at 1: its update is 1.9 at first, and then 1.
        updates, state = tx.update({"w": jnp.asarray(0.1 if step else 1.0)}, state, params)
        moved.append(-float(updates["w"]))
    expected = [1.9, *[1.0] * 7] * np.repeat([0.05, 0.05, 0.005, 0.0005], 2)
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


def test_a_run_is_complete(plain):
    assert plain.run == RUN
    assert plain.machine == {"gpu": None}
    assert plain.done
    assert not plain.diverged
    assert [line["epoch"] for line in plain.epochs] == [1, 2, 3]
    keys = {"train_gradient", "test_gradient", "sigma_product", "seconds"}
    assert set(plain.epochs[0]) == keys | {"epoch", "loss", "train", "test"}
    largest = [max(values) for values in plain.spectra.values()]
    assert [values[0] for values in plain.spectra.values()] == largest
    assert plain.epochs[-1]["sigma_product"] == pytest.approx(prod(largest))
    model = models.nin(channels=1, classes=3, width=WIDTH)
    assert plain.parameters == sum(p.numel() for p in model.parameters())
    assert len(plain.spectra) == 9


def test_a_run_depends_on_its_seed_alone(data, plain):
    same, other = trained(data), trained(data, seed=1)
    assert without_seconds(plain) == without_seconds(same)
    assert plain.spectra == same.spectra
    assert without_seconds(plain) != without_seconds(other)


@pytest.mark.parametrize("method", ["spectral", "decay"])
def test_what_regularizes_lowers_sigma(data, plain, method):
    regularized = trained(data, method=method, strength=0.1)
    for name, values in regularized.spectra.items():
        assert values[0] < plain.spectra[name][0]


def test_a_run_that_diverges_stops(data):
    result = trained(data, rate=1e30)
    assert result.done
    assert result.diverged
    assert len(result.epochs) < RUN.epochs
    assert result.spectra == {}


@pytest.mark.parametrize("changes", [{"model": "vgg"}, {"method": "adversarial"}])
def test_what_it_does_not_have_is_refused(data, changes):
    with pytest.raises(ValueError, match="JAX trains"):
        trained(data, **changes)


def test_images_to_be_changed_are_refused(data):
    with pytest.raises(ValueError, match="as they are"):
        trained(data._replace(augmented=True))
