"""v, sigma and u of a model's weights beside its optimizer: shared by the penalty and the bound."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import spectral_core as sc
from spectral_core.engine import Choice, ReferenceEngine, array_namespace, check_fits, traits_of
from spectral_core.errors import check_int

from ._jobs import JobCache
from ._select import Model, choose_parameters
from .engines import DTensorEngine, engines
from .engines.foreach import write_into

_Self = TypeVar("_Self", bound="OptimizerHook")

# They leave the state's tensors alone: sigma and the vectors are new tensors.
PURE_ENGINES = (DTensorEngine(), ReferenceEngine())


class OptimizerHook:
    """The singular vectors of the chosen weights, and an action when an optimizer steps.

    A subclass defines the action, and registers it in `_register`. The parameters are those of
    `SpectralNormRegularizer`.
    """

    _by_hand: str  # what to do where an optimizer runs no hooks

    def __init__(
        self,
        model: Model,
        *,
        n_iter: int,
        n_vectors: int,
        warmup_iters: int,
        include: Choice | None,
        exclude: Choice | None,
        layouts: Mapping[str, sc.Layout | str] | None,
        seed: int,
        kernels: bool,
    ) -> None:
        self._parameters, chosen = choose_parameters(model, include, exclude, layouts)
        self._handles: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()
        self.n_iter = check_int(n_iter, "n_iter")
        self._kernels = kernels
        self._jobs = JobCache(engines(kernels=kernels))
        with self._full_precision():
            self._state = sc.init(
                self._parameters,
                seed=seed,
                layouts=chosen,
                n_vectors=n_vectors,
                engines=PURE_ENGINES,
            )
        if warmup_iters != 0:
            self.iterate_(check_int(warmup_iters, "warmup_iters"))

    def __getstate__(self) -> dict[str, Any]:
        # Copies of an optimizer lose its hooks, so a copy of this is attached to none. Compiled
        # kernels and tables are not copied, but made anew.
        return {**vars(self), "_handles": None, "_jobs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = {
            "_handles": WeakKeyDictionary(),
            "_jobs": JobCache(engines(kernels=state["_kernels"])),
        }
        vars(self).update({**state, **fresh})

    def attach(self: _Self, *optimizers: Optimizer) -> _Self:
        """Act in each step of these optimizers, on the weights that they hold.

        Attaching twice is the same as once. If a model has several optimizers, attach all of them.
        The same holds for one optimizer for each parameter, stepping in the backward pass.

        Parameters
        ----------
        *optimizers : torch.optim.Optimizer

        Returns
        -------
        SpectralNormRegularizer or SpectralNormConstraint
            The object itself.

        Raises
        ------
        spectral_core.ArgumentError
            If the step of an optimizer would not run hooks, or would run them twice, or if no
            optimizer holds one of the weights.
        """
        for optimizer in optimizers:
            check_hooks(optimizer, self._by_hand)
        if not any(map(self._held_by, optimizers)):
            raise sc.ArgumentError(
                f"{', '.join(type(optimizer).__name__ for optimizer in optimizers)} holds none of "
                f"the weights {list(self._parameters)}: was it made from another model?"
            )
        for optimizer in optimizers:
            if optimizer not in self._handles:
                self._handles[optimizer] = self._register(optimizer)
        return self

    def detach(self, optimizer: Optimizer | None = None) -> None:
        """Undo `attach` for one optimizer, or for all."""
        self._jobs.clear()
        for attached in list(self._handles) if optimizer is None else [optimizer]:
            handle = self._handles.pop(attached, None)
            if handle is not None:
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
            found = sc.iterate(
                self._parameters, self._state, n_iter=n_iter, engines=self._jobs.engines
            )
        self._write_back(found)

    def sigmas(self) -> dict[str, Tensor]:
        """Return the newest estimate of each weight's largest singular value, on its device.

        Returns
        -------
        dict of name to tensor, shape (*stack,)
            The estimates of the last step: before the optimizer changed the weights, or after the
            weights were scaled to a bound.
        """
        return {name: sigma.clone() for name, sigma in self._state.sigma.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything a training run needs to continue, as a flat dict of tensors.

        Returns
        -------
        dict of str to tensor
            ``"<name>.v"`` and ``"<name>.sigma"`` of each weight. Where ``every_n_steps`` is not 1,
            also ``"<name>.u"`` and ``"<name>.steps"``. The tensors are those in use, as in a
            module's state dict: the next step changes them.
        """
        self._jobs.state_is_out = True
        return {**self._required(), **self._between_iterations()}

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
        """
        own = self._required()
        optional = {f"{name}.{field}" for name in self._parameters for field in ("u", "steps")}
        between = self._between_iterations()
        whole = all(key in state_dict for key in between)
        own |= between if whole else {}
        check_fits(own, state_dict, optional)
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state_dict[key].reshape(value.shape))
        self._load_between(between if whole else {})

    def _required(self) -> dict[str, Tensor]:
        return sc.state_dict(replace(self._state, u={}))

    def _between_iterations(self) -> dict[str, Tensor]:
        """Return what the state holds in addition, where not every step iterates."""
        return {}

    def _load_between(self, between: Mapping[str, Tensor]) -> None:
        """Load what `_between_iterations` returned, or do without it."""

    def _register(self, optimizer: Optimizer) -> RemovableHandle:
        raise NotImplementedError

    def _held_by(self, optimizer: Optimizer) -> list[str]:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name, parameter in self._parameters.items() if id(parameter) in ids]

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
        if all(
            state.v[name].device == parameter.device
            and state.v[name].dtype == _iterated_in(parameter.dtype)
            for name, parameter in self._parameters.items()
        ):
            return

        def moved(field: Mapping[str, Tensor], *, real: bool) -> dict[str, Tensor]:
            dtypes = {name: _iterated_in(p.dtype) for name, p in self._parameters.items()}
            return {
                name: field[name].to(p.device, dtypes[name].to_real() if real else dtypes[name])
                for name, p in self._parameters.items()
            }

        self._jobs.clear()
        self._state = replace(
            state,
            v=moved(state.v, real=False),
            sigma=moved(state.sigma, real=True),
            u=moved(state.u, real=False),
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


def check_hooks(optimizer: Any, by_hand: str) -> None:
    """Raise `ArgumentError` if a step of ``optimizer`` would run no hooks, or run them twice."""
    kind = type(optimizer)
    if not getattr(getattr(kind, "step", None), "hooked", False):
        raise sc.ArgumentError(
            f"{kind.__name__}.step runs no hooks: attach the optimizer that it wraps, or {by_hand}"
        )
    if _calls_parents_step(kind):
        raise sc.ArgumentError(
            f"{kind.__name__}.step calls the step of a class that it is derived from, and "
            f"PyTorch may run the hooks in both: {by_hand} instead"
        )


@cache
def _iterated_in(dtype: torch.dtype) -> torch.dtype:
    traits = traits_of(dtype, array_namespace(torch.empty(0)))
    return dtype if traits is None else traits.iteration_dtype


def _calls_parents_step(kind: type[Optimizer]) -> bool:
    """PyTorch hooks the step of each class that an optimizer was ever made of."""
    steps = {inspect.unwrap(vars(base)["step"]) for base in kind.__mro__ if "step" in vars(base)}
    own = inspect.unwrap(kind.step)
    overridden = steps - {own, inspect.unwrap(Optimizer.step)}
    return bool(overridden) and "step" in own.__code__.co_names
