"""The readers of published data sets, on files made up here, and what is done to images."""

import gzip
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.paper import data
from benchmarks.paper.data import DataError

RNG = np.random.default_rng(0)


def part(shape, classes, count=4):
    images = RNG.integers(256, size=(count, *shape), dtype=np.uint8)
    return images, np.r_[classes - 1, RNG.integers(classes, size=count - 1)].astype(np.uint8)


def cifar(images, *labels):
    columns = [np.reshape(one, (-1, 1)) for one in labels]
    return np.hstack([*columns, images.reshape(len(images), -1)]).tobytes()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def made(name):
    """The files of a data set, its training and its test images with their labels."""
    shape = {"stl-10": (3, 96, 96), "fashion-mnist": (1, 5, 7)}.get(name, (3, 32, 32))
    classes = 100 if name == "cifar-100" else 10
    *train, test = (part(shape, classes) for _ in range(6 if name == "cifar-10" else 2))
    contents = []
    for x, y in [*train, test]:
        contents += {
            "cifar-10": lambda x=x, y=y: [cifar(x, y)],
            "cifar-100": lambda x=x, y=y: [cifar(x, y // 5, y)],
            "stl-10": lambda x=x, y=y: [x.swapaxes(2, 3).tobytes(), (y + 1).tobytes()],
            "fashion-mnist": lambda x=x, y=y: [idx(x[:, 0]), idx(y)],
        }[name]()
    files = dict(zip(data.SOURCES[name].files, contents, strict=True))
    return files, [np.concatenate(arrays) for arrays in zip(*train, strict=True)], test


each = pytest.mark.parametrize("name", data.SOURCES)


def write(folder, files, packed=False):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@each
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_written_is_read(tmp_path, name, packed):
    files, train, test = made(name)
    write(tmp_path / data.SOURCES[name].unpacked, files, packed)
    found = data.load(name, tmp_path)
    np.testing.assert_array_equal(found.train_images, data.normalized(train[0]))
    np.testing.assert_array_equal(found.test_images, data.normalized(test[0]))
    np.testing.assert_array_equal(found.train_labels, train[1])
    np.testing.assert_array_equal(found.test_labels, test[1])
    assert found.classes == (100 if name == "cifar-100" else 10)
    assert found.augmented == (name == "stl-10")


@each
def test_damaged_and_missing_files_are_named(tmp_path, name):
    files, *_ = made(name)
    write(tmp_path, files)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:3], b""):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=path.name):
                data.load(name, tmp_path)
        path.unlink()
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(whole)[:-9])
        with pytest.raises(DataError, match=rf"{path.name}\.gz cannot be decompressed"):
            data.load(name, tmp_path)
        path.with_name(f"{path.name}.gz").unlink()
        with pytest.raises(DataError, match=rf"lacks {path.name}; get the data set from"):
            data.load(name, tmp_path)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "case", [("cifar-100", "train.bin", 1, 100), ("stl-10", "test_y.bin", 0, 0)]
)
def test_labels_out_of_range_are_named(tmp_path, case):
    name, file, at, label = case
    write(tmp_path, files := made(name)[0])
    changed = files[file][:at] + bytes([label]) + files[file][at + 1 :]
    (tmp_path / file).write_bytes(changed)
    with pytest.raises(DataError, match=f"{file} has labels"):
        data.load(name, tmp_path)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(DataError, match="'mnist': digits, cifar-10"):
        data.load("mnist")
    with pytest.raises(DataError, match=r"needs a folder; .*https://"):
        data.load("stl-10")
    files, *_ = made("stl-10")
    files["test_y.bin"] += b"\1"
    with pytest.raises(DataError, match=r"4 images, but .* has 5 labels"):
        data.load("stl-10", write(tmp_path, files))
    files, *_ = made("fashion-mnist")
    files["train-images-idx3-ubyte"] = files["train-labels-idx1-ubyte"]
    with pytest.raises(DataError, match="starts with 00000801, not with IDX's 00000803"):
        data.load("fashion-mnist", write(tmp_path, files))


def test_every_image_has_zero_mean_and_unit_deviation_but_a_constant_one():
    images = RNG.integers(256, size=(2500, 1, 2, 2), dtype=np.uint8)
    images[7] = 200
    result = data.normalized(images)
    np.testing.assert_allclose(result.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    deviations = np.where(np.ptp(images, axis=(1, 2, 3)) > 0, 1, 0)
    np.testing.assert_allclose(result.std(axis=(1, 2, 3)), deviations, rtol=1e-4)
    assert (data.normalized(np.full((1, 1, 1, 7), 0.1)) == 0).all()  # its mean is rounded


def test_subsets_are_the_first_images_and_the_last_tenth_is_held_out():
    images, labels = np.zeros((25, 1, 2, 2), np.float32), np.arange(25)
    whole = data.Data(images, labels, images[:1], labels[:1], 25)
    assert data.limited(whole, 3).train_labels.tolist() == [0, 1, 2]
    assert data.held_out(whole).test_labels.tolist() == [23, 24]
    assert data.held_out(whole).train_labels.tolist() == list(range(23))
    with pytest.raises(DataError, match="no subset of 26"):
        data.limited(whole, 26)


@given(st.integers(1, 60), st.integers(0, 2**32), st.integers(0, 100), st.data())
def test_batches_cover_the_set_once_in_an_order_of_seed_and_epoch(count, seed, epoch, draw):
    size = draw.draw(st.integers(1, count))
    drawn = list(data.batches(count, size, seed, epoch))
    assert [len(batch) for batch in drawn] == [size] * (count // size)
    order = np.concatenate(drawn)
    assert len(set(order.tolist())) == len(order)
    (whole,) = data.batches(count, count, seed, epoch)
    np.testing.assert_array_equal(order, whole[: len(order)])
    with pytest.raises(DataError, match="cannot be drawn"):
        data.batches(count, count + 1, seed, epoch)


def test_augmented_images_are_shifted_up_to_an_eighth_and_mirrored():
    images = np.arange(1, 1 + 40 * 16 * 8, dtype=np.float32).reshape(40, 1, 16, 8)
    padded = np.pad(images, [(0, 0), (0, 0), (2, 2), (1, 1)])
    found = set()
    for image, source in zip(data.augment(images, RNG), padded, strict=True):
        for top, left, step in itertools.product(range(5), range(3), (1, -1)):
            if (source[:, top : top + 16, left : left + 8][..., ::step] == image).all():
                found.add((top, left, step))
    assert [{one[k] for one in found} for k in range(3)] == [set(range(5)), {0, 1, 2}, {1, -1}]
