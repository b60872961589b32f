"""The data sets by name, as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from benchmarks import order
from benchmarks.contrast import contrast_normalized

from . import formats
from .formats import DataError, MissingData

Images = NDArray[np.float32]  # (n, channels, height, width)
Labels = NDArray[np.int64]  # (n,)

CHUNK = 1000  # images normalized at once: all of them in double precision may not fit in memory
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it


class Data(NamedTuple):
    """Normalized images with their labels."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    classes: int
    augmented: bool = False  # whether the paper crops and flips these


class Source(NamedTuple):
    """How a published data set is read, and from where if no folder is told."""

    read: Callable[[Path], formats.Raw]
    origin: str
    classes: int
    folder: Path | None = None
    augmented: bool = False


SOURCES = {
    "cifar-10": Source(formats.cifar_10, formats.CIFAR, 10),
    "cifar-100": Source(formats.cifar_100, formats.CIFAR, 100),
    "stl-10": Source(formats.stl_10, formats.STL, 10, augmented=True),
    "fashion-mnist": Source(formats.fashion_mnist, formats.FASHION, 10, FASHION_FOLDER),
}

NAMES = ["digits", *SOURCES]


def load(name: str, folder: Path | None = None) -> Data:
    """A data set; ``folder`` has its files, except for digits, which scikit-learn brings.

    Raises
    ------
    MissingData
        If files are not there; the message says where the data set comes from.
    CorruptData
        If a file is damaged, or another than its name says.
    DataError
        If no data set has the name.
    """
    if name == "digits":
        return digits()
    if name not in SOURCES:
        raise DataError(f"No data set is named {name!r}; these are: {', '.join(NAMES)}")
    source = SOURCES[name]
    if (place := folder or source.folder) is None:
        raise MissingData(f"{name} needs a folder; get the data set from {source.origin}")
    train, test = source.read(place)
    return Data(
        normalized(train.images),
        train.labels,
        normalized(test.images),
        test.labels,
        source.classes,
        source.augmented,
    )


def digits() -> Data:
    """Half to train on, half to test on."""
    # Not on top: the other data sets do without scikit-learn.
    from benchmarks.demo.data import digits as load_digits

    half = load_digits(test_share=0.5)
    return Data(
        half.train_images[:, None],
        half.train_labels,
        half.test_images[:, None],
        half.test_labels,
        classes=10,
    )


def normalized(images: NDArray[np.uint8]) -> Images:
    """Each image with zero mean and unit deviation over all its pixels and channels."""
    result = np.empty(images.shape, np.float32)
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        rows = contrast_normalized(chunk.reshape(len(chunk), -1))
        result[start : start + CHUNK] = rows.reshape(chunk.shape)
    return result


def limited(data: Data, subset: int | None) -> Data:
    """With the first ``subset`` training images alone, or with all for None."""
    if subset is None:
        return data
    if not 1 <= subset <= len(data.train_labels):
        raise DataError(f"A subset of {subset} images of {len(data.train_labels)} cannot be had")
    return data._replace(
        train_images=data.train_images[:subset], train_labels=data.train_labels[:subset]
    )


def held_out(data: Data) -> Data:
    """With the last tenth of the training images in place of the test set."""
    kept = len(data.train_labels) - len(data.train_labels) // 10
    if kept == len(data.train_labels):
        raise DataError(f"A tenth of {kept} training images is none")
    return data._replace(
        train_images=data.train_images[:kept],
        train_labels=data.train_labels[:kept],
        test_images=data.train_images[kept:],
        test_labels=data.train_labels[kept:],
    )


def batches(data: Data, size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """One epoch's indices of training images.

    Raises
    ------
    DataError
        If not even one batch is there.
    """
    count = len(data.train_labels)
    if not 1 <= size <= count:
        raise DataError(f"A batch of {size} cannot be drawn from {count} training images")
    return order.batches(count, size, seed, epoch)


def augment(images: Images, rng: np.random.Generator) -> Images:
    """Shift each image by up to an eighth of its side, and mirror about every other one.

    What a shift brings in is zero, the mean of a normalized image.
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
