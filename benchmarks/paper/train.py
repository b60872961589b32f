"""One training loop for all methods; a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from time import monotonic, perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.speed.device import machine

from . import data, measure, results
from .data import Data
from .methods import METHODS, Method
from .networks import build
from .results import MEASURED, MOMENTUM, Result, Run

Epoch = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """How runs are computed, which is no part of what they are, but for rounding."""

    device: str = "cpu"
    bfloat16: bool = False
    compiled: bool = False
    channels_last: bool = False
    threads: int = 1
    deadline: float | None = None  # of `time.monotonic`: when to stop, to go on another time
    save_every: float = 20.0  # seconds between checkpoints

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16) if self.bfloat16 else nullcontext()

    def late(self) -> bool:
        return self.deadline is not None and monotonic() > self.deadline


class Trainer:
    """A run in progress."""

    def __init__(self, run: Run, images: Data, settings: Settings) -> None:
        self.run, self.data, self.settings, self.epoch = run, images, settings, 0
        self.diverged = False
        self.method: Method = METHODS[run.method](run.strength, run.seed)
        self.model = build(run.model, images, run.width, run.seed).to(settings.device)
        if settings.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        torch.manual_seed(run.seed)  # of what the method draws
        self.method.prepare(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=run.rate,
            momentum=MOMENTUM,
            nesterov=True,
            **self.method.options(),
        )
        self.method.attach(self.model, self.optimizer)
        # What torch.compile makes can be differentiated once.
        compiled = settings.compiled and not self.method.twice
        self.network = torch.compile(self.model) if compiled else self.model
        self._train = self._on_device(images.train_images, images.train_labels)
        self._test = self._on_device(images.test_images, images.test_labels)

    def _on_device(self, images: data.Images, labels: data.Labels) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(images).to(self.settings.device)
        if self.settings.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, torch.from_numpy(labels).to(self.settings.device)

    def train_epoch(self) -> Epoch:
        """Go over the images once, and measure."""
        start = perf_counter()
        self._set_rate()
        # Whatever is drawn depends on seed and epoch alone, so a run that goes on draws the same.
        torch.manual_seed(self.run.seed * 100_003 + self.epoch)
        self._rng = np.random.default_rng([self.run.seed, self.epoch, 1])
        total, steps = torch.zeros((), device=self.settings.device), 0
        for chosen in data.batches(self.data, self.run.batch, self.run.seed, self.epoch):
            total += self._step(*self._batch(chosen))
            steps += 1
        self.epoch += 1
        line: Epoch = {"epoch": self.epoch, "loss": float(total) / steps}
        finite = all(bool(p.isfinite().all()) for p in self.model.parameters())
        self.diverged = not (finite and isfinite(line["loss"]))
        if not self.diverged:
            line |= self._measured()
        return {**line, "seconds": perf_counter() - start}

    def _set_rate(self) -> None:
        half, three_quarters = self.run.epochs // 2, 3 * self.run.epochs // 4
        drops = (self.epoch >= half) + (self.epoch >= three_quarters)
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.rate / 10**drops

    def _batch(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        if self.data.augmented:
            images = data.augment(self.data.train_images[chosen], self._rng)
            return self._on_device(images, self.data.train_labels[chosen])
        x, y = self._train
        index = torch.from_numpy(chosen).to(x.device)
        return x[index], y[index]

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with self.settings.precision():
            loss, plain = self.method.loss(self.network, x, y)
        loss.backward()
        self.optimizer.step()
        return plain.detach()

    def _measured(self) -> Epoch:
        some = [(x[:MEASURED], y[:MEASURED]) for x, y in (self._train, self._test)]
        with measure.evaluating(self.model):
            line: Epoch = {
                "train": measure.accuracy(self.model, *self._train),
                "test": measure.accuracy(self.model, *self._test),
                "train_gradient": measure.input_gradient(self.model, *some[0]),
                "test_gradient": measure.input_gradient(self.model, *some[1]),
                "sigma_product": measure.sigma_product(self.model),
            }
            if self.epoch in self._hessian_epochs():
                line["train_hessian"] = measure.hessian(self.model, *some[0])
                line["test_hessian"] = measure.hessian(self.model, *some[1])
        return line

    def _hessian_epochs(self) -> set[int]:
        count = self.run.hessians
        return {round(self.run.epochs * (k + 1) / count) for k in range(count)}

    def state(self) -> dict[str, Tensor]:
        """All that the run needs to go on, flat."""
        names = {p: name for name, p in self.model.named_parameters()}
        momenta = {
            names[p]: state["momentum_buffer"]
            for p, state in self.optimizer.state.items()
            if state.get("momentum_buffer") is not None
        }
        parts = {
            "model": self.model.state_dict(),
            "momentum": momenta,
            "method": self.method.state(),
            "run": {"epoch": torch.tensor(self.epoch)},
        }
        return {
            f"{part}.{key}": value.detach().contiguous()
            for part, values in parts.items()
            for key, value in values.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""

        def part(name: str) -> dict[str, Tensor]:
            start = f"{name}."
            return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}

        self.model.load_state_dict(part("model"))
        for name, momentum in part("momentum").items():
            parameter = self.model.get_parameter(name)
            self.optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)
        self.method.load(part("method"))
        self.epoch = int(state["run.epoch"])


def train(
    run: Run,
    images: Data,
    settings: Settings,
    folder: Path,
    checkpoints: Path,
    advance: Callable[[], object] = lambda: None,
) -> Result:
    """Train, or go on training, and leave a file of results in ``folder``.

    Raises
    ------
    ResultsError
        If the file there belongs to another run.
    """
    path, checkpoint = folder / f"{run.name}.jsonl", checkpoints / f"{run.name}.safetensors"
    result = results.begun(run, path)
    if result.done:
        return result
    trainer = Trainer(run, images, settings)
    if checkpoint.exists() and result.epochs:
        trainer.load(_loaded(checkpoint, trainer))
    if trainer.epoch > len(result.epochs):
        trainer = Trainer(run, images, settings)  # the checkpoint is of a file that was removed
    result.epochs = result.epochs[: trainer.epoch]
    result.parameters = _count(trainer.model)
    result.machine = {**machine(settings.device), **_how(settings)}
    results.write(path, result)
    saved = monotonic()
    while trainer.epoch < run.epochs and not result.diverged:
        if settings.late():
            _save(checkpoint, trainer)
            return result
        line = trainer.train_epoch()
        result.diverged = trainer.diverged
        result.epochs.append(dict(line))
        results.append(path, line)
        if monotonic() - saved > settings.save_every:
            _save(checkpoint, trainer)
            saved = monotonic()
        advance()
    with measure.evaluating(trainer.model):
        result.spectra = {} if result.diverged else measure.spectra(trainer.model)
    result.done = True
    results.write(path, result)
    checkpoint.unlink(missing_ok=True)
    return result


def _save(path: Path, trainer: Trainer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(trainer.state(), partial, _about(trainer))
    partial.replace(path)


def _loaded(path: Path, trainer: Trainer) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        about = file.metadata()
    if about != _about(trainer):
        raise results.ResultsError(
            f"{path.name} is a checkpoint of {about}, not of {_about(trainer)}: go on with the "
            "same settings, or remove it"
        )
    return load_file(path, device=trainer.settings.device)


def _about(trainer: Trainer) -> dict[str, str]:
    """What must be the same for a run to go on."""
    how = {**_how(trainer.settings), "device": trainer.settings.device}
    return {"run": json.dumps(asdict(trainer.run)), "how": json.dumps(how)}


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _how(settings: Settings) -> dict[str, object]:
    how = asdict(settings)
    return {key: how[key] for key in ("bfloat16", "compiled", "channels_last")}
