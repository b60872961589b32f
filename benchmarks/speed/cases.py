"""The weights that are timed: single matrices, and all the layers of known networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import models

Shape = tuple[int, ...]
ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2}


@dataclass(frozen=True)
class Case:
    """Weights by shape, in PyTorch's order of axes: output, input, kernel."""

    name: str  # what --only matches
    title: str
    shapes: Mapping[str, Shape]
    dtype: str = "float32"

    @property
    def n(self) -> int | None:
        """The size of a single n × n matrix, else None."""
        rows, *columns = next(iter(self.shapes.values()))
        return rows if len(self.shapes) == 1 and columns == [rows] else None

    @cached_property
    def matrices(self) -> list[tuple[int, int]]:
        return [(shape[0], prod(shape[1:])) for shape in self.shapes.values()]

    @cached_property
    def size(self) -> int:
        """The bytes of all weights."""
        return ITEMSIZE[self.dtype] * sum(m * n for m, n in self.matrices)

    @property
    def bytes_moved(self) -> int:
        """The bytes that any step must move: it reads W, and reads and writes G."""
        return 3 * self.size

    @cached_property
    def vectors_size(self) -> int:
        """The bytes of one left and one right vector of each matrix."""
        return ITEMSIZE[self.dtype] * sum(m + n for m, n in self.matrices)


def squares() -> list[Case]:
    dtypes = {n: list(ITEMSIZE) if n in (1024, 4096, 8192) else ["float32"] for n in SIZES}
    return [
        Case(f"square-{n}-{dtype}", f"{n} × {n}", {"w": (n, n)}, dtype)
        for n, chosen in dtypes.items()
        for dtype in chosen
    ]


def layer_sets() -> list[Case]:
    densenet = models.weight_shapes(models.densenet)
    convolutions = {name: shape for name, shape in densenet.items() if len(shape) == 4}
    in_blocks = {name: shape for name, shape in convolutions.items() if shape[0] == 12}
    gpt2 = models.weight_shapes(models.GPT2)
    sets: list[tuple[str, str, Mapping[str, Shape], tuple[str, ...]]] = [
        ("vgg-16", "VGG-16", models.weight_shapes(models.vgg_16), ("float32",)),
        ("densenet-40-36", "DenseNet-40, blocks", in_blocks, ("float32",)),
        ("densenet-40-39", "DenseNet-40, convolutions", convolutions, ("float32",)),
        ("densenet-121", "DenseNet-121", models.weight_shapes(models.densenet_121), ("float32",)),
        ("resnet-50", "ResNet-50", models.weight_shapes(models.resnet_50), ("float32",)),
        ("gpt2-small", "GPT-2 small", gpt2, ("float32", "bfloat16")),
        ("llama-1b", "Llama-like, 1 B", llama(), ("float32", "bfloat16")),
    ]
    return [
        Case(f"{name}-{dtype}", f"{title}, {len(shapes)} weights", shapes, dtype)
        for name, title, shapes, dtypes in sets
        for dtype in dtypes
    ]


def llama(layers: int = 16, hidden: int = 2048, kv: int = 512, mlp: int = 8192) -> dict[str, Shape]:
    """Return the linear layers of a Llama-like model of a billion parameters."""
    block = {
        "q": (hidden, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, hidden),
        "gate": (mlp, hidden),
        "up": (mlp, hidden),
        "down": (hidden, mlp),
    }
    return {f"{k}.{name}": shape for k in range(layers) for name, shape in block.items()}


def by_formula(xp: Any, weights: dict[str, Any], grads: dict[str, Any]) -> Callable[[], None]:
    """Return a loop over the layers as it is commonly copied, but for the misprint."""
    vectors = {name: xp.ones_like(w[0].reshape(-1)) for name, w in weights.items()}
    norm, outer = xp.linalg.norm, xp.outer

    def step() -> None:
        for name, w in weights.items():
            matrix = w.reshape(w.shape[0], -1)
            u = matrix @ vectors[name]
            v = matrix.T @ u
            sigma = norm(v) / norm(u)
            u, v = u / norm(u), v / norm(v)
            vectors[name] = v
            grads[name] += (0.01 * sigma * outer(u, v)).reshape(w.shape)

    return step


def filled(shape: Shape, seed: int = 0) -> NDArray[np.float32]:
    """Return normal numbers of the scale of weights, a million of them repeated.

    Drawing them all would take long, and reading the untouched pages of a zero array costs nothing.
    The period is a prime, so that rows differ.
    """
    pool = np.random.default_rng(seed).standard_normal(1_000_003, dtype=np.float32)
    pool *= prod(shape[1:]) ** -0.5
    return np.resize(pool, shape)


SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
