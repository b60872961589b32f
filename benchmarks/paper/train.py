"""One training loop for all methods, and what is measured after each epoch.

A run that was stopped goes on from its checkpoint, which holds the results so far as well.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import isfinite, prod
from pathlib import Path
from time import monotonic, perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import spectral_core as sc
from benchmarks.common import machine, rounded

from . import data, runs
from .data import Data
from .methods import METHODS, Method, build
from .runs import MEASURED, MOMENTUM, Result, Run, RunError

HOW = ("device", "bfloat16", "compiled", "channels_last")
CHUNK = 500  # images at a time, where nothing is trained


@dataclass(frozen=True)
class Settings:
    """How runs are computed, which changes their results by no more than rounding."""

    device: str = "cpu"
    bfloat16: bool = False
    compiled: bool = False
    channels_last: bool = False
    threads: int = 1
    deadline: float | None = None  # of `time.monotonic`: when to stop, to go on another time
    save_every: float = 20.0  # seconds between checkpoints

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
        if not self.result.diverged:
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
        with torch.autocast(self.settings.device, torch.bfloat16, self.settings.bfloat16):
            loss, plain = self.method.loss(self.network, x, y)
        loss.backward()
        self.optimizer.step()
        return plain.detach()

    def _measured(self, epoch: int) -> dict[str, float]:
        hessians = self.run.hessians
        with_hessian = {round(self.run.epochs * (k + 1) / hessians) for k in range(hessians)}
        measured = {}
        self.model.eval()
        for part, (x, y) in {"train": self._train, "test": self._test}.items():
            some = x[:MEASURED], y[:MEASURED]
            measured[part] = accuracy(self.model, x, y)
            measured[f"{part}_gradient"] = input_gradient(self.model, *some)
            if epoch in with_hessian:
                measured[f"{part}_hessian"] = hessian(self.model, *some)
        measured["sigma_product"] = sigma_product(self.model)
        self.model.train()
        return measured

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
    if not trainer.result.diverged:
        trainer.result.spectra = rounded(spectra(trainer.model.eval()), runs.DIGITS)
    result = runs.write(folder, trainer.result)
    checkpoint.unlink(missing_ok=True)
    return result


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    pairs = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    right = sum((model(some).argmax(1) == labels).sum() for some, labels in pairs)
    return float(right) / len(y)


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the mean over images of ‖∇ₓ loss‖₂ (paper, figures 2 and 6)."""
    total = torch.zeros((), device=x.device)
    for some, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        some = some.detach().requires_grad_()
        loss = cross_entropy(model(some), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, some)
        total += gradient.flatten(1).norm(dim=1).sum()
    return float(total) / len(x)


def hessian(model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> float:
    """Return the largest eigenvalue of the loss's Hessian, within some 2 % (paper, figure 3).

    By Lanczos: the paper's power iteration needs more products, and finds the largest magnitude.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(cross_entropy(model(x), y), parameters, create_graph=True)
    sizes = [p.numel() for p in parameters]

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        parts = torch.from_numpy(vector.ravel()).to(x.device, torch.float32).split(sizes)
        pieces = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        products = torch.autograd.grad(gradients, parameters, pieces, retain_graph=True)
        return torch.cat([part.flatten() for part in products]).double().cpu().numpy()

    size = sum(sizes)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(seed).standard_normal(size)
    try:
        values = eigsh(operator, 1, which="LA", v0=start, ncv=6, tol=0.02, maxiter=30)[0]
    except ArpackError:  # not converged, or a Hessian that is zero or not finite
        return float("nan")
    return float(values[0])


@torch.no_grad()
def spectra(model: nn.Module) -> dict[str, list[float]]:
    """Return all singular values of each weight, the largest first (paper, figure 4)."""
    return {name: torch.linalg.svdvals(W).tolist() for name, W in matrices(model).items()}


@torch.no_grad()
def sigma_product(model: nn.Module) -> float:
    """Return Π σ, a bound on how much the weights, without batch normalization, can amplify."""
    # From the smaller of WWᵀ and WᵀW: much faster than an SVD, and as good for σ₁.
    squares = (W @ W.T if len(W) < W.shape[1] else W.T @ W for W in matrices(model).values())
    return prod(float(torch.linalg.eigvalsh(square)[-1]) ** 0.5 for square in squares)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of convolutions and linear layers, in float64."""
    layouts = {nn.Conv2d: "oihw", nn.Linear: "oi"}
    return {
        name: sc.as_matrix(module.weight.detach(), layout).double()
        for name, module in model.named_modules()
        for kind, layout in layouts.items()
        if isinstance(module, kind)
    }
