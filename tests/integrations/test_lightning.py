"""Lightning's loops beside a plain one."""

import pytest

pytest.importorskip("lightning", reason="lightning is not installed")
import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

import plain_loop
import spectral_core as sc
import with_lightning
from plain_loop import assert_same, batches, overflowing, sgd

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
        with pytest.raises(sc.ArgumentError, match="attach the optimizer that it wraps"):
            self.reg.attach(self.optimizers())
        self.reg.attach(self.optimizers().optimizer)


def test_lightnings_wrapper_is_told_apart():
    module, data = Late(), batches(4)
    fit(module, data)
    assert_as_plain(module, data)


def test_the_example():
    model, accuracy = with_lightning.main(epochs=3, factor=0.05)
    plain, _ = with_lightning.main(epochs=3, factor=0.0)
    assert accuracy > 0.8
    plain_loop.assert_smaller(model, plain, model.reg)
