import gzip
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.contrast import contrast_normalized
from benchmarks.paper import formats
from benchmarks.paper.data import (
    FASHION_FOLDER,
    Data,
    augment,
    batches,
    held_out,
    limited,
    load,
    normalized,
)
from benchmarks.paper.formats import CorruptData, DataError, MissingData

# Folder that the archive unpacks to; reader; number of classes.
FORMATS = {
    "cifar-10": ("cifar-10-batches-bin", formats.cifar_10, 10),
    "cifar-100": ("cifar-100-binary", formats.cifar_100, 100),
    "stl-10": ("stl10_binary", formats.stl_10, 10),
    "fashion-mnist": ("fashion-mnist", formats.fashion_mnist, 10),
}


def part(shape, classes, count, seed):
    rng = np.random.default_rng(seed)
    return formats.Part(
        rng.integers(256, size=(count, *shape), dtype=np.uint8), rng.integers(classes, size=count)
    )


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def as_bytes(labels):
    return labels.astype(np.uint8)


def write_cifar_10(folder):
    parts = [part((3, 32, 32), 10, count, count) for count in (2, 3, 1, 2, 4, 5)]
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, (images, labels) in zip(names, parts, strict=True):
        records = np.hstack([as_bytes(labels)[:, None], images.reshape(len(images), -1)])
        (folder / name).write_bytes(records.tobytes())
    train = formats.Part(*map(np.concatenate, zip(*parts[:-1], strict=True)))
    return formats.Raw(train, parts[-1])


def write_cifar_100(folder):
    raw = formats.Raw(part((3, 32, 32), 100, 5, 0), part((3, 32, 32), 100, 3, 1))
    for name, (images, labels) in zip(("train.bin", "test.bin"), raw, strict=True):
        both = np.stack([as_bytes(labels) // 5, as_bytes(labels)], axis=1)
        records = np.hstack([both, images.reshape(len(images), -1)])
        (folder / name).write_bytes(records.tobytes())
    return raw


def write_stl_10(folder):
    raw = formats.Raw(part((3, 96, 96), 10, 4, 0), part((3, 96, 96), 10, 5, 1))
    for name, (images, labels) in zip(("train", "test"), raw, strict=True):
        (folder / f"{name}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{name}_y.bin").write_bytes(as_bytes(labels + 1).tobytes())
    return raw


def write_fashion_mnist(folder):
    raw = formats.Raw(part((1, 5, 7), 10, 6, 0), part((1, 5, 7), 10, 4, 1))
    for name, (images, labels) in zip(("train", "t10k"), raw, strict=True):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx_bytes(images[:, 0]))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(as_bytes(labels)))
    return raw


WRITERS = {
    "cifar-10": write_cifar_10,
    "cifar-100": write_cifar_100,
    "stl-10": write_stl_10,
    "fashion-mnist": write_fashion_mnist,
}

each_format = pytest.mark.parametrize("name", FORMATS)


def compress(folder):
    for path in list(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def assert_same(found, expected):
    for found_part, expected_part in zip(found, expected, strict=True):
        np.testing.assert_array_equal(found_part.images, expected_part.images)
        np.testing.assert_array_equal(found_part.labels, expected_part.labels)
        assert found_part.images.dtype == np.uint8
        assert found_part.labels.dtype == np.int64


@each_format
def test_what_is_written_is_read(tmp_path, name):
    raw = WRITERS[name](tmp_path)
    assert_same(FORMATS[name][1](tmp_path), raw)


@each_format
def test_the_archives_own_folder_is_found(tmp_path, name):
    unpacked, read, _ = FORMATS[name]
    (tmp_path / unpacked).mkdir()
    raw = WRITERS[name](tmp_path / unpacked)
    assert_same(read(tmp_path), raw)


@each_format
def test_compressed_files_are_read(tmp_path, name):
    raw = WRITERS[name](tmp_path)
    compress(tmp_path)
    assert_same(FORMATS[name][1](tmp_path), raw)


@each_format
def test_load_gives_normalized_images(tmp_path, name):
    raw = WRITERS[name](tmp_path)
    data = load(name, tmp_path)
    assert data.classes == FORMATS[name][2]
    assert data.augmented == (name == "stl-10")
    for images, labels, expected in (
        (data.train_images, data.train_labels, raw.train),
        (data.test_images, data.test_labels, raw.test),
    ):
        assert images.dtype == np.float32
        assert images.shape == expected.images.shape
        np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), 0, atol=1e-5)
        np.testing.assert_allclose(images.std(axis=(1, 2, 3)), 1, rtol=1e-5)
        np.testing.assert_array_equal(labels, expected.labels)


def test_stl_columns_come_first(tmp_path):
    write_stl_10(tmp_path)
    image = np.zeros((3, 96, 96), np.uint8)
    image[0, 1] = 7  # the second column of the first channel, as the file has it
    (tmp_path / "test_X.bin").write_bytes(image.tobytes())
    (tmp_path / "test_y.bin").write_bytes(bytes([10]))
    images, labels = formats.stl_10(tmp_path).test
    assert (images[0, 0, :, 1] == 7).all()
    assert images.sum() == 7 * 96
    assert labels.tolist() == [9]


@each_format
def test_each_missing_file_is_named(tmp_path, name):
    WRITERS[name](tmp_path)
    first, *_, last = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / first).unlink()
    (tmp_path / last).unlink()
    with pytest.raises(MissingData) as error:
        load(name, tmp_path)
    message = str(error.value)
    place, _, rest = message.partition(" lacks ")
    assert place == str(tmp_path)
    assert sorted(rest.partition(";")[0].split(", ")) == [first, last]
    assert any(origin in message for origin in ("kriz/cifar.html", "stl10/", "dataset-fashion"))


def test_the_folder_with_most_of_the_files_is_named(tmp_path):
    inner = tmp_path / "stl10_binary"
    inner.mkdir()
    write_stl_10(inner)
    (inner / "test_y.bin").unlink()
    with pytest.raises(MissingData, match=r"stl10_binary lacks test_y\.bin; .*acoates/stl10"):
        load("stl-10", tmp_path)


def test_a_folder_in_a_files_place_is_a_missing_file(tmp_path):
    write_cifar_100(tmp_path)
    (tmp_path / "test.bin").unlink()
    (tmp_path / "test.bin").mkdir()
    with pytest.raises(MissingData, match=r"lacks test\.bin"):
        load("cifar-100", tmp_path)


@pytest.mark.parametrize("name", ["cifar-10", "cifar-100", "stl-10"])
def test_data_without_a_folder_says_where_it_comes_from(name):
    with pytest.raises(MissingData, match=rf"{name} needs a folder; .*https://"):
        load(name)


def test_an_unknown_name_lists_the_known_ones():
    names = "digits, cifar-10, cifar-100, stl-10, fashion-mnist"
    with pytest.raises(DataError, match=f"'mnist'; these are: {names}"):
        load("mnist")


@each_format
@pytest.mark.parametrize("keep", [-1, 3, 0])
def test_truncated_files_are_named(tmp_path, name, keep):
    WRITERS[name](tmp_path)
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[:keep])
        with pytest.raises(CorruptData, match=path.name.replace(".", r"\.")):
            load(name, tmp_path)
        path.write_bytes(whole)


@each_format
def test_corrupt_compression_is_named(tmp_path, name):
    WRITERS[name](tmp_path)
    compress(tmp_path)
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]  # the check sum
        for damaged in (b"not gzip", whole[:middle], flipped, whole[:10] + b"\xff" * 40):
            path.write_bytes(damaged)
            with pytest.raises(CorruptData, match=rf"{path.name} cannot be decompressed"):
                load(name, tmp_path)
        path.write_bytes(whole)


def test_a_wrong_magic_number_is_told(tmp_path):
    write_fashion_mnist(tmp_path)
    labels = (tmp_path / "train-labels-idx1-ubyte").read_bytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(labels)
    with pytest.raises(CorruptData, match="starts with 00000801, not with IDX's 00000803"):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    ("shape", "words"),
    [((6, 5, 8), "210 bytes after its header, expected 240: 6 × 5 × 8"), ((2**32 - 1,) * 3, "210")],
)
def test_an_idx_file_of_another_size_than_its_header_says(tmp_path, shape, words):
    write_fashion_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack(">3I", *shape) + content[16:])
    with pytest.raises(CorruptData, match=words):
        load("fashion-mnist", tmp_path)


def test_an_idx_file_without_images(tmp_path):
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(np.empty((0, 5, 7), np.uint8)))
    with pytest.raises(CorruptData, match="is empty: 0 × 5 × 7"):
        load("fashion-mnist", tmp_path)


def test_more_labels_than_images(tmp_path):
    write_fashion_mnist(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    with pytest.raises(
        CorruptData, match=r"t10k-images\S+ has 4 images, but \S+t10k-lab\S+ has 5 l"
    ):
        load("fashion-mnist", tmp_path)


def test_fewer_labels_than_images(tmp_path):
    write_stl_10(tmp_path)
    (tmp_path / "train_y.bin").write_bytes(bytes([1, 2, 3]))
    with pytest.raises(CorruptData, match=r"train_X\.bin has 4 images, but \S+train_y\.bin has 3"):
        load("stl-10", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "at", "label", "words"),
    [
        ("cifar-10", "test_batch.bin", 0, 10, "expected 0 to 9"),
        ("cifar-100", "train.bin", 1, 100, "expected 0 to 99"),
        ("stl-10", "test_y.bin", 0, 0, "0 to .*, expected 1 to 10"),
        ("stl-10", "train_y.bin", 0, 11, "to 11, expected 1 to 10"),
        ("fashion-mnist", "train-labels-idx1-ubyte", 8, 10, "to 10, expected 0 to 9"),
    ],
)
def test_labels_out_of_range(tmp_path, name, file, at, label, words):
    WRITERS[name](tmp_path)
    content = bytearray((tmp_path / file).read_bytes())
    content[at] = label
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CorruptData, match=f"{file} has labels .*{words}"):
        load(name, tmp_path)


def test_a_constant_image_becomes_zeros():
    images = np.full((2, 3, 4, 4), 200, np.uint8)
    images[1, 0, 0, 0] = 0
    result = normalized(images)
    assert (result[0] == 0).all()
    assert result[1].std() == pytest.approx(1)


def test_a_constant_image_becomes_zeros_though_its_mean_is_rounded():
    assert (contrast_normalized(np.full((1, 7), 0.1)) == 0).all()


@given(arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(2), st.just(3), st.just(3))))
def test_every_image_has_zero_mean_and_unit_deviation(images):
    result = normalized(images)
    for image, original in zip(result, images, strict=True):
        assert image.mean() == pytest.approx(0, abs=1e-5)
        assert image.std() == pytest.approx(1 if np.ptp(original) else 0, rel=1e-4)


def test_many_images_are_normalized_as_one_is():
    images = part((1, 2, 2), 10, 2500, 0).images
    alone = np.concatenate([normalized(images[i : i + 1]) for i in range(len(images))])
    np.testing.assert_array_equal(normalized(images), alone)


def numbered(count):
    """Each image tells its index."""
    images = np.broadcast_to(
        np.arange(count, dtype=np.float32)[:, None, None, None], (count, 1, 2, 2)
    )
    labels = np.arange(count)
    return Data(images, labels, images[:1], labels[:1], classes=max(count, 1), augmented=True)


def test_limited_takes_the_first():
    data = limited(numbered(10), 3)
    assert data.train_labels.tolist() == [0, 1, 2]
    assert data.train_images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert len(data.test_labels) == 1
    assert data.augmented


def test_limited_to_nothing_told_is_all():
    data = numbered(10)
    assert limited(data, None) is data


@pytest.mark.parametrize("subset", [0, -1, 11])
def test_limited_to_what_is_not_there(subset):
    with pytest.raises(DataError, match=f"subset of {subset} images of 10"):
        limited(numbered(10), subset)


def test_held_out_is_the_last_tenth():
    data = held_out(numbered(25))
    assert data.train_labels.tolist() == list(range(23))
    assert data.test_labels.tolist() == [23, 24]
    assert data.train_images[:, 0, 0, 0].tolist() == list(range(23))
    assert data.test_images[:, 0, 0, 0].tolist() == [23, 24]
    assert data.augmented


def test_held_out_of_too_few():
    with pytest.raises(DataError, match="9 training images"):
        held_out(numbered(9))


@given(
    count=st.integers(1, 60), seed=st.integers(0, 2**32), epoch=st.integers(0, 100), draw=st.data()
)
def test_batches_cover_the_set_once(count, seed, epoch, draw):
    size = draw.draw(st.integers(1, count))
    drawn = list(batches(numbered(count), size, seed, epoch))
    assert [len(batch) for batch in drawn] == [size] * (count // size)
    order = np.concatenate(drawn)
    assert len(set(order.tolist())) == len(order)
    assert set(order.tolist()) <= set(range(count))
    again = np.concatenate(list(batches(numbered(count), size, seed, epoch)))
    np.testing.assert_array_equal(order, again)


def test_order_depends_on_seed_and_epoch_and_not_on_size():
    def order(size, seed, epoch):
        return np.concatenate(list(batches(numbered(60), size, seed, epoch))).tolist()

    orders = {tuple(order(60, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert order(60, 1, 2) == order(6, 1, 2)


@pytest.mark.parametrize("size", [11, 0, -1])
def test_a_batch_that_cannot_be_drawn_is_told_before_the_first_one(size):
    with pytest.raises(DataError, match=f"batch of {size} cannot be drawn from 10 training images"):
        batches(numbered(10), size, 0, 0)


def test_augmented_images_are_crops_of_the_padded_or_their_mirrors():
    images = np.arange(1, 1 + 40 * 2 * 16 * 8, dtype=np.float32).reshape(40, 2, 16, 8)
    result = augment(images, np.random.default_rng(0))
    padded = np.pad(images, [(0, 0), (0, 0), (2, 2), (1, 1)])
    found = [place_of(image, source) for image, source in zip(result, padded, strict=True)]
    assert {top for top, _, _ in found} == set(range(5))
    assert {left for _, left, _ in found} == set(range(3))
    assert {step for _, _, step in found} == {1, -1}


def place_of(image, padded):
    """Which crop it is, and whether in order (1) or mirrored (-1)."""
    for top in range(5):
        for left in range(3):
            for step in (1, -1):
                if (padded[:, top : top + 16, left : left + 8][..., ::step] == image).all():
                    return top, left, step
    raise AssertionError("not a crop")


def test_augment_shifts_stl_by_up_to_12():
    images = np.zeros((200, 1, 96, 96), np.float32)
    images[:, :, 48, :] = 1
    rows = augment(images, np.random.default_rng(0)).max(axis=(1, 3)).argmax(axis=1)
    assert (rows.min(), rows.max()) == (36, 60)


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 2**32),
)
def test_augment_keeps_the_shape_and_depends_on_its_generator_alone(shape, seed):
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    before = images.copy()
    result = augment(images, np.random.default_rng(seed))
    assert (result.shape, result.dtype) == (shape, np.float32)
    assert not np.shares_memory(result, images)
    np.testing.assert_array_equal(images, before)
    np.testing.assert_array_equal(result, augment(images, np.random.default_rng(seed)))


def test_digits_are_split_in_halves():
    pytest.importorskip("sklearn")
    data, again = load("digits"), load("digits")
    assert data.train_images.shape == (898, 1, 8, 8)
    assert data.test_images.shape == (899, 1, 8, 8)
    assert (data.train_images.dtype, data.train_labels.dtype) == (np.float32, np.int64)
    assert (data.classes, data.augmented) == (10, False)
    np.testing.assert_array_equal(data.train_images, again.train_images)
    counts = np.bincount(data.train_labels), np.bincount(data.test_labels)
    assert (abs(counts[0] - counts[1]) <= 1).all()


def test_the_published_fashion_mnist():
    if not FASHION_FOLDER.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    data = load("fashion-mnist")
    assert data.train_images.shape == (60000, 1, 28, 28)
    assert data.test_images.shape == (10000, 1, 28, 28)
    assert np.bincount(data.train_labels).tolist() == [6000] * 10
    assert np.bincount(data.test_labels).tolist() == [1000] * 10
