"""The loop of Hugging Face's Trainer beside a plain one."""

import doctest
import json
import sys
import warnings
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
import torch
from accelerate.state import AcceleratorState
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

import plain_loop
import spectral_core as sc
import with_transformers
from plain_loop import assert_same, sgd
from spectral_torch import SpectralNormRegularizer
from spectral_torch.transformers import SpectralNormCallback, _unscale

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
        num_train_epochs=options.pop("num_train_epochs", 1),
        train_sampling_strategy="sequential",
        use_cpu=True,
        max_grad_norm=options.pop("max_grad_norm", 0.0),
        lr_scheduler_type="constant",
        save_strategy=options.pop("save_strategy", "no"),
        report_to=options.pop("report_to", "none"),
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
        self.reg.attach(optimizer)  # Accelerate's wrapper


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


# The ready callback


def ready_trainer(folder, steps=8, *, callbacks, train=True, resume=None, **options):
    model = options.pop("model", None) or net()
    given = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1}
    trainer = Trainer(
        model,
        arguments(folder, **{**given, "logging_strategy": "no", **options}),
        train_dataset=examples(steps),
        callbacks=callbacks,
    )
    if train:
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def callback(**options):
    return SpectralNormCallback(plain_loop.FACTOR, **options)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_callback_trains_as_a_plain_loop(tmp_path, accumulate, clip):
    ready = callback()
    options = {"gradient_accumulation_steps": accumulate, "max_grad_norm": clip or 0.0}
    trainer = ready_trainer(tmp_path, callbacks=[ready], **options)
    assert_as_plain(trainer.model, ready.regularizer, 8, accumulate=accumulate, clip=clip)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("every_n_steps", [1, 3])
def test_callback_resumes_bit_equal(tmp_path, every_n_steps, restored):
    options = {"restore_callback_states_from_checkpoint": restored}
    expected_ready, ready = (callback(every_n_steps=every_n_steps) for _ in range(2))
    expected = ready_trainer(
        tmp_path, callbacks=[expected_ready], save_strategy="steps", save_steps=4
    )
    checkpoint = str(tmp_path / "checkpoint-4")
    trainer = ready_trainer(tmp_path / "resumed", callbacks=[ready], resume=checkpoint, **options)
    (ready,) = (x for x in trainer.callback_handler.callbacks if type(x) is SpectralNormCallback)
    assert ready.regularizer.factor == plain_loop.FACTOR
    assert_same(trainer.model, expected.model, ready.regularizer, expected_ready.regularizer)


def test_callback_can_join_a_run_that_is_resumed(tmp_path):
    ready_trainer(tmp_path, callbacks=[], save_strategy="steps", save_steps=4)
    ready, options = callback(), {"save_strategy": "steps", "save_steps": 4}
    checkpoint = str(tmp_path / "checkpoint-4")
    ready_trainer(tmp_path / "resumed", callbacks=[ready], resume=checkpoint, **options)
    saved = json.loads((tmp_path / "resumed/checkpoint-8/trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["SpectralNormCallback"]["attributes"]["saved"]


def test_callback_refuses_the_state_of_another_model(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    ready_trainer(tmp_path, callbacks=[callback(include="classifier")], **options)
    with pytest.raises(sc.NamesError, match="missing"):
        ready_trainer(
            tmp_path / "resumed", callbacks=[callback()], resume=str(tmp_path / "checkpoint-4")
        )


def test_two_callbacks_with_two_prefixes_resume(tmp_path):
    def both():
        head = SpectralNormCallback(0.2, include="classifier", prefix="head/")
        return [callback(exclude="classifier"), head]

    first, second = both(), both()
    ready_trainer(tmp_path, callbacks=first, save_strategy="steps", save_steps=2)
    saved = json.loads((tmp_path / "checkpoint-6/trainer_state.json").read_text())
    assert len(saved["stateful_callbacks"]["SpectralNormCallback"]) <= 4
    checkpoint = str(tmp_path / "checkpoint-6")
    ready_trainer(tmp_path / "resumed", callbacks=second, resume=checkpoint)
    for one, other in zip(first, second, strict=True):
        state = other.regularizer.state_dict()
        for name, value in one.regularizer.state_dict().items():
            assert torch.equal(state[name], value), name


def test_what_a_checkpoint_cannot_hold_is_refused_when_restored(tmp_path):
    def ready():
        return SpectralNormCallback(lambda step: 0.1)

    ready_trainer(tmp_path, callbacks=[ready()], save_strategy="steps", save_steps=4)
    checkpoint = str(tmp_path / "checkpoint-4")
    ready_trainer(tmp_path / "resumed", callbacks=[ready()], resume=checkpoint)
    with pytest.raises(sc.ArgumentError, match=r"factor is <function.*restored anyway"):
        ready_trainer(
            tmp_path / "restored",
            callbacks=[ready()],
            resume=checkpoint,
            restore_callback_states_from_checkpoint=True,
        )


def test_callback_schedule_is_of_the_global_step(tmp_path):
    seen = []

    def ramp(step):
        seen.append(step)
        return 0.01 * step

    ready = SpectralNormCallback(ramp)
    ready_trainer(tmp_path, 6, callbacks=[ready], gradient_accumulation_steps=2)
    assert sorted(set(seen)) == [0, 1, 2]
    assert ready.regularizer.factor == 0.02


class Late(TrainerCallback):
    def __init__(self):
        self.rows, self.weights = {}, {}

    def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
        pairs = model.named_parameters()
        self.weights[state.global_step + 1] = {name: p.detach().clone() for name, p in pairs}

    def on_log(self, args, state, control, *, logs, **kwargs):
        self.rows.setdefault(state.global_step, {}).update(logs)


@pytest.mark.parametrize("first", [True, False])
def test_callback_logs_the_numbers_of_an_svd(tmp_path, first):
    ready, late, early = callback(n_iter=800, log=True), Late(), Late()
    options = {"logging_strategy": "steps", "logging_steps": 3}
    callbacks = [early, late] if first else [early, ready, late]
    trainer = ready_trainer(tmp_path, callbacks=callbacks, train=False, **options)
    if first:
        assert ready.add_to(trainer) is ready
    trainer.train()
    names = ready.regularizer.sigmas()
    history = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    for rows in (history, late.rows, *([early.rows] if first else [])):
        assert [step for step, row in rows.items() if "spectral/penalty" in row] == [3, 6]
        for step in (3, 6):
            weights = {name: late.weights[step][name].double().flatten(1) for name in names}
            # A depthwise convolution has a matrix of one row for each channel.
            stacks = {n: x[:, None] if "dwconv" in n else x[None] for n, x in weights.items()}
            every = {name: torch.linalg.matrix_norm(x, 2) for name, x in stacks.items()}
            expected = {f"spectral/sigma/{name}": float(x.max()) for name, x in every.items()}
            flat = torch.cat(list(every.values()))
            expected["spectral/log10_sigma_product"] = float(flat.log10().sum())
            squares = float(flat.square().sum())
            expected["spectral/penalty"] = plain_loop.FACTOR / 2 * squares
            found = {name: rows[step][name] for name in expected}
            assert found == pytest.approx(expected, rel=1e-2)  # σ₂ is close
    assert ("spectral/penalty" in early.rows[3]) == first


def test_reporters_that_see_no_numbers_are_told_of(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    options = {"logging_strategy": "steps", "logging_steps": 2, "report_to": "tensorboard"}
    with pytest.warns(sc.SpectralWarning, match=r"add_to\(trainer\)"):
        ready_trainer(tmp_path, 2, callbacks=[callback()], **options)
    folder = tmp_path / "seen"
    trainer = ready_trainer(folder, 2, callbacks=[], train=False, **options)
    callback().add_to(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sc.SpectralWarning)
        trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events*")
    names = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert "train/spectral/penalty" in names


def bert(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=20, intermediate_size=16, **sizes)
    return BertForMaskedLM(config)


LINEAR = {"query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query", "value"], {"query", "value"}),
        (r".*layer\.1\..*\.(query|key)", {"1.attention.self.query", "1.attention.self.key"}),
        ("query", {"query"}),
        ("all-linear", None),
    ],
)
def test_targets_are_those_of_peft(targets, expected):
    model = bert()
    ready = callback(target_modules=targets)
    ready.on_train_begin(None, TrainerState(), None, model=model)
    found = set(ready.regularizer.sigmas())
    linear = {name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)}
    linear.discard("cls.predictions.decoder")  # the output layer, tied to the embedding
    ends = expected or linear
    named = {f"{name}.weight" for name in linear if any(name.endswith(end) for end in ends)}
    assert found == named


def test_a_target_that_is_not_there_is_told():
    for targets in ("quary", ["query", "quary"]):
        with pytest.raises(sc.NamesError, match="quary"):
            callback(target_modules=targets).on_train_begin(
                None, TrainerState(), None, model=bert()
            )


def test_adapters_of_peft_are_trained_and_logged(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["pwconv1", "pwconv2"]))
    # B starts at zero, where a norm has no gradient.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ready, late = callback(target_modules=["pwconv1"]), Late()
    options = {"logging_strategy": "steps", "logging_steps": 1}
    ready_trainer(tmp_path, 2, callbacks=[ready, late], model=model, **options)
    logged = {name for name in late.rows[1] if name.startswith("spectral/sigma/")}
    assert logged
    assert all("pwconv1.lora_" in name for name in logged)


def test_gradients_are_unscaled_once():
    optimizer = sgd(net())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = SimpleNamespace(optimizer=optimizer, scaler=scaler)
    weight = optimizer.param_groups[0]["params"][0]
    for _ in range(2):
        scaler.scale(weight.sum()).backward()
        for _ in range(2):  # clipping has done it, or nothing has
            _unscale(wrapped)
        assert torch.equal(weight.grad, torch.ones_like(weight))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    _unscale(SimpleNamespace(optimizer=optimizer, scaler=None))


def test_callback_takes_in_weights_that_thaw(tmp_path):
    class Thaw(TrainerCallback):
        def on_train_begin(self, args, state, control, *, model, **kwargs):
            model.classifier.requires_grad_(False)

        def on_epoch_begin(self, args, state, control, *, model, **kwargs):
            model.classifier.requires_grad_(state.epoch >= 1)

    def run(folder, resume=None):
        ready = callback()
        options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2}
        trainer = ready_trainer(folder, 2, callbacks=[Thaw(), ready], resume=resume, **options)
        return trainer.model, ready.regularizer

    model, reg = run(tmp_path)
    assert "classifier.weight" in reg.sigmas()
    for step in (2, 4):
        resumed = run(tmp_path / f"from-{step}", str(tmp_path / f"checkpoint-{step}"))
        assert_same(resumed[0], model, resumed[1], reg)


def test_deepspeed_is_refused():
    options = SimpleNamespace(deepspeed={"zero_optimization": {}})
    with pytest.raises(sc.ArgumentError, match="DeepSpeed keeps the gradients"):
        callback().on_train_begin(options, TrainerState(), None, model=net())
    with pytest.raises(sc.ArgumentError, match="after the training had started"):
        callback().on_pre_optimizer_step(None, TrainerState(), None, optimizer=None)


def test_the_docstring_runs():
    module = sys.modules[SpectralNormCallback.__module__]
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
