"""The data sets as arrays, read from published binary files: reading a pickle runs code."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from benchmarks.common import read_toml

Images = NDArray[np.float32]  # (n, channels, height, width)
Labels = NDArray[np.int64]  # (n,)
Bytes = NDArray[np.uint8]
Parts = Iterator[tuple[Bytes, Bytes, Path]]  # images, labels, and the file of the labels

CHUNK = 1000  # images normalized at once: all of them in double precision may not fit in memory


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
    """How a published data set is read, and from where, as data.toml has it."""

    reader: str
    files: list[str]
    unpacked: str
    origin: str
    classes: int = 10
    first_label: int = 0
    label_bytes: int = 1
    folder: str = ""
    augmented: bool = False


def load(name: str, folder: Path | None = None) -> Data:
    """Return a data set from the files in ``folder``; digits come with scikit-learn."""
    if name in MADE:
        return MADE[name]()
    if name not in SOURCES:
        raise DataError(f"no data set is named {name!r}: {', '.join([*MADE, *SOURCES])}")
    source = SOURCES[name]
    parts = READERS[source.reader](source, located(name, source, folder))
    *train, test = (checked(source, *part) for part in parts)
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    arrays = (normalized(images), labels, normalized(test[0]), test[1])
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
    advice = f"get the data set from {source.origin}"
    if not (folder := folder or (source.folder and Path(source.folder))):
        raise DataError(f"{name} needs a folder; {advice}")
    at = folder / source.unpacked if (folder / source.unpacked).is_dir() else folder
    plain = [at / file for file in source.files]
    paths = [path if path.is_file() else at / f"{path.name}.gz" for path in plain]
    if missing := [path.stem for path in paths if not path.is_file()]:
        raise DataError(f"{at} lacks {', '.join(missing)}; {advice}")
    return paths


def checked(source: Source, images: Bytes, labels: Bytes, path: Path) -> tuple[Bytes, Labels]:
    """Return images, and their labels counted from 0."""
    if len(images) != len(labels):
        raise DataError(f"there are {len(images)} images, but {path} has {len(labels)} labels")
    low, high, first = labels.min(), labels.max(), source.first_label
    if low < first or high >= first + source.classes:
        expected = f"expected {first} to {first + source.classes - 1}"
        raise DataError(f"{path} has labels {low} to {high}, {expected}")
    return images, labels.astype(np.int64) - first


def read_cifar(source: Source, paths: list[Path]) -> Parts:
    """Read records of the label's bytes, the last of which is the fine label, and an image."""
    for path in paths:
        records = rows(path, source.label_bytes + 3 * 32 * 32)
        labels, pixels = np.split(records, [source.label_bytes], axis=1)
        yield pixels.reshape(-1, 3, 32, 32), labels[:, -1], path


def read_stl(_: Source, paths: list[Path]) -> Parts:
    """Read images, whose pixels are in columns, and labels from files of their own."""
    for images, labels in (paths[:2], paths[2:]):
        pixels = rows(images, 3 * 96 * 96).reshape(-1, 3, 96, 96).swapaxes(2, 3)
        yield pixels, rows(labels, 1)[:, 0], labels


def read_idx(_: Source, paths: list[Path]) -> Parts:
    """Read the four files of MNIST and its like."""
    for images, labels in (paths[:2], paths[2:]):
        yield idx(images, 3)[:, None], idx(labels, 1), labels


def idx(path: Path, dimensions: int) -> Bytes:
    """Return an array of unsigned bytes, whose shape is in the file."""
    content, start = contents(path), 4 + 4 * dimensions
    shape = [int.from_bytes(content[k : k + 4]) for k in range(4, start, 4)]
    magic = bytes([0, 0, 0x08, dimensions])  # 8: unsigned bytes
    if content[:4] != magic or len(content) != start + prod(shape) or not prod(shape):
        about = f"it starts with {content[:4].hex()} and has {len(content)} bytes"
        raise DataError(f"{path} is no IDX file of {dimensions} dimensions: {about}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def rows(path: Path, size: int) -> Bytes:
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


READERS = {"cifar": read_cifar, "stl": read_stl, "idx": read_idx}
TABLE = read_toml(Path(__file__).with_name("data.toml"))
SOURCES = {name: Source(**fields) for name, fields in TABLE.items()}


# Data sets that need no files of --data. Add your own.
MADE: dict[str, Callable[[], Data]] = {"digits": digits}


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
    images, labels, *_ = data
    return data._replace(train_images=images[:subset], train_labels=labels[:subset])


def held_out(data: Data) -> Data:
    """Put the last tenth of the training images in place of the test set."""
    kept = len(data.train_labels) - len(data.train_labels) // 10
    if kept == len(data.train_labels):
        raise DataError(f"{kept} training images have no tenth")
    images, labels, *_ = data
    return Data(images[:kept], labels[:kept], images[kept:], labels[kept:], *data[4:])


def batches(count: int, size: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """Return one epoch's full batches as indices; seed and epoch alone decide their order."""
    if not 1 <= size <= count:
        raise DataError(f"a batch of {size} cannot be drawn from {count} training images")
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return (order[start : start + size] for start in range(0, count - size + 1, size))


def augment(images: Images, rng: np.random.Generator) -> Images:
    """Shift each image by up to an eighth of its side, and mirror about every other one."""
    count, _, height, width = images.shape
    down, across = height // 8, width // 8
    # With zeros, the mean of a normalized image.
    padded = np.pad(images, [(0, 0), (0, 0), (down, down), (across, across)])
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    top, left = rng.integers(2 * down + 1, size=count), rng.integers(2 * across + 1, size=count)
    cropped: Images = windows[np.arange(count), :, top, left]
    mirrored = rng.random(count) < 0.5
    cropped[mirrored] = cropped[mirrored, :, :, ::-1]
    return cropped
