"""The jobs of a regularizer, validated once and kept from step to step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter

from spectral_core import DTypeError, SpectralState
from spectral_core.engine import (
    AT_MOST,
    EXACTLY,
    Engine,
    Factor,
    Job,
    JobList,
    Number,
    Rule,
    Triplet,
    bounds_of,
    check_factors,
    make_jobs,
    same_rule,
    slope_of,
)

from .engines.foreach import write_into
from .engines.recent import keep_recent

_PLAIN = (Tensor, Parameter)
LISTS = 64  # lists of an optimizer that are kept: experts and LayerDrop take turns

# Power iterations, and the names of the parameters that have a gradient.
_Key: TypeAlias = tuple[int, tuple[str, ...]]


@dataclass
class Penalty:
    """Hold λ, target and power of a regularizer, which checks them when they are set."""

    factor: Factor
    target: Factor
    power: int

    @property
    def code(self) -> int:
        """The code of the rules."""
        return self.power

    def rules(self, names: Mapping[str, Any]) -> Mapping[str, Rule | None]:
        """Return what a step does with each weight's sigma."""
        return slope_of(self.target, self.power, names)

    def changed(self, parameter: Tensor) -> Tensor | None:
        """Return the tensor that a step changes: the gradient, or None where there is none."""
        return parameter.grad if parameter.requires_grad else None


@dataclass
class Limit:
    """Hold the bound of a constraint. Its steps change the weights themselves."""

    target: Factor
    normalize: bool
    factor: Factor = 0.0

    @property
    def code(self) -> int:
        """The code of the bounds."""
        return EXACTLY if self.normalize else AT_MOST

    def rules(self, names: Mapping[str, Any]) -> Mapping[str, Rule | None]:
        """Return what a step does with each weight's sigma."""
        return bounds_of(self.target, self.normalize, names)

    def changed(self, parameter: Tensor) -> Tensor:
        """Return the tensor that a step changes: the weight, outside of autograd."""
        return parameter.detach()


class JobCache:
    """Keep the jobs of each optimizer, and rebuild them only where something has changed.

    Validation is skipped while nothing it depends on has changed: the same parameters at the same
    addresses, gradients of the same dtype, shape and strides. On a CPU the checks of a small
    network would otherwise cost more than its step.

    Each set of parameters that have a gradient has a list of its own: experts, LayerDrop and layers
    that are frozen by turns need no new list where a set comes back.

    Parameters
    ----------
    engines : sequence of Engine
        The engines that run the jobs. What they accepted stays accepted while a list is kept.

    Attributes
    ----------
    state_is_out : bool
        True once others have the state's tensors. To send one to another process moves it to shared
        memory, so from then on each step looks at the addresses of V, sigma and u.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = engines
        self.state_is_out = False
        # The lists of each optimizer, the one that was used last at the end.
        self._kept: WeakKeyDictionary[object, dict[_Key, _Kept]] = WeakKeyDictionary()

    def clear(self) -> None:
        """Forget every list: the state's tensors have moved."""
        self._kept.clear()

    def current(
        self,
        owner: object,
        names: Collection[str],
        parameters: Mapping[str, Tensor],
        penalty: Penalty | Limit,
        scaled: Mapping[str, Number] | None,
        n_iter: int,
    ) -> JobList | None:
        """Return the jobs of the last step with this step's gradients, or None if they do not fit.

        Parameters
        ----------
        owner : object
            The optimizer. Several optimizers keep lists of their own.
        names : collection of str
            The parameters of this step.
        parameters : mapping of name to tensor
            All parameters.
        penalty : Penalty
        scaled : mapping of name to number, optional
            λ times the scale of gradients that are still scaled, in place of ``penalty.factor``.
        n_iter : int
            Power iterations. Steps with another number keep lists of their own.
        """
        lists = self._kept.get(owner)
        if not lists:
            return None
        # Out of the dictionary until it is known to fit: a list that does not fit, or an error,
        # must keep no gradient alive.
        latest, kept = lists.popitem()
        if (
            latest[0] == n_iter
            and not (self.state_is_out and kept.state_has_moved())
            and kept.fits(names, penalty, scaled, parameters)
        ):
            lists[latest] = kept
            return kept.jobs
        key = _key(n_iter, names, parameters, penalty)
        if key != latest:  # it is the list of other gradients, and may be needed again
            release(kept.jobs)
            lists[latest] = kept
        other = lists.pop(key, None)
        if other is None or (self.state_is_out and other.state_has_moved()):
            return None
        if not other.fits(names, penalty, scaled, parameters):
            return None
        lists[key] = other
        return other.jobs

    def build(
        self,
        owner: object,
        names: Collection[str],
        parameters: Mapping[str, Tensor],
        penalty: Penalty | Limit,
        scaled: Mapping[str, Number] | None,
        n_iter: int,
        state: SpectralState,
    ) -> JobList:
        """Return new jobs of the parameters that have a gradient, and keep them for `current`.

        Raises
        ------
        spectral_core.SpectralError
            If a gradient does not fit, before any gradient changes.
        """
        jobs = _build(names, parameters, state, penalty, scaled)
        kept = _Kept(jobs, names, parameters, penalty)
        lists = self._kept.setdefault(owner, {})
        key = _key(n_iter, names, parameters, penalty)
        lists.pop(key, None)
        if kept.cacheable:
            keep_recent(lists, key, kept, LISTS)
        return kept.jobs


def _key(
    n_iter: int,
    names: Collection[str],
    parameters: Mapping[str, Tensor],
    penalty: Penalty | Limit,
) -> _Key:
    return n_iter, tuple(name for name in names if penalty.changed(parameters[name]) is not None)


class _Place(NamedTuple):
    """The kind and place of a parameter and its gradient when they were validated."""

    address: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    grad_dtype: torch.dtype
    grad_stride: tuple[int, ...] | None  # None: contiguous


class _Kept:
    """A `JobList`, and the kind and place of everything when it was validated."""

    def __init__(
        self,
        jobs: JobList,
        names: Collection[str],
        parameters: Mapping[str, Tensor],
        penalty: Penalty | Limit,
    ) -> None:
        self.jobs = jobs
        self.cacheable = bool(jobs) and all(map(is_cacheable, jobs))
        self._names = list(names)
        self._parameters = [parameters[name] for name in self._names]
        self._changed = penalty.changed
        by_name = {job.name: job for job in jobs} if self.cacheable else {}
        self._jobs = [by_name.get(name) for name in self._names]
        self._places = [None if job is None else _place(job) for job in self._jobs]
        self._state_pointers = [
            x.data_ptr for job in by_name.values() for x in job.last or (job.V,) if x.is_cpu
        ]
        self._state_addresses = [address() for address in self._state_pointers]
        self._lazy = any(job.weight.is_complex() for job in by_name.values())
        self._factor: Any = None  # the number that the jobs' factors are; None: ask again
        self._rule = penalty.target, penalty.code

    def state_has_moved(self) -> bool:
        """Return True if V, sigma or u of a job is at another address."""
        return [address() for address in self._state_pointers] != self._state_addresses

    def fits(
        self,
        names: Collection[str],
        penalty: Penalty | Limit,
        scaled: Mapping[str, Number] | None,
        parameters: Mapping[str, Tensor],
    ) -> bool:
        """Give the jobs the gradients and factors of this step; return False if they do not fit."""
        return (
            self.refresh(names)
            and self.has_rules(penalty, parameters)
            and self.set_factors(penalty, scaled, parameters)
        )

    def refresh(self, names: Collection[str]) -> bool:
        """Give each job the gradient of this step; return False if anything else has changed."""
        if [*names] != self._names or torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_autocast_enabled("cuda"):
            return False
        addresses: list[int] = []
        taken: set[int] = set()
        for parameter, job, place in zip(self._parameters, self._jobs, self._places, strict=True):
            grad = self._changed(parameter)
            if grad is None:
                if job is None:
                    continue
                return False
            if job is None or place is None:
                return False
            address, dtype, shape, stride, grad_dtype, grad_stride = place
            if (
                parameter.data_ptr() != address
                or parameter.dtype is not dtype
                or parameter.shape != shape
                or parameter.stride() != stride
                or parameter.is_neg()
                or type(grad) not in _PLAIN
                or grad.dtype is not grad_dtype
                or grad.shape != shape
                or grad.layout is not torch.strided
                or grad.requires_grad
                or grad.is_neg()
                # One tensor for two weights: the new list gives each its own.
                or (here := grad.data_ptr()) in taken
                or grad.is_contiguous() is not (grad_stride is None)
                or (grad_stride is not None and grad.stride() != grad_stride)
            ):
                return False
            job.grad = grad
            taken.add(here)
            addresses.append(here)
        # A lazy conjugation changes the numbers, but not the address.
        if self._lazy and any(x.is_conj() for job in self.jobs for x in (job.weight, job.grad)):
            return False
        self.jobs.addresses = addresses
        return True

    def has_rules(self, penalty: Penalty | Limit, names: Mapping[str, Any]) -> bool:
        """Give each job its target and power; return False if one is another kind of number."""
        target, code = self._rule
        if penalty.target is target and penalty.code == code and _is_constant(target):
            return True
        rules = penalty.rules(names)
        self._rule = penalty.target, penalty.code
        changed = [job for job in self.jobs if not same_rule(job.rule, rules[job.name])]
        for job in changed:
            before, rule = job.rule, rules[job.name]
            if before is None or rule is None or before.code != rule.code:
                return False
            if _kind(before.target) != _kind(rule.target):
                return False
            job.rule = rule
        if changed:
            self.jobs.renew()
        return True

    def set_factors(
        self, penalty: Penalty | Limit, scaled: Mapping[str, Number] | None, names: Collection[str]
    ) -> bool:
        """Give each job its factor; return False if one is another kind of number."""
        if scaled is None and self._factor is penalty.factor:
            return True
        factors = check_factors(penalty.factor, names) if scaled is None else scaled
        if any(_kind(factors[job.name]) != _kind(job.factor) for job in self.jobs):
            return False
        for job in self.jobs:
            job.factor = factors[job.name]
        self.jobs.renew()
        constant = scaled is None and _is_constant(penalty.factor)
        self._factor = penalty.factor if constant else None
        return True


def release(jobs: JobList) -> None:
    """Drop the gradients: a list that is kept must not keep them alive until the next step."""
    for job in jobs:
        job.grad = None


def _build(
    names: Collection[str],
    parameters: Mapping[str, Tensor],
    state: SpectralState,
    penalty: Penalty | Limit,
    scaled: Mapping[str, Number] | None,
) -> JobList:
    grads: dict[str, Tensor] = {}
    for name in names:
        grad = penalty.changed(parameters[name])
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise DTypeError(
                f"the gradient of {name!r} is {grad.layout}: a rank-1 term has no sparse form, so "
                "exclude the weight or make its gradient dense (sparse=False)"
            )
        grads[name] = grad
    if isinstance(penalty, Penalty):
        _separate(grads, parameters)
    jobs = JobList(
        make_jobs(
            grads,
            parameters,
            state,
            grads=grads,
            factors=check_factors(penalty.factor, parameters) if scaled is None else scaled,
            rules=penalty.rules(parameters),
        )
    )
    for job in jobs:
        if type(job.weight) in _PLAIN:
            # The parameter itself, not a view of its memory: a model that is moved to another
            # device must not keep its old memory until the next step.
            job.weight = parameters[job.name]
    return jobs


def _separate(grads: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Give a gradient memory of its own where it shares some, with itself or with another.

    `torch.autograd.grad` returns one tensor for both terms of a sum, and an expanded tensor for the
    gradient of a mean. In place, each weight would get the other's term too.
    """
    taken: set[int] = set()
    for name, grad in grads.items():
        if type(grad) not in _PLAIN:
            continue
        address = grad.data_ptr()
        expanded = 0 in grad.stride() and any(
            size > 1 and stride == 0 for size, stride in zip(grad.shape, grad.stride(), strict=True)
        )
        if expanded or address in taken:
            own = torch.empty_like(grad, memory_format=torch.contiguous_format).copy_(grad)
            parameters[name].grad = grads[name] = own
        taken.add(address)


def is_cacheable(job: Job) -> bool:
    """Return True if addresses say all: a subclass, or another device, may have none."""
    return (
        type(job.weight) in _PLAIN
        and type(job.grad) in _PLAIN
        and job.weight.device.type in ("cpu", "cuda")
        and not job.grad.requires_grad
        # A lazy conjugation or negation changes the numbers, but not the address.
        and not any(x.is_conj() or x.is_neg() for x in (job.weight, job.grad))
    )


def _place(job: Job) -> _Place:
    weight, grad = job.weight, job.grad
    stride = None if grad.is_contiguous() else grad.stride()
    return _Place(
        weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), grad.dtype, stride
    )


def _is_constant(number: Factor) -> bool:
    """Return True if a number changes only where an attribute is set, or on the device.

    The entries of a mapping and the value of a NumPy array can change unseen.
    """
    return isinstance(number, (int, float, Tensor))


def _kind(factor: Number) -> Any:
    return (factor.device, factor.dtype) if isinstance(factor, Tensor) else float


def write_back(jobs: Sequence[Job], triplets: Sequence[Triplet]) -> None:
    """Write new triplets into the state's own tensors.

    Results are written into the existing v, sigma and u tensors, because captured CUDA graphs (and
    anyone holding the state) refer to them by address.
    """
    if isinstance(jobs, JobList) and triplets is jobs.lasts:
        return  # the engine has written them there already
    write_into(
        pair
        for job, triplet in zip(jobs, triplets, strict=True)
        if job.last is not None and triplet is not job.last
        for pair in zip(job.last, triplet, strict=True)
    )
