"""The data sets as arrays, read from the files that they are published as.

The binary files, since reading a pickle runs code.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Images = NDArray[np.float32]  # (n, channels, height, width)
Labels = NDArray[np.int64]  # (n,)
Part = tuple[NDArray[np.uint8], Labels]

CHUNK = 1000  # images normalized at once: all of them in double precision may not fit in memory
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html (the binary version)"
STL = "https://cs.stanford.edu/~acoates/stl10/ (the binary files)"
FASHION = "the Debian package dataset-fashion-mnist"


class DataError(Exception):
    """A data set that is missing, damaged, or too small for what is asked."""


class Data(NamedTuple):
    """Normalized images with their labels, which count from 0."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: int
    augmented: bool = False  # whether the paper crops and flips these


class Source(NamedTuple):
    """How a published data set is read, and from where."""

    read: Callable[[list[Path]], tuple[Part, Part]]
    files: tuple[str, ...]
    unpacked: str  # the folder that its archive unpacks to
    origin: str
    classes: int
    folder: Path | None = None
    augmented: bool = False


def load(name: str, folder: Path | None = None) -> Data:
    """Return a data set; ``folder`` has its files, and digits come with scikit-learn.

    Raises
    ------
    DataError
        If no data set has the name, a file is missing (the message says where to get it), or a
        file is damaged.
    """
    if name == "digits":
        return digits()
    if name not in SOURCES:
        raise DataError(f"no data set is named {name!r}: digits, {', '.join(SOURCES)}")
    source = SOURCES[name]
    train, test = source.read(located(name, source, folder or source.folder))
    arrays = (normalized(train[0]), train[1], normalized(test[0]), test[1])
    return Data(*arrays, source.classes, source.augmented)


def digits(test_share: float = 0.5) -> Data:
    """Return scikit-learn's 1797 images of 8 × 8; the split has each digit in both parts."""
    # Not on top: the other data sets do without scikit-learn.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = normalized(images.reshape(-1, 1, 8, 8))
    split = train_test_split(images, labels, test_size=test_share, stratify=labels, random_state=0)
    train, test, train_labels, test_labels = split
    return Data(train, train_labels, test, test_labels, classes=10)


def located(name: str, source: Source, folder: Path | None) -> list[Path]:
    """Return the files, each plain or compressed, in the folder or in its archive's folder."""
    if folder is None:
        raise DataError(f"{name} needs a folder; get the data set from {source.origin}")
    places = []
    for at in (folder, folder / source.unpacked):
        choices = [(at / file, at / f"{file}.gz") for file in source.files]
        places.append([next((path for path in one if path.is_file()), None) for one in choices])
    paths = max(places, key=lambda place: sum(path is not None for path in place))
    missing = [file for file, path in zip(source.files, paths, strict=True) if path is None]
    if missing:
        at = folder if paths is places[0] else folder / source.unpacked
        raise DataError(f"{at} lacks {', '.join(missing)}; get the data set from {source.origin}")
    return [path for path in paths if path is not None]


def read_cifar(paths: list[Path], label_bytes: int, classes: int) -> tuple[Part, Part]:
    """Read records of the label's bytes, the last of which is the fine label, and an image."""
    shape, parts = (3, 32, 32), []
    for path in paths:
        records = rows(path, label_bytes + prod(shape))
        labels = checked(path, records[:, label_bytes - 1], 0, classes)
        parts.append((records[:, label_bytes:].reshape(-1, *shape), labels))
    *train, test = parts
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return (images, labels), test


def read_stl(paths: list[Path]) -> tuple[Part, Part]:
    """Read images and labels from files of their own; pixels are in columns, labels from 1."""

    def part(images: Path, labels: Path) -> Part:
        pixels = rows(images, 3 * 96 * 96).reshape(-1, 3, 96, 96).swapaxes(2, 3)
        return paired(images, pixels, labels, checked(labels, rows(labels, 1)[:, 0], 1, 10))

    return part(*paths[:2]), part(*paths[2:])


def read_idx(paths: list[Path]) -> tuple[Part, Part]:
    """Read the four files of MNIST and its like."""

    def part(images: Path, labels: Path) -> Part:
        return paired(
            images, idx(images, 3)[:, None], labels, checked(labels, idx(labels, 1), 0, 10)
        )

    return part(*paths[:2]), part(*paths[2:])


def idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return an array of unsigned bytes, whose shape is in the file."""
    content, start = contents(path), 4 + 4 * dimensions
    magic = bytes([0, 0, 0x08, dimensions])  # 8: unsigned bytes
    if content[:4] != magic or len(content) < start:
        raise DataError(f"{path} starts with {content[:4].hex()}, not with IDX's {magic.hex()}")
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    if len(content) - start != prod(shape) or not prod(shape):
        raise DataError(f"{path} has {len(content) - start} bytes after its header, not {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def rows(path: Path, size: int) -> NDArray[np.uint8]:
    """Return records of a fixed size, as many as the file has."""
    content = contents(path)
    if not content or len(content) % size:
        raise DataError(f"{path} has {len(content)} bytes, expected a multiple of {size}")
    return np.frombuffer(content, np.uint8).reshape(-1, size)


def contents(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be decompressed: {error}") from error


def checked(path: Path, labels: NDArray[np.uint8], first: int, classes: int) -> Labels:
    """Return labels from 0; ``first`` is the file's lowest."""
    low, high, last = int(labels.min()), int(labels.max()), first + classes - 1
    if low < first or high > last:
        raise DataError(f"{path} has labels {low} to {high}, expected {first} to {last}")
    return labels.astype(np.int64) - first


def paired(images: Path, pixels: NDArray[np.uint8], path: Path, labels: Labels) -> Part:
    if len(pixels) != len(labels):
        raise DataError(f"{images} has {len(pixels)} images, but {path} has {len(labels)} labels")
    return pixels, labels


CIFAR_10 = (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin")
STL_10 = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
MNIST = tuple(f"{part}-{kind}" for part in ("train", "t10k") for kind in KINDS)
PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts its files
COARSE = partial(read_cifar, label_bytes=1, classes=10)
FINE = partial(read_cifar, label_bytes=2, classes=100)
SOURCES = {
    "cifar-10": Source(COARSE, CIFAR_10, "cifar-10-batches-bin", CIFAR, 10),
    "cifar-100": Source(FINE, ("train.bin", "test.bin"), "cifar-100-binary", CIFAR, 100),
    "stl-10": Source(read_stl, STL_10, "stl10_binary", STL, 10, augmented=True),
    "fashion-mnist": Source(read_idx, MNIST, "fashion-mnist", FASHION, 10, folder=PACKAGE),
}


def normalized(images: NDArray[Any]) -> Images:
    """Give each image zero mean and unit deviation, as the paper does; a constant one is zeros."""
    result = np.empty(images.shape, np.float32)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        centered = chunk - chunk.mean(axis=(1, 2, 3), keepdims=True)
        # Not by the deviation: the mean is rounded, so a constant image may deviate from it.
        varied = np.ptp(chunk, axis=(1, 2, 3), keepdims=True) > 0
        deviation = centered.std(axis=(1, 2, 3), keepdims=True)
        out = np.zeros_like(centered)
        result[start : start + CHUNK] = np.divide(centered, deviation, out=out, where=varied)
    return result


def limited(data: Data, subset: int | None) -> Data:
    """Keep the first ``subset`` training images, or all of them for None."""
    if subset is None:
        return data
    if not 1 <= subset <= len(data.train_labels):
        raise DataError(f"{len(data.train_labels)} training images have no subset of {subset}")
    return data._replace(
        train_images=data.train_images[:subset], train_labels=data.train_labels[:subset]
    )


def held_out(data: Data) -> Data:
    """Put the last tenth of the training images in place of the test set."""
    kept = len(data.train_labels) - len(data.train_labels) // 10
    if kept == len(data.train_labels):
        raise DataError(f"{kept} training images have no tenth")
    return data._replace(
        train_images=data.train_images[:kept],
        train_labels=data.train_labels[:kept],
        test_images=data.train_images[kept:],
        test_labels=data.train_labels[kept:],
    )


def batches(count: int, size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """Return one epoch's batches as indices; seed and epoch alone decide their order.

    A short last batch is dropped.

    Raises `DataError` if there is not one batch.
    """
    if not 1 <= size <= count:
        raise DataError(f"a batch of {size} cannot be drawn from {count} training images")
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return (order[start : start + size] for start in range(0, count - size + 1, size))


def augment(images: Images, rng: np.random.Generator) -> Images:
    """Shift each image by up to an eighth of its side, and mirror about every other one.

    A shift brings in zeros, the mean of a normalized image.
    """
    count, _, *sides = images.shape
    height, width = sides
    down, across = height // 8, width // 8
    padded = np.pad(images, [(0, 0), (0, 0), (down, down), (across, across)])
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    top, left = rng.integers(2 * down + 1, size=count), rng.integers(2 * across + 1, size=count)
    cropped: Images = windows[np.arange(count), :, top, left]
    mirrored = rng.random(count) < 0.5
    cropped[mirrored] = cropped[mirrored, :, :, ::-1]
    return cropped
