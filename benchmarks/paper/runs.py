"""What a run is, what it leaves, and the suites of runs that are reported together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, read_json, read_toml, rounded, write_json

ROOT = Path(__file__).parent
COMMITTED = RESULTS / "paper"

MODELS, DATA, STRENGTHS, SENTENCES = read_toml(ROOT / "names.toml").values()
PAPERS = ("vanilla", "decay", "adversarial", "spectral")  # the methods in its table

MOMENTUM = 0.9  # Nesterov's
MEASURED = 256  # images that input gradients and the Hessian are measured on
DIGITS = 5  # one image moves an accuracy by 1e-4 or so: more digits are noise
SEARCH_SEED = 1000  # no run that is reported has this seed


class RunError(Exception):
    """A run that cannot be had: an unknown model or batch, or a file of another run."""


@dataclass(frozen=True)
class Run:
    """All that decides a run. Two equal runs leave equal results on the same machine."""

    data: str
    model: str
    method: str
    strength: float  # λ; for adversarial training α; 0 where the method has none
    batch: int
    rate: float  # the initial one, divided by 10 at a half and at three quarters
    epochs: int
    seed: int
    width: float = 1.0  # of the model; 1 is the published one
    subset: int | None = None  # train on this many images only
    validate: bool = False  # test on a tenth of the training images, held out
    hessians: int = 0  # how often the Hessian is measured, the last time at the end
    framework: str = "torch"

    @property
    def name(self) -> str:
        """The name of its file, distinct within a suite."""
        method = f"{self.method}-{self.strength:g}"
        parts = [self.model, f"b{self.batch}", method, f"r{self.rate:g}", f"s{self.seed}"]
        return "-".join(parts if self.framework == "torch" else [*parts, self.framework])


@dataclass
class Result:
    """A run and what it left, in rounded numbers: a result just computed equals the one read back.

    ``curves`` has one value an epoch, or None where nothing was measured: ``loss``, accuracies
    ``train`` and ``test``, mean ‖∇ₓ loss‖₂ of an image ``train_gradient`` and ``test_gradient``,
    largest eigenvalues ``train_hessian`` and ``test_hessian``, and ``sigma_product`` (Π σ).
    ``spectra`` has all singular values by weight, the largest first.
    """

    run: Run
    machine: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    seconds: float = 0.0
    epochs: int = 0
    diverged: bool = False
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    spectra: dict[str, list[float]] = field(default_factory=dict)

    def record(self, measured: Mapping[str, float]) -> None:
        """Add an epoch."""
        for key in [*self.curves, *(key for key in measured if key not in self.curves)]:
            values = self.curves.setdefault(key, [None] * self.epochs)
            values.append(rounded(measured.get(key), DIGITS))
        self.epochs += 1

    def curve(self, key: str) -> dict[int, float]:
        """Return the measured values by epoch, which counts from 1."""
        values = self.curves.get(key, [])
        return {epoch: value for epoch, value in enumerate(values, 1) if value is not None}

    def last(self, key: str) -> float:
        return list(self.curve(key).values())[-1]


def from_json(fields: Mapping[str, Any]) -> Result:
    return Result(**{**fields, "run": Run(**fields["run"])})


def finished(run: Run, folder: Path) -> Result | None:
    """Return the run's result if the folder has it; `RunError` if that file is another run's."""
    path = folder / f"{run.name}.json"
    if not path.exists():
        return None
    result = from_json(read_json(path))
    if result.run != run:
        raise RunError(f"{path} holds another run, {result.run}, not {run}: use another folder")
    return result


def write(folder: Path, result: Result) -> Result:
    """Write a finished run."""
    write_json(folder / f"{result.run.name}.json", asdict(result), DIGITS)
    return result


def read_folder(folder: Path) -> list[Result]:
    """Return the finished runs of one suite, in the order of their names."""
    return [from_json(read_json(path)) for path in sorted(folder.glob("*.json"))]


def commit(suite: str, results: Iterable[Result]) -> None:
    """Write a suite into the repository, as one compressed table."""
    write_json(COMMITTED / f"{suite}.json.gz", [asdict(result) for result in results], DIGITS)


def committed() -> dict[str, list[Result]]:
    """Return the repository's results by suite."""
    paths = {path.name.partition(".")[0]: path for path in sorted(COMMITTED.glob("*.json.gz"))}
    return {suite: [from_json(one) for one in read_json(path)] for suite, path in paths.items()}


@dataclass(frozen=True)
class Suite:
    """Models on one data set, usually at a small and a large batch."""

    title: str
    data: str
    models: Mapping[str, Mapping[str, Any]]  # rates, one for each batch size, epochs and width
    batches: Sequence[int] = (64, 4096)
    methods: Sequence[str] = PAPERS
    seeds: int = 3
    subset: int | None = None
    hessians: int = 0
    frameworks: Sequence[str] = ("torch",)

    def runs(
        self,
        models: Sequence[str] = (),
        methods: Sequence[str] = (),
        batches: Sequence[int] = (),
        strengths: Mapping[str, float] | None = None,
    ) -> list[Run]:
        """Return all runs, or those chosen, seed by seed: a sweep cut short can be compared."""
        if unknown := set(batches) - set(self.batches):
            raise RunError(f"the suite has the batch sizes {self.batches}, not {sorted(unknown)}")
        strengths = STRENGTHS | dict(strengths or {})
        networks = product(range(self.seeds), models or self.models, batches or self.batches)
        ways = list(product(methods or self.methods, self.frameworks))
        found = []
        for (seed, model, batch), (method, framework) in product(networks, ways):
            changes = {"method": method, "strength": strengths.get(method, 0.0), "seed": seed}
            changes |= {"hessians": self.hessians, "framework": framework}
            found.append(self._run(model, batch, **changes))
        return found

    def grid(
        self, models: Iterable[str], method: str, strengths: Iterable[float], rates: Iterable[float]
    ) -> list[Run]:
        """Return each strength with each rate, judged by a tenth of the images, held out."""
        # Batches are a tenth smaller too: an epoch has as many steps.
        plan = {"method": method, "validate": True, "seed": SEARCH_SEED}
        return [
            self._run(m, b, batch=9 * b // 10, strength=strength, rate=rate, **plan)
            for m, b, strength, rate in product(models, self.batches, strengths, rates)
        ]

    def _run(self, model: str, size: int, **fields: Any) -> Run:
        # A model that the suite does not name is trained like its first one.
        setting = dict(self.models.get(model, next(iter(self.models.values()))))
        setting["rate"] = setting.pop("rates")[self.batches.index(size)]
        plan = {"data": self.data, "model": model, "batch": size, "subset": self.subset}
        return Run(**plan | setting | fields)


SUITES = {name: Suite(**fields) for name, fields in read_toml(ROOT / "suites.toml").items()}
