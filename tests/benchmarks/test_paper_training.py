"""The paper's models, methods, measurements and runs, on images made up here."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
filelock = pytest.importorskip("filelock", reason="filelock is not installed")
for _package in ("scipy", "safetensors", "rich"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: nox -s paper has it")

from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from benchmarks import models, rounding  # noqa: E402
from benchmarks.paper import measure, results, sweep  # noqa: E402
from benchmarks.paper.data import Data  # noqa: E402
from benchmarks.paper.methods import METHODS  # noqa: E402
from benchmarks.paper.networks import MODELS, build, construct  # noqa: E402
from benchmarks.paper.results import PAPERS, STRENGTHS, ResultsError, Run  # noqa: E402
from benchmarks.paper.suites import SUITES  # noqa: E402
from benchmarks.paper.train import Settings, Trainer, train  # noqa: E402


def images(count=48, classes=3, size=8, channels=1, seed=0):
    """Classes that differ in their mean image, so that something can be learned."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((classes, channels, size, size))
    labels = np.arange(2 * count) % classes
    x = (means[labels] + rng.standard_normal((2 * count, channels, size, size))).astype(np.float32)
    return Data(x[:count], labels[:count], x[count:], labels[count:], classes)


def plan(method="vanilla", **changes):
    """A run of seconds."""
    values = {
        "data": "digits",
        "model": "vgg",
        "batch": 16,
        "rate": 0.02,
        "epochs": 4,
        "seed": 0,
        "width": 0.04,
        "method": method,
        "strength": STRENGTHS[method],
    }
    return Run(**values | changes)


def rounded(value):
    """As a file has it."""
    return rounding.rounded(value, results.DIGITS)


def without_time(epochs):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in epochs]


def count(model):
    return sum(p.numel() for p in model.parameters())


class TestModels:
    def test_have_as_many_parameters_as_published(self):
        assert count(models.densenet(40)) == 1_019_722  # Huang et al., 2017, table 2: 1.0 M
        assert count(models.nin()) == 966_986  # 0.97 M, as cited since Lee et al., 2015
        # 138,357,544 without batch normalization, which has two numbers a channel and takes the
        # place of one bias.
        assert count(models.vgg_16(3, 224, 1000, hidden=4096)) == 138_357_544 + 4224

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize(("size", "channels", "classes"), [(8, 1, 10), (28, 1, 10), (96, 3, 7)])
    def test_take_images_of_any_size(self, name, size, channels, classes):
        with torch.device("meta"):
            model = construct(name, channels, size, classes, 0.25)
            assert model(torch.empty(2, channels, size, size)).shape == (2, classes)

    def test_depend_on_the_seed_alone(self):
        weights = [
            torch.cat(
                [p.detach().flatten() for p in build("nin", images(), 0.1, seed).parameters()]
            )
            for seed in (0, 0, 1)
        ]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_an_unknown_name_is_an_error(self):
        with pytest.raises(ValueError, match="densenet-40"):
            construct("resnet", 3, 32, 10, 1.0)


class TestMethods:
    def gradient(self, method, model, x, y):
        """What the optimizer steps along."""
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **method.options())
        method.attach(model, optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        loss, _ = method.loss(model, x, y)
        loss.backward()
        optimizer.step()
        return [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]

    def linear(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False))
        return model, torch.randn(7, 1, 8, 8), torch.arange(7) % 5

    def test_there_is_one_for_each_name(self):
        assert METHODS.keys() == STRENGTHS.keys()
        assert set(PAPERS) < set(STRENGTHS)

    def test_decay_adds_the_weights(self):
        model, x, y = self.linear()
        weight = model[1].weight.detach().clone()
        (plain,) = self.gradient(METHODS["vanilla"](), self.linear()[0], x, y)
        (decayed,) = self.gradient(METHODS["decay"](0.5), model, x, y)
        torch.testing.assert_close(decayed - plain, 0.5 * weight, atol=1e-6, rtol=1e-5)

    def test_spectral_adds_a_matrix_of_rank_one_on_its_way_to_the_first_term(self):
        model, x, y = self.linear()
        weight = model[1].weight.detach().clone()
        (plain,) = self.gradient(METHODS["vanilla"](), self.linear()[0], x, y)
        method = METHODS["spectral"](0.5)
        (regularized,) = self.gradient(method, model, x, y)
        values = torch.linalg.svdvals(regularized - plain)
        assert values[1] < 1e-5
        assert 0 < values[0] <= 0.5 * torch.linalg.matrix_norm(weight, 2) * (1 + 1e-5)

    def test_adversarial_moves_each_image_by_one_up_its_loss(self):
        model, x, y = self.linear()
        seen = []
        loss, plain = METHODS["adversarial"](0.25).loss(
            lambda images: seen.append(images.detach()) or model(images), x, y
        )
        first, moved = seen
        torch.testing.assert_close((moved - first).flatten(1).norm(dim=1), torch.ones(7))
        before, after = (cross_entropy(model(some), y, reduction="none") for some in seen)
        assert (after > before).all()
        torch.testing.assert_close(loss, 0.25 * before.mean() + 0.75 * after.mean())
        torch.testing.assert_close(plain, before.mean())

    def test_adversarial_moves_by_one_where_the_gradient_is_tiny(self):
        model, x, y = self.linear()
        seen = []
        METHODS["adversarial"](0.5).loss(
            lambda images: seen.append(images.detach()) or 1e-24 * model(images), x, y
        )
        first, moved = seen
        torch.testing.assert_close((moved - first).flatten(1).norm(dim=1), torch.ones(7))

    def test_jacobian_estimates_the_squared_frobenius_norm(self):
        model, x, y = self.linear()
        method = METHODS["jacobian"](2.0)
        torch.manual_seed(1)
        terms = [loss - plain for loss, plain in (method.loss(model, x, y) for _ in range(400))]
        exact = model[1].weight.square().sum()  # the Jacobian of a linear map is its matrix
        torch.testing.assert_close(torch.stack(terms).mean(), exact, rtol=0.02, atol=0)

    def test_normalization_makes_the_largest_singular_value_one(self):
        model = build("vgg", images(), 0.04, 0)
        METHODS["normalization"]().prepare(model)
        for _ in range(30):
            model(torch.from_numpy(images().train_images))
        with measure.evaluating(model):
            assert all(
                values[0] == pytest.approx(1, abs=0.02)
                for values in measure.spectra(model).values()
            )


class TestMeasurements:
    def network(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3))
        data = images()
        return model, torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)

    def test_the_gradient_is_that_of_each_image(self):
        model, x, y = self.network()
        norms = []
        for image, label in zip(x, y, strict=True):
            image = image[None].requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(model(image), label[None]), image)
            norms.append(gradient.norm())
        assert measure.input_gradient(model, x, y) == pytest.approx(
            float(torch.stack(norms).mean()), rel=1e-5
        )

    def test_the_eigenvalue_is_the_dense_hessians(self):
        model, x, y = self.network()
        names, values = zip(*model.named_parameters(), strict=True)
        shapes = [value.numel() for value in values]

        def loss(flat):
            parts = [
                part.view_as(value) for part, value in zip(flat.split(shapes), values, strict=True)
            ]
            outputs = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), x)
            return cross_entropy(outputs, y)

        flat = torch.cat([value.detach().flatten() for value in values])
        dense = torch.autograd.functional.hessian(loss, flat)
        expected = float(torch.linalg.eigvalsh(dense.double())[-1])
        assert measure.hessian(model, x, y) == pytest.approx(expected, rel=0.03)

    def test_where_weights_are_not_numbers_the_eigenvalue_is_none(self):
        model, x, y = self.network()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        assert math.isnan(measure.hessian(model, x, y))

    def test_accuracy_and_spectra(self):
        model, x, y = self.network()
        right = (model(x).argmax(1) == y).float().mean()
        assert measure.accuracy(model, x, y) == pytest.approx(float(right))
        spectra = measure.spectra(model)
        assert spectra.keys() == {"1", "3"}
        expected = np.linalg.svd(model[1].weight.detach().double().numpy(), compute_uv=False)
        np.testing.assert_allclose(spectra["1"], expected, rtol=1e-6)
        first = (values[0] for values in spectra.values())
        assert measure.sigma_product(model) == pytest.approx(math.prod(first))


class TestRuns:
    @pytest.mark.parametrize("method", METHODS)
    def test_one_that_was_stopped_goes_on_to_the_same_result(self, method, tmp_path):
        run, data = plan(method, hessians=2), images()
        whole = train(run, data, Settings(), tmp_path / "whole", tmp_path)
        folder, checkpoints = tmp_path / "parts", tmp_path / "checkpoints"
        self.stop_after(2, run, data, folder, checkpoints)
        assert (checkpoints / f"{run.name}.safetensors").exists()
        resumed = train(run, data, Settings(), folder, checkpoints)
        assert without_time(rounded(resumed.epochs)) == without_time(rounded(whole.epochs))
        assert rounded(resumed.spectra) == rounded(whole.spectra)
        assert not any(checkpoints.glob("*.safetensors"))

    def stop_after(self, epochs, run, data, folder, checkpoints):
        """As a process that is killed: whatever it is doing."""

        def advance():
            lines = (folder / f"{run.name}.jsonl").read_text().splitlines()
            if len(lines) == 1 + epochs:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(run, data, Settings(save_every=0), folder, checkpoints, advance)

    def test_what_was_written_after_the_last_checkpoint_is_done_again(self, tmp_path):
        run, data = plan(), images()
        self.stop_after(2, run, data, tmp_path, tmp_path)
        path = tmp_path / f"{run.name}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps({"epoch": 3, "train": 0.0}) + "\n" + '{"epoch": 4, "tr')
        result = train(run, data, Settings(), tmp_path, tmp_path)
        assert [line["epoch"] for line in result.epochs] == [1, 2, 3, 4]
        assert results.read(path).epochs[2]["train"] > 0

    def test_a_checkpoint_of_another_run_or_of_other_settings_is_refused(self, tmp_path):
        run, data = plan(), images()
        self.stop_after(2, run, data, tmp_path, tmp_path)
        half = Settings(bfloat16=True)
        with pytest.raises(ResultsError, match="same settings"):
            train(run, data, half, tmp_path, tmp_path)
        (tmp_path / f"{run.name}.jsonl").unlink()
        other = plan(rate=0.01)
        results.write(tmp_path / f"{run.name}.jsonl", results.Result(other, epochs=[{"epoch": 1}]))
        with pytest.raises(ResultsError, match="checkpoint"):
            train(other, data, Settings(), tmp_path, tmp_path)

    def test_a_checkpoint_further_than_its_file_is_not_used(self, tmp_path):
        run, data = plan(), images()
        self.stop_after(3, run, data, tmp_path, tmp_path)
        first = results.Result(run, epochs=[{"epoch": 1}])
        results.write(tmp_path / f"{run.name}.jsonl", first)
        result = train(run, data, Settings(), tmp_path, tmp_path)
        assert [line["epoch"] for line in result.epochs] == [1, 2, 3, 4]
        assert all("test" in line for line in result.epochs)

    def test_one_without_a_checkpoint_begins_anew(self, tmp_path):
        run, data = plan(), images()
        self.stop_after(2, run, data, tmp_path, tmp_path)
        (tmp_path / f"{run.name}.safetensors").unlink()
        result = train(run, data, Settings(), tmp_path, tmp_path)
        assert [line["epoch"] for line in result.epochs] == [1, 2, 3, 4]

    def test_a_finished_one_is_left_alone(self, tmp_path):
        run, data = plan(epochs=1), images()
        train(run, data, Settings(), tmp_path, tmp_path)
        text = (tmp_path / f"{run.name}.jsonl").read_text()
        assert train(run, data, Settings(), tmp_path, tmp_path).done
        assert (tmp_path / f"{run.name}.jsonl").read_text() == text

    def test_anothers_file_is_an_error(self, tmp_path):
        train(plan(epochs=1), images(), Settings(), tmp_path, tmp_path)
        with pytest.raises(ResultsError, match="another run"):
            train(plan(epochs=1, rate=0.5), images(), Settings(), tmp_path, tmp_path)

    def test_a_late_one_stops_before_its_next_epoch(self, tmp_path):
        result = train(plan(), images(), Settings(deadline=0.0), tmp_path, tmp_path)
        assert not result.done
        assert not result.epochs
        assert results.read_all(tmp_path) == []

    def test_one_that_diverges_says_so_and_ends(self, tmp_path):
        run = plan("decay", model="nin", strength=1e4, rate=1e4, epochs=30)
        result = train(run, images(), Settings(), tmp_path, tmp_path)
        assert result.diverged
        assert len(result.epochs) < 30
        assert results.read(tmp_path / f"{run.name}.jsonl").diverged

    def test_the_rate_falls_at_a_half_and_at_three_quarters(self):
        trainer, rates = Trainer(plan(epochs=8), images(), Settings()), []
        for _ in range(8):
            trainer.train_epoch()
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx([0.02] * 4 + [0.002] * 2 + [0.0002] * 2)

    def test_spectral_lowers_the_largest_singular_value(self, tmp_path):
        data = images()
        vanilla, spectral = (
            train(plan(method, rate=0.05), data, Settings(), tmp_path, tmp_path)
            for method in ("vanilla", "spectral")
        )
        assert spectral.epochs[-1]["sigma_product"] < vanilla.epochs[-1]["sigma_product"]

    @pytest.mark.parametrize("method", METHODS)
    def test_in_bfloat16_and_channels_last_they_go_nearly_the_same_way(self, method, tmp_path):
        half = Settings(bfloat16=True, channels_last=True)
        run, data = plan(method, epochs=1), images()
        one, two = (
            train(run, data, settings, tmp_path / str(k), tmp_path)
            for k, settings in enumerate((Settings(), half))
        )
        assert two.epochs[0]["loss"] == pytest.approx(one.epochs[0]["loss"], rel=0.1)
        assert two.machine["bfloat16"]
        assert two.machine["channels_last"]

    def test_augmented_images_are_trained_on(self):
        data = images()._replace(augmented=True)
        trainer, again = (Trainer(plan(), data, Settings()) for _ in range(2))
        plain = Trainer(plan(), images(), Settings())
        first = trainer.train_epoch()["loss"]
        assert again.train_epoch()["loss"] == first
        assert plain.train_epoch()["loss"] != first


class TestSuites:
    @pytest.mark.parametrize("name", SUITES)
    def test_no_two_runs_have_one_file(self, name):
        runs = SUITES[name].runs()
        assert len({run.name for run in runs}) == len(runs)

    def test_the_papers_have_its_rates(self):
        rates = {
            (run.data, run.model, run.batch): run.rate
            for name in ("cifar-10", "cifar-100", "stl-10")
            for run in SUITES[name].runs()
        }
        assert rates == {
            ("cifar-10", "vgg", 64): 0.01,
            ("cifar-10", "vgg", 4096): 0.1,
            ("cifar-100", "nin", 64): 0.1,
            ("cifar-100", "nin", 4096): 1.0,
            ("cifar-100", "densenet-40", 64): 0.1,
            ("cifar-100", "densenet-40", 4096): 1.0,
            ("stl-10", "densenet-22", 64): 0.01,
            ("stl-10", "densenet-22", 4096): 0.1,
        }

    def test_a_grid_has_each_pair_and_tests_on_no_test_image(self):
        grid = SUITES["quick"].grid(["vgg"], "spectral", [0.01, 0.1], [0.1, 0.2, 0.3])
        assert len({run.name for run in grid}) == len(grid) == 2 * 2 * 3
        assert all(run.validate for run in grid)

    def test_killed_they_leave_no_process_behind(self, tmp_path):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
        command = [sys.executable, "-m", "benchmarks.paper", "run", "quick", "--seeds", "1"]
        command += ["--epochs", "500", "--workers", "2", "--out", str(tmp_path)]
        root = Path(__file__).parents[2]
        paths = os.pathsep.join([str(root), str(root / "adapters")])
        process = subprocess.Popen(
            command, cwd=root, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL
        )

        def sizes():
            return [path.stat().st_size for path in sorted(tmp_path.rglob("*.jsonl"))]

        self.wait_for(lambda: len(sizes()) == 2 and min(sizes()) > 2000)
        process.kill()
        process.wait()
        self.wait_for(lambda: self.all_free(tmp_path))
        before = sizes()
        time.sleep(2)
        assert sizes() == before

    def all_free(self, folder):
        """Whether no process holds a run."""
        for path in folder.rglob("*.lock"):
            try:
                with filelock.FileLock(path, timeout=0):
                    pass
            except filelock.Timeout:
                return False
        return True

    def wait_for(self, condition):
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.2)

    def test_side_by_side_they_leave_what_they_leave_alone(self, tmp_path):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
        from rich.console import Console

        runs = [plan(method, epochs=1, batch=64) for method in ("vanilla", "spectral")]
        found = sweep.sweep(
            runs,
            Settings(),
            tmp_path,
            tmp_path,
            workers=2,
            source=None,
            console=Console(quiet=True),
        )
        assert [result.run for result in found] == runs
        assert all(result.done for result in found)
        assert sweep.epochs_done(runs, tmp_path) == 2
        alone = sweep.work(runs[1], Settings(), tmp_path / "alone", tmp_path, None)
        assert without_time(rounded(found[1].epochs)) == without_time(rounded(alone.epochs))
