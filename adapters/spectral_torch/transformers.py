"""A callback for Hugging Face's Trainer: the term, its state in the checkpoints, and the logs."""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import spectral_core as sc
from spectral_core.engine import Choice, Schedule

from ._callback import set_numbers
from ._regularizer import SpectralNormRegularizer
from ._watch import Watch

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "spectral_torch.transformers needs Hugging Face's library: pip install transformers"
    ) from error

__all__ = ["SpectralNormCallback"]

_NOT_SAVED = "not saved: "  # before what JSON cannot hold


class SpectralNormCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    r"""Add λσuvᵀ to the gradients before each optimizer step of Hugging Face's Trainer.

    The regularizer is made when the training starts, of the parameters as Accelerate has prepared
    them. The term is added after gradients are accumulated and clipped. v and σ are part of the
    Trainer's checkpoints: a run that resumes from one repeats bit for bit on a CPU.

    Whenever the Trainer logs the loss, σ of each weight, log₁₀ Πσ and the penalty join the logs
    (see `spectral_core.Watch`).

    Parameters
    ----------
    factor : float, tensor of shape (), mapping of name or pattern to either, or callable
        λ. A callable is a schedule ``factor(step)`` of ``state.global_step``. A mapping may hold
        schedules.
    target_modules : str or list of str, optional
        The layers to regularize, as PEFT names them: the ends of their names
        (``["q_proj", "v_proj"]``), a regular expression of the whole name, or ``"all-linear"``,
        which leaves the output layer out.
    target, power, n_iter, n_vectors, every_n_steps, warmup_iters, layouts, seed, kernels
        As for `SpectralNormRegularizer`; ``target`` may be a schedule, as ``factor`` may.
    include, exclude
        As for `SpectralNormRegularizer`, beside ``target_modules``.
    log : bool
        Whether the numbers join the Trainer's logs.
    prefix : str
        Prefix of the logged names. Two of these callbacks in one Trainer need two prefixes.

    Attributes
    ----------
    regularizer : SpectralNormRegularizer or None
        The regularizer of the newest training; None before the first.

    Raises
    ------
    spectral_core.NamesError
        When the training starts, if a pattern matches nothing.
    spectral_core.ArgumentError
        If a number is out of its range, or the Trainer uses DeepSpeed, which keeps the gradients to
        itself.

    Notes
    -----
    The Trainer calls the reporters of ``report_to`` before the callbacks that it is given, so they
    do not see what a callback adds. `add_to` puts this callback in front of them.

    With ``restore_callback_states_from_checkpoint`` the Trainer makes the callback anew of what the
    checkpoint holds. A schedule or a predicate is no part of that, and is refused.

    Examples
    --------
    >>> import tempfile, torch
    >>> from transformers import Trainer, TrainingArguments
    >>> from spectral_torch.transformers import SpectralNormCallback
    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.query, self.out = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    ...     def forward(self, x):
    ...         return {"loss": self.out(self.query(x)).square().mean()}
    >>> options = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    >>> arguments = TrainingArguments(tempfile.mkdtemp(), **options)
    >>> callback = SpectralNormCallback(0.01, target_modules=["query"])
    >>> data = [{"x": torch.ones(4)}] * 16
    >>> _ = Trainer(Model(), arguments, train_dataset=data, callbacks=[callback]).train()
    {'train_runtime': ...}
    >>> list(callback.regularizer.sigmas())
    ['query.weight']
    """

    def __init__(
        self,
        factor: Schedule = 0.01,
        *,
        target_modules: str | Sequence[str] | None = None,
        target: Schedule = 0.0,
        power: int = 2,
        n_iter: int = 1,
        n_vectors: int = 1,
        every_n_steps: int = 1,
        warmup_iters: int = 15,
        include: Choice | None = None,
        exclude: Choice | None = None,
        layouts: Mapping[str, sc.Layout | str] | None = None,
        seed: int = 0,
        kernels: bool = True,
        log: bool = True,
        prefix: str = "spectral/",
    ) -> None:
        self.factor = factor
        self.target_modules = target_modules
        self.target = target
        self.include = include
        self.exclude = exclude
        self.log = log
        self.prefix = prefix
        self.regularizer: SpectralNormRegularizer | None = None
        self._options: dict[str, Any] = {
            "power": power,
            "n_iter": n_iter,
            "n_vectors": n_vectors,
            "every_n_steps": every_n_steps,
            "warmup_iters": warmup_iters,
            "layouts": layouts,
            "seed": seed,
            "kernels": kernels,
        }
        _refuse_unsaved(self._arguments())
        self._is_first = False

    def add_to(self, trainer: Any) -> SpectralNormCallback:
        """Add the callback to a Trainer, in front of its reporters: they see the numbers then.

        Use this instead of ``callbacks=[callback]`` where ``report_to`` names a reporter.

        Parameters
        ----------
        trainer : transformers.Trainer

        Returns
        -------
        SpectralNormCallback
            The object itself.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        self._is_first = True
        return self

    def state(self) -> dict[str, Any]:
        """Return the options, and v and σ as text, for the Trainer's checkpoint."""
        options = {name: _plain(value) for name, value in self._arguments().items()}
        if self.regularizer is None:
            return {"args": options, "attributes": {}}
        saved = _encode(self.regularizer.state_dict())
        return {"args": options, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Make the regularizer; where a run is resumed, load its state."""
        if getattr(args, "deepspeed", None):
            raise sc.ArgumentError(
                "DeepSpeed keeps the gradients to itself, so a callback cannot add to them: train "
                "without it, with FSDP for instance"
            )
        self._tell_of_reporters(args)
        self.regularizer = self._regularizer_of(model, state)
        # A checkpoint made without this callback lacks the entry that the Trainer looks up.
        entries = state.stateful_callbacks.setdefault(type(self).__name__, {})
        saved = [entry["attributes"].get("saved") for entry in self._own(entries)]
        if state.global_step and saved and saved[-1]:
            self.regularizer.load_state_dict(_decode(saved[-1]))

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add the term; the gradients are accumulated and clipped by now."""
        if self.regularizer is None:
            raise sc.ArgumentError("this callback was added after the training had started")
        set_numbers(self.regularizer, self.factor, self.target, state.global_step)
        _unscale(optimizer)
        self.regularizer.add_gradients_()

    def on_log(
        self, args: Any, state: Any, control: Any, *, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Add the numbers of the newest step to the logs of the loss."""
        if not self.log or self.regularizer is None or "loss" not in logs:
            return
        watch = Watch(lambda values, _: logs.update(values), every_n_steps=1, prefix=self.prefix)
        with watch:
            watch(self.regularizer)
        if state.log_history:  # the Trainer's copy of the logs
            state.log_history[-1].update(logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget older states: of several callbacks of a class, the Trainer keeps all."""
        entries = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(entries, list):
            newest = {entry["args"].get("prefix"): entry for entry in entries}
            entries[:] = newest.values()

    def _regularizer_of(self, model: nn.Module, state: Any) -> SpectralNormRegularizer:
        include: Any = self.include
        if self.target_modules is not None:
            include = [] if include is None else [include]
            include += _targets(model, self.target_modules)
        reg = SpectralNormRegularizer(model, include=include, exclude=self.exclude, **self._options)
        set_numbers(reg, self.factor, self.target, state.global_step)
        return reg

    def _arguments(self) -> dict[str, Any]:
        names = ("factor", "target_modules", "target", "include", "exclude", "log", "prefix")
        return {**{name: getattr(self, name) for name in names}, **self._options}

    def _own(self, entries: Any) -> Iterator[dict[str, Any]]:
        """Yield the saved entries of this callback, the newest one last."""
        for entry in entries if isinstance(entries, list) else [entries]:
            if entry.get("args", {}).get("prefix") == self.prefix:
                yield entry

    def _tell_of_reporters(self, args: Any) -> None:
        reporters = list(getattr(args, "report_to", None) or ())
        if self.log and reporters and not self._is_first:
            warnings.warn(
                f"the reporters {reporters} run before this callback, and do not see its numbers: "
                "write callback.add_to(trainer) instead of callbacks=[callback], or log=False",
                sc.SpectralWarning,
                stacklevel=2,
            )


def _unscale(optimizer: Any) -> None:
    """Undo a GradScaler's scale, unless clipping has done so."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return
    try:
        scaler.unscale_(optimizer.optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise


def _targets(model: nn.Module, targets: str | Sequence[str]) -> list[Any]:
    """Return what PEFT's ``target_modules`` means, as choices of a regularizer."""
    if not isinstance(targets, str):
        return list(targets)
    if targets == "all-linear":
        return [_weights_of_linears(model)]
    try:
        expression = re.compile(targets)
    except re.error:
        return [targets]
    if any(expression.fullmatch(name) for name, _ in model.named_modules()):
        return [re.compile(rf"^(?:{targets})\.")]
    return [targets]  # the end of a name, or an error that says what there is


def _weights_of_linears(model: nn.Module) -> Callable[[str, Tensor], bool]:
    """Return a predicate that is true of all linear layers' weights but the output layer's."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    found = {
        id(parameter)
        for module in model.modules()
        if module is not head
        and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        for parameter in module.parameters()
    }
    tied = id(getattr(head, "weight", None))
    return lambda _, parameter: id(parameter) in found and id(parameter) != tied


def _encode(state: Mapping[str, Tensor]) -> str:
    """Return tensors as text: JSON would write every element as a decimal number."""
    file = io.BytesIO()
    torch.save({name: x.detach().cpu().clone() for name, x in state.items()}, file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _decode(text: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
    return state


def _plain(value: Any) -> Any:
    """Return a value for JSON, or a text that the constructor refuses."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return float(value)
    try:
        json.dumps(value)
    except TypeError:
        return f"{_NOT_SAVED}{value!r}"
    return value


def _refuse_unsaved(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if isinstance(value, str) and value.startswith(_NOT_SAVED):
            raise sc.ArgumentError(
                f"{name} is {value.removeprefix(_NOT_SAVED):.60}, which a checkpoint cannot hold: "
                "set restore_callback_states_from_checkpoint=False; v and σ are restored anyway"
            )
