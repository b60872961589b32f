"""The many-at-once step gives what the plain step gives, one by one."""

import pytest

from spectral_core import Layout
from spectral_core._arrays import array_namespace
from spectral_core.layout import plan_of
from spectral_core.power import PowerIteration, start_vector
from spectral_core.step import Task, plain_step_

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from spectral_torch.multi_tensor import MultiTensorStep  # noqa: E402

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def weight(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


WEIGHTS = [
    (weight(5, 7), "oi"),
    (weight(4, 6, dtype=torch.float64), "oi"),
    (weight(3, 2, 4), "soi"),
    (weight(9, 3, seed=1), "io"),
    (weight(1, 8), "oi"),
    (weight(8, 1), "oi"),
    (weight(6, 5, dtype=torch.bfloat16), "oi"),
    (weight(6, 5, dtype=torch.float16), "oi"),
    (weight(3, 4, dtype=torch.complex64), "oi"),
    (weight(2, 3, 4, 5), "hwio"),  # its columns lie in another order
    (weight(4, 3, 2, 2), "iohw"),
    (weight(8, 3, 3), Layout("(go)ik", groups=2)),
    (torch.zeros(3, 5), "oi"),
    (torch.full((2, 3), torch.nan), "oi"),
    (torch.full((2, 3), torch.inf), "oi"),
    (torch.full((2, 3), 3e38), "oi"),
    (weight(7, 4).T, "oi"),  # not contiguous
]


def tasks(device, factor=0.3, *, n_vectors=None):
    made = []
    for i, (W, layout) in enumerate(WEIGHTS):
        W = W.to(device)
        plan = plan_of(layout, W.shape, "w")
        right = plan.right if n_vectors is None else (*plan.right[:-1], n_vectors, plan.right[-1])
        v = start_vector(right, W, name=str(i))
        u, sigma = (torch.ones(plan.matrix[:-k], device=device).to(v) for k in (1, 2))
        grad = None if i == 1 else torch.ones_like(W)
        last = PowerIteration(sigma.real.contiguous(), u, v)
        each = torch.tensor(factor, device=device) if i == 2 else factor
        made.append(Task(str(i), W, grad, v, each, plan, array_namespace(W), last))
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_iter", [0, 1, 3])
@pytest.mark.parametrize("n_vectors", [None, 2])
def test_equals_the_plain_step(n_iter, n_vectors, device):
    found = MultiTensorStep()(tasks(device, n_vectors=n_vectors), n_iter)
    expected = plain_step_(tasks(device, n_vectors=n_vectors), n_iter)
    for i, (triple, other) in enumerate(zip(found.triples, expected.triples, strict=True)):
        assert triple.sigma.dtype == other.sigma.dtype
        torch.testing.assert_close(triple.v, other.v, rtol=1e-4, atol=1e-4)
        if not other.sigma.isfinite().all():  # said by a NaN or by an Inf
            assert not triple.sigma.isfinite().any()
            assert not found.grads[i].isfinite().all()
            continue
        torch.testing.assert_close(triple.sigma, other.sigma, rtol=1e-5, atol=0)
        torch.testing.assert_close(triple.u, other.u, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.grads[i], expected.grads[i], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_each_weight_has_its_factor(device):
    mine, theirs = tasks(device)[:6], tasks(device)[:6]
    for group in (mine, theirs):
        for i in range(6):
            number = 0.1 * (i + 1)
            factor = torch.tensor(number, device=device) if i % 2 else number
            group[i] = group[i]._replace(factor=factor)
    found, expected = MultiTensorStep()(mine, 1), plain_step_(theirs, 1)
    for grad, other in zip(found.grads, expected.grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)


def test_one_object_serves_other_shapes():
    step = MultiTensorStep()
    for chosen in (slice(0, 1), slice(3, 6), slice(0, 1), slice(4, 5)):
        found, expected = step(tasks("cpu")[chosen], 1), plain_step_(tasks("cpu")[chosen], 1)
        for triple, other in zip(found.triples, expected.triples, strict=True):
            torch.testing.assert_close(tuple(triple), tuple(other), rtol=1e-5, atol=1e-5)


def test_of_nothing_is_nothing():
    assert MultiTensorStep()([], 1) == ([], [])


def test_what_it_keeps_is_bounded():
    step, everything = MultiTensorStep(), tasks("cpu")
    for i in range(40):
        step([task._replace(name=str(k)) for k, task in enumerate(everything[:1] * (i + 1))], 1)
    assert step._owners.cache_info().currsize <= 16
