"""A callback for Lightning's Trainer: the term, its state in the checkpoints, and the logs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import spectral_core as sc
from spectral_core.errors import check_int

from ._callback import set_numbers
from ._regularizer import SpectralNormRegularizer
from ._watch import Watch

__all__ = ["SpectralNormCallback"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # one code, published under two names


def _callback_classes() -> tuple[Any, ...]:
    """Return the ``Callback`` of each package in use: a LightningCLI accepts its own alone."""
    used = [name for name in _PACKAGES if name in sys.modules]
    found = used or [name for name in _PACKAGES if find_spec(name.partition(".")[0])][:1]
    if not found:
        raise ImportError("spectral_torch.lightning needs Lightning: pip install lightning")
    return tuple(import_module(name).Callback for name in found)


class SpectralNormCallback(*_callback_classes()):  # type: ignore[misc]
    r"""Add λσuvᵀ to the gradients in each step of Lightning's Trainer.

    The regularizer is made when the training starts, of the parameters as the strategy has placed
    them. It is attached to the trainer's optimizers, and detached when the training ends. v and σ
    are part of Lightning's checkpoints: a run that resumes from one repeats bit for bit on a CPU.

    σ of each weight, log₁₀ Πσ and the penalty go to the trainer's loggers (see
    `spectral_core.Watch`) without a wait for the device. They are in ``trainer.callback_metrics``
    too, so `EarlyStopping` and `ModelCheckpoint` can monitor them.

    Parameters
    ----------
    factor : float, mapping of name or pattern to float, or callable
        λ. A callable is a schedule ``factor(step)`` of ``trainer.global_step``, which counts the
        steps of all optimizers. A mapping may hold schedules.
    target, power, n_iter, n_vectors, every_n_steps, warmup_iters, layouts, seed, kernels
        As for `SpectralNormRegularizer`; ``target`` may be a schedule, as ``factor`` may.
    include, exclude
        As for `SpectralNormRegularizer`. The names are those of the LightningModule.
    optimizers : int, str or list of them, optional
        The optimizers to act in, by index or by the name of their class. The weights are then those
        that they hold. The default is each optimizer that holds a weight.
    log_every_n_steps : int, optional
        Steps that are multiples of this number are logged, from 0 on; 0 logs none. The default is
        the trainer's own number.
    prefix : str
        Prefix of the logged names. Two of these callbacks in one trainer need two prefixes.

    Attributes
    ----------
    regularizer : SpectralNormRegularizer or None
        The regularizer of the newest training; None before the first.

    Raises
    ------
    spectral_core.NamesError
        When the training starts, if a pattern or an optimizer's name matches nothing.
    spectral_core.ArgumentError
        If a number is out of its range, or an optimizer runs no hooks or is not there.

    Notes
    -----
    With a LightningCLI, name it in the YAML::

        trainer:
          callbacks:
            - class_path: spectral_torch.lightning.SpectralNormCallback
              init_args: {factor: 0.01, exclude: [head]}

    Lightning clips gradients before the optimizer steps, and so before the term is added. A weight
    that is frozen at first, as by `BaseFinetuning`, is regularized from when it is unfrozen.

    Examples
    --------
    >>> import lightning.pytorch as pl
    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> from spectral_torch.lightning import SpectralNormCallback
    >>> callback = SpectralNormCallback(0.01)
    >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    >>> quiet["enable_model_summary"] = False
    >>> trainer = pl.Trainer(accelerator="cpu", max_steps=2, callbacks=[callback], **quiet)
    >>> trainer.fit(BoringModel())
    >>> list(callback.regularizer.sigmas())
    ['layer.weight']
    """

    def __init__(
        self,
        factor: float | dict[str, Any] | Callable[[int], Any] = 0.01,
        *,
        target: float | dict[str, Any] | Callable[[int], Any] = 0.0,
        power: int = 2,
        n_iter: int = 1,
        n_vectors: int = 1,
        every_n_steps: int = 1,
        warmup_iters: int = 15,
        include: Any = None,
        exclude: Any = None,
        layouts: dict[str, Any] | None = None,
        seed: int = 0,
        kernels: bool = True,
        optimizers: int | str | Sequence[int | str] | None = None,
        log_every_n_steps: int | None = None,
        prefix: str = "spectral/",
    ) -> None:
        super().__init__()
        self.factor = factor
        self.target = target
        self.include = include
        self.exclude = exclude
        self.optimizers = optimizers
        self.log_every_n_steps = log_every_n_steps
        self.prefix = prefix
        self.regularizer: SpectralNormRegularizer | None = None
        self._options: dict[str, Any] = {
            "power": power,
            "n_iter": check_int(n_iter, "n_iter"),
            "n_vectors": check_int(n_vectors, "n_vectors"),
            "every_n_steps": check_int(every_n_steps, "every_n_steps"),
            "warmup_iters": check_int(warmup_iters, "warmup_iters", 0),
            "layouts": layouts,
            "seed": seed,
            "kernels": kernels,
        }
        if log_every_n_steps is not None:
            check_int(log_every_n_steps, "log_every_n_steps", 0)
        self._loaded: dict[str, Any] = {}  # a state that waits for its regularizer
        self._is_training = False
        self._watch: Watch | None = None
        self._steps_seen = 0

    @property
    def state_key(self) -> str:
        """The key of this callback in a checkpoint; it names a prefix that is not the default."""
        name: str = type(self).__qualname__
        return name if self.prefix == "spectral/" else f"{name}[{self.prefix}]"

    def state_dict(self) -> dict[str, Any]:
        """Return v and σ for a checkpoint, as copies: a checkpoint may be written later."""
        if self.regularizer is None:
            return dict(self._loaded)
        state = self.regularizer.state_dict()
        return {name: value.detach().clone() for name, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned: when the training starts, or now if it did."""
        self._loaded = dict(state_dict)
        if self._is_training:  # some strategies load late
            self._load()

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the regularizer, and attach it."""
        optimizers = _chosen(trainer.optimizers, self.optimizers)
        before, reg = self.regularizer, self._regularizer_of(pl_module, trainer, optimizers)
        if before is not None and not self._loaded and _share_weights(before, reg):
            self._loaded = before.state_dict()  # a second `fit` goes on
        self.regularizer, self._is_training = reg, True
        self._load()
        reg.attach(*([one for one in optimizers if reg._held_by(one)] or optimizers))
        every = self.log_every_n_steps
        every = trainer.log_every_n_steps if every is None else every
        if every:
            self._watch = Watch(partial(_log, trainer), every_n_steps=every, prefix=self.prefix)
        self._steps_seen = trainer.global_step

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        """Set λ and the target of this step."""
        if self._is_training and self.regularizer is not None:
            set_numbers(self.regularizer, self.factor, self.target, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Log the numbers of this step if it is due, and those that have come from the device."""
        stepped = trainer.global_step != self._steps_seen  # else gradients are accumulated
        self._steps_seen = trainer.global_step
        if stepped and self._watch is not None and self.regularizer is not None:
            self._watch(self.regularizer, _step_of(trainer))

    def on_train_epoch_end(self, *_: Any) -> None:
        """Log what is on its way, so that other callbacks find the newest numbers."""
        if self._watch is not None:
            self._watch.flush()

    def on_train_end(self, *_: Any) -> None:
        """Log what is on its way."""
        self.on_train_epoch_end()

    def on_exception(self, *_: Any) -> None:
        """Detach the regularizer."""
        self._stop()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Detach the regularizer after the training; it keeps v and σ."""
        if stage == "fit":
            self._stop()

    def _regularizer_of(
        self, pl_module: nn.Module, trainer: Any, optimizers: Sequence[Optimizer]
    ) -> SpectralNormRegularizer:
        # A weight that no optimizer holds is kept: it may be frozen now, and get one later.
        own, every = (_ids_in(those) for those in (optimizers, trainer.optimizers))
        others: Any = [] if self.exclude is None else [self.exclude]
        others.append(lambda _, parameter: id(parameter) in every - own)
        exclude = self.exclude if self.optimizers is None else others
        reg = SpectralNormRegularizer(
            pl_module, include=self.include, exclude=exclude, **self._options
        )
        set_numbers(reg, self.factor, self.target, trainer.global_step)
        return reg

    def _load(self) -> None:
        state, self._loaded = self._loaded, {}
        if state and self.regularizer is not None:
            self.regularizer.load_state_dict(state)

    def _stop(self) -> None:
        self._is_training, self._watch = False, None
        if self.regularizer is not None:
            self.regularizer.detach()


def _ids_in(optimizers: Sequence[Any]) -> set[int]:
    return {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}


def _chosen(optimizers: Sequence[Any], wanted: Any) -> list[Optimizer]:
    """Return the optimizers of these places or classes, by default all."""
    found = [one if isinstance(one, Optimizer) else one.optimizer for one in optimizers]
    found = [one for one in found if type(one).__name__ != "_MockOptimizer"]  # stands for none
    if not found:
        raise sc.ArgumentError(
            "the LightningModule has no optimizer that could add the term: return one from "
            "configure_optimizers, or leave this callback out"
        )
    if wanted is None:
        return found
    kinds = [type(one).__name__ for one in found]
    chosen: dict[int, Optimizer] = {}
    for one in [wanted] if isinstance(wanted, (int, str)) else wanted:
        places = [i for i, kind in enumerate(kinds) if one in (i, kind)]
        if not places:
            raise sc.NamesError(f"optimizers: {one!r} is not there; by place they are {kinds}")
        chosen.update({i: found[i] for i in places})
    return list(chosen.values())


def _share_weights(one: SpectralNormRegularizer, other: SpectralNormRegularizer) -> bool:
    a, b = one._parameters, other._parameters
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


def _step_of(trainer: Any) -> int:
    """Return the number of this step on the axis of Lightning's own metrics, from 0."""
    loop = trainer.fit_loop.epoch_loop
    step: int = getattr(loop, "_batches_that_stepped", trainer.global_step - 1)
    return step


def _log(trainer: Any, values: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
    metrics = {name: torch.tensor(value) for name, value in values.items()}
    trainer.callback_metrics.update(metrics)
    trainer.logged_metrics.update(metrics)
