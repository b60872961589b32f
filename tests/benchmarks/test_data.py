"""The readers of published data sets, on files made up here, and what is done to images."""

import gzip
import itertools

import numpy as np
import pytest

from benchmarks.paper import data
from benchmarks.paper.data import DataError
from published import made, write

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", data.SOURCES)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_written_is_read(tmp_path, name, packed):
    files, expected = made(name)
    write(tmp_path / data.SOURCES[name].unpacked, files, packed)
    for one, other in zip(data.load(name, tmp_path), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def refuses(message, *arguments, function=data.load):
    with pytest.raises(DataError, match=message):
        function(*arguments)


@pytest.mark.parametrize("name", data.SOURCES)
def test_damaged_and_missing_files_are_named(tmp_path, name):
    for file, whole in made(name)[0].items():
        path = write(tmp_path, made(name)[0]) / file
        for damaged in (whole[:-1], whole[:3], b""):
            path.write_bytes(damaged)
            refuses(file, name, tmp_path)
        path.unlink()
        refuses(rf"lacks {file}; get the data set from", name, tmp_path)
        path.with_name(f"{file}.gz").write_bytes(gzip.compress(whole)[:-9])
        refuses(rf"{file}\.gz cannot be decompressed", name, tmp_path)


def test_what_does_not_fit_is_named(tmp_path):
    refuses("'mnist': digits, cifar-10", "mnist")
    refuses(r"needs a folder; .*https://", "stl-10")
    write(tmp_path, made("stl-10")[0] | {"test_y.bin": b"\1" * 5})
    refuses(r"4 images, but .* has 5 labels", "stl-10", tmp_path)
    write(tmp_path, {"train_y.bin": b"\0" * 4})
    refuses(r"train_y\.bin has labels 0 to 0, expected 1 to 10", "stl-10", tmp_path)
    refuses("cannot be drawn from 3", 3, 4, 0, 0, function=data.batches)


def test_every_image_has_zero_mean_and_unit_deviation_but_a_constant_one():
    images = RNG.integers(256, size=(2500, 1, 2, 2), dtype=np.uint8)
    images[7] = 200
    result = data.normalized(images)
    np.testing.assert_allclose(result.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(result.std(axis=(1, 2, 3)), np.arange(2500) != 7, rtol=1e-4)
    assert (data.normalized(np.full((1, 1, 1, 7), 0.1)) == 0).all()  # its mean is rounded


@pytest.mark.parametrize("size", [1, 7, 25])
def test_batches_cover_the_set_once_in_an_order_of_seed_and_epoch(size):
    (whole,) = data.batches(25, 25, seed=1, epoch=2)
    assert [*itertools.chain(*data.batches(25, size, 1, 2))] == [*whole[: 25 // size * size]]
    assert sorted(whole) == list(range(25)) != whole.tolist()
    assert any(next(data.batches(25, 25, 1, 3)) != whole)
    images = data.Data(np.zeros((25, 1, 2, 2)), whole, np.zeros((1, 1, 2, 2)), whole[:1], 25)
    assert data.limited(images, size).train_labels.tolist() == whole.tolist()[:size]
    assert data.held_out(images).test_labels.tolist() == whole.tolist()[-2:]


def test_augmented_images_are_shifted_up_to_an_eighth_and_mirrored():
    images = np.arange(1, 1 + 40 * 16 * 8, dtype=np.float32).reshape(40, 1, 16, 8)
    padded = np.pad(images, [(0, 0), (0, 0), (2, 2), (1, 1)])
    found = {
        (top, left, step)
        for image, source in zip(data.augment(images, RNG), padded, strict=True)
        for top, left, step in itertools.product(range(5), range(3), (1, -1))
        if (source[:, top : top + 16, left : left + 8][..., ::step] == image).all()
    }
    assert [{*axis} for axis in zip(*found, strict=True)] == [{*range(5)}, {0, 1, 2}, {1, -1}]
