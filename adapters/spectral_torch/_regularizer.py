"""Algorithm 1 beside a PyTorch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import spectral_core as sc
from spectral_core.engine import (
    Choice,
    Job,
    Schedule,
    Triplet,
    array_namespace,
    at_step,
    check_factors,
    check_power,
    dispatch,
    make_jobs,
    parts_of,
    plan_of,
    select,
    slope_of,
    wave_of,
)
from spectral_core.errors import check_int, listed

from . import _compile
from ._attach import is_nested
from ._compiled_jobs import CompiledJobs
from ._hook import PURE_ENGINES, OptimizerHook
from ._jobs import Penalty, release, write_back
from ._select import Model
from ._terms import Added, AddedTensors, OpenStep, take_out
from .engines.dtensor import is_sharded, penalty_at


class SpectralNormRegularizer(OptimizerHook):
    r"""Add λσuvᵀ to the gradient of every weight matrix before the optimizer steps.

    This minimizes :math:`L + \frac{λ}{2} \sum_ℓ σ(W^ℓ)^2` by Algorithm 1 of Yoshida & Miyato
    (2017).

    Parameters
    ----------
    model : torch.nn.Module, mapping or iterable of (name, parameter)
        The weights to regularize. Of a module, the weights of its linear, bilinear, convolution,
        recurrent and attention layers; not embeddings, norms and biases. Of a parametrized layer,
        the original. Of names and parameters, every one with two axes or more.
    factor : float, tensor of shape (), callable, or mapping of name or pattern to any of them
        λ. A callable is a schedule: ``factor(step)`` returns the number for a step, counted from 0
        for each optimizer. λ can be changed at any time: ``reg.factor = 0.02``. A tensor can be
        written into, and then `torch.compile` compiles no step again.
    target : float, tensor of shape (), callable, or mapping of name or pattern to any of them
        The σ below which the penalty is zero: the penalty is the hinge
        (λ/2)·Σ max(0, σ − target)². It can be changed at any time.
    power : int
        2, or 1 for the penalty λ·Σ max(0, σ − target).
    n_iter : int
        Power iterations in a step.
    n_vectors : int
        Number of vectors for each matrix. Several vectors follow σ where σ₂ comes close to it or
        overtakes it. They cost many small operations (`spectral_core.block_iteration`).
        With ``norm="operator"``, a convolution follows the waves of its layout instead.
    norm : str
        "flattened", the norm of each weight's matrix, as in the paper, or "operator": the norm of a
        convolution as a map of images, with the stride and dilation of its module. A layout that is
        a `spectral_core.Convolution` chooses it for one weight.
    every_n_steps : int
        Iterate only in every n-th step of a weight. The steps between add the term of the last
        iteration again: they read no weight, and σ, u and v are up to n − 1 steps old. A step that
        a GradScaler makes a fused optimizer skip counts, although its iteration is undone.
    warmup_iters : int
        Power iterations at construction, so that the first steps have good vectors. The paper has
        none: 0.
    include : str, compiled pattern, class, callable, or iterable of them, optional
        The parameters to regularize instead of the default ones: names, shell patterns
        (``"encoder.*"``), names of modules or their ends (``"query"``), compiled patterns, classes
        of layers (``nn.Conv2d``), or ``include(name, parameter) -> bool``.
    exclude : str, compiled pattern, class, callable, or iterable of them, optional
        Parameters to skip, in the same forms as ``include``.
    layouts : mapping of name or pattern to `spectral_core.Layout` or str, optional
        The meaning of a parameter's axes, where its module does not define it or defines it
        otherwise. A parameter named here is regularized even if the default would skip it.
    restore_gradients : bool
        Whether to take the term out of the gradients again after the optimizer's step, so that
        they are what the backward pass left. This costs one more pass over the gradients. False
        saves it, for a loop that sets the gradients to zero before each backward pass.
    seed : int
        Seed of the random start vectors. They depend only on the seed and the parameter's name, so
        all ranks draw the same ones.
    kernels : bool
        Whether to use compiled kernels: Triton's for weights on a GPU, and Numba's on the CPU if it
        is installed. The kernels need real, contiguous weights and gradients, and on a GPU
        ``n_vectors=1``. Everything else falls back to ordinary PyTorch operations: the same result,
        slower. False forces the fallback.

    Raises
    ------
    spectral_core.NamesError
        If a pattern matches nothing, or nothing is left to regularize.
    spectral_core.ArgumentError
        If a number is out of its range, or a parameter is lazy.

    Notes
    -----
    A weight without a gradient, or one that does not require a gradient, is left out of a step.
    Within `torch.compile`, set the gradient of a weight that you freeze to None: a compiled step
    does not notice that the weight requires no gradient.

    A tied weight counts once. A grouped convolution is a stack of matrices, each with its own σ. A
    weight that is sharded over processes (DTensor) stays sharded, and the processes must step
    together. Nothing in a step waits for the device. Results are written into the existing v, σ and
    u tensors, because captured CUDA graphs refer to them by address.

    After a step the gradients are what the backward pass left, up to rounding. Where two optimizers
    hold one weight, or several steps follow one backward pass, each step adds its term once. Two
    cases differ: an optimizer that changes or replaces a gradient within its step leaves it as it
    is, and a step that ends in an error leaves the term until the next step. An optimizer made with
    ``maximize=True`` gets the term with the opposite sign, so that σ shrinks.

    If ``optimizer.step`` gets a closure, the term is added after each call of the closure, and the
    penalty is added to the loss it returns, as a line search needs. A `torch.amp.GradScaler` may be
    in use, also with optimizers that unscale within their step.

    Gradients are clipped before the optimizer steps, and so before the term is added. To clip with
    the term, clip in a step pre-hook of the optimizer that is registered after `attach`.

    Construct the regularizer once the parameters are final: it keeps a reference to each parameter,
    and does not see one that replaces it in the model later. The names are those of the module it
    gets, so pass the module that checkpoints are made of, not the wrapper of ``torch.compile``. A
    weight-normalized layer does not depend on the length of its directions, so the regularizer has
    no effect on it.

    Examples
    --------
    >>> import torch, spectral_torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    >>> reg = spectral_torch.SpectralNormRegularizer(model, factor=0.01).attach(optimizer)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()  # with the regularizer's term
    >>> sorted(reg.sigmas())
    ['0.weight', '2.weight']
    """

    _by_hand = "call add_gradients_() before each step"
    _shown = "factor"

    def __init__(
        self,
        model: Model,
        factor: Schedule = 0.01,
        *,
        target: Schedule = 0.0,
        power: int = 2,
        n_iter: int = 1,
        n_vectors: int = 1,
        norm: str = "flattened",
        every_n_steps: int = 1,
        warmup_iters: int = 15,
        include: Choice | None = None,
        exclude: Choice | None = None,
        layouts: Mapping[str, sc.Layout | str] | None = None,
        restore_gradients: bool = True,
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
        self._penalty = Penalty(0.0, 0.0, check_power(power))
        self._open: WeakKeyDictionary[object, OpenStep] = WeakKeyDictionary()
        self.factor = factor
        self.target = target
        self.every_n_steps = every_n_steps
        self.restore_gradients = restore_gradients
        self._steps_taken = dict.fromkeys(self._parameters, 0)
        self._begin_compiled()
        self._lines = {
            name: _compile.described(name, layout) for name, layout in self._state.layouts.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_open": None, "_compiled_jobs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open = WeakKeyDictionary()
        self._penalty = copy(self._penalty)  # `copy.copy` would share it
        self._begin_compiled()

    def _begin_compiled(self) -> None:
        """Prepare what steps in graphs of `torch.compile` need."""
        self._compiled_jobs = CompiledJobs(self._jobs.engines)
        self._number = _compile.number_of(self._compiled_jobs)
        _compile.mark_static(self._state)

    def _move(self, state: sc.SpectralState) -> None:
        super()._move(state)
        if self._state is not state:
            _compile.mark_static(self._state)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(factor={self.factor!r}, n_iter={self.n_iter}, "
            f"weights={listed(self._parameters)}): {self._state_of()}"
        )

    @property
    def factor(self) -> Schedule:
        """λ or its schedule; checked when it is set."""
        return self._schedules.get("factor", self._penalty.factor)

    @factor.setter
    def factor(self, factor: Schedule) -> None:
        self._penalty.factor = self._checked("factor", factor)

    @property
    def target(self) -> Schedule:
        """The σ below which the penalty is zero, or its schedule; checked when it is set."""
        return self._schedules.get("target", self._penalty.target)

    @target.setter
    def target(self, target: Schedule) -> None:
        self._penalty.target = self._checked("target", target)

    @property
    def every_n_steps(self) -> int:
        """The number of steps from one iteration to the next; checked when it is set."""
        return self._every_n_steps

    @every_n_steps.setter
    def every_n_steps(self, every_n_steps: int) -> None:
        self._every_n_steps = check_int(every_n_steps, "every_n_steps")

    @property
    def power(self) -> int:
        """The exponent of the penalty, 1 or 2; checked when it is set."""
        return self._penalty.power

    @power.setter
    def power(self, power: int) -> None:
        self._penalty.power = check_power(power)

    def add_gradients_(self, *, scale: float | Tensor | None = None) -> None:
        """Run one step of Algorithm 1, for a loop whose optimizer runs no hooks.

        Parameters
        ----------
        scale : float or tensor of one element, optional
            The scale of the gradients, where they have not been unscaled yet.
        """
        self._add_terms_(self._parameters, self, scale)
        if not torch.compiler.is_compiling():
            self._acted(self)
        elif not self._is_one_operation(self._parameters):
            torch.compiler.disable(self._acted)(self)  # type: ignore[no-untyped-call]

    def penalty(self, *, differentiable: bool = True) -> Tensor:
        """Return (λ/2)·Σσ² of the weights that require a gradient (paper, equation 1).

        With ``target`` and ``power`` it is (λ/power)·Σ max(0, σ − target)^power.

        The value is differentiable where PyTorch records gradients, so it can be added to the loss
        in place of `attach`. When the gradient of the value is computed, v moves on by the power
        iteration that the value was computed with. A value that is only logged changes nothing.

        Parameters
        ----------
        differentiable : bool
            False builds no graph.

        Returns
        -------
        torch.Tensor, shape ()

        Warns
        -----
        spectral_core.SpectralWarning
            Once, if the gradient of the value is computed although the regularizer is attached:
            the term then counts twice.
        """
        self._warn_if_idle()
        self._follow()
        names = self._taking_part()
        if not names:
            return torch.zeros((), device=next(iter(self._parameters.values())).device)
        record = differentiable and torch.is_grad_enabled()
        with self._full_precision():
            state = select(self._state, names)
            with torch.no_grad():
                found = sc.iterate(self._weights(names), state, engines=PURE_ENGINES)
            with torch.set_grad_enabled(record):
                prices = self._prices(self._now(None if self._handles else self))
                total = _sum([self._penalty_at(name, found, prices[name]) for name in names])
        if record:
            self._follow_training(total, found)
        return total

    def _follow_training(self, total: Tensor, found: sc.SpectralState) -> None:
        """Write the iteration into the state when the gradient of ``total`` is computed."""

        def advance(gradient: Tensor) -> None:  # noqa: ARG001
            if self._handles:
                self._warn(
                    "twice",
                    "penalty() is part of a loss, and the regularizer is attached to an "
                    "optimizer: the term counts twice; use one of them (detach())",
                )
            self._write_back(found)
            self._acted(self)

        total.register_hook(advance)  # type: ignore[no-untyped-call]

    def _now(self, owner: object | None) -> Penalty:
        """Return the numbers of an optimizer's next step, or without one, of the last step made."""
        if not self._schedules:
            return self._penalty
        step = max(self._most_steps - 1, 0) if owner is None else self._step_of(owner)
        factor, target = (at_step(x, step) for x in (self.factor, self.target))
        return Penalty(factor, target, self.power)

    def _prices(self, penalty: Penalty) -> dict[str, dict[str, Any]]:
        """Return the keywords of each weight's penalty."""
        factors = check_factors(penalty.factor, self._parameters)
        targets = check_factors(penalty.target, self._parameters, "target")
        return {
            name: {"factor": factors[name], "target": targets[name], "power": penalty.power}
            for name in self._parameters
        }

    def _penalty_at(self, name: str, found: sc.SpectralState, price: dict[str, Any]) -> Tensor:
        (parameter,) = self._weights([name]).values()
        layout = self._state.layouts[name]
        triplet = Triplet(found.sigma[name], found.u[name], found.v[name])
        if is_sharded(parameter):
            plan = plan_of(layout, parameter.shape, name)
            return penalty_at(parameter, triplet, plan, array_namespace(parameter), **price)
        W = sc.as_matrix(parameter, layout, name=name)
        wave = wave_of(layout, tuple(parameter.shape))
        if wave is None:
            return sc.penalty_at(W, triplet.u, **price)
        # σ = Re(aᴴWw), whose derivative is the term, with the vectors held.
        parts = parts_of(triplet, wave, array_namespace(parameter))
        products = (t.u * (W.to(t.V.dtype) @ t.V[..., 0, :, None])[..., 0] for t in parts)
        return sc.penalty(sum(products).sum(-1), **price)

    def _register(self, optimizer: Optimizer) -> list[RemovableHandle]:
        return [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _between_iterations(self) -> dict[str, Tensor]:
        if self.every_n_steps == 1:
            return {}
        found = {f"{name}.u": self._state.u[name] for name in self._parameters}
        for name, steps in self._steps_taken.items():
            found[f"{name}.steps"] = torch.tensor(steps % self.every_n_steps)
        return found

    def _load_between(self, between: Mapping[str, Tensor]) -> None:
        for name in self._parameters:
            # Without its u, a weight has to iterate in its next step.
            steps = between.get(f"{name}.steps")
            self._steps_taken[name] = 0 if steps is None else int(steps)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._begin(optimizer):
            return None
        if kwargs.get("grad_scaler") is not None:
            raise sc.ArgumentError(
                f"{type(optimizer).__name__} receives the GradScaler itself: detach the "
                "regularizer, and call add_gradients_() between scaler.unscale_(optimizer) and "
                "the step"
            )
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._with_term(kwargs["closure"], optimizer)}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._with_term(args[1], optimizer), *args[2:]), kwargs
        self._add_terms_(self._held_by(optimizer), optimizer)
        return None

    def _with_term(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def closure_with_term() -> Any:
            self._end(optimizer)  # the term of the call before, if the gradients still have it
            loss = closure()
            held = self._held_by(optimizer)
            penalty = self._now(optimizer)
            self._add_terms_(held, optimizer)
            held = [name for name in held if self._has_gradient(name)]
            prices, sigma = self._prices(penalty), self._state.sigma
            terms = [sc.penalty(sigma[name], **prices[name]) for name in held]
            if not terms or not isinstance(loss, (Tensor, float, int)):
                return loss
            total = _sum(terms)
            return loss + (total.to(loss.device) if isinstance(loss, Tensor) else float(total))

        return closure_with_term

    def _begin(self, optimizer: Optimizer) -> bool:
        """Return True if a step of this optimizer runs within a step that has the term already."""
        if torch.compiler.is_compiling() or optimizer not in self._open:
            return False
        if is_nested(optimizer):
            self._open[optimizer].inner += 1
            return True
        self._end(optimizer)  # the step before ended in an error, and left its term
        return False

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if torch.compiler.is_compiling():
            self._end_compiled(optimizer)
        elif optimizer in self._open and self._open[optimizer].inner:
            self._open[optimizer].inner -= 1
        else:
            self._end(optimizer)
            self._acted(optimizer)

    def _end(self, optimizer: Optimizer) -> None:
        """Take the terms of an optimizer's step out of the gradients."""
        opened = self._open.pop(optimizer, None)
        if opened is None or not opened.added or not self.restore_gradients:
            return
        fused, factors = any(group.get("fused") for group in optimizer.param_groups), None
        if fused and getattr(optimizer, "grad_scale", None) is not None:
            # A fused optimizer divides the gradients, and the term in them, by the scale.
            names = self._maximized_by(optimizer)
            factors = self._scaled(None, names, self._now(optimizer))
        engines = self._jobs.engines
        for added in opened.added:
            if isinstance(added, AddedTensors):
                added.take_out(self._parameters, factors, rewritten=fused)
            else:
                take_out(added, self._parameters, engines, factors=factors, rewritten=fused)

    def _end_compiled(self, optimizer: Optimizer) -> None:
        names = self._held_by(optimizer)
        if not self._is_one_operation(names):
            for ended in (self._end, self._acted):  # a schedule goes on by the steps counted
                torch.compiler.disable(ended)(optimizer)  # type: ignore[no-untyped-call]
        elif self.restore_gradients:
            self._add_compiled_(names, optimizer, getattr(optimizer, "grad_scale", None), undo=True)

    def _add_terms_(
        self, names: Collection[str], owner: object, scale: float | Tensor | None = None
    ) -> None:
        """Make a step on these parameters; each optimizer, the ``owner``, has jobs of its own."""
        compiling = torch.compiler.is_compiling()
        if compiling and not self._is_one_operation(names):  # then between two graphs
            outside = torch.compiler.disable(self._add_terms_)  # type: ignore[no-untyped-call]
            outside(names, owner, scale)
            return
        found_inf = None
        if owner is not self:
            # What a GradScaler does to the term: an optimizer that unscales within its step gets
            # gradients that are still scaled, so the term is multiplied by the same scale. Where a
            # gradient is not finite, that step changes no weight, so the iteration is undone too.
            # Both numbers stay on their device: nothing waits for them.
            scale = getattr(owner, "grad_scale", None)
            found_inf = getattr(owner, "found_inf", None)
            if type(found_inf) is Tensor and found_inf.is_cpu and not compiling and not found_inf:
                found_inf = None  # a CPU can look at once: there is nothing to undo
        before = None if found_inf is None else _flat(self._buffers(names))
        if compiling:
            self._add_compiled_(names, owner, scale)
        else:
            penalty, flipped = self._now(owner), self._maximized_by(owner)
            added: list[Added | AddedTensors] = []
            for n_iter, due in self._phases(names):
                changed = scale is not None or flipped
                scaled = self._scaled(scale, flipped, penalty) if changed else None
                if self._masks:
                    pruned = [name for name in due if name in self._masks]
                    due = [name for name in due if name not in self._masks]
                    added += self._add_masked_(pruned, penalty, scaled, n_iter)
                jobs, context = self._jobs_of(owner, due, penalty, scaled, n_iter)
                try:
                    with context:
                        write_back(jobs, dispatch(jobs, n_iter, self._jobs.engines).triplets)
                    if jobs:
                        # A kernel writes by address, unseen by autograd: a backward pass that saved
                        # a gradient must notice, as after any operation in place.
                        increment_version([job.grad for job in jobs])
                        added.append(Added.by(jobs))
                    if self.every_n_steps != 1:
                        self._count(jobs)
                finally:
                    release(jobs)
            if owner is not self:  # a call by hand leaves its term: no step follows that could end
                self._open[owner] = OpenStep(added)
        if found_inf is not None and before is not None:
            _undo_where(found_inf, self._buffers(names), before)

    @torch.no_grad()
    def _add_masked_(
        self,
        names: Collection[str],
        penalty: Penalty,
        scaled: Mapping[str, Any] | None,
        n_iter: int,
    ) -> list[Added | AddedTensors]:
        """Add the terms of pruned parameters: the gradient through a mask is masked too."""
        names = [name for name in names if self._has_gradient(name)]
        if not names:
            return []
        self._follow()
        factors = scaled or check_factors(penalty.factor, self._parameters)
        with self._full_precision():
            weights = self._weights(names)
            terms = {name: torch.zeros_like(self._parameters[name]) for name in names}
            slopes = slope_of(penalty.target, penalty.power, self._parameters)
            jobs = make_jobs(
                names, weights, self._state, grads=terms, factors=factors, rules=slopes
            )
            write_back(jobs, dispatch(jobs, n_iter, self._jobs.engines).triplets)
        for name in names:
            mask = self._masks[name].now()
            terms[name] = terms[name] if mask is None else terms[name] * mask
            self._parameters[name].grad.add_(terms[name])  # type: ignore[union-attr]
        if self.every_n_steps != 1:
            self._count(jobs)
        return [AddedTensors.of(self._parameters, terms, factors)]

    def _maximized_by(self, owner: object) -> set[str]:
        """Return the weights that an optimizer with ``maximize=True`` moves along its gradients."""
        groups: list[dict[str, Any]] = getattr(owner, "param_groups", [])
        ids = {id(p) for group in groups if group.get("maximize") for p in group["params"]}
        if not ids:
            return set()
        return {name for name, p in self._parameters.items() if id(p) in ids}

    def _count(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self._steps_taken[job.name] += 1

    def _phases(self, names: Collection[str]) -> list[tuple[int, Collection[str]]]:
        """Return how often to iterate in this step, and for which parameters."""
        if self.every_n_steps == 1:
            return [(self.n_iter, names)]
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise sc.ArgumentError(
                f"every_n_steps is {self.every_n_steps}: a CUDA graph repeats the captured step, "
                "either with an iteration or without one; use 1, and replay the graph as often as "
                "you like"
            )
        phases: dict[int, list[str]] = {}
        for name in filter(self._has_gradient, names):
            due = self._steps_taken[name] % self.every_n_steps == 0
            phases.setdefault(self.n_iter if due else 0, []).append(name)
        return list(phases.items())

    def _add_compiled_(
        self,
        names: Collection[str],
        owner: object,
        scale: float | Tensor | None,
        *,
        undo: bool = False,
    ) -> None:
        """Add the terms within `torch.compile`, as one operation, or take the last ones out."""
        present = [name for name in names if self._has_gradient(name)]
        if not present:
            return
        self._compiled = True
        parameters, state = self._parameters, self._state
        flipped = self._maximized_by(owner)
        prices = self._prices(self._penalty)
        factors = {name: prices[name]["factor"] for name in present}
        if scale is not None or flipped:
            factors = self._scaled(scale, flipped, self._penalty)
        with torch.no_grad():
            _compile.run(
                [self._lines[name] for name in present],
                [parameters[name] for name in present],
                [parameters[name].grad for name in present],  # type: ignore[misc]
                [Triplet(state.sigma[n], state.u[n], state.v[n]) for n in present],
                [-factors[name] if undo else factors[name] for name in present],
                [prices[n]["target"] for n in present],
                power=self.power,
                n_iter=0 if undo else self.n_iter,
                engines=self._number,
            )

    def _is_one_operation(self, names: Collection[str]) -> bool:
        """Return True if `torch.compile` can have the step of these parameters in its graph."""
        plain = self.every_n_steps == 1 and not self._schedules
        return plain and all(map(self._is_operation, names))

    def _is_operation(self, name: str) -> bool:
        if name in self._masks:
            return False
        parameter = self._parameters[name]
        if self._state.u[name].is_complex() and not parameter.is_complex():
            return False  # waves: an operation that writes complex tensors does not compile
        return _compile.accepts(parameter, self._state.v[name])

    def _has_gradient(self, name: str) -> bool:
        parameter = self._parameters[name]
        # In this order: `torch.compile` guards an optimizer's gradients, not its `requires_grad`.
        return parameter.grad is not None and parameter.requires_grad

    def _buffers(self, names: Collection[str]) -> list[Tensor]:
        state = self._state
        return [field[name] for field in (state.v, state.sigma, state.u) for name in names]

    def _scaled(
        self, scale: float | Tensor | None, flipped: Collection[str], penalty: Penalty
    ) -> dict[str, Any]:
        """Return λ of each weight, times the scale of its gradient and the sign of its step."""
        factors = check_factors(penalty.factor, self._parameters)
        signed = {name: -f if name in flipped else f for name, f in factors.items()}
        if not isinstance(scale, Tensor):
            return signed if scale is None else {name: f * scale for name, f in signed.items()}
        # One product for all weights with the same factor and device: each is an operation there.
        products: dict[tuple[Any, ...], Tensor] = {}
        scaled = {}
        for name, factor in signed.items():
            device, own = self._parameters[name].device, factors[name]
            key = (own if isinstance(own, float) else id(own), name in flipped, device)
            if key not in products:
                products[key] = factor * scale.reshape(()).to(device, non_blocking=True)
            scaled[name] = products[key]
        return scaled


_Kind: TypeAlias = tuple[torch.device, torch.dtype]


def _flat(buffers: Iterable[Tensor]) -> dict[_Kind, Tensor]:
    """Return a copy of the elements of all buffers: one tensor for each device and dtype.

    One operation copies those of all weights. A copy of each is three launches a weight, and its
    restoration six more, beside a step that has three in all.
    """
    return {kind: torch.cat([x.reshape(-1) for x in some]) for kind, some in _by_kind(buffers)}


def _by_kind(buffers: Iterable[Tensor]) -> Iterable[tuple[_Kind, list[Tensor]]]:
    kinds: dict[_Kind, list[Tensor]] = {}
    for x in buffers:
        kinds.setdefault((x.device, x.dtype), []).append(x)
    return kinds.items()


def _undo_where(found_inf: Tensor, buffers: list[Tensor], before: Mapping[_Kind, Tensor]) -> None:
    """Restore ``buffers`` where the optimizer skips its step: the device decides."""
    now = _flat(buffers)
    for kind, some in _by_kind(buffers):
        skipped = found_inf.reshape(()).to(kind[0], non_blocking=True) > 0
        kept = torch.where(skipped, before[kind], now[kind])
        pieces = torch.split_with_sizes(kept, [x.numel() for x in some])
        views = [piece.view(x.shape) for piece, x in zip(pieces, some, strict=True)]
        torch._foreach_copy_(some, views)


def _sum(terms: list[Tensor]) -> Tensor:
    """Return the sum of scalars, which may be on several devices, on the first device."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
