"""All that is measured, one part after another."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import models
from spectral_torch import SpectralNormRegularizer

from . import sharded
from .cases import Case, layer_sets, squares, sweeps
from .report import LISTS, NOTES, WRAPPER, Result
from .timing import Budget, LeftOutError, Makers, Step, interleaved, peak_memory

GROUPS = {"torch": "peers_torch", "jax": "peers_jax", "numpy": "peers_numpy", "cupy": "peers_numpy"}
SUITE = NOTES["suite"]


def images(count: int, side: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, side, side), torch.randint(classes, (count,))


def texts(count: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(50257, (count, 257))
    return text[:, :-1].contiguous(), text[:, 1:].flatten()


SMALL, LARGE = partial(images, side=32, classes=10), partial(images, side=224, classes=1000)
TRAININGS: dict[str, tuple[str, Callable[[], nn.Module], Callable[..., Any], int]] = {
    "densenet-40": ("DenseNet-40, 32² images", models.densenet, SMALL, 64),
    "vgg-16": ("VGG-16, 32² images", models.vgg_16, SMALL, 64),
    "gpt2-small": ("GPT-2 small, 256 tokens", models.GPT2, texts, 2),
    "resnet-50": ("ResNet-50, 224² images", models.resnet_50, LARGE, 32),
}


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    only: Sequence[str] = ("*",)
    groups: Sequence[str] = tuple(GROUPS)
    without: Sequence[str] = ()  # words in the names or the descriptions of steps
    quick: bool = False
    budget: Budget = field(default_factory=Budget)

    def wants(self, step: str) -> bool:
        about = " ".join([step, *(notes.get(step, "") for notes in NOTES["steps"].values())])
        return not any(word.casefold() in about.casefold() for word in self.without)


class Part(NamedTuple):
    """One measurement, and the section of the result that it belongs to."""

    name: str
    section: str
    measure: Callable[[], Any]
    group: str = ""  # the only one that takes part


def parts(settings: Settings, bytes_per_second: float = 1.0) -> list[Part]:
    cases = [*squares(), *layer_sets()]
    varied = [case for case in cases if case.name in SUITE["varied"]]
    options = [replace(case, name=f"options-{case.name}") for case in varied]
    sections = {"cases": cases, "options": options, "scaling": sweeps()}
    found = [
        Part(case.name, section, partial(case_result, section, case, settings, bytes_per_second))
        for section, some in sections.items()
        for case in some
    ]
    for name in TRAININGS:
        measure = partial(training_result, name, settings)
        found.append(Part(f"training-{name}", "training", measure, "torch"))
    if find_spec("jax"):
        found.append(Part("compilation", "compilation", partial(compilation, settings), "jax"))
    if settings.device == "cpu":
        some = varied[:1] if settings.quick else varied
        found.append(Part("sharded", "sharded", partial(sharded.measure, some), "torch"))
        found.append(Part("account", "account", sharded.account, "torch"))
    found = [part for part in found if part.group in ("", *settings.groups)]
    for patterns in (settings.only, SUITE["quick"] if settings.quick else ["*"]):
        found = [part for part in found if any(fnmatch(part.name, one) for one in patterns)]
    return found


def run(parts: Iterable[Part], result: Result) -> Iterator[Result]:
    """Yield the result after each part: a run that is cut off loses its last part only."""
    for part in parts:
        start = perf_counter()
        measured = part.measure()
        if part.section in LISTS:
            named = {case["name"]: case for case in result[part.section]}
            others = named.get(part.name, {}).get("peers", {})  # groups that were measured before
            named[part.name] = {**measured, "peers": others | measured["peers"]}
            result[part.section] = [*named.values()]
        else:
            result[part.section] = result[part.section] | measured
        result["seconds_of"] = result["seconds_of"] | {part.name: perf_counter() - start}
        yield result


def training_result(name: str, settings: Settings) -> Result:
    """Time a training step with the regularizer and without, and the regularizer in between."""
    torch.manual_seed(0)
    title, make, draw, batch = TRAININGS[name]
    batch, model = 2 if settings.quick else batch, make().to(settings.device)
    data, target = (tensor.to(settings.device) for tensor in draw(batch))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    regularizer = SpectralNormRegularizer(model, factor=1e-4, warmup_iters=1)

    def step(before: Step) -> None:
        optimizer.zero_grad()
        cross_entropy(model(data), target).backward()
        before()  # where `attach` would call the regularizer
        optimizer.step()

    steps = {
        "without": lambda: step(lambda: None),
        "with": lambda: step(regularizer.add_gradients_),
        # After a whole training step, which has put other things into the caches.
        "regularizer": regularizer.add_gradients_,
    }
    # Training steps are slow and steady: few are enough.
    budget = Budget(3 * settings.budget.seconds, settings.budget.rounds, least=3)
    timings = interleaved(steps, budget, settings.device)
    own, whole = timings["regularizer"]["median_ms"], timings["with"]["median_ms"]
    about = {"title": f"{title}, batch {batch}"}
    about |= {"weights": len(regularizer.sigmas()), "steps": timings}
    return {name: {**about, "regularizer_ms": own, "share": own / whole}}


def compilation(settings: Settings) -> Result:
    module = import_module(".peers_jax", __package__)
    return {"times": module.compile_times((1, 4) if settings.quick else (12, 96))}


def case_result(section: str, case: Case, settings: Settings, bytes_per_second: float) -> Result:
    about = {"name": case.name, "title": case.title, "weights": len(case.shapes), "n": case.n}
    about |= {"dtype": case.dtype, "bytes_of_weights": case.size, "bytes_moved": 3 * case.size}
    # Any step must read W, and read and write G.
    about["bytes_over_bandwidth_ms"] = floor = 1e3 * about["bytes_moved"] / bytes_per_second
    # XLA compiles each of many layers anew, which takes minutes.
    groups = [one for one in settings.groups if (section, one) != ("scaling", "jax")]
    peers = {one: group_result(section, one, case, settings, floor) for one in groups}
    return about | {"peers": peers}


def group_result(section: str, group: str, case: Case, settings: Settings, floor: float) -> Result:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA is not in use
    found: Result = {"steps": {}, "left_out": {}, "memory": {}}
    try:
        makers = makers_of(section, group, case, settings)
    except (ImportError, LeftOutError) as reason:
        return found | {"left_out": {"all": str(reason)}}
    steps: dict[str, Step] = {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except LeftOutError as reason:
            found["left_out"][name] = str(reason)
    if next(iter(makers)) not in steps:  # what the others are compared to
        return found
    found["steps"] = interleaved(steps, settings.budget, settings.device)
    for taken in found["steps"].values():
        taken["ratio_to_ours"] = taken.pop("ratio_to_first")
        taken["ratio_to_bytes"] = taken["median_ms"] / floor
    # CuPy has no honest way to count.
    if group != "cupy" and section == "scaling":
        found["memory"] = {n: peak_memory(one, settings.device) for n, one in steps.items()}
    return found


def makers_of(section: str, group: str, case: Case, settings: Settings) -> Makers:
    """Return all peers of a case, or some of them and the options, the step to compare to first."""
    module = import_module(f".{GROUPS[group]}", __package__)
    arrays = module.arrays(case, settings.device, group)
    makers: Makers = module.peers(case, settings.device, *arrays)
    if section != "cases":
        makers = {name: makers[name] for name in SUITE["beside"][group]}
    if section == "scaling":  # ten thousand wrapped layers are slow
        makers.pop(WRAPPER.get(group, ""), None)
    if section == "options":
        makers |= module.variants(case, settings.device, *arrays, SUITE["common"])
    first = next(iter(makers))
    return {name: make for name, make in makers.items() if name == first or settings.wants(name)}
