"""The weights that are timed: single matrices, and all the layers of known networks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
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

    @property
    def matrices(self) -> list[tuple[int, int]]:
        return [(shape[0], prod(shape[1:])) for shape in self.shapes.values()]

    @property
    def size(self) -> int:
        """The bytes of all weights."""
        return ITEMSIZE[self.dtype] * sum(m * n for m, n in self.matrices)


def squares() -> list[Case]:
    return [
        Case(f"square-{n}-{dtype}", f"{n} × {n}", {"w": (n, n)}, dtype)
        for n in SIZES
        for dtype in (ITEMSIZE if n in (1024, 4096, 8192) else ["float32"])
    ]


def layer_sets() -> list[Case]:
    shapes_of = models.weight_shapes
    layers = shapes_of(models.densenet).items()
    convolutions = {name: shape for name, shape in layers if len(shape) == 4}
    in_blocks = {name: shape for name, shape in convolutions.items() if shape[0] == 12}
    sets = {
        ("vgg-16", "VGG-16"): shapes_of(models.vgg_16),
        ("densenet-40-36", "DenseNet-40, blocks"): in_blocks,
        ("densenet-40-39", "DenseNet-40, convolutions"): convolutions,
        ("densenet-121", "DenseNet-121"): shapes_of(models.densenet_121),
        ("resnet-50", "ResNet-50"): shapes_of(models.resnet_50),
        ("gpt2-small", "GPT-2 small"): shapes_of(models.GPT2),
        ("llama-1b", "Llama-like, 1 B"): llama(),
    }
    return [
        Case(f"{name}-{dtype}", f"{title}, {len(shapes)} weights", shapes, dtype)
        for (name, title), shapes in sets.items()
        for dtype in ("float32", *["bfloat16"] * (name in ("gpt2-small", "llama-1b")))
    ]


def sweeps() -> list[Case]:
    """Return equal layers: more of them, wider ones, and up to 10,000 small ones."""
    sizes = {"depth": [(4**k, 512) for k in range(5)], "width": [(8, 4**k) for k in range(3, 7)]}
    found = []
    for sweep, points in {**sizes, "weights": [(10**k, 16) for k in range(5)]}.items():
        for count, n in points:
            name = f"{sweep}-{n if sweep == 'width' else count}"
            found.append(Case(name, f"{count} × {n}²", {f"w{k}": (n, n) for k in range(count)}))
    return found


def llama(layers: int = 16, hidden: int = 2048, kv: int = 512, mlp: int = 8192) -> dict[str, Shape]:
    """Return the linear layers of a Llama-like model of a billion parameters."""
    outputs = {"q": hidden, "k": kv, "v": kv, "o": hidden, "gate": mlp, "up": mlp}
    block = {name: (output, hidden) for name, output in outputs.items()} | {"down": (hidden, mlp)}
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
    """Return normal numbers of the scale of weights, a million of them repeated: quick to draw."""
    some = pool(seed)[: prod(shape)] * np.float32(prod(shape[1:]) ** -0.5)
    return np.resize(some, shape)


@cache
def pool(seed: int) -> NDArray[np.float32]:
    # A prime, so that rows differ. Not zeros: reading untouched pages costs nothing.
    return np.random.default_rng(seed).standard_normal(1_000_003, dtype=np.float32)


SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)
