"""Accelerate's loop beside a plain one."""

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed")
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

import plain_loop
import with_accelerate
from plain_loop import assert_same, batches, cross_entropy, net, overflowing, sgd
from spectral_torch import SpectralNormRegularizer


@pytest.fixture(autouse=True)
def settings_of_its_own():
    """Accelerate keeps a process's settings."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(*, scaler=None, optimizer_of=sgd, seed=0, **options):
    accelerator = Accelerator(cpu=True, **options)
    accelerator.scaler = scaler  # Accelerate makes none on a CPU, and uses one that is there
    model = net()
    optimizer = optimizer_of(model)
    reg = SpectralNormRegularizer(model, factor=plain_loop.FACTOR, seed=seed).attach(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(reg)
    return accelerator, model, optimizer, reg


def run(accelerator, model, optimizer, data, *, clip=None):
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model, batch))
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_is_as_in_a_plain_loop(accumulate, clip):
    data, expected = batches(8), net()
    expected_reg = plain_loop.train(expected, data, accumulate=accumulate, clip=clip)
    accelerator, model, optimizer, reg = prepared(gradient_accumulation_steps=accumulate)
    run(accelerator, model, optimizer, data, clip=clip)
    assert_same(model, expected, reg, expected_reg)


def test_bfloat16():
    data, expected = batches(8), net()
    expected_reg = plain_loop.train(expected, data, autocast=torch.bfloat16)
    accelerator, model, optimizer, reg = prepared(mixed_precision="bf16")
    run(accelerator, model, optimizer, data)
    assert_same(model, expected, reg, expected_reg)


def half():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_skips_a_step(fused):
    data, expected = overflowing(batches(6), 3), net()
    expected_reg = plain_loop.train(expected, data, scaler=half())
    accelerator, model, optimizer, reg = prepared(
        scaler=half(), optimizer_of=lambda model: sgd(model, fused=fused)
    )
    skipped = []
    for batch in data:
        run(accelerator, model, optimizer, [batch])
        skipped.append(optimizer.step_was_skipped)
    # A fused step is called, and skips within.
    assert skipped == [False, False, False, not fused, False, False]
    # It also adds and divides in another order.
    assert_same(
        model, expected, reg, expected_reg, **({"rtol": 1e-4, "atol": 1e-5} if fused else {})
    )


def test_resuming_is_bit_equal(tmp_path):
    data = batches(8)
    accelerator, expected, optimizer, expected_reg = prepared()
    run(accelerator, expected, optimizer, data[:4])
    accelerator.save_state(tmp_path)
    run(accelerator, expected, optimizer, data[4:])

    accelerator, model, optimizer, reg = prepared(seed=5)
    accelerator.load_state(tmp_path)
    run(accelerator, model, optimizer, data[4:])
    assert_same(model, expected, reg, expected_reg)


def test_its_wrapper_stands_for_the_optimizer():
    accelerator = Accelerator(cpu=True)
    model = net()
    model, optimizer = accelerator.prepare(model, sgd(model))
    assert isinstance(optimizer, AcceleratedOptimizer)
    reg = SpectralNormRegularizer(model, factor=plain_loop.FACTOR)
    reg.attach(optimizer)
    assert "attached to SGD" in repr(reg)
    data, expected = batches(4), net()
    expected_reg = plain_loop.train(expected, data)
    run(accelerator, model, optimizer, data)
    assert_same(model, expected, reg, expected_reg)


def test_the_example():
    model, reg, accuracy = with_accelerate.main(epochs=3, factor=0.05)
    plain, _, _ = with_accelerate.main(epochs=3, factor=0.0)
    assert accuracy > 0.8
    plain_loop.assert_smaller(model, plain, reg)
