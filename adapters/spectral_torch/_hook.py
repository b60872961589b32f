"""v, sigma and u of a model's weights beside its optimizer: shared by the penalty and the bound."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cache
from inspect import getfile
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import spectral_core as sc
from spectral_core.engine import (
    Choice,
    Factor,
    JobList,
    Number,
    Row,
    Schedule,
    array_namespace,
    at_step,
    check_factors,
    loaded_arrays,
    plan_of,
    traits_of,
)
from spectral_core.errors import check_int, listed

from ._attach import unwrapped
from ._jobs import JobCache, Limit, Penalty
from ._parametrized import masks, remarks
from ._select import Model, choose_parameters
from .engines import DTensorEngine, TensorEngine, Unmeasured, engines
from .engines.dtensor import is_sharded
from .engines.foreach import write_into

_OURS = tuple(str(Path(getfile(thing)).parent) for thing in (torch, sc.Watch, JobCache))

_Self = TypeVar("_Self", bound="OptimizerHook")

_AS_IT_IS: AbstractContextManager[object] = nullcontext()

# They leave the state's tensors alone: sigma and the vectors are new tensors.
PURE_ENGINES = (DTensorEngine(), TensorEngine())

# A step of an optimizer writes into a parameter a few times, and loading a checkpoint once. More
# writes than these mean that training went on.
_WRITES = 20


class OptimizerHook:
    """The singular vectors of the chosen weights, and an action when an optimizer steps.

    A subclass defines the action, and registers it in `_register`. The parameters are those of
    `SpectralNormRegularizer`.
    """

    _by_hand: str  # what to do where an optimizer runs no hooks
    _shown: str  # the attribute that a summary shows as λ

    def __init__(
        self,
        model: Model,
        *,
        n_iter: int,
        n_vectors: int,
        norm: str,
        warmup_iters: int,
        include: Choice | None,
        exclude: Choice | None,
        layouts: Mapping[str, sc.Layout | str] | None,
        seed: int,
        kernels: bool,
    ) -> None:
        self._parameters, chosen, self._left_out = choose_parameters(
            model, include, exclude, layouts, norm
        )
        self.norm = norm
        _check_whole(self._parameters, chosen)
        self._handles: WeakKeyDictionary[Optimizer, list[RemovableHandle]] = WeakKeyDictionary()
        self._steps: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._schedules: dict[str, Schedule] = {}
        self._first_step = 0  # of an optimizer that has made no step yet
        self._most_steps = 0  # of any optimizer, also of one that is gone
        self._compiled = False
        self._warned: set[str] = set()
        self._written = self._writes()
        self.n_iter = n_iter
        self._kernels = kernels
        self._jobs = JobCache(engines(kernels=kernels))
        with self._full_precision():
            self._state = sc.init(
                self._parameters,
                seed=seed,
                layouts=chosen,
                n_vectors=n_vectors,
                engines=PURE_ENGINES if warmup_iters == 0 else (Unmeasured(),),
            )
        self._masks = masks(model, self._parameters)
        for kind, remark in remarks(model, self._parameters).items():
            self._warn(kind, remark)
        if warmup_iters != 0:
            self.iterate_(check_int(warmup_iters, "warmup_iters"))

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__name__
        if name == "state_key" or name.startswith("on_"):  # a trainer that takes it for a callback
            raise AttributeError(
                f"{kind} is no callback: pass spectral_torch.lightning.SpectralNormCallback or "
                "spectral_torch.transformers.SpectralNormCallback to the trainer"
            )
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        # Copies of an optimizer lose its hooks, so a copy of this is attached to none. Compiled
        # kernels and tables are not copied, but made anew.
        fresh = {"_handles": None, "_steps": None, "_jobs": None}
        masks = {name: mask.without_module() for name, mask in self._masks.items()}
        return {**vars(self), **fresh, "_masks": masks, "_first_step": self._most_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = {
            "_handles": WeakKeyDictionary(),
            "_steps": WeakKeyDictionary(),
            "_schedules": dict(state["_schedules"]),
            "_warned": set(state["_warned"]),
            "_jobs": JobCache(engines(kernels=state["_kernels"])),
        }
        vars(self).update({**state, **fresh})

    @property
    def n_iter(self) -> int:
        """The number of power iterations in a step; checked when it is set."""
        return self._n_iter

    @n_iter.setter
    def n_iter(self, n_iter: int) -> None:
        self._n_iter = check_int(n_iter, "n_iter")

    def attach(self: _Self, *optimizers: Optimizer) -> _Self:
        """Act in each step of these optimizers, on the weights that they hold.

        Attaching twice is the same as once. If a model has several optimizers, attach all of them.
        The same holds for one optimizer for each parameter, stepping in the backward pass.

        Parameters
        ----------
        *optimizers : torch.optim.Optimizer
            A wrapper of Accelerate, Lightning or PyTorch stands for the optimizer that it wraps.

        Returns
        -------
        SpectralNormRegularizer or SpectralNormConstraint
            The object itself.

        Raises
        ------
        spectral_core.ArgumentError
            If the step of an optimizer would not run hooks, or would run them twice, or if no
            optimizer holds one of the weights.

        Warns
        -----
        spectral_core.SpectralWarning
            If another object of the same kind acts on one of the weights in the same step.
        """
        if not optimizers:
            raise sc.ArgumentError("attach() got no optimizer: give it one, attach(optimizer)")
        inner = [unwrapped(optimizer, self._by_hand) for optimizer in optimizers]
        if not any(map(self._held_by, inner)):
            raise sc.ArgumentError(
                f"{', '.join(type(optimizer).__name__ for optimizer in inner)} holds none of "
                f"the weights {listed(self._parameters)}: was it made from another model?"
            )
        for optimizer in inner:
            if optimizer not in self._handles:
                self._warn_of_others(optimizer)
                self._handles[optimizer] = self._register(optimizer)
        return self

    def _warn_of_others(self, optimizer: Optimizer) -> None:
        hooks = (*optimizer._optimizer_step_pre_hooks.values(),)
        hooks += (*optimizer._optimizer_step_post_hooks.values(),)
        mine = {id(self._parameters[name]) for name in self._held_by(optimizer)}
        for other in {
            id(x): x for x in (getattr(hook, "__self__", None) for hook in hooks)
        }.values():
            if other is self or not isinstance(other, type(self)):
                continue
            both = [name for name, p in other._parameters.items() if id(p) in mine]
            if both:
                self._warn(
                    "another",
                    f"another {type(self).__name__} acts on {listed(both)} in the steps of "
                    f"{type(optimizer).__name__} too, and both terms are added: detach() one of "
                    "them, or exclude these weights from it",
                )

    def detach(self, optimizer: Optimizer | None = None) -> None:
        """Undo `attach` for one optimizer, or for all."""
        self._jobs.clear()
        for attached in list(self._handles) if optimizer is None else [optimizer]:
            for handle in self._handles.pop(attached, ()):
                handle.remove()

    @torch.no_grad()
    def iterate_(self, n_iter: int = 1) -> None:
        """Improve v and sigma; weights and gradients stay as they are.

        Parameters
        ----------
        n_iter : int
            Power iterations.
        """
        self._follow()
        with self._full_precision():
            weights = self._weights(self._parameters)
            found = sc.iterate(weights, self._state, n_iter=n_iter, engines=self._jobs.engines)
        self._write_back(found)

    def sigmas(self) -> dict[str, Tensor]:
        """Return the newest estimate of each weight's largest singular value, on its device.

        Returns
        -------
        dict of name to tensor, shape (*stack,)
            The estimates of the last step: before the optimizer changed the weights, or after the
            weights were scaled to a bound.

        Warns
        -----
        spectral_core.SpectralWarning
            Once, if the weights were trained and nothing acted on them.
        """
        self._warn_if_idle()
        return {name: sigma.clone() for name, sigma in self._state.sigma.items()}

    def summary(self) -> sc.Summary:
        """Return a table of the weights, their λ or bound, σ, and what they are attached to.

        Below the table is what is left out, and why. This waits for the device.

        Returns
        -------
        spectral_core.Summary

        Examples
        --------
        >>> import torch, spectral_torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3))
        >>> summary = spectral_torch.SpectralNormRegularizer(model).summary()
        >>> [row.name for row in summary.rows], list(summary.left_out)
        (['1.weight'], ['0.weight'])
        """
        title = f"{type(self).__name__} on {len(self._parameters)} weights"
        return sc.Summary(title, self._rows(), self._left_out, notes=[self._state_of()])

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything a training run needs to continue, as a flat dict of tensors.

        Returns
        -------
        dict of str to tensor
            ``"<name>.v"`` and ``"<name>.sigma"`` of each weight. Where ``every_n_steps`` is not 1,
            also ``"<name>.u"`` and ``"<name>.steps"``. Where a number is a schedule, also
            ``"steps"``, the steps of each attached optimizer. The tensors are those in use, as in a
            module's state dict: the next step changes them.
        """
        self._warn_if_idle()
        self._jobs.state_is_out = True
        return {**self._required(), **self._between_iterations(), **self._counted()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a `state_dict`: all of it or, after an error, nothing.

        ``every_n_steps`` may differ from that of the run that saved it. States of version 0.1.0,
        whose v has no axis of vectors, load too.

        Parameters
        ----------
        state_dict : mapping of str to tensor

        Raises
        ------
        spectral_core.NamesError
            If the state belongs to another model. The message lists what is missing, unexpected and
            of another shape.
        spectral_core.DTypeError, spectral_core.ArgumentError
            If an entry is no array of numbers, or a v is no unit vector.
        """
        own = self._required()
        optional = {f"{name}.{field}" for name in self._parameters for field in ("u", "steps")}
        optional.add("steps")
        between = self._between_iterations()
        whole = all(key in state_dict for key in between)
        own |= between if whole else {}
        loaded = loaded_arrays(own, state_dict, optional)
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(loaded[key])
        self._load_between(between if whole else {})
        if "steps" in state_dict:
            self._resume(state_dict["steps"].tolist())

    def _counted(self) -> dict[str, Tensor]:
        """Return the steps that each attached optimizer has made, where a schedule needs them."""
        if not self._schedules:
            return {}
        steps = [self._step_of(owner) for owner in self._handles] or [self._most_steps]
        return {"steps": torch.tensor(steps)}

    def _resume(self, steps: list[int]) -> None:
        self._steps.clear()
        self._first_step = self._most_steps = max(steps)
        if len(steps) == len(self._handles):
            self._steps.update(zip(self._handles, steps, strict=True))

    def _step_of(self, owner: object) -> int:
        """Return the number of the next step of an optimizer, counted from 0."""
        return self._steps.get(owner, self._first_step)

    def _acted(self, owner: object) -> None:
        """Count a step of an optimizer, or of a call by hand."""
        steps = self._steps[owner] = self._step_of(owner) + 1
        self._most_steps = max(self._most_steps, steps)
        self._written = self._writes()
        if steps == self._first_step + 2 and owner is not self:
            self._warn_of_unheld()

    def _checked(self, what: str, given: Schedule) -> Factor:
        """Return a number, or the first one of a schedule, which is kept; raise if it is bad."""
        now = at_step(given, self._most_steps)
        check_factors(now, self._parameters, what)
        if now is given:
            self._schedules.pop(what, None)
        else:
            self._schedules[what] = given
        return now

    def _writes(self) -> int:
        """Return how often the first weight was written into."""
        return next(iter(self._parameters.values()))._version

    def _weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the weights that the layers use: of a pruned parameter, mask · parameter."""
        masks, parameters = self._masks, self._parameters
        return {
            name: masks[name].applied(parameters[name]) if name in masks else parameters[name]
            for name in names
        }

    def _taking_part(self) -> list[str]:
        """Return the weights that are trained: those that require a gradient."""
        return [name for name, p in self._parameters.items() if p.requires_grad]

    def _warn(self, kind: str, message: str) -> None:
        """Warn once, at the line of the user's own code."""
        if kind not in self._warned:
            self._warned.add(kind)
            level, frame = 1, sys._getframe()
            while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
                level, frame = level + 1, frame.f_back
            warnings.warn(message, sc.SpectralWarning, stacklevel=level)

    def _warn_if_idle(self) -> None:
        """Warn if training went on and nothing acted."""
        if self._compiled or self._writes() - self._written <= _WRITES:
            return
        last = self._most_steps
        acted = f"has not acted since its step {last - 1}" if last else "has never acted"
        remedy = (
            f"it is attached to {self._attached()}, which did not step: attach the optimizer that "
            "is in use"
            if self._handles
            else f"call attach(optimizer), or {self._by_hand}"
        )
        kind = type(self).__name__
        self._warn("idle", f"the weights have changed, but the {kind} {acted}: {remedy}")

    def _warn_of_unheld(self) -> None:
        """Warn of trained weights that no attached optimizer holds."""
        held = {name for optimizer in self._handles for name in self._held_by(optimizer)}
        lost = [name for name in self._taking_part() if name not in held]
        if lost:
            self._warn(
                "unheld",
                f"no attached optimizer holds {listed(lost)}: attach the optimizer that does, or "
                "exclude them",
            )

    def _state_of(self) -> str:
        """Return a sentence: attached to what, and the last step."""
        last = self._most_steps
        acted = f"last step {last - 1}" if last else "no step yet"
        return f"attached to {self._attached()}, {'compiled' if self._compiled else acted}"

    def _attached(self) -> str:
        """Return the attached optimizers as text."""
        return ", ".join(type(optimizer).__name__ for optimizer in self._handles) or "no optimizer"

    def _rows(self) -> list[Row]:
        """Return the rows of a summary; this waits for the device."""
        self._warn_if_idle()
        given = at_step(getattr(self, self._shown), self._most_steps)
        numbers = check_factors(given, self._parameters, self._shown)
        holders = {name: o for o in self._handles for name in self._held_by(o)}
        rows = []
        for name, parameter in self._parameters.items():
            layout, holder = self._state.layouts[name], holders.get(name)
            plan = plan_of(layout, parameter.shape, name)
            steps = 0 if holder is None else self._step_of(holder)
            note = "" if parameter.requires_grad else "frozen"
            if not note and self._handles and holder is None:
                note = "held by no attached optimizer"
            rows.append(
                Row(
                    name,
                    tuple(parameter.shape),
                    tuple(plan.matrix),
                    layout.axes,
                    self._displayed(float(numbers[name])),
                    float(self._state.sigma[name].max()),
                    "–" if holder is None else type(holder).__name__,
                    steps - 1 if steps else None,
                    note,
                )
            )
        return rows

    def _displayed(self, number: float) -> float | str:
        """Return λ of a weight as a summary shows it."""
        return number

    def _required(self) -> dict[str, Tensor]:
        return sc.state_dict(replace(self._state, u={}))

    def _between_iterations(self) -> dict[str, Tensor]:
        """Return what the state holds in addition, where not every step iterates."""
        return {}

    def _load_between(self, between: Mapping[str, Tensor]) -> None:
        """Load what `_between_iterations` returned, or do without it."""

    def _register(self, optimizer: Optimizer) -> list[RemovableHandle]:
        raise NotImplementedError

    def _held_by(self, optimizer: Optimizer) -> list[str]:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name, parameter in self._parameters.items() if id(parameter) in ids]

    def _jobs_of(
        self,
        owner: object,
        names: Collection[str],
        penalty: Penalty | Limit,
        scaled: Mapping[str, Number] | None,
        n_iter: int,
    ) -> tuple[JobList, AbstractContextManager[object]]:
        """Return the jobs of a step, those of the step before where they fit, and its context."""
        arguments = (owner, names, self._parameters, penalty, scaled, n_iter)
        jobs = self._jobs.current(*arguments)
        if jobs is not None:
            return jobs, _AS_IT_IS
        self._follow()
        return self._jobs.build(*arguments, self._state), self._full_precision()

    def _full_precision(self) -> AbstractContextManager[object]:
        """Disable an autocast around the training step: it would round the products."""
        rounding = [
            kind
            for kind in {parameter.device.type for parameter in self._parameters.values()}
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ]
        if not rounding:
            return nullcontext()
        stack = ExitStack()
        for kind in rounding:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack

    def _follow(self) -> None:
        """Move the state to the device and the precision of the weights, after ``model.to``."""
        state = self._state
        # Tensors that are made in inference mode could not be written into by a training step.
        with torch.inference_mode(False):
            self._move(state)

    def _move(self, state: sc.SpectralState) -> None:
        if all(
            state.v[name].device == parameter.device
            and state.v[name].dtype == _iterated_in(parameter.dtype)
            for name, parameter in self._parameters.items()
        ):
            return

        def moved(field: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = {}
            for name, parameter in self._parameters.items():
                own, dtype = field[name], _iterated_in(parameter.dtype)
                # σ stays real, and the u of waves complex, whatever the weight is.
                kind = dtype.to_complex() if own.is_complex() else dtype.to_real()
                found[name] = own.to(parameter.device, kind)
            return found

        self._jobs.clear()
        self._state = replace(
            state,
            v=moved(state.v),
            sigma=moved(state.sigma),
            u=moved(state.u),
        )

    @torch.no_grad()
    def _write_back(self, found: sc.SpectralState) -> None:
        """Write the values of ``found`` into the state's own tensors, which others may refer to."""
        state = self._state
        write_into(
            (old, new[name])
            for own, new in ((state.v, found.v), (state.sigma, found.sigma), (state.u, found.u))
            for name, old in own.items()
            if name in new
        )


def _check_whole(parameters: Mapping[str, Tensor], layouts: Mapping[str, sc.Layout]) -> None:
    """Raise `ArgumentError` if a convolution whose waves are to be followed is sharded."""
    sharded = [
        name
        for name, layout in layouts.items()
        if isinstance(layout, sc.Convolution) and is_sharded(parameters[name])
    ]
    if sharded:
        raise sc.ArgumentError(
            f'norm="operator" needs whole weights, but {listed(sharded)} is sharded: use '
            'norm="flattened", or exclude it'
        )


def _is_ours(file: str) -> bool:
    """Return True for a file of this library, or of PyTorch, which calls the hooks."""
    return file.startswith(_OURS)


@cache
def _iterated_in(dtype: torch.dtype) -> torch.dtype:
    traits = traits_of(dtype, array_namespace(torch.empty(0)))
    return dtype if traits is None else traits.iteration_dtype
