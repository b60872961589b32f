"""What a run is, and the lines of JSON that it leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rounding import rounded

RESULTS = Path(__file__).parent / "results"

# The methods and their strengths in the paper: λ, and of adversarial training α. What is not in
# its table has the strength that its authors use.
STRENGTHS = {
    "vanilla": 0.0,
    "decay": 1e-4,
    "adversarial": 0.5,
    "spectral": 0.01,
    "jacobian": 0.01,
    "normalization": 0.0,
}
PAPERS = ("vanilla", "decay", "adversarial", "spectral")  # those in its table

# What all runs have in common.
MOMENTUM = 0.9  # Nesterov's
MEASURED = 256  # images that gradients and the Hessian are measured on

# An accuracy moves by 1e-4 or so from one image: more digits would be noise.
DIGITS = 5


@dataclass(frozen=True)
class Run:
    """All that decides a run. Two that are equal leave equal results on the same machine."""

    data: str
    model: str
    method: str
    strength: float  # λ; of adversarial training α; 0 where the method has none
    batch: int
    rate: float  # the initial one: ÷10 at a half and at three quarters
    epochs: int
    seed: int
    width: float = 1.0  # of the model; 1 is the published one
    subset: int | None = None  # train on this many images alone
    validate: bool = False  # test on a tenth of the training images, held out
    hessians: int = 0  # how often the Hessian is measured, the last time at the end
    framework: str = "torch"

    @property
    def name(self) -> str:
        """Of its file: what tells it from the other runs of a suite."""
        parts = [self.model, f"b{self.batch}", self.method, f"s{self.seed}"]
        if self.validate:
            parts.insert(3, f"{self.strength:g}-r{self.rate:g}")
        return "-".join(parts if self.framework == "torch" else [*parts, self.framework])


@dataclass
class Result:
    """A run and what it left.

    ``epochs`` has a mapping for each epoch: ``epoch`` (from 1), ``loss`` (mean over its steps),
    ``train``, ``test`` (accuracies), ``train_gradient``, ``test_gradient`` (mean ‖∇ₓ loss‖₂ of an
    image), ``sigma_product`` (Π σ), ``seconds`` and, at some epochs, ``train_hessian`` and
    ``test_hessian`` (the largest eigenvalue). What is not finite is None.
    """

    run: Run
    machine: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    spectra: dict[str, list[float]] = field(default_factory=dict)  # by weight, largest first
    diverged: bool = False
    done: bool = False

    def curve(self, key: str) -> list[float]:
        """One value of each epoch that has it."""
        return [line[key] for line in self.epochs if line.get(key) is not None]

    @property
    def best(self) -> float:
        """The highest test accuracy of any epoch."""
        return max(self.curve("test"))


class ResultsError(Exception):
    """A results file that cannot be read, or that belongs to another run."""


def head(result: Result) -> dict[str, Any]:
    """The first line of a file."""
    return {
        "run": asdict(result.run),
        "parameters": result.parameters,
        "machine": result.machine,
    }


def tail(result: Result) -> dict[str, Any]:
    """The last line of a file, which says that it is complete."""
    return {"done": True, "diverged": result.diverged, "spectra": result.spectra}


def read(path: Path) -> Result:
    """A file, complete or not.

    Raises
    ------
    ResultsError
        If it is not one that `write` wrote.
    """
    try:
        # A process that was killed may have left half a line at the end.
        text = path.read_text(encoding="utf-8")
        first, *rest = (json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines())
        result = Result(Run(**first["run"]), first["machine"], first["parameters"])
        for line in rest:
            if line.get("done"):
                result.spectra, result.diverged = line["spectra"], line["diverged"]
                result.done = True
            else:
                result.epochs.append(line)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(f"{path.name} is not the record of a run: {error!r}") from error
    return result


def begun(run: Run, path: Path) -> Result:
    """What a run has left so far.

    Raises
    ------
    ResultsError
        If the file is another run's.
    """
    if not path.exists():
        return Result(run)
    result = read(path)
    if result.run != run:
        raise ResultsError(
            f"{path.name} holds another run, {result.run}, not {run}: give another folder, or "
            "remove it"
        )
    return result


def write(path: Path, result: Result) -> None:
    """The whole file, in place of what is there."""
    lines = [head(result), *result.epochs, *([tail(result)] if result.done else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(map(as_line, lines)), encoding="utf-8")
    partial.replace(path)


def append(path: Path, line: Mapping[str, Any]) -> None:
    """One epoch's line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(as_line(line))


def read_all(folder: Path) -> list[Result]:
    """The complete runs of a suite, in the order of their names."""
    return [result for path in sorted(folder.glob("*.jsonl")) if (result := read(path)).done]


def as_line(line: Mapping[str, Any]) -> str:
    return json.dumps(rounded(line, DIGITS)) + "\n"
