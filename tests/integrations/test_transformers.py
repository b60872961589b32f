"""The loop of Hugging Face's Trainer beside a plain one."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainerCallback, TrainingArguments

import plain_loop
import spectral_core as sc
import with_transformers
from plain_loop import assert_same, sgd
from spectral_torch import SpectralNormRegularizer

SIZE = 16


@pytest.fixture(autouse=True)
def settings_of_its_own():
    """Accelerate keeps a process's settings."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def net():
    torch.manual_seed(0)
    return with_transformers.network(width=8)


def examples(steps):
    return with_transformers.digits()[: steps * SIZE]


def batches(steps):
    rows = examples(steps)
    for start in range(0, len(rows), SIZE):
        part = rows[start : start + SIZE]
        yield {
            "pixel_values": torch.stack([row["pixel_values"] for row in part]),
            "labels": torch.tensor([row["labels"] for row in part]),
        }


def loss_of(model, batch):
    return model(**batch).loss


def arguments(folder, **options):
    return TrainingArguments(
        folder,
        per_device_train_batch_size=SIZE,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        use_cpu=True,
        max_grad_norm=options.pop("max_grad_norm", 0.0),
        lr_scheduler_type="constant",
        save_strategy=options.pop("save_strategy", "no"),
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def trained(folder, steps, *, resume=None, **options):
    model = net()
    optimizer = sgd(model)
    reg = with_transformers.regularized(model, optimizer, plain_loop.FACTOR)
    trainer = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=examples(steps),
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, reg


# The Trainer divides a sum of losses by their number, and so rounds otherwise than a mean does.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def assert_as_plain(model, reg, steps, **options):
    expected = net()
    expected_reg = plain_loop.train(expected, batches(steps), sgd, loss_of, **options)
    assert_same(model, expected, reg, expected_reg, **ROUNDING)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_is_as_in_a_plain_loop(tmp_path, accumulate, clip):
    options = {"gradient_accumulation_steps": accumulate, "max_grad_norm": clip or 0.0}
    model, reg = trained(tmp_path, 8, **options)
    assert_as_plain(model, reg, 8, accumulate=accumulate, clip=clip)


def test_resuming_is_bit_equal(tmp_path):
    expected, expected_reg = trained(tmp_path, 8, save_strategy="steps", save_steps=4)
    model, reg = trained(tmp_path / "resumed", 8, resume=str(tmp_path / "checkpoint-4"))
    assert_same(model, expected, reg, expected_reg)
    assert (tmp_path / "checkpoint-4").is_dir()
    assert not (tmp_path / "resumed" / "checkpoint-4").exists()


class Attach(TrainerCallback):
    def __init__(self, reg):
        self.reg = reg

    def on_train_begin(self, args, state, control, *, optimizer, **kwargs):
        with pytest.raises(sc.ArgumentError, match="attach the optimizer that it wraps"):
            self.reg.attach(optimizer)
        self.reg.attach(optimizer.optimizer)


class Attached(Trainer):
    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        self.reg = SpectralNormRegularizer(self.model, factor=plain_loop.FACTOR).attach(optimizer)
        return optimizer


@pytest.mark.parametrize("how", ["callback", "subclass"])
def test_the_trainers_own_optimizer(tmp_path, how):
    options = arguments(
        tmp_path, learning_rate=0.1, optim="sgd", optim_args="momentum=0.9", weight_decay=0.0
    )
    model = net()
    reg = SpectralNormRegularizer(model, factor=plain_loop.FACTOR)
    if how == "callback":
        trainer = Trainer(model, options, train_dataset=examples(4), callbacks=[Attach(reg)])
    else:
        trainer = Attached(model, options, train_dataset=examples(4))
    trainer.train()
    assert_as_plain(model, reg if how == "callback" else trainer.reg, 4)


def test_the_example():
    reg, accuracy = with_transformers.main(epochs=3, factor=0.05)
    plain_reg, _ = with_transformers.main(epochs=3, factor=0.0)
    assert accuracy > 0.5
    largest, without = (max(s.max() for s in r.sigmas().values()) for r in (reg, plain_reg))
    assert largest < 0.7 * without
