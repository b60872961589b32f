"""Find the scale of a low-rank update: given, in its file, or in PEFT's adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArgumentError
from .entry import CheckpointError, TensorEntry
from .files import Mapped, parsed_json, short
from .numbers import widened

CONFIG = "adapter_config.json"
_SPECIAL = re.compile(r"[*+?\[\](){}|\\]")


class Pair(NamedTuple):
    """Two factors of an update: B is ``up`` and A is ``down``."""

    name: str  # of the module
    up: TensorEntry
    down: TensorEntry
    alpha: TensorEntry | None = None
    embedding: bool = False
    magnitude: bool = False  # DoRA's vector is there
    middle: bool = False  # a third factor is between the two: Tucker's form of a kernel
    adapter: str = ""  # its name, where the file holds several for a module

    def titled(self, what: str) -> str:
        """Return the name of a row: a module has one for each adapter."""
        return f"{self.name} ({what}{' of ' * bool(self.adapter)}{self.adapter})"


class Scale:
    """The scale s of each update W + s·B·A.

    Parameters
    ----------
    given : float, optional
        The scale of all.
    config : mapping, optional
        What adapter_config.json holds.
    """

    def __init__(self, given: float | None = None, config: Mapping[str, Any] | None = None) -> None:
        self.given = None if given is None else _finite(given)
        if given is not None and self.given is None:
            raise ArgumentError(f"lora_scale is {short(given)}: it must be a finite number")
        self._config = config or {}
        pattern = self._config.get("alpha_pattern") or {}
        if not isinstance(pattern, Mapping):
            raise CheckpointError(f"{CONFIG}: its alpha_pattern is no object")
        self._pattern = dict(pattern)

    def of(self, pair: Pair) -> float | None:
        """Return the scale of an update, or None where nothing says it.

        >>> down = TensorEntry("q.lora_A.weight", (4, 9), "float32", lambda: np.ones((4, 9)))
        >>> Scale(config={"lora_alpha": 8}).of(Pair("q", down, down))
        2.0
        """
        if self.given is not None:
            return self.given
        rank = pair.down.shape[0]
        if pair.alpha is not None and pair.alpha.size == 1:
            stored = np.asarray(pair.alpha.load()).reshape(-1)
            return float(widened(stored, pair.alpha.dtype)[0].real) / rank
        alpha = self._alpha(pair.name)
        if alpha is None:
            return None
        return alpha / (rank**0.5 if self._config.get("use_rslora") is True else rank)

    def _alpha(self, name: str) -> float | None:
        found = self._config.get("lora_alpha")
        for key, value in self._pattern.items():
            # PEFT matches regular expressions. One from a file could take for ever.
            plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if _SPECIAL.search(plain):
                raise CheckpointError(
                    f"{CONFIG}: {short(key)} of alpha_pattern is a regular expression, which is "
                    "not matched; give --lora-scale S"
                )
            if f".{name}".endswith(f".{plain}"):
                found = value
                break
        alpha = _finite(found)
        if found is not None and alpha is None:
            raise CheckpointError(f"{CONFIG}: lora_alpha is {short(found)}, which is no number")
        return alpha


def _finite(value: object) -> float | None:
    """Return a finite number as a float, or None for anything else. JSON has endless integers."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if isfinite(found) else None


def read_beside(source: Any, name: str) -> dict[str, Any] | None:
    """Return the JSON of a file in the folder of the weights, or None."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source)
    return read_config((path if path.is_dir() else path.parent) / name)


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if there is no file."""
    if not path.is_file():
        return None
    try:
        file = Mapped(path)
        return parsed_json(file.read(0, file.size, path.name), path.name)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
