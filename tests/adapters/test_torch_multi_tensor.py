"""The many-at-once power iteration gives what the core gives, one by one."""

import pytest

from spectral_core import power_iteration

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from spectral_torch.multi_tensor import iterations  # noqa: E402

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def pair(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator).to(dtype)
    v = torch.randn(shape[:-2] + shape[-1:], generator=generator)
    return W, v.to(dtype if dtype.is_complex or dtype == torch.float64 else torch.float32)


PAIRS = [
    pair(5, 7),
    pair(4, 6, dtype=torch.float64),
    pair(3, 2, 4),  # a stack
    pair(9, 3, seed=1),
    pair(1, 8),
    pair(8, 1),
    pair(6, 5, dtype=torch.bfloat16),
    pair(6, 5, dtype=torch.float16),
    pair(3, 4, dtype=torch.complex64),
    (torch.zeros(3, 5), pair(3, 5)[1]),
    (torch.full((2, 3), torch.nan), pair(2, 3)[1]),
    (torch.full((2, 3), torch.inf), pair(2, 3)[1]),
    (torch.full((2, 3), 3e38), pair(2, 3)[1]),
    (pair(7, 4)[0].T, pair(4, 7)[1]),  # not contiguous
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_iter", [1, 3])
def test_equals_the_core(n_iter, device):
    Ws, vs = zip(*((W.to(device), v.to(device)) for W, v in PAIRS), strict=True)
    together = iterations(Ws, vs, n_iter)
    assert len(together) == len(PAIRS)
    for W, v, found in zip(Ws, vs, together, strict=True):
        expected = power_iteration(W, v, n_iter=n_iter)
        assert found.sigma.dtype == expected.sigma.dtype
        torch.testing.assert_close(found.v, expected.v, rtol=1e-5, atol=1e-6)
        if not expected.sigma.isfinite().all():  # said by a NaN or by an Inf
            assert not found.sigma.isfinite().any()
            continue
        torch.testing.assert_close(found.sigma, expected.sigma, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.u, expected.u, rtol=1e-5, atol=1e-6)


def test_of_nothing_is_nothing():
    assert iterations([], [], 1) == []
