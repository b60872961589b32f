"""Lightning's loops beside a plain one."""

import doctest
import math
import os
import subprocess
import sys
from types import ModuleType

import pytest

pytest.importorskip("lightning", reason="lightning is not installed")
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

import plain_loop
import spectral_core as sc
import with_lightning
from plain_loop import assert_same, batches, overflowing, sgd
from spectral_torch.lightning import SpectralNormCallback

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


class Module(with_lightning.Digits):
    """The example's."""

    def __init__(self, optimizer_of=None):
        torch.manual_seed(0)
        super().__init__(plain_loop.FACTOR, width=16)
        self.optimizer_of = optimizer_of

    def configure_optimizers(self):
        if self.optimizer_of is None:
            return super().configure_optimizers()
        optimizer = self.optimizer_of(self)
        self.reg.attach(optimizer)
        return optimizer


def trainer(**options):
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(**{**quiet, **options})


def fit(module, data, *, ckpt_path=None, **options):
    loader = DataLoader(data, batch_size=None)  # the batches as they are
    fitted = trainer(**options)
    fitted.fit(module, loader, ckpt_path=ckpt_path)
    return fitted


def assert_as_plain(module, data, *, tolerance=None, optimizer_of=sgd, **options):
    expected = Module()
    reg = plain_loop.train(expected, data, optimizer_of, Module.training_step, **options)
    assert_same(module, expected, module.reg, reg, **(tolerance or {}))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_is_as_in_a_plain_loop(accumulate, clip):
    module, data = Module(), batches(8)
    fit(module, data, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    assert_as_plain(module, data, accumulate=accumulate, clip=clip)


def test_bfloat16():
    module, data = Module(), batches(8)
    fit(module, data, precision="bf16-mixed")
    assert_as_plain(module, data, autocast=torch.bfloat16)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


def half():
    return MixedPrecision("16-mixed", device="cpu", scaler=scaler())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer_of", [sgd, adamw])
def test_float16_with_a_scaler_that_skips_a_step(optimizer_of, fused):
    data = overflowing(batches(6), 3)
    module = Module(lambda model: optimizer_of(model, fused=fused))
    fit(module, data, plugins=half())
    assert_as_plain(
        module,
        data,
        optimizer_of=optimizer_of,
        autocast=torch.float16,
        scaler=scaler(),
        # A fused step adds and divides in another order.
        tolerance={"rtol": 1e-4, "atol": 1e-5} if fused else {},
    )


@pytest.mark.parametrize("clip", [None, 0.1])
def test_gradients_are_unscaled_and_clipped_before_the_term(clip):
    module, data = Module(), batches(6)
    fit(module, data, plugins=half(), gradient_clip_val=clip)
    assert_as_plain(module, data, autocast=torch.float16, scaler=scaler(), clip=clip)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_skipped_moves_nothing(fused):
    module, start = Module(lambda model: sgd(model, fused=fused)), Module()
    fit(module, overflowing(batches(1), 0), plugins=half())
    assert_same(module, start, module.reg, start.reg)


@pytest.mark.parametrize("plugin", [None, half], ids=["float32", "float16"])
def test_resuming_is_bit_equal(tmp_path, plugin):
    def plugins():
        return None if plugin is None else plugin()

    data, path = batches(8), tmp_path / "middle.ckpt"
    straight = Module()
    fit(straight, data, max_epochs=2, plugins=plugins())

    fit(Module(), data, plugins=plugins()).save_checkpoint(path)
    resumed = Module()
    fit(resumed, data, max_epochs=2, plugins=plugins(), ckpt_path=path)
    assert_same(resumed, straight, resumed.reg, straight.reg)

    loaded = Module.load_from_checkpoint(path)  # without a Trainer
    for name, value in torch.load(path, weights_only=False)["spectral"].items():
        assert torch.equal(loaded.reg.state_dict()[name], value), name


class Manual(Module):
    automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        optimizer.step()


def test_manual_optimization_is_as_in_a_plain_loop():
    module, data = Manual(), batches(4)
    fit(module, data)
    assert_as_plain(module, data)


class Late(Module):
    def configure_optimizers(self):
        return sgd(self)

    def on_train_start(self):
        self.reg.attach(self.optimizers())  # Lightning's wrapper


def test_lightnings_wrapper_is_unwrapped():
    module, data = Late(), batches(4)
    fit(module, data)
    assert_as_plain(module, data)


def test_the_example():
    model, accuracy = with_lightning.main(epochs=3, factor=0.05)
    plain, _ = with_lightning.main(epochs=3, factor=0.0)
    assert accuracy > 0.8
    plain_loop.assert_smaller(model, plain, model.reg)


# The ready callback


class Net(pl.LightningModule):
    """A module that knows nothing of the regularizer."""

    def __init__(self, optimizer_of=sgd):
        super().__init__()
        self.net = plain_loop.net()
        self.optimizer_of = optimizer_of

    def training_step(self, batch):
        return plain_loop.cross_entropy(self.net, batch)

    def configure_optimizers(self):
        return self.optimizer_of(self)


class ManualNet(Net):
    automatic_optimization = False

    def training_step(self, batch):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        optimizer.step()


def callback(**options):
    return SpectralNormCallback(plain_loop.FACTOR, **options)


def assert_callback_as_plain(module, reg, data, *, tolerance=None, **options):
    expected = Net()
    expected_reg = plain_loop.train(
        expected, data, module.optimizer_of, Net.training_step, **options
    )
    assert_same(module, expected, reg, expected_reg, **(tolerance or {}))


LOOPS = {
    "plain": (Net, {}, {}),
    "accumulated": (Net, {"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "clipped": (Net, {"gradient_clip_val": 0.1}, {"clip": 0.1}),
    "bfloat16": (Net, {"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
    "manual": (ManualNet, {}, {}),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_callback_trains_as_a_plain_loop(loop):
    kind, options, plain = LOOPS[loop]
    module, data, ready = kind(), batches(8), callback()
    fit(module, data, callbacks=[ready], **options)
    assert_callback_as_plain(module, ready.regularizer, data, **plain)


@pytest.mark.parametrize("fused", [False, True])
def test_callback_with_a_scaler_that_skips_a_step(fused):
    data, ready = overflowing(batches(6), 3), callback()
    module = Net(lambda model: sgd(model, fused=fused))
    fit(module, data, callbacks=[ready], plugins=half())
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if fused else {}
    options = {"autocast": torch.float16, "scaler": scaler(), "tolerance": tolerance}
    assert_callback_as_plain(module, ready.regularizer, data, **options)


@pytest.mark.thorough
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_callback_is_one_of_the_package_in_use(package):
    code = (
        f"import {package} as pl\n"
        "from spectral_torch.lightning import SpectralNormCallback\n"
        "assert issubclass(SpectralNormCallback, pl.Callback)\n"
        "pl.Trainer(callbacks=[SpectralNormCallback()], logger=False, accelerator='cpu')\n"
    )
    pytest.importorskip(package)
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_callback_resumes_bit_equal(tmp_path, every_n_steps):
    data, path = batches(8), tmp_path / "middle.ckpt"

    def run(**options):
        module, ready = Net(), callback(every_n_steps=every_n_steps)
        return module, ready, fit(module, data, callbacks=[ready], **options)

    straight, straight_ready, _ = run(max_epochs=2)
    run()[2].save_checkpoint(path)
    resumed, resumed_ready, _ = run(max_epochs=2, ckpt_path=path)
    assert_same(resumed, straight, resumed_ready.regularizer, straight_ready.regularizer)
    assert resumed_ready.state_dict().keys() == straight_ready.state_dict().keys()


def test_second_fit_goes_on_and_another_module_starts_anew():
    data = batches(8)
    module, ready = Net(), callback()
    fit(module, data, callbacks=[ready])
    before = ready.state_dict()
    fit(module, data[:1], callbacks=[ready])
    fresh = callback(warmup_iters=0)
    fit(module, data[:1], callbacks=[fresh])
    old, gone_on, anew = (one["net.0.weight.v"] for one in (before, *states(ready, fresh)))
    assert abs(float((old * gone_on).sum())) > 0.9 > abs(float((old * anew).sum()))
    other = Net()
    other.more = torch.nn.Linear(3, 3)
    fit(other, data[:1], callbacks=[ready])
    assert "more.weight" in ready.regularizer.sigmas()


def test_callback_refuses_the_state_of_other_weights(tmp_path):
    path, data = tmp_path / "middle.ckpt", batches(2)
    fit(Net(), data, callbacks=[callback(include="net.0")]).save_checkpoint(path)
    with pytest.raises(sc.NamesError, match=r"missing.*net\.2\.weight"):
        fit(Net(), data, callbacks=[callback()], ckpt_path=path)


def states(ready, fresh):
    return ready.state_dict(), fresh.state_dict()


class Gan(pl.LightningModule):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.discriminator = torch.nn.Linear(8, 64), torch.nn.Linear(64, 1)

    def configure_optimizers(self):
        generator = torch.optim.SGD(self.generator.parameters(), lr=0.01)
        return generator, torch.optim.ASGD(self.discriminator.parameters(), lr=0.01)

    def training_step(self, batch):
        generator, discriminator = self.optimizers()
        fake = self.generator(batch[0][:, :8])
        for optimizer, x in ((generator, fake), (discriminator, fake.detach())):
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.discriminator(x).mean())
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


@pytest.mark.parametrize(
    ("optimizers", "names"),
    [
        (None, {"generator.weight", "discriminator.weight"}),
        (1, {"discriminator.weight"}),
        (["SGD"], {"generator.weight"}),
        (["ASGD", 0], {"generator.weight", "discriminator.weight"}),
    ],
)
def test_callback_acts_in_the_chosen_optimizers(optimizers, names):
    plain, data = Gan(), batches(1)
    fit(plain, data)
    module = Gan()
    ready = callback(optimizers=optimizers)
    fit(module, data, callbacks=[ready])
    assert ready.regularizer.sigmas().keys() == names
    for name in ("generator.weight", "discriminator.weight"):
        same = torch.equal(module.get_parameter(name), plain.get_parameter(name))
        assert same == (name not in names), name


def test_two_callbacks_with_two_prefixes(tmp_path):
    def both():
        return [
            callback(optimizers=0, prefix="generator/"),
            SpectralNormCallback(0.5, optimizers="ASGD"),
        ]

    path, ready = tmp_path / "gan.ckpt", both()
    trained = fit(Gan(), batches(4), callbacks=ready)
    assert {"generator/penalty", "spectral/penalty"} <= set(trained.callback_metrics)
    trained.save_checkpoint(path)
    again = both()
    fit(Gan(), batches(4), callbacks=again, ckpt_path=path)  # it has ended: nothing is trained
    for one, other in zip(ready, again, strict=True):
        assert all(torch.equal(x, other.state_dict()[name]) for name, x in one.state_dict().items())


def test_callback_schedules_are_of_the_global_step():
    seen = []

    def ramp(step):
        seen.append(step)
        return 0.01 * step

    module, ready = (
        Net(),
        SpectralNormCallback({"net.0.weight": ramp, "*": 0.1}, target=lambda _: 0.2),
    )
    fit(module, batches(3), callbacks=[ready])
    assert sorted(set(seen)) == [0, 1, 2]
    assert ready.regularizer.factor == {"net.0.weight": 0.02, "*": 0.1}
    assert ready.regularizer.target == 0.2


def expected_numbers(weights):
    sigma = {name: torch.linalg.matrix_norm(x.double(), 2).item() for name, x in weights.items()}
    return {
        **{f"spectral/sigma/{name}": value for name, value in sigma.items()},
        "spectral/log10_sigma_product": sum(map(math.log10, sigma.values())),
        "spectral/penalty": plain_loop.FACTOR / 2 * sum(value**2 for value in sigma.values()),
    }


class Recording(Logger):
    name, version = "recording", "0"

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


class Seen(Net):
    """Note the weights of each step's loss."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def training_step(self, batch):
        pairs = self.named_parameters()
        self.weights.append({name: p.detach().clone() for name, p in pairs if p.ndim == 2})
        self.log("loss", 0.0)
        return super().training_step(batch)


@pytest.mark.parametrize(
    ("options", "every", "accumulate", "steps"),
    [
        ({"log_every_n_steps": 3}, 50, 1, [0, 3, 6]),
        ({}, 4, 1, [0, 4]),
        ({}, 2, 2, [0, 2]),
        ({"log_every_n_steps": 0}, 1, 1, []),
    ],
)
def test_callback_logs_the_numbers_of_an_svd(tmp_path, options, every, accumulate, steps):
    logger, module = Recording(), Seen()
    saving = ModelCheckpoint(tmp_path, monitor="spectral/penalty")
    ready = callback(n_iter=1000, **options)
    trained = fit(
        module,
        batches(8),
        callbacks=[ready, saving] if steps else [ready],
        logger=logger,
        log_every_n_steps=every,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=bool(steps),
    )
    rows = {step: row for step, row in logger.rows.items() if "spectral/penalty" in row}
    assert list(rows) == steps
    for step, row in rows.items():
        numbers = expected_numbers(module.weights[step * accumulate])
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    if steps:
        last = rows[steps[-1]]["spectral/penalty"]
        assert saving.best_model_score == trained.callback_metrics["spectral/penalty"]
        assert float(saving.best_model_score) == pytest.approx(last)


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)


@pytest.mark.parametrize("optimizers", [None, 0])
def test_callback_takes_in_weights_that_thaw(optimizers):
    def trained(callbacks, epochs):
        module = Net(lambda model: torch.optim.SGD(model.net[2].parameters(), lr=0.1))
        fit(module, batches(4), callbacks=[Finetuning(), *callbacks], max_epochs=epochs)
        return module

    ready = callback(n_iter=20, optimizers=optimizers)
    module = trained([ready], 3)
    assert torch.equal(trained([callback()], 1).net[0].weight, Net().net[0].weight)
    assert not torch.equal(module.net[0].weight, trained([], 3).net[0].weight)
    norm = torch.linalg.matrix_norm(module.net[0].weight.detach(), 2)
    assert float(ready.regularizer.sigmas()["net.0.weight"]) == pytest.approx(float(norm), rel=0.1)


def test_callback_lets_go_of_the_optimizer():
    module, ready = Net(), callback()
    trained = fit(module, batches(2), callbacks=[ready])
    assert not trained.optimizers[0]._optimizer_step_pre_hooks

    class Broken(Net):
        def training_step(self, batch):
            raise OSError("the disk is full")

    module = Broken()
    optimizer = sgd(module)
    module.optimizer_of = lambda _: optimizer
    with pytest.raises(OSError, match="disk"):
        fit(module, batches(2), callbacks=[ready])
    assert not optimizer._optimizer_step_pre_hooks


def test_callback_errors_name_the_remedy():
    module = Net(lambda _: None)
    with pytest.raises(sc.ArgumentError, match="configure_optimizers"):
        fit(module, batches(1), callbacks=[callback()])
    for wrong in (3, "Lion", -4):
        with pytest.raises(sc.NamesError, match=rf"optimizers: {wrong!r} .*\['SGD', 'ASGD'\]"):
            fit(Gan(), batches(1), callbacks=[callback(optimizers=wrong)])
    with pytest.raises(sc.NamesError, match="nothing"):
        fit(Net(), batches(1), callbacks=[callback(include="nothing")])
    for name in ("n_iter", "every_n_steps", "log_every_n_steps"):
        with pytest.raises(sc.ArgumentError, match=name):
            callback(**{name: -1})


YAML = """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: spectral_torch.lightning.SpectralNormCallback
      init_args:
        factor: {factor}
        exclude: [net.2.weight]
        layouts: {{net.0.weight: oi}}
        optimizers: 0
        log_every_n_steps: 2
"""


def ramp(step):
    return 0.25 * step


@pytest.mark.parametrize(
    ("factor", "expected"),
    [("0.25", 0.25), ("{net.0: 0.125}", {"net.0": 0.125}), (f"{__name__}.ramp", 0.25)],
)
def test_callback_in_the_yaml_of_a_cli(tmp_path, monkeypatch, factor, expected):
    pytest.importorskip("jsonargparse", reason="jsonargparse is not installed")
    from lightning.pytorch.cli import LightningCLI

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or ModuleType(__name__))
    monkeypatch.setattr(sys.modules[__name__], "ramp", ramp, raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(YAML.format(factor=factor))
    cli = LightningCLI(Net, save_config_callback=None, run=False, args=["--config", str(path)])
    cli.trainer.fit(cli.model, DataLoader(batches(2), batch_size=None))
    (ready,) = (x for x in cli.trainer.callbacks if isinstance(x, SpectralNormCallback))
    assert ready.regularizer.sigmas().keys() == {"net.0.weight"}
    assert ready.regularizer.factor == expected


def test_the_docstring_runs():
    module = sys.modules[SpectralNormCallback.__module__]
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
