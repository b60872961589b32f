"""The power iteration of many matrices at once: the core's arithmetic in fewer calls.

For the small matrices of most networks a step is bound by the number of operations, not by their
size. The two products are made one by one; norms and their inverses, of all matrices together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_core import PowerIteration
from spectral_core.block import iterations as one_by_one

_PLAIN = (torch.float32, torch.float64)


def iterations(
    matrices: Sequence[Tensor], vectors: Sequence[Tensor], n_iter: int
) -> list[PowerIteration]:
    """`spectral_core.block.iterations` of these matrices, from their vectors.

    Parameters
    ----------
    matrices : sequence of tensor, shape (..., m, n)
    vectors : sequence of tensor, shape (..., n) or (..., k, n)
    n_iter : int
        At least one.

    Returns
    -------
    list of PowerIteration
    """
    found: dict[int, PowerIteration] = {}
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (W, v) in enumerate(zip(matrices, vectors, strict=True)):
        if (
            W.ndim == 2
            and v.ndim == 1
            and W.dtype in (torch.float32, torch.float64)
            and v.dtype == W.dtype
        ):
            alike.setdefault((W.device, W.dtype), []).append(i)
        else:  # stacks, several vectors, half precision, complex
            (found[i],) = one_by_one([W], [v], n_iter)
    for indices in alike.values():
        triples = _together([matrices[i] for i in indices], [vectors[i] for i in indices], n_iter)
        found.update(zip(indices, triples, strict=True))
    return [found[i] for i in range(len(matrices))]


def _together(Ws: list[Tensor], vs: list[Tensor], n_iter: int) -> list[PowerIteration]:
    for _ in range(n_iter):
        us, _, _ = _normalized([torch.mv(W, v) for W, v in zip(Ws, vs, strict=True)])
        units, inverses, sigmas = _normalized([u @ W for W, u in zip(Ws, us, strict=True)])
        # As in the core: v stays where σ is zero or not finite.
        usable = (inverses > 0).unbind()
        vs = [torch.where(*each) for each in zip(usable, units, vs, strict=True)]
    return [PowerIteration(*each) for each in zip(sigmas.unbind(), us, vs, strict=True)]


def _normalized(xs: list[Tensor]) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """The core's ``_normalized`` of each vector: units, and all inverses and lengths."""
    lengths = torch.stack(torch._foreach_norm(xs))
    inverses = lengths / (lengths.square() + torch.finfo(lengths.dtype).tiny)
    return torch._foreach_mul(xs, list(inverses.unbind())), inverses, lengths
