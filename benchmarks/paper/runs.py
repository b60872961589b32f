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
RATES = (0.01, 0.03, 0.1, 0.3)  # of a grid, where its suite has no other

# What a grid chose for each model and batch: "rate", and the strength of each method.
Settled = dict[tuple[str, int], dict[str, float]]


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
    checks: int = 0  # how often accuracies are measured, evenly; after each epoch if 0

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
    ``spectra`` has all singular values by weight, the largest first; ``final`` what `measure.final`
    returns.
    """

    run: Run
    machine: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    seconds: float = 0.0
    epochs: int = 0
    diverged: bool = False
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    spectra: dict[str, list[float]] = field(default_factory=dict)
    final: dict[str, Any] = field(default_factory=dict)

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


def restore(suite: str, planned: Iterable[Run], folder: Path) -> None:
    """Write the committed results of these runs into a folder that lacks them."""
    known = {result.run: result for result in committed(suite).get(suite, [])}
    for run in planned:
        if run in known and not (folder / f"{run.name}.json").exists():
            write(folder, known[run])


def commit(suite: str, results: Iterable[Result]) -> None:
    """Add results to the suite's in the repository, one compressed table."""
    kept = {one.run: one for one in [*committed(suite).get(suite, []), *results]}
    table = [asdict(kept[run]) for run in sorted(kept, key=lambda run: (run.seed, run.name))]
    write_json(COMMITTED / f"{suite}.json.gz", table, DIGITS)


def committed(suite: str = "*") -> dict[str, list[Result]]:
    """Return the repository's results by suite, of all or of one."""
    paths = sorted(COMMITTED.glob(f"{suite}.json.gz"))
    paths = {path.name.partition(".")[0]: path for path in paths}
    return {suite: [from_json(one) for one in read_json(path)] for suite, path in paths.items()}


@dataclass(frozen=True)
class Suite:
    """Models on one data set, usually at a small and a large batch."""

    title: str
    data: str
    # Epochs, width, and initial rates: one for each batch size, or in `grid` a list for each.
    models: Mapping[str, Mapping[str, Any]]
    batches: Sequence[int] = (64, 4096)
    methods: Sequence[str] = PAPERS
    seeds: int = 3
    subset: int | None = None
    hessians: int = 0
    checks: int = 0
    frameworks: Sequence[str] = ("torch",)
    strengths: Mapping[str, Sequence[float]] = field(default_factory=dict)  # the grid's
    search: str = ""  # the suite whose grid chooses rates and strengths

    def runs(
        self,
        models: Sequence[str] = (),
        methods: Sequence[str] = (),
        batches: Sequence[int] = (),
        strengths: Mapping[str, float] | None = None,
        settled: Settled | None = None,
    ) -> list[Run]:
        """Return all runs, or those chosen, seed by seed: a sweep cut short can be compared.

        ``settled`` has the rate and strengths of each model and batch, where a grid chose them.
        """
        networks = list(product(models or self.models, self._known(batches)))
        found = []
        for seed, (model, batch) in product(range(self.seeds), networks):
            best = dict((settled or {}).get((model, batch), {}))
            fields = {"seed": seed, "hessians": self.hessians, "checks": self.checks}
            fields |= {"rate": best.pop("rate")} if best else {}
            by_method = STRENGTHS | best | dict(strengths or {})
            for method, framework in product(methods or self.methods, self.frameworks):
                ways = {"method": method, "framework": framework}
                ways["strength"] = by_method.get(method, by_method.get(method.split("-")[0], 0.0))
                found.append(self._run(model, batch, **fields, **ways))
        return found

    def rates(
        self, models: Sequence[str] = (), batches: Sequence[int] = (), rates: Sequence[float] = ()
    ) -> list[Run]:
        """Return a vanilla run at each rate, judged by a tenth of the images, held out."""
        found = []
        for model, batch in product(models or self.models, self._known(batches)):
            grid = self._plan(model).get("grid")
            some = rates or (grid[self.batches.index(batch)] if grid else RATES)
            found += [self._held_out(model, batch, rate=rate) for rate in some]
        return found

    def grid(self, settled: Settled, strengths: Mapping[str, Sequence[float]]) -> list[Run]:
        """Return each method at each of its strengths, at the rate that suits vanilla best."""
        return [
            self._held_out(model, batch, rate=best["rate"], method=method, strength=strength)
            for (model, batch), best in settled.items()
            for method, some in strengths.items()
            for strength in some
        ]

    def settled(self, results: Sequence[Result]) -> Settled:
        """Return the rate and the strengths with the best accuracy on the images held out.

        Of equal ones, the one with the smaller loss at the end. The rate is vanilla's.
        """
        found: Settled = {}
        kept = sorted(
            (one for one in results if one.run.validate and not one.diverged),
            key=lambda one: (-one.last("test"), one.final.get("nll", 0.0), one.run.strength),
        )
        for batch in self.batches:
            mine = [one.run for one in kept if one.run.batch == self._smaller(batch)]
            for run in (run for run in mine if run.method == "vanilla"):
                found.setdefault((run.model, batch), {"rate": run.rate})
            for run in mine:
                best = found.get((run.model, batch), {})
                if run.method != "vanilla" and run.rate == best.get("rate"):
                    best.setdefault(run.method, run.strength)
        return found

    def decided(self, results: Sequence[Result]) -> Settled:
        """Return what `settled` does, of the models and batches whose whole grid is done."""
        done = {_point(one.run) for one in results}
        found = self.settled(results)
        for (model, batch), best in [*found.items()]:
            planned = self.rates([model], [batch])
            planned += self.grid({(model, batch): best}, self.strengths)
            if not done >= {_point(run) for run in planned}:
                del found[model, batch]
        return found

    def _known(self, batches: Sequence[int]) -> Sequence[int]:
        if unknown := set(batches) - set(self.batches):
            raise RunError(f"the suite has the batch sizes {self.batches}, not {sorted(unknown)}")
        return batches or self.batches

    def _smaller(self, batch: int) -> int:
        """Return the batch of a set that is a tenth smaller: an epoch has as many steps."""
        return batch if self.subset else 9 * batch // 10

    def _held_out(self, model: str, batch: int, **fields: Any) -> Run:
        plan = {"method": "vanilla", "strength": 0.0, "validate": True, "seed": SEARCH_SEED}
        plan |= {"checks": self.checks, "batch": self._smaller(batch)}
        return self._run(model, batch, **plan | fields)

    def _plan(self, model: str) -> dict[str, Any]:
        # A model that the suite does not name is trained like its first one.
        return dict(self.models.get(model, next(iter(self.models.values()))))

    def _run(self, model: str, size: int, **fields: Any) -> Run:
        place, setting = self.batches.index(size), self._plan(model)
        setting.pop("grid", None)
        if "rates" in setting:
            setting["rate"] = setting.pop("rates")[place]
        if not isinstance(setting["epochs"], int):
            setting["epochs"] = setting["epochs"][place]
        plan = {"data": self.data, "model": model, "batch": size, "subset": self.subset}
        plan = plan | setting | fields
        if "rate" not in plan:
            raise RunError(f"no whole grid has chosen for {model} at {size}: search it first")
        return Run(**plan)


def _point(run: Run) -> tuple[Any, ...]:
    """Return what tells the runs of a grid from one another."""
    return run.model, run.batch, run.method, run.strength, run.rate


SUITES = {name: Suite(**fields) for name, fields in read_toml(ROOT / "suites.toml").items()}
