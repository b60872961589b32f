"""One training loop for all methods, and what is measured after each epoch.

A run that was stopped goes on from its checkpoint, which holds the results so far as well.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from time import monotonic, perf_counter

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import machine, rounded

from . import data, measure, runs
from .data import Data
from .methods import METHODS, Method, build
from .runs import MEASURED, MOMENTUM, Result, Run, RunError

HOW = ("device", "bfloat16", "compiled", "channels_last", "micro_batch")


@dataclass(frozen=True)
class Settings:
    """How runs are computed, which changes their results by no more than rounding."""

    device: str = "cpu"
    bfloat16: bool = False
    compiled: bool = False
    channels_last: bool = False
    micro_batch: int | None = None  # images at a time, where memory does not hold a whole batch
    threads: int = 1
    deadline: float | None = None  # of `time.monotonic`: when to stop, to go on another time
    save_every: float = 30.0  # seconds between checkpoints

    def late(self) -> bool:
        return self.deadline is not None and monotonic() > self.deadline

    def how(self) -> dict[str, object]:
        """Return what a resumed run must have in common with its checkpoint."""
        return {key: getattr(self, key) for key in HOW}


class Trainer:
    """A run in progress."""

    def __init__(self, run: Run, images: Data, settings: Settings) -> None:
        self.run, self.data, self.settings = run, images, settings
        self.method: Method = METHODS[run.method](run.strength, run.seed)
        self.model = build(run.model, images, run.width, run.seed).to(settings.device)
        self._layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = self.model.to(memory_format=self._layout)
        torch.manual_seed(run.seed)  # for what the method draws
        self.method.prepare(self.model)
        options = {"lr": run.rate, "momentum": MOMENTUM, "nesterov": True, **self.method.options()}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **options)
        self.method.attach(self.model, self.optimizer)
        # What torch.compile makes can be differentiated once.
        compiled = settings.compiled and not self.method.twice
        self.network = torch.compile(self.model) if compiled else self.model
        self._train, self._test = self._on_device(*images[:2]), self._on_device(*images[2:4])
        parameters = sum(p.numel() for p in self.model.parameters())
        about = {**machine(settings.device), **settings.how()}
        self.result = Result(run, rounded(about, runs.DIGITS), parameters)

    def _on_device(self, images: data.Images, labels: data.Labels) -> tuple[Tensor, Tensor]:
        x, y = (torch.from_numpy(part).to(self.settings.device) for part in (images, labels))
        return (x.contiguous(memory_format=self._layout), y)

    def train_epoch(self) -> None:
        """Go over the images once, measure and record."""
        start, epoch, seed = perf_counter(), self.result.epochs, self.run.seed
        drops = (epoch >= self.run.epochs // 2) + (epoch >= 3 * self.run.epochs // 4)
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.rate / 10**drops
        # Random numbers depend on seed and epoch alone, so a resumed run draws the same ones.
        torch.manual_seed(seed * 100_003 + epoch)
        self._rng = np.random.default_rng([seed, epoch, 1])
        losses = [self._step(x, y) for x, y in self._batches(epoch)]
        measured = {"loss": float(torch.stack(losses).mean())}
        finite = all(bool(p.isfinite().all()) for p in self.model.parameters())
        self.result.diverged = not (finite and isfinite(measured["loss"]))
        if epoch + 1 not in self._when(self.run.checks or self.run.epochs):
            measured = {}
        elif not self.result.diverged:
            measured |= self._measured(epoch + 1)
        self.result.record(measured)
        seconds = self.result.seconds + perf_counter() - start
        self.result.seconds = rounded(seconds, runs.DIGITS)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = data.batches(len(self.data.train_labels), self.run.batch, self.run.seed, epoch)
        if self.data.augmented:
            for batch in chosen:
                images = data.augment(self.data.train_images[batch], self._rng)
                yield self._on_device(images, self.data.train_labels[batch])
        else:
            # All indices at once: the upload of each batch's would wait for the steps before.
            for index in torch.from_numpy(np.stack([*chosen])).to(self.settings.device):
                yield self._train[0][index], self._train[1][index]

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        """Do a step on images and labels, and return the plain loss."""
        self.optimizer.zero_grad()
        size, total = self.settings.micro_batch or len(y), torch.zeros((), device=y.device)
        for images, labels in zip(x.split(size), y.split(size), strict=True):
            share = len(labels) / len(y)
            with torch.autocast(self.settings.device, torch.bfloat16, self.settings.bfloat16):
                loss, plain = self.method.loss(self.network, images, labels)
            (loss * share).backward()
            total += plain.detach() * share
        self.optimizer.step()
        return total

    def _when(self, times: int) -> set[int]:
        """Return so many epochs, evenly apart, the last one among them."""
        return {round(self.run.epochs * (k + 1) / times) for k in range(times)}

    def _measured(self, epoch: int) -> dict[str, float]:
        measured = {}
        self.model.eval()
        for part, (x, y) in {"train": self._train, "test": self._test}.items():
            some = x[:MEASURED], y[:MEASURED]
            measured[part] = measure.accuracy(self.model, x, y)
            measured[f"{part}_gradient"] = measure.input_gradient(self.model, *some)
            if epoch in self._when(self.run.hessians):
                measured[f"{part}_hessian"] = measure.hessian(self.model, *some)
        measured["sigma_product"] = measure.sigma_product(self.model)
        self.model.train()
        return measured

    def finish(self) -> None:
        """Measure what is measured once, at the end."""
        if self.result.diverged:
            return
        model = self.model.eval()
        found = measure.final(model, *self._test, self.run.seed)
        self.result.final = rounded(found, runs.DIGITS)
        # One seed's are enough for a figure, and the rest has σ₁ and the rank of all.
        if self.run.seed == 0 or not self.run.checks:
            self.result.spectra = rounded(measure.spectra(model), runs.DIGITS)

    def save(self, path: Path) -> None:
        """Write all that the run needs to go on, and its results so far."""
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        states |= {"method": self.method.state(), "result": asdict(self.result)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(states, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote; `RunError` if another run did, or computed otherwise."""
        states = torch.load(path, map_location=self.settings.device, weights_only=True)
        result = runs.from_json(states["result"])
        how = {key: result.machine.get(key) for key in self.settings.how()}
        if (result.run, how) != (self.run, self.settings.how()):
            what = f"{path.name} is a checkpoint of {result.run}, computed with {how}"
            raise RunError(f"{what}: go on with the same settings, or remove it")
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.method.load(states["method"])
        self.result = result


def train(
    run: Run,
    images: Data,
    settings: Settings,
    folder: Path,
    advance: Callable[[], object] = lambda: None,
) -> Result:
    """Train, or go on training, until the end or the deadline; leave a result or a checkpoint."""
    if (done := runs.finished(run, folder)) is not None:
        return done
    trainer, checkpoint = Trainer(run, images, settings), folder / f"{run.name}.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
    saved = monotonic()
    while trainer.result.epochs < run.epochs and not trainer.result.diverged:
        if settings.late():
            trainer.save(checkpoint)
            return trainer.result
        trainer.train_epoch()
        if monotonic() - saved > settings.save_every:
            trainer.save(checkpoint)
            saved = monotonic()
        advance()
    trainer.finish()
    result = runs.write(folder, trainer.result)
    checkpoint.unlink(missing_ok=True)
    return result
