"""The step of many matrices at once by PyTorch's own operations: the core's arithmetic in fewer.

For the small matrices of most networks a step is bound by the number of operations, not by their
size. Three a matrix are left: its two products and the update of its gradient. The vectors of all
matrices lie one after another in one tensor, and what is done to them is done to all together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_core import PowerIteration
from spectral_core.layout import lay, lying_matrix, reshaped, spread, unlay
from spectral_core.penalty import add_outer_
from spectral_core.step import Advance, Step, Task, divided_step, last_of, plain_step_

_PLAIN = (torch.float32, torch.float64)
_SETS = 16


class _Owners(NamedTuple):
    """Of each element of all u, and of all v, the place of its matrix."""

    u: Tensor
    v: Tensor


class MultiTensorStep:
    """`spectral_core.step.plain_step_` for tensors: matrices of one device and dtype together.

    Stacks, several vectors a matrix, half precision and complex numbers go one by one.

    Examples
    --------
    >>> MultiTensorStep()([], 1)
    Advance(grads=[], triples=[])
    """

    in_place = True

    def __init__(self) -> None:
        # Kept, for they are copied to the device; of weights that take part: not all may each time.
        self._owners = lru_cache(_SETS)(_owners)
        self._together: dict[Hashable, Step] = {}

    def __call__(self, tasks: Sequence[Task], n_iter: int) -> Advance:
        """Advance all tasks."""
        if not tasks:
            return Advance([], [])
        return divided_step(tasks, n_iter, self._step_of)

    def _step_of(self, task: Task) -> Step:
        weight, v = task.weight, task.v
        alone = len(task.plan.matrix) != 2 or v.ndim != 1
        if alone or weight.dtype not in _PLAIN or v.dtype is not weight.dtype:
            return plain_step_
        key = weight.device, weight.dtype
        if key not in self._together:
            self._together[key] = partial(self._advance, *key)
        return self._together[key]

    def _advance(
        self, device: torch.device, dtype: torch.dtype, tasks: Sequence[Task], n_iter: int
    ) -> Advance:
        owners = self._owners(tuple(task.plan.matrix for task in tasks), device)
        m, n = ([task.plan.matrix[axis] for task in tasks] for axis in (0, 1))
        if n_iter:
            sigma, u, v = _iterated(tasks, n_iter, owners, (m, n), torch.finfo(dtype).tiny)
            sigmas, us, vs = (
                sigma.unbind(),
                torch.split_with_sizes(u, m),
                torch.split_with_sizes(v, n),
            )
        else:
            sigmas, us, vs = zip(*map(last_of, tasks), strict=True)
            sigma, u = torch.stack(sigmas), torch.cat(us)
        factors = [task.factor for task in tasks]
        if all(factor is factors[0] for factor in factors):
            scaled = sigma * factors[0]
        else:
            scaled = torch.stack([s * f for s, f in zip(sigmas, factors, strict=True)])
        terms = torch.split_with_sizes(u * scaled.index_select(0, owners.u), m)
        for task, term, v in zip(tasks, terms, vs, strict=True):
            if task.grad is not None:
                grad = reshaped(task.grad, task.plan.split, task.xp)
                add_outer_(grad, *spread(term, v, task.plan, task.xp))
        triples = map(PowerIteration, sigmas, us, vs)
        return Advance([task.grad for task in tasks], list(triples))


def _owners(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> _Owners:
    places = torch.arange(len(shapes))
    m, n = torch.tensor(shapes).T
    u, v = (places.repeat_interleave(sizes).to(device) for sizes in (m, n))
    return _Owners(u, v)


def _iterated(
    tasks: Sequence[Task],
    n_iter: int,
    owners: _Owners,
    sizes: tuple[list[int], list[int]],
    tiny: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """σ of all, and all u and all v in a row, these in the order of `as_matrix`'s columns."""
    Ws = [lying_matrix(task.weight, task.plan, task.xp) for task in tasks]
    vs: Sequence[Tensor] = [lay(task.v, task.plan, task.xp) for task in tasks]
    v = torch.cat(list(vs))
    for _ in range(n_iter):
        u, _, _ = _normalized(_products(torch.mv, Ws, vs, sizes[0], v), owners.u, sizes[0], tiny)
        w = _products(_transposed_mv, Ws, torch.split_with_sizes(u, sizes[0]), sizes[1], v)
        unit, inverse, sigma = _normalized(w, owners.v, sizes[1], tiny)
        # As in the core: v stays where σ is zero or not finite.
        v = torch.where((inverse > 0).index_select(0, owners.v), unit, v)
        vs = torch.split_with_sizes(v, sizes[1])
    if any(task.plan.order != task.plan.lying for task in tasks):
        v = torch.cat([unlay(v, t.plan, t.xp) for v, t in zip(vs, tasks, strict=True)])
    return sigma, u, v


def _transposed_mv(W: Tensor, u: Tensor, *, out: Tensor) -> Tensor:
    return torch.mv(W.t(), u, out=out)


def _products(
    product: Callable[..., Tensor],
    Ws: Sequence[Tensor],
    xs: Sequence[Tensor],
    sizes: list[int],
    like: Tensor,
) -> Tensor:
    """The product of each matrix, one after another in one tensor."""
    found = like.new_empty(sum(sizes))
    for W, x, out in zip(Ws, xs, torch.split_with_sizes(found, sizes), strict=True):
        product(W, x, out=out)
    return found


def _normalized(
    x: Tensor, owners: Tensor, sizes: list[int], tiny: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The core's ``_normalized`` of each piece: all units, and the inverses and lengths."""
    lengths = torch.stack(torch._foreach_norm(torch.split_with_sizes(x, sizes)))
    inverses = lengths / (lengths.square() + tiny)
    return x * inverses.index_select(0, owners), inverses, lengths
