"""A bound on spectral norms beside a PyTorch optimizer, kept after each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import spectral_core as sc
from spectral_core.engine import Choice, Schedule, at_step, check_factors, dispatch, select
from spectral_core.errors import listed

from ._hook import OptimizerHook
from ._jobs import Limit, release, write_back
from ._select import Model


class SpectralNormConstraint(OptimizerHook):
    r"""Scale every weight matrix to a spectral norm of at most ``bound`` after each step.

    .. math:: W ← W · \min(1, \text{bound}/σ)

    This is the hard bound of `spectral_core.constrain`, or with ``normalize`` spectral
    normalization of the weights themselves. Unlike
    `torch.nn.utils.parametrizations.spectral_norm` it wraps no layer, and the saved weights are
    those in use.

    Parameters
    ----------
    model
        As for `SpectralNormRegularizer`.
    bound : float, tensor of shape (), callable, or mapping of name or pattern to any of them
        The largest spectral norm. A callable is a schedule: ``bound(step)``. It can be changed at
        any time.
    normalize : bool
        Whether to scale smaller matrices up to the bound too.
    n_iter, n_vectors, norm, warmup_iters, include, exclude, layouts, seed, kernels
        As for `SpectralNormRegularizer`.

    Raises
    ------
    spectral_core.NamesError, spectral_core.ArgumentError
        As `SpectralNormRegularizer`.

    Notes
    -----
    Nothing changes before the first step, or before `constrain_`. A step scales only the weights
    that its optimizer holds and that require a gradient. Power iteration underestimates σ, so the
    true norm can exceed the bound slightly: see `spectral_core.constrain`. The bound is on the
    weight's matrix, unless ``norm="operator"``: a convolution as a map of images can have a larger
    norm. Moments that an optimizer keeps are not scaled.

    Examples
    --------
    >>> import torch, spectral_torch
    >>> model = torch.nn.Linear(4, 8)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    >>> cap = spectral_torch.SpectralNormConstraint(model, bound=1.0, n_iter=20).attach(optimizer)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
    >>> bool(torch.linalg.matrix_norm(model.weight, 2) < 1.01)
    True
    """

    _by_hand = "call constrain_() after each step"
    _shown = "bound"

    def __init__(
        self,
        model: Model,
        bound: Schedule = 1.0,
        *,
        normalize: bool = False,
        n_iter: int = 1,
        n_vectors: int = 1,
        norm: str = "flattened",
        warmup_iters: int = 15,
        include: Choice | None = None,
        exclude: Choice | None = None,
        layouts: Mapping[str, sc.Layout | str] | None = None,
        seed: int = 0,
        kernels: bool = True,
    ) -> None:
        super().__init__(
            model,
            n_iter=n_iter,
            n_vectors=n_vectors,
            norm=norm,
            warmup_iters=warmup_iters,
            include=include,
            exclude=exclude,
            layouts=layouts,
            seed=seed,
            kernels=kernels,
        )
        self.bound = bound
        self.normalize = normalize

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(bound={self.bound!r}, normalize={self.normalize}, "
            f"n_iter={self.n_iter}, weights={listed(self._parameters)}): {self._state_of()}"
        )

    def _displayed(self, number: float) -> float | str:
        return f"σ ≤ {number:.4g}"

    @property
    def bound(self) -> Schedule:
        """The largest spectral norm, or its schedule; checked when it is set."""
        return self._schedules.get("bound", self._bound)

    @bound.setter
    def bound(self, bound: Schedule) -> None:
        self._bound = self._checked("bound", bound)

    def constrain_(self) -> None:
        """Scale all weights now: before the first step, or where an optimizer runs no hooks."""
        self._constrain_(None)

    def _register(self, optimizer: Optimizer) -> list[RemovableHandle]:
        return [optimizer.register_step_post_hook(self._after_step)]

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._constrain_(optimizer)

    @torch.no_grad()
    def _constrain_(self, optimizer: Optimizer | None) -> None:
        if torch.compiler.is_compiling():  # between two graphs
            outside = torch.compiler.disable(self._constrain_)  # type: ignore[no-untyped-call]
            outside(optimizer)
            return
        names = list(self._parameters)
        if optimizer is not None:
            held = self._held_by(optimizer)
            names = [name for name in held if self._is_trained(name)]
        if not names:
            return
        owner = self if optimizer is None else optimizer
        limit = Limit(at_step(self.bound, self._step_of(owner)), self.normalize)
        if self._masks:
            self._constrain_masked_([name for name in names if name in self._masks], limit)
            names = [name for name in names if name not in self._masks]
        jobs, context = self._jobs_of(owner, names, limit, None, self.n_iter)
        try:
            with context:
                write_back(jobs, dispatch(jobs, self.n_iter, self._jobs.engines).triplets)
            # A kernel writes by address, unseen by autograd, which must notice it.
            increment_version([self._parameters[job.name] for job in jobs])
        finally:
            release(jobs)
        self._acted(owner)

    def _constrain_masked_(self, names: list[str], limit: Limit) -> None:
        """Scale pruned parameters: the bound is on mask · parameter."""
        if not names:
            return
        self._follow()
        weights = self._weights(names)
        bounds = check_factors(limit.target, self._parameters, "bound")
        with self._full_precision():
            found = sc.constrain_(
                weights,
                select(self._state, names),
                bound={name: bounds[name] for name in names},
                normalize=limit.normalize,
                n_iter=self.n_iter,
                engines=self._jobs.engines,
            )
        for name, weight in weights.items():
            self._masks[name].write(weight, self._parameters[name])
        self._write_back(found)

    def _is_trained(self, name: str) -> bool:
        parameter = self._parameters[name]
        return parameter.requires_grad and parameter.grad is not None
