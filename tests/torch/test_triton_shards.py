"""Test that the Triton kernels run the shards of divided weights."""

from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")
if not torch.distributed.is_available():
    pytest.skip("PyTorch is built without torch.distributed", allow_module_level=True)

import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Shard, distribute_tensor  # noqa: E402

from spectral_torch import SpectralNormRegularizer, engines  # noqa: E402
from triton_jobs import CUDA, DEVICE, TritonEngine, bf16, f32, runs  # noqa: E402

SHAPES = {"a": (24, 40), "b": (16, 33), "c": (8, 3, 3, 3), "d": (3, 6, 5)}
LAYOUTS = {"c": "oihw", "d": "soi"}


@pytest.fixture
def mesh(tmp_path):
    """The mesh of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if CUDA else "gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh(DEVICE.type, (1,))
    dist.destroy_process_group()


@runs
@pytest.mark.parametrize(("dtype", "tolerance"), [(f32, 1e-5), (bf16, 1e-2)])
def test_shards_are_as_whole_weights(mesh, monkeypatch, dtype, tolerance):
    # Interpreted, the tensors are the CPU's, which has kernels of its own.
    monkeypatch.setattr(engines, "_cpu_engine", list)
    run, seen = TritonEngine.run, []

    def counted(self, jobs, n_iter):
        seen.extend((n_iter, job.name) for job in jobs)
        return run(self, jobs, n_iter)

    generator = torch.Generator().manual_seed(0)
    weights, grads = (
        {k: torch.randn(s, generator=generator).to(DEVICE, dtype) for k, s in SHAPES.items()}
        for _ in range(2)
    )

    def step(place):
        parameters = {key: nn.Parameter(place(w.clone())) for key, w in weights.items()}
        reg = SpectralNormRegularizer(parameters, 0.3, layouts=LAYOUTS, warmup_iters=2)
        for _ in range(2):
            for key, parameter in parameters.items():
                parameter.grad = place(grads[key].clone())
            seen.clear()
            reg.add_gradients_()
        return reg, {key: parameter.grad for key, parameter in parameters.items()}

    with patch.object(TritonEngine, "run", counted):
        whole, expected = step(lambda x: x)
        sharded, found = step(lambda x: distribute_tensor(x, mesh, [Shard(0)]))
    assert sorted(seen) == [(n_iter, name) for n_iter in (0, 1) for name in SHAPES]
    for name, value in expected.items():
        close = torch.testing.assert_close
        close(found[name].full_tensor(), value, rtol=tolerance, atol=tolerance)
        close(sharded.sigmas()[name], whole.sigmas()[name], rtol=1e-5, atol=0.0)
