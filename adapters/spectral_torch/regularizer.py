"""Algorithm 1 beside a PyTorch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import spectral_core as sc
from spectral_core._arrays import array_namespace
from spectral_core.errors import checked_int
from spectral_core.layout import plan_of
from spectral_core.penalty import Factor, check_power, factors_of, is_plain
from spectral_core.step import Advance, Task

from . import operation
from .estimator import Estimator
from .repetition import Repetition
from .selection import Choice, Model
from .sharded import is_sharded, penalty_at
from .steps import looked_at


class SpectralNormRegularizer(Estimator):
    r"""Add λσuvᵀ to the gradient of every weight matrix before the optimizer steps.

    Minimizes :math:`L + \frac{λ}{2} \sum_ℓ σ(W^ℓ)^2` by Algorithm 1 of Yoshida & Miyato (2017).

    Parameters
    ----------
    model : torch.nn.Module, mapping or iterable of (name, parameter)
        What to regularize. Of a module, the weights of its linear, bilinear, convolution,
        recurrent and attention layers, not embeddings, norms and biases; of a parametrized
        layer, the original. Of names and parameters, all with two axes or more.
    factor : float, tensor of shape (), or mapping of name or pattern to either
        λ. May be set anew at any time, as a schedule does: ``reg.factor = 0.02``; a tensor may be
        written into, and that compiles no step anew.
    n_iter : int
        Power iterations a step.
    n_vectors : int
        How many vectors to iterate with for each matrix. More than one keep track of σ where σ₂
        comes close to it or overtakes it, at the price of many small operations
        (`spectral_core.block_iteration`).
    every_n_steps : int
        Iterate only in every n-th step of a weight, and in between add the term of the last one
        again: a step then reads no weight, and σ, u and v are up to n - 1 steps old. (A step that
        a GradScaler makes a fused optimizer skip counts, though its iteration is undone.)
    warmup_iters : int
        Power iterations now, so that the first steps see good vectors. 0 is the paper's choice.
    include : str, iterable of str, or callable, optional
        Names or shell patterns (``"encoder.*"``) of the parameters to regularize instead of the
        default ones, or ``include(name, parameter) -> bool``.
    exclude : str, iterable of str, or callable, optional
        Of those, the ones to leave out.
    seed : int
        Of the start vectors, which depend on it and on the names alone: they are the same on
        every rank.
    layouts : mapping of name or pattern to `spectral_core.Layout` or str, optional
        What the axes of a parameter are where its module does not tell, or tells otherwise. What
        is named here is regularized, if the default would leave it out.
    kernels : bool
        Whether to use compiled kernels where they can be: Triton's for weights on a GPU, and
        Numba's on the CPU if it is installed. Otherwise, and for weights that do not lie as their
        matrix does, PyTorch's own operations.
    target : float, tensor of shape (), or mapping of name or pattern to either
        The σ below which a matrix is left alone: the penalty is the hinge
        (λ/2)·Σ max(0, σ − target)². May be set anew at any time.
    power : int
        2, or 1 for the penalty λ·Σ max(0, σ − target).

    Raises
    ------
    spectral_core.NamesError
        If a pattern matches nothing, or nothing is left to regularize.
    spectral_core.ArgumentError
        If a number is out of its range or a parameter is lazy.

    Notes
    -----
    A weight whose gradient is None, or that does not require one, is left out of a step. (Within
    `torch.compile`, set the gradient of a weight that you freeze to None: a compiled step does not
    see that it requires none.) A tied
    weight counts once. A grouped convolution is a stack of matrices, each with its own σ. A weight
    that is divided among processes (DTensor) stays so, and these must step together. Nothing
    in a step waits for the device. v and σ are written in place, as a captured CUDA graph needs.

    Where ``optimizer.step`` is given a closure, the term is added each time the closure has
    computed gradients, and the penalty to the loss it returns, as a line search needs.
    A `torch.amp.GradScaler` may be in use, with optimizers that unscale in their step too.

    Gradients are clipped before the optimizer steps, and so before this adds to them. To clip with
    the term, clip in a step pre-hook of the optimizer that is registered after `attach`.

    Make it once the parameters are final: it holds on to them, and does not see one that takes
    another's place in the model later. The names are those of the module that it is given, so give
    the one that checkpoints are made of, not ``torch.compile``'s wrapper. A weight-normalized
    layer does not depend on the length of its directions, and so neither on this.

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

    def __init__(
        self,
        model: Model,
        factor: Factor = 0.01,
        n_iter: int = 1,
        n_vectors: int = 1,
        every_n_steps: int = 1,
        warmup_iters: int = 15,
        include: Choice | None = None,
        exclude: Choice | None = None,
        seed: int = 0,
        layouts: Mapping[str, sc.Layout | str] | None = None,
        kernels: bool = True,
        target: Factor = 0.0,
        power: int = 2,
    ) -> None:
        self._last: WeakKeyDictionary[object, Repetition] = WeakKeyDictionary()
        super().__init__(
            model,
            n_iter=n_iter,
            n_vectors=n_vectors,
            warmup_iters=warmup_iters,
            include=include,
            exclude=exclude,
            seed=seed,
            layouts=layouts,
            kernels=kernels,
        )
        self.factor = factor
        self.target = target
        self.power = check_power(power)
        self.every_n_steps = checked_int(every_n_steps, "every_n_steps")
        self._steps_taken = dict.fromkeys(self._parameters, 0)
        self._number = operation.number_of(self._step)
        self._lines = {
            name: operation.described(name, layout) for name, layout in self._state.layouts.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_last": WeakKeyDictionary()})
        self._number = operation.number_of(self._step)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(factor={self.factor!r}, n_iter={self.n_iter}, "
            f"weights={list(self._parameters)})"
        )

    @property
    def factor(self) -> Factor:
        """λ: checked when it is set."""
        return self._factor

    @factor.setter
    def factor(self, factor: Factor) -> None:
        factors_of(factor, self._parameters)
        self._factor = factor

    @property
    def target(self) -> Factor:
        """The σ below which a matrix is left alone: checked when it is set."""
        return self._target

    @target.setter
    def target(self, target: Factor) -> None:
        factors_of(target, self._parameters, "target")
        self._target = target

    def detach(self, optimizer: Optimizer | None = None) -> None:
        """Undo `attach`, for one optimizer or for all."""
        for attached in list(self._handles) if optimizer is None else [optimizer]:
            self._last.pop(attached, None)
        super().detach(optimizer)

    def add_gradients_(self, *, scale: float | Tensor | None = None) -> None:
        """Run one step of Algorithm 1: for a loop whose optimizer takes no hooks.

        Parameters
        ----------
        scale : float or tensor of one element, optional
            What the gradients are still multiplied by, where they have not been unscaled.
        """
        self._add_gradients_(self._parameters, scale)

    def penalty(self, *, differentiable: bool = False) -> Tensor:
        """(λ/2)·Σσ² of the weights as they are now (paper, equation 1).

        With ``target`` and ``power``, (λ/power)·Σ max(0, σ − target)^power.

        Parameters
        ----------
        differentiable : bool
            Whether to build a graph: the gradient of the value is what a step would add. To train
            with it in the loss instead of the hook, call `iterate_` each step.

        Returns
        -------
        torch.Tensor, shape ()
        """
        self._follow()
        with self._full_precision():
            with torch.no_grad():
                found = sc.iterate(self._parameters, self._state, step=looked_at)
            with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                prices = self._prices()
                terms = [self._penalty_at(name, found, prices[name]) for name in self._parameters]
                return _sum(terms)

    def _prices(self) -> dict[str, dict[str, Any]]:
        """The keywords of each weight's penalty."""
        factors = factors_of(self.factor, self._parameters)
        targets = factors_of(self.target, self._parameters, "target")
        return {
            name: {"factor": factors[name], "target": targets[name], "power": self.power}
            for name in self._parameters
        }

    def _penalty_at(self, name: str, found: sc.SpectralState, price: dict[str, Any]) -> Tensor:
        parameter, layout = self._parameters[name], self._state.layouts[name]
        triple = sc.PowerIteration(found.sigma[name], found.u[name], found.v[name])
        if is_sharded(parameter):
            plan = plan_of(layout, parameter.shape, name)
            return penalty_at(parameter, triple, plan, array_namespace(parameter), **price)
        W = sc.as_matrix(parameter, layout, name=name)
        return sc.penalty_at(W, triple.u, **price)

    def _register(self, optimizer: Optimizer) -> RemovableHandle:
        return optimizer.register_step_pre_hook(self._before_step)

    def _between_iterations(self) -> dict[str, Tensor]:
        if self.every_n_steps == 1:
            return {}
        found = {f"{name}.u": self._state.u[name] for name in self._parameters}
        for name, steps in self._steps_taken.items():
            found[f"{name}.steps"] = torch.tensor(steps % self.every_n_steps)
        return found

    def _take_over(self, between: Mapping[str, Tensor]) -> None:
        for name in self._parameters:
            # Without its u, a weight has to iterate in its next step.
            steps = between.get(f"{name}.steps")
            self._steps_taken[name] = 0 if steps is None else int(steps)

    def _moved(self) -> None:
        self._last.clear()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs.get("grad_scaler") is not None:
            raise sc.ArgumentError(
                f"{type(optimizer).__name__} takes the GradScaler itself: detach the regularizer, "
                "and between scaler.unscale_(optimizer) and the step call add_gradients_()"
            )
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._with_term(kwargs["closure"], optimizer)}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._with_term(args[1], optimizer), *args[2:]), kwargs
        self._add_held(optimizer)
        return None

    def _with_term(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def closure_with_term() -> Any:
            loss = closure()
            held = self._add_held(optimizer)
            prices, sigma = self._prices(), self._state.sigma
            terms = [sc.penalty(sigma[name], **prices[name]) for name in held]
            if not terms or not isinstance(loss, (Tensor, float, int)):
                return loss
            total = _sum(terms)
            return loss + (total.to(loss.device) if isinstance(loss, Tensor) else float(total))

        return closure_with_term

    def _add_held(self, optimizer: Optimizer) -> list[str]:
        """Add the term to what ``optimizer`` holds and has a gradient, and say what that is."""
        held = self._held_by(optimizer)
        # Set by GradScaler on optimizers that unscale within their step: the gradients are
        # still scaled, and where one of them is not finite, the step will change no weight.
        scale, found_inf = (getattr(optimizer, key, None) for key in ("grad_scale", "found_inf"))
        before = None if found_inf is None else [x.clone() for x in self._buffers(held)]
        self._add_gradients_(held, scale, turn=optimizer)
        if found_inf is not None and before is not None:
            _take_back(self._buffers(held), before, found_inf)
        return [name for name in held if self._takes_part(name)]

    def _buffers(self, names: list[str]) -> list[Tensor]:
        state = self._state
        return [field[name] for field in (state.v, state.sigma, state.u) for name in names]

    def _takes_part(self, name: str) -> bool:
        parameter = self._parameters[name]
        # In this order: `torch.compile` guards an optimizer's gradients, not its `requires_grad`.
        return parameter.grad is not None and parameter.requires_grad

    def _add_gradients_(
        self, names: Collection[str], scale: float | Tensor | None, turn: object = None
    ) -> None:
        """Make a step; ``turn`` tells optimizers that take turns apart."""
        if torch.compiler.is_compiling():
            if self.every_n_steps == 1 and all(map(self._is_operation, names)):
                self._add_in_graph_(names, scale)
                return
            # Between two compiled graphs.
            outside = torch.compiler.disable(self._add_gradients_)  # type: ignore[no-untyped-call]
            outside(names, scale, turn)
            return
        plain = is_plain(self._target, self.power)
        may_repeat = plain and scale is None and self.every_n_steps == 1
        turn = self if turn is None else turn
        last = self._last.get(turn) if may_repeat else None
        if last and last.step(names, self._parameters, self._factor, self.n_iter):
            return
        tasks = self._add_checked_(names, scale)
        if may_repeat:
            self._last[turn] = Repetition(tasks, self.n_iter, self._factor, self._step)

    def _is_operation(self, name: str) -> bool:
        return operation.takes(self._parameters[name], self._state.v[name])

    def _add_in_graph_(self, names: Collection[str], scale: float | Tensor | None) -> None:
        """The same, as `torch.compile` can trace it: one operation, which it does not look into."""
        taken = [name for name in names if self._takes_part(name)]
        if not taken:
            return
        parameters, state = self._parameters, self._state
        prices, scaled = self._prices(), None if scale is None else self._scaled(scale)
        with torch.no_grad():
            operation.run(
                [self._lines[name] for name in taken],
                [parameters[name] for name in taken],
                [parameters[name].grad for name in taken],  # type: ignore[misc]
                [sc.PowerIteration(state.sigma[n], state.u[n], state.v[n]) for n in taken],
                [prices[n]["factor"] if scaled is None else scaled[n] for n in taken],
                [prices[n]["target"] for n in taken],
                power=self.power,
                n_iter=self.n_iter,
                step=self._number,
            )

    @torch.no_grad()
    def _add_checked_(self, names: Collection[str], scale: float | Tensor | None) -> Sequence[Task]:
        self._follow()
        grads: dict[str, Tensor | None] = dict.fromkeys(self._parameters)
        for name in names:
            if self._takes_part(name):
                grads[name] = grad = self._parameters[name].grad
                if grad is not None and grad.layout != torch.strided:
                    raise sc.DTypeError(
                        f"the gradient of {name!r} is {grad.layout}: a rank-1 term has no sparse "
                        "form, so exclude the weight or make its gradient dense (sparse=False)"
                    )
        factor = self.factor if scale is None else self._scaled(scale)
        taken: list[Task] = []

        def step(tasks: Sequence[Task], n_iter: int) -> Advance:
            taken.extend(task for task in tasks if task.grad is not None)
            return self._step(tasks, n_iter)

        for n_iter, due in self._iterations(grads):
            with self._full_precision():
                self._state = sc.add_gradient_(
                    *(self._parameters, due, self._state),
                    factor=factor,
                    target=self.target,
                    power=self.power,
                    n_iter=n_iter,
                    step=step,
                )
        for task in taken:
            self._steps_taken[task.name] += 1
        return taken

    def _iterations(
        self, grads: dict[str, Tensor | None]
    ) -> list[tuple[int, dict[str, Tensor | None]]]:
        """How often to iterate in this step, and of which weights' gradients."""
        if self.every_n_steps == 1:
            return [(self.n_iter, grads)]
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise sc.ArgumentError(
                f"every_n_steps is {self.every_n_steps}: a CUDA graph would make the captured step "
                "each time, with an iteration or without one; use 1, and replay the graph as often "
                "as you like"
            )
        shares: dict[int, dict[str, Tensor | None]] = {}
        for name, grad in grads.items():
            if grad is not None:
                due = self._steps_taken[name] % self.every_n_steps == 0
                share = shares.setdefault(self.n_iter if due else 0, dict.fromkeys(grads))
                share[name] = grad
        return list(shares.items())

    def _scaled(self, scale: float | Tensor) -> dict[str, Any]:
        factors = factors_of(self.factor, self._parameters)
        if not isinstance(scale, Tensor):
            return {name: factor * scale for name, factor in factors.items()}
        # One product for all weights of a factor and a device: each is an operation there.
        products: dict[tuple[Any, torch.device], Tensor] = {}
        scaled = {}
        for name, factor in factors.items():
            device = self._parameters[name].device
            key = (factor if isinstance(factor, float) else id(factor), device)
            if key not in products:
                products[key] = factor * scale.reshape(()).to(device, non_blocking=True)
            scaled[name] = products[key]
        return scaled


def _take_back(buffers: list[Tensor], before: list[Tensor], found_inf: Tensor) -> None:
    """Undo the iteration where the optimizer's step is skipped, decided on the device."""
    for now, then in zip(buffers, before, strict=True):
        skipped = found_inf.reshape(()).to(now.device, non_blocking=True) > 0
        now.copy_(torch.where(skipped, then, now))


def _sum(terms: list[Tensor]) -> Tensor:
    """The sum of scalars that may lie on several devices, on the first one's."""
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
