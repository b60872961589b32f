"""Scikit-learn's digits: 1797 images of 8×8, a quarter to train on, the rest to test on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks import order
from benchmarks.contrast import contrast_normalized

Images = NDArray[np.float32]  # (n, 8, 8)
Labels = NDArray[np.int64]  # (n,)


class Digits(NamedTuple):
    train_images: Images
    test_images: Images
    train_labels: Labels
    test_labels: Labels


# Trained on more, even vanilla errs on so few images that no method can be told from another.
TEST_SHARE = 0.75


def digits(test_share: float = TEST_SHARE) -> Digits:
    """The data, normalized; the split is always the same and has each digit in both parts."""
    images, labels = load_digits(return_X_y=True)
    images = contrast_normalized(images).reshape(-1, 8, 8).astype(np.float32)
    split = train_test_split(images, labels, test_size=test_share, stratify=labels, random_state=0)
    return Digits(*split)


def batches(data: Digits, size: int, seed: int, epoch: int) -> Iterator[tuple[Images, Labels]]:
    """One epoch in an order that depends on nothing but the seed; a short last batch is dropped."""
    for chosen in order.batches(len(data.train_images), size, seed, epoch):
        yield data.train_images[chosen], data.train_labels[chosen]
