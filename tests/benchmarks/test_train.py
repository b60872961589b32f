"""The paper's models, methods and measurements, and runs that stop and go on."""

import itertools
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest

for _package in ("torch", "scipy", "filelock", "rich", "pandas", "seaborn", "sklearn", "flax"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: nox -s paper has it")

import torch  # noqa: E402
from flax import nnx  # noqa: E402
from torch import nn  # noqa: E402

import spectral_core as sc  # noqa: E402
from benchmarks import models  # noqa: E402
from benchmarks.paper import __main__ as cli  # noqa: E402
from benchmarks.paper import data, jax_nin, measure, methods, runs, train  # noqa: E402
from benchmarks.paper.runs import STRENGTHS, SUITES, Run, RunError  # noqa: E402
from benchmarks.paper.train import Settings, Trainer  # noqa: E402

torch.set_num_threads(1)  # networks this small run no faster on several
PLAN = Run(
    "digits", "vgg-7", "vanilla", 0.0, 16, rate=0.02, epochs=4, seed=0, width=0.04, hessians=2
)


@pytest.fixture(scope="module")
def images():
    """Classes that differ in their mean image, so that something can be learned."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 3
    x = rng.standard_normal((3, 1, 8, 8), "f4")[labels] + rng.standard_normal((96, 1, 8, 8), "f4")
    return data.Data(x[:48], labels[:48], x[48:], labels[48:], 3)


def linear(classes=5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes, bias=False))
    return model, torch.randn(7, 1, 8, 8), torch.arange(7) % 5


def test_models_have_as_many_parameters_as_published_and_their_seeds_weights(images):
    published = (models.densenet(), models.nin(), models.vgg_16(3, 1000, 224, hidden=4096))
    counts = [sum(p.numel() for p in model.parameters()) for model in published]
    # 1.0 M (Huang et al., 2017), 0.97 M (Lee et al., 2015), batch normalization instead of biases
    assert counts == [1_019_722, 966_986, 138_357_544 + 4224]
    for name in methods.MODELS:
        weights = [next(methods.build(name, images, 0.1, k).parameters()) for k in (0, 0, 1)]
        assert [torch.equal(weights[0], other) for other in weights[1:]] == [True, False]
    with pytest.raises(RunError, match="densenet-40"):
        methods.build("resnet", images, 1.0, 0)


def test_decay_and_spectral_change_the_gradient_as_they_say():
    steps, weight = {}, linear()[0][1].weight.detach()
    for name in ("vanilla", "decay", "spectral"):
        (model, x, y), method = linear(), methods.METHODS[name](0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **method.options())
        method.attach(model, optimizer)
        method.loss(model, x, y)[0].backward()
        optimizer.step()
        steps[name] = weight - model[1].weight.detach()
    torch.testing.assert_close(steps["decay"] - steps["vanilla"], 0.5 * weight)
    values = torch.linalg.svdvals(steps["spectral"] - steps["vanilla"])
    assert values[1] < 1e-5
    assert 0 < values[0] <= 0.5 * torch.linalg.matrix_norm(weight, 2) * (1 + 1e-5)


def test_adversarial_moves_images_by_one_and_jacobian_estimates_its_norm():
    (model, x, y), seen = linear(), []
    for k in (1.0, 1e-24):
        methods.Adversarial().loss(lambda z, k=k: seen.append(z.detach()) or k * model(z), x, y)
        torch.testing.assert_close((seen[-1] - seen[-2]).flatten(1).norm(dim=1), torch.ones(7))
    method = methods.Jacobian(2.0)
    terms = [loss - plain for loss, plain in (method.loss(model, x, y) for _ in range(400))]
    exact = model[1].weight.square().sum()  # the Jacobian of a linear map is its matrix
    torch.testing.assert_close(torch.stack(terms).mean(), exact, rtol=0.02, atol=0)


def test_measurements_are_those_of_dense_linear_algebra(images):
    model, *_ = linear(classes=3)
    x, y = map(torch.from_numpy, images[:2])
    weight = model[1].weight.detach()
    dense = torch.func.hessian(lambda W: nn.functional.cross_entropy(x.flatten(1) @ W.T, y))(weight)
    largest = float(torch.linalg.eigvalsh(dense.reshape(192, 192).double())[-1])
    assert measure.hessian(model, x, y) == pytest.approx(largest, rel=0.03)
    norms = ((model(x).softmax(1) - nn.functional.one_hot(y, 3)) @ weight).norm(dim=1)
    assert measure.input_gradient(model, x, y) == pytest.approx(float(norms.mean()), rel=1e-5)
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(measure.spectra(model)["1"], values, rtol=1e-6)
    assert measure.sigma_product(model) == pytest.approx(values[0])


def test_final_measurements_are_those_of_a_linear_classifier(images):
    model, *_ = linear(classes=2)
    x, y = map(torch.from_numpy, images[:2])
    y = y % 2
    weight = model[1].weight.detach()
    found = measure.final(model, x, y, seed=0)
    # An attack moves an image against the difference of the two rows, whatever the number of steps.
    apart = weight[0] - weight[1]
    margin = (x.flatten(1) @ apart) * (1 - 2 * y) / apart.norm()
    expected = [float((margin > size).float().mean()) for size in measure.SIZES]
    assert found["one_step"] == pytest.approx(expected)
    assert found["ten_steps"] == pytest.approx(expected)
    assert found["noise"][0] > found["noise"][-1]
    sigma = float(torch.linalg.matrix_norm(weight, 2))
    assert found["bound"] == pytest.approx(np.log10(sigma), abs=1e-5)
    assert found["layers"]["1"][::2] == pytest.approx([sigma, sigma], rel=1e-5)
    shares = (x.flatten(1) @ weight.T).softmax(1)
    assert found["nll"] == pytest.approx(-float(shares[range(48), y].log().mean()), rel=1e-5)
    sums = np.zeros(measure.BINS)
    for share, guess, label in zip(*shares.max(1), y, strict=True):
        sums[int(share * measure.BINS)] += float(share) - float(guess == label)
    assert found["ece"] == pytest.approx(np.abs(sums).sum() / 48, rel=1e-4)


def test_a_convolutions_norm_has_its_stride(images):
    model = methods.build("lenet", images, 0.5, 0)
    sigma, _, norm = measure.layers(model)["2"]
    kernel = model[2].weight.detach()
    exact = sc.convolution_norm(kernel, "oihw", stride=2)
    assert exact.lower <= norm <= exact.upper * (1 + 2 * measure.TOL)
    assert sigma < norm < 5 * sigma


@pytest.mark.parametrize("method", ["vanilla", "decay", "spectral", "adversarial"])
def test_a_micro_batch_has_the_gradient_of_the_batch(images, method):
    found = []
    for size in (None, 5):
        run = replace(PLAN, model="mlp", method=method, strength=0.5)
        trainer = Trainer(run, images, Settings(micro_batch=size))
        loss = trainer._step(*(part[:16] for part in trainer._train))
        found.append((loss, [p.detach() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_run_that_was_killed_goes_on_to_the_same_result(method, images, tmp_path):
    run = replace(PLAN, method=method, strength=STRENGTHS.get(method, 0.01))
    whole = train.train(run, images, Settings(), tmp_path / "whole")
    assert [*whole.curve("test_hessian")] == [2, 4]
    killed = Mock(side_effect=[None, KeyboardInterrupt])  # after the second epoch
    with pytest.raises(KeyboardInterrupt):
        train.train(run, images, Settings(save_every=0), tmp_path, killed)
    with pytest.raises(RunError, match="same settings"):
        train.train(run, images, Settings(bfloat16=True), tmp_path)
    resumed = train.train(run, images, Settings(), tmp_path)
    for name in ("curves", "spectra", "final"):
        assert getattr(resumed, name) == getattr(whole, name)
    assert runs.read_folder(tmp_path) == [resumed]  # in the same digits as just computed
    assert train.train(run, images, Settings(), tmp_path) == resumed
    assert not list(tmp_path.glob("*.pt"))
    with pytest.raises(RunError, match="another run"):
        train.train(replace(run, epochs=5), images, Settings(), tmp_path)


def test_the_rate_falls_augmented_images_are_others_and_runs_diverge(images, tmp_path):
    trainer, rates = Trainer(replace(PLAN, epochs=8, hessians=0), images, Settings()), []
    for _ in range(8):
        trainer.train_epoch()
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.02] * 4 + [0.002] * 2 + [0.0002] * 2)
    other = Trainer(PLAN, images._replace(augmented=True), Settings(channels_last=True))
    other.train_epoch()
    assert other.result.last("loss") != pytest.approx(trainer.result.curve("loss")[1], rel=0.01)
    wild = replace(PLAN, model="nin", method="decay", strength=1e4, rate=1e4, epochs=30)
    result = train.train(wild, images, Settings(), tmp_path)
    assert result.diverged
    assert result.epochs < 30
    assert train.train(PLAN, images, Settings(deadline=0.0), tmp_path).epochs == 0


def test_an_epoch_uploads_its_indices_once(images, monkeypatch):
    trainer = Trainer(PLAN, images, Settings())
    upload = Mock(wraps=torch.from_numpy)
    monkeypatch.setattr(torch, "from_numpy", upload)
    found, expected = [*trainer._batches(1)], [*data.batches(48, 16, PLAN.seed, 1)]
    assert upload.call_count == 1
    for (x, y), chosen in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, images.train_images[chosen])
        np.testing.assert_array_equal(y, images.train_labels[chosen])


def test_suites_have_the_papers_rates_and_no_two_runs_one_file():
    for suite in SUITES.values():
        settled = {key: {"rate": 0.1} for key in itertools.product(suite.models, suite.batches)}
        planned = suite.runs(settled=settled) + suite.rates(rates=[0.1, 0.2])
        planned += suite.grid(settled, {"spectral": [0.01, 0.1]})
        assert len({run.name for run in planned}) == len(planned)
    rates = {(run.model, run.batch): run.rate for run in SUITES["cifar-100"].runs()}
    assert (rates["nin", 64], rates["nin", 4096]) == (0.1, 1.0)
    chosen = SUITES["quick"].runs(["nin"], ["spectral"], [64], {"spectral": 0.03})
    assert [run.name for run in chosen] == [f"nin-b64-spectral-0.03-r0.03-s{k}" for k in (0, 1)]


def test_accuracies_are_measured_as_often_as_asked(images, tmp_path):
    plan = replace(PLAN, model="mlp", epochs=7, checks=3, hessians=1)
    found = [train.train(replace(plan, seed=k), images, Settings(), tmp_path) for k in (0, 1)]
    assert [*found[0].curve("test")] == [2, 5, 7] == [*found[0].curve("loss")]
    assert [*found[0].curve("test_hessian")] == [7]
    assert found[0].spectra
    assert not found[1].spectra  # one seed's fill a figure, and σ₁ and ranks are kept of all
    assert found[1].final["layers"].keys() == found[0].spectra.keys()


def test_of_equal_accuracies_the_smaller_loss_is_chosen_at_the_rate_of_vanilla():
    suite, found = SUITES["fashion-mlp"], []
    plan = replace(PLAN, data="fashion-mnist", model="mlp", batch=57, validate=True)
    rates, strengths = (
        ((0.1, 0.9, 0.3), (0.2, 0.8, 0.1)),
        ((0.3, 0.9, 0.5), (0.4, 0.9, 0.4), (0.5, 0.8, 0)),
    )
    ways = [("vanilla", rate, 0.0, test, loss) for rate, test, loss in rates]
    ways += [("decay", 0.1, strength, test, loss) for strength, test, loss in strengths]
    ways += [("decay", 0.2, 0.6, 1.0, 0.0)]
    for method, rate, strength, test, loss in ways:
        run = replace(plan, method=method, rate=rate, strength=strength)
        found.append(runs.Result(run, final={"nll": loss}))
        found[-1].record({"test": test})
    assert suite.settled(found) == {("mlp", 64): {"rate": 0.1, "decay": 0.4}}
    assert suite.settled([replace(one, diverged=True) for one in found]) == {}


UNKNOWN = ("run quick --models foo", "run quick --batches 12", "run quick --strengths l=1")


@pytest.mark.parametrize("line", [*UNKNOWN, "table x"])
def test_what_is_unknown_is_an_error(line, monkeypatch):
    monkeypatch.setattr("sys.argv", ["paper", *line.split()])
    with pytest.raises(SystemExit, match=r"2|RunError"):
        cli.main()


def test_a_sweep_leaves_what_runs_leave_alone_in_both_frameworks(tmp_path, monkeypatch, capsys):
    line = f"run two-frameworks --epochs 1 --seeds 1 --workers 2 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", ["paper", *line.split()])
    cli.main()
    assert "4 of 4 runs are done" in capsys.readouterr().out
    (first, *_), alone = runs.read_folder(tmp_path / "two-frameworks"), tmp_path / "alone"
    assert cli.sweep([first.run], Settings(), alone, cli.CONSOLE)[0].curves == first.curves


def test_the_network_in_jax_steps_as_that_in_pytorch(images):
    run = replace(PLAN, model="nin", method="decay", strength=0.1, rate=0.05, epochs=8, width=0.1)
    trainer, model = Trainer(run, images, Settings()), jax_nin.NIN(1, 3, 0.1, rngs=nnx.Rngs(0))
    trainer.model.eval()  # both without dropout
    model.dropout.rate = 0.0
    convs = [m for m in trainer.model.modules() if isinstance(m, nn.Conv2d)]
    for layer, conv in zip(model.convs, convs, strict=True):
        layer.kernel[...] = conv.weight.detach().permute(2, 3, 1, 0).numpy()  # biases are zero
    ours = nnx.Optimizer(model, jax_nin.transformation(run, steps=1), wrt=nnx.Param)
    train_set = jax_nin.labelled(images.train_images, images.train_labels)
    for batch in data.batches(48, 16, seed=0, epoch=0):
        loss = jax_nin.train_step(model, ours, train_set, batch)
        step = trainer._step(*(part[batch] for part in trainer._train))
        assert float(loss) == pytest.approx(float(step), rel=1e-4)
