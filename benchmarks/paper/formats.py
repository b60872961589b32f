"""Readers of the files that data sets are published as: binary ones, since a pickle runs code."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Labels = NDArray[np.int64]

CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html (the binary version)"
STL = "https://cs.stanford.edu/~acoates/stl10/ (the binary files)"
FASHION = "the Debian package dataset-fashion-mnist"

CIFAR_SHAPE = (3, 32, 32)
STL_SHAPE = (3, 96, 96)

IDX_BYTES = 0x08  # the magic number's third byte: elements are unsigned bytes


class DataError(Exception):
    """A data set that cannot be had as asked for."""


class MissingData(DataError):  # noqa: N818
    """Files of a data set are not there."""


class CorruptData(DataError):  # noqa: N818
    """A file is not what its name says."""


class Part(NamedTuple):
    """Images (n, channels, height, width) with their labels, from 0."""

    images: Bytes
    labels: Labels


class Raw(NamedTuple):
    """A data set as it is published."""

    train: Part
    test: Part


def cifar_10(folder: Path) -> Raw:
    """Records of one byte, the label, and an image."""
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    paths = located(folder, names, "cifar-10-batches-bin", CIFAR)
    parts = [cifar_part(path, label_bytes=1, classes=10) for path in paths]
    return Raw(Part(*map(np.concatenate, zip(*parts[:-1], strict=True))), parts[-1])


def cifar_100(folder: Path) -> Raw:
    """Records of two bytes, the coarse and the fine label, and an image; the fine one is read."""
    paths = located(folder, ["train.bin", "test.bin"], "cifar-100-binary", CIFAR)
    return Raw(*(cifar_part(path, label_bytes=2, classes=100) for path in paths))


def stl_10(folder: Path) -> Raw:
    """Images and labels in files of their own; labels start at 1."""
    names = ["train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"]
    train, train_labels, test, test_labels = located(folder, names, "stl10_binary", STL)
    return Raw(stl_part(train, train_labels), stl_part(test, test_labels))


def fashion_mnist(folder: Path) -> Raw:
    """The four IDX files of MNIST, compressed or not."""
    names = [
        f"{part}-{kind}-ubyte"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    train, train_labels, test, test_labels = located(folder, names, "fashion-mnist", FASHION)
    return Raw(idx_part(train, train_labels, 10), idx_part(test, test_labels, 10))


def cifar_part(path: Path, label_bytes: int, classes: int) -> Part:
    records = rows(path, label_bytes + prod(CIFAR_SHAPE))
    labels = checked_labels(path, records[:, label_bytes - 1], 0, classes)
    return Part(records[:, label_bytes:].reshape(-1, *CIFAR_SHAPE), labels)


def stl_part(images: Path, labels: Path) -> Part:
    # Columns come first: read as rows, each image would lie on its side.
    pixels = rows(images, prod(STL_SHAPE)).reshape(-1, *STL_SHAPE).swapaxes(2, 3)
    return paired(images, pixels, labels, checked_labels(labels, rows(labels, 1)[:, 0], 1, 10))


def idx_part(images: Path, labels: Path, classes: int) -> Part:
    pixels = idx(images, 3)[:, None]
    return paired(images, pixels, labels, checked_labels(labels, idx(labels, 1), 0, classes))


def idx(path: Path, dimensions: int) -> Bytes:
    """An array of unsigned bytes; its shape is in the file."""
    content, start = contents(path), 4 + 4 * dimensions
    magic = bytes([0, 0, IDX_BYTES, dimensions])
    if content[:4] != magic:
        raise CorruptData(
            f"{path} starts with {content[:4].hex() or 'nothing'}, not with IDX's {magic.hex()}"
        )
    if len(content) < start:
        raise CorruptData(f"{path} has {len(content)} bytes, its header alone has {start}")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
    if len(content) - start != prod(shape):
        raise CorruptData(
            f"{path} has {len(content) - start} bytes after its header, expected {prod(shape)}:"
            f" {' × '.join(map(str, shape))}"
        )
    if prod(shape) == 0:
        raise CorruptData(f"{path} is empty: {' × '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def rows(path: Path, size: int) -> Bytes:
    """Records of a fixed size, as many as the file has."""
    content = contents(path)
    if not content or len(content) % size:
        raise CorruptData(f"{path} has {len(content)} bytes, expected a multiple of {size}")
    return np.frombuffer(content, np.uint8).reshape(-1, size)


def contents(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorruptData(f"{path} cannot be decompressed: {error}") from error


def checked_labels(path: Path, labels: Bytes, first: int, classes: int) -> Labels:
    """Labels from 0 on; ``first`` is the file's lowest."""
    low, high, last = int(labels.min()), int(labels.max()), first + classes - 1
    if low < first or high > last:
        raise CorruptData(f"{path} has labels {low} to {high}, expected {first} to {last}")
    return labels.astype(np.int64) - first


def paired(images_path: Path, images: Bytes, labels_path: Path, labels: Labels) -> Part:
    if len(images) != len(labels):
        raise CorruptData(
            f"{images_path} has {len(images)} images, but {labels_path} has {len(labels)} labels"
        )
    return Part(images, labels)


def located(folder: Path, names: Sequence[str], unpacked: str, origin: str) -> list[Path]:
    """The files, each plain or compressed, in the folder or in what its archive unpacks to.

    Raises
    ------
    MissingData
        If neither has them all.
    """
    places = [[found(place, name) for name in names] for place in (folder, folder / unpacked)]
    # The better place tells most about what is missing.
    paths = max(places, key=lambda place: sum(path is not None for path in place))
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        place = folder if paths is places[0] else folder / unpacked
        raise MissingData(f"{place} lacks {', '.join(missing)}; get the data set from {origin}")
    return [path for path in paths if path is not None]


def found(folder: Path, name: str) -> Path | None:
    choices = (folder / name, folder / f"{name}.gz")
    return next((path for path in choices if path.is_file()), None)
