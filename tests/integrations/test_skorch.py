"""skorch's loop, which gives the optimizer a closure, beside a plain one."""

import pytest

pytest.importorskip("skorch", reason="skorch is not installed")
import torch
from sklearn.base import clone
from skorch.callbacks import GradientNormClipping
from torch import nn

import plain_loop
import with_skorch
from plain_loop import assert_same, batches, net


def classifier(**options):
    return with_skorch.SpectralClassifier(
        net(),
        factor=plain_loop.FACTOR,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        lr=0.1,
        batch_size=32,
        max_epochs=1,
        train_split=None,
        verbose=0,
        **options,
    )


def arrays(data):
    return (torch.cat(part).numpy() for part in zip(*data, strict=True))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_training_is_as_in_a_plain_loop(clip):
    data, expected = batches(8), net()
    reg = plain_loop.train(expected, data * 2, clip=clip)
    callbacks = [] if clip is None else [GradientNormClipping(gradient_clip_value=clip)]
    found = classifier(callbacks=callbacks)
    found.fit(*arrays(data))
    found.partial_fit(*arrays(data))  # goes on with the same regularizer
    assert_same(found.module_, expected, found.reg_, reg)


def test_resuming_is_bit_equal(tmp_path):
    data = batches(8)
    straight = classifier().fit(*arrays(data))
    straight.save_params(f_params=tmp_path / "model.pt", f_optimizer=tmp_path / "optimizer.pt")
    torch.save(straight.reg_.state_dict(), tmp_path / "spectral.pt")
    straight.partial_fit(*arrays(data))

    resumed = classifier().initialize()
    resumed.load_params(f_params=tmp_path / "model.pt", f_optimizer=tmp_path / "optimizer.pt")
    resumed.reg_.load_state_dict(torch.load(tmp_path / "spectral.pt"))
    resumed.partial_fit(*arrays(data))
    assert_same(resumed.module_, straight.module_, resumed.reg_, straight.reg_)


def test_the_example():
    found, accuracy = with_skorch.main(epochs=3, factor=0.05)
    plain, _ = with_skorch.main(epochs=3, factor=0.0)
    assert accuracy > 0.8
    plain_loop.assert_smaller(found.module_, plain.module_, found.reg_)
    assert clone(found).set_params(factor=0.2).factor == 0.2
