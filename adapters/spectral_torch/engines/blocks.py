"""Products with a matrix in half precision, by blocks that are cast to float32.

PyTorch multiplies a matrix in half precision only with a vector in half precision, and rounds the
result. A copy of the whole matrix in float32 is larger than the matrix, and is written and read. A
block of it stays in the cache: its memory is read once, and nothing else leaves the processor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a block for each thread: 512 KiB of float32 stay in the second cache of a core.
_BLOCK = 1 << 17
# A GPU has no such cache for itself alone, but each operation starts anew.
_BLOCK_ON_DEVICE = 1 << 24


def times(W: Tensor, V: Tensor) -> Tensor:
    """Return V Wᵀ in the dtype of V (..., k, n), for W (..., m, n) in any real dtype."""
    if W.dtype is V.dtype or (torch.is_grad_enabled() and W.requires_grad):
        return V @ W.to(V.dtype).mT
    found = V.new_zeros((*V.shape[:-1], W.shape[-2]))
    for here, block, axis in _blocks(W, V.dtype):
        if axis == -2:
            torch.matmul(V, block.mT, out=found[..., here])
        else:
            found += V[..., here] @ block.mT
    return found


def adjoint_times(W: Tensor, U: Tensor) -> Tensor:
    """Return U W in the dtype of U (..., k, m), for W (..., m, n) in any real dtype."""
    return times(W.mT, U)


def both_products(W: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return y = Wv and Wᵀy in the dtype of v, for one matrix; its rows are read once."""
    y, z = v.new_zeros(W.shape[0]), v.new_zeros(W.shape[1])
    if W.stride(0) < W.stride(1):  # a column is whole in memory, a row is not
        y = times(W, v[None, :])[0]
        return y, adjoint_times(W, y[None, :])[0]
    for here, block, _ in _blocks(W, v.dtype):
        torch.mv(block, v, out=y[here])
        z.addmv_(block.t(), y[here])
    return y, z


def scale_(x: Tensor, scale: Tensor) -> None:
    """Multiply a matrix in half precision by a number in float32, and round once."""
    for here, block, axis in _blocks(x, scale.dtype):
        x.narrow(axis, here.start, here.stop - here.start).copy_(block.mul_(scale))


def _blocks(W: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, int]]:
    """Yield parts of W in another dtype, each in the memory of the one before.

    The parts are those of the axis that yields whole pieces of memory: the rows, axis −2, or of a
    transposed matrix the columns, axis −1.
    """
    axis = -2 if W.stride(-2) >= W.stride(-1) else -1
    size = W.shape[axis]
    most = _BLOCK * torch.get_num_threads() if W.is_cpu else _BLOCK_ON_DEVICE
    count = min(size, max(1, most * size // max(1, W.numel())))
    room = torch.empty_like(W.narrow(axis, 0, count), dtype=dtype)
    for start in range(0, size, count):
        here = slice(start, min(size, start + count))
        block = room.narrow(axis, 0, here.stop - start)
        yield here, block.copy_(W.narrow(axis, start, here.stop - start)), axis
