"""The work of each process in the distributed tests, which import it by its name."""

from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from spectral_torch import Layout, SpectralNormConstraint, SpectralNormRegularizer
from spectral_torch.engines import CpuEngine
from spectral_torch.engines.shards import Shards

# Sizes that four processes do not divide evenly, nor the groups.
WEIGHTS = {
    "linear": ((10, 7), Layout("oi")),
    "conv": ((6, 5, 3, 2), Layout("oihw")),
    "transposed": ((5, 6, 3, 2), Layout("iohw")),
    "grouped": ((12, 3, 2, 2), Layout("(go)ihw", 4)),
    "few_groups": ((14, 3), Layout("(go)i", 2)),
    "grouped_transposed": ((12, 3, 2, 2), Layout("(gi)ohw", 3)),
    "stack": ((3, 4, 5), Layout("sio")),
    "one_row": ((1, 9), Layout("oi")),
}
PLACEMENTS = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "whole": ((4,), [Replicate()]),
    "rows and columns": ((2, 2), [Shard(0), Shard(1)]),
    "columns and rows": ((2, 2), [Shard(1), Shard(0)]),
    "rows twice": ((2, 2), [Shard(0), Shard(0)]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
    "whole inside": ((2, 2), [Shard(1), Replicate()]),
}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def first_vectors(reg, *, several):
    """v; of several the first: the others of a matrix of low rank are noise."""
    found = {key: value for key, value in reg.state_dict().items() if key.endswith(".v")}
    return {key: (v[..., 0, :] if several else v).clone() for key, v in found.items()}


def weights(dtype):
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype)
        for name, (shape, _) in WEIGHTS.items()
    }


def twins(name, dtype, make, steps, *, kernels=False):
    """Weights that lie as `PLACEMENTS` says, and whole ones, after steps with ``make``'s hook."""
    mesh_shape, placements = PLACEMENTS[name]
    mesh = init_device_mesh("cpu", mesh_shape)
    layouts = {key: layout for key, (_, layout) in WEIGHTS.items()}
    for sharded in (True, False):
        parameters = {
            key: nn.Parameter(distribute_tensor(w, mesh, placements) if sharded else w.clone())
            for key, w in weights(dtype).items()
        }
        optimizer = torch.optim.SGD(parameters.values(), lr=0.1, momentum=0.9)
        hook = make(parameters, layouts=layouts, kernels=kernels).attach(optimizer)
        generator = torch.Generator().manual_seed(4)
        for _ in range(steps):
            for parameter in parameters.values():
                grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)
                parameter.grad = distribute_tensor(grad, mesh, placements) if sharded else grad
            optimizer.step()
        found = {key: whole(p.detach()) for key, p in parameters.items()}
        yield parameters, hook, {"weight": found, "sigma": hook.sigmas()}


def placed(name, dtype, options):
    """Steps with the regularizer, of divided weights and of whole ones, and its penalty."""
    runs, kernels = [], options.pop("kernels", False)
    make = partial(SpectralNormRegularizer, factor=0.3, **options)
    for parameters, reg, found in twins(name, dtype, make, steps=5, kernels=kernels):
        penalty = reg.penalty(differentiable=True)
        for parameter in parameters.values():
            parameter.grad = None
        penalty.backward()
        runs.append(
            {
                **found,
                "slope": {key: whole(p.grad) for key, p in parameters.items()},
                "v": first_vectors(reg, several=options.get("n_vectors", 1) > 1),
                "penalty": {"": penalty.detach()},
            }
        )
    return runs


def bounded(name, dtype, normalize):
    """The same for weights that are held at a bound, a stack's matrices by themselves."""
    make = partial(SpectralNormConstraint, bound=1.5, normalize=normalize, n_iter=3)
    return [found for _, _, found in twins(name, dtype, make, steps=3)]


def run_by_kernels():
    """Iterations, names and shapes of the shards that the kernels of the CPU run.

    First those of a step of the regularizer, then those of a step of the constraint.
    """
    mesh = init_device_mesh("cpu", (4,))
    shapes = {"a": (64, 48), "b": (32, 16)}
    parameters = {
        key: nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)]))
        for key, shape in shapes.items()
    }
    reg, limit = (make(parameters) for make in (SpectralNormRegularizer, SpectralNormConstraint))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    found, run = [], CpuEngine.run
    for step in (reg.add_gradients_, limit.constrain_):
        seen = []

        def counted(self, jobs, n_iter, seen=seen):
            seen += [(n_iter, job.name, tuple(job.weight.shape)) for job in jobs]
            return run(self, jobs, n_iter)

        with patch.object(CpuEngine, "run", counted):
            step()
        found.append(seen)
    return found


def zeros_and_nan():
    """Sigma, v before and v after a step, of weights of which some processes hold zeros or NaN."""
    mesh = init_device_mesh("cpu", (4,))
    rows = torch.arange(1.0, 25.0).reshape(8, 3)
    whole_weights = {
        "some zero": torch.where(torch.arange(8)[:, None] < 4, 0.0, rows),
        "all zero": torch.zeros(8, 3),
        "a NaN": torch.where(rows == 1.0, torch.nan, rows),
        "infinite": torch.where(rows == 1.0, torch.inf, rows),
        "small": rows * 1e-16,
        "large": rows * 1e15,
    }
    parameters = {
        key: nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]))
        for key, w in whole_weights.items()
    }
    found = {}
    for kernels in (True, False):
        reg = SpectralNormRegularizer(parameters, kernels=kernels, warmup_iters=30)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        before = first_vectors(reg, several=False)
        reg.add_gradients_()
        found[kernels] = reg.sigmas(), before, first_vectors(reg, several=False)
    return whole_weights, found


def sets_of_shards(steps):
    """How many sets of shards are made in some steps, what they hold then, and the gradients."""
    mesh = init_device_mesh("cpu", (4,))
    parameters = {
        key: nn.Parameter(distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)])) for key in "ab"
    }
    made = []
    with patch.object(Shards, "__init__", counted(Shards.__init__, made)):
        reg = SpectralNormRegularizer(parameters, warmup_iters=1)
        for step in range(steps):
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            reg.factor = 0.1 * (step + 1)
            reg.add_gradients_()
    grads = {key: whole(parameter.grad) for key, parameter in parameters.items()}
    held = [job.weight for shards in made for job in shards.jobs]
    return len(made), held, grads


def counted(function, calls):
    """The function, which notes its first argument."""

    def also_noted(self, *args, **kwargs):
        calls.append(self)
        return function(self, *args, **kwargs)

    return also_noted


class Sizes:
    """Counts the elements of all messages while it is entered."""

    def __enter__(self):
        self.elements, self.messages = 0, 0
        send = dist.all_reduce

        def counted(tensor, *args, **kwargs):
            self.elements += tensor.numel()
            self.messages += 1
            return send(tensor, *args, **kwargs)

        self._patch = patch.object(dist, "all_reduce", counted)
        self._patch.__enter__()
        return self

    def __exit__(self, *error):
        self._patch.__exit__(*error)


def traffic():
    """Elements and messages of a step, the messages PyTorch counts, and those of a penalty."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (4,))
    shapes = {"a": (64, 48), "b": (32, 16)}
    parameters = {
        key: nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [Shard(0)]))
        for key, shape in shapes.items()
    }
    reg = SpectralNormRegularizer(parameters)
    for parameter in parameters.values():
        parameter.grad = distribute_tensor(torch.zeros(parameter.shape), mesh, [Shard(0)])
    with Sizes() as sizes, CommDebugMode() as others:
        reg.add_gradients_()
    with Sizes() as of_penalty:
        reg.penalty(differentiable=True).backward()
    return sizes.elements, sizes.messages, others.get_total_counts(), of_penalty.messages


def partial_and_wrong_gradients():
    """Add terms to a gradient that is a pending sum, and to one that is not sharded: an error."""
    import spectral_core as sc

    mesh = init_device_mesh("cpu", (4,))
    w = torch.arange(12.0).reshape(4, 3)
    parameters = {
        key: nn.Parameter(distribute_tensor(w, mesh, [Replicate()])) for key in ("a", "b")
    }
    reg = SpectralNormRegularizer(parameters, factor=1.0)
    zeros = torch.zeros(4, 3)
    for key, operation in (("a", "sum"), ("b", "avg")):
        parameters[key].grad = DTensor.from_local(zeros.clone(), mesh, [Partial(operation)])
    reg.add_gradients_()
    sums = [whole(parameters[key].grad) for key in ("a", "b")]
    u, s, v = torch.linalg.svd(w)
    expected = s[0] * torch.outer(u[:, 0], v[0])

    before = parameters["a"].grad.to_local().clone()
    parameters["b"].grad = DTensor.from_local(zeros.clone(), mesh, [Partial("max")])
    try:
        reg.add_gradients_()
    except sc.ArgumentError as error:
        message = str(error)
    return sums, expected, message, torch.equal(before, parameters["a"].grad.to_local())


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 12, bias=bias),
        nn.ReLU(),
        nn.Linear(12, 3, bias=bias),
    )


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 2, 4, 4, generator=generator)
    return x, torch.randint(3, (8,), generator=generator)


def train(model, steps, *, mine=slice(None), parameters=None, **options):
    """Train and say what became of it; ``mine`` is this process's part of each batch."""
    reg = SpectralNormRegularizer(parameters or model, factor=0.1, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    reg.attach(optimizer)
    for step in steps:
        one_step(model, optimizer, step, mine)
    return reg, optimizer


def one_step(model, optimizer, step, mine=slice(None)):
    x, y = batch(step)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[mine]), y[mine]).backward()
    optimizer.step()


def outcome(model, reg):
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    return found, reg.sigmas()


def alone():
    model = net()
    reg, _ = train(model, range(6))
    return outcome(model, reg)


def ddp():
    rank, size = dist.get_rank(), dist.get_world_size()
    model = nn.parallel.DistributedDataParallel(net())
    reg, _ = train(
        model,
        range(6),
        mine=slice(rank * 8 // size, (rank + 1) * 8 // size),
        parameters=model.module,
    )
    weights, sigma = outcome(model.module, reg)
    with Sizes() as sizes:
        reg.add_gradients_()
    return weights, sigma, reg.state_dict(), sizes.messages


def sharded_net(mesh, **options):
    model = net()
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def fsdp(mesh_shape):
    mesh = init_device_mesh(
        "cpu", mesh_shape, mesh_dim_names=("copies", "shards")[-len(mesh_shape) :]
    )
    rank, size = dist.get_rank(), dist.get_world_size()
    model = sharded_net(mesh)
    reg, _ = train(model, range(6), mine=slice(rank * 8 // size, (rank + 1) * 8 // size))
    return outcome(model, reg)


def scaled(overflow_at, fused, options):
    """Fully sharded training with a GradScaler."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = sharded_net(init_device_mesh("cpu", (size,)), **options)
    mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
    return with_scaler(model, overflow_at, fused, mine)


def with_scaler(model, overflow_at, fused=False, mine=slice(0, None)):
    """Return the outcome of a model, the steps that moved v or σ, and the last scale."""
    reg = SpectralNormRegularizer(model, factor=0.1)
    # A large eps: Adam would divide what bfloat16 rounds by almost nothing.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=0.1, fused=fused)
    reg.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    moved = []
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x[mine]).float(), y[mine])).backward()
        if step == overflow_at and mine.start == 0:  # in what one process holds
            grad = next(model.parameters()).grad
            (grad.to_local() if isinstance(grad, DTensor) else grad).view(-1)[0] = torch.inf
        before = {key: value.clone() for key, value in reg.state_dict().items()}
        scaler.step(optimizer)
        scaler.update()
        moved.append(any(not torch.equal(before[k], v) for k, v in reg.state_dict().items()))
    return *outcome(model, reg), moved, scaler.get_scale()


def tensor_parallel(mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("data", "model")[-len(mesh_shape) :])
    model = net(bias=False)
    parallelize_module(model, mesh["model"], {"5": ColwiseParallel(), "7": RowwiseParallel()})
    mine = slice(None)
    if len(mesh_shape) == 2:
        fully_shard(model, mesh=mesh["data"])
        part = mesh["data"].get_local_rank()
        mine = slice(part * 8 // mesh_shape[0], (part + 1) * 8 // mesh_shape[0])
    chosen = {
        name: p for name, p in model.named_parameters() if isinstance(p, DTensor) and p.ndim == 2
    }
    reg, _ = train(model, range(6), mine=mine, parameters=chosen)
    reference = net(bias=False)
    names = {name: p for name, p in reference.named_parameters() if name in chosen}
    reference_reg, _ = train(reference, range(6), parameters=names)
    return outcome(model, reg), outcome(reference, reference_reg)


def held(model, optimizer, reg):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, "spectral": reg.state_dict()}


def save(folder, every_n_steps):
    """Train three steps, save, and go on for three more."""
    model = sharded_net(init_device_mesh("cpu", (dist.get_world_size(),)))
    reg, optimizer = train(model, range(3), every_n_steps=every_n_steps)
    checkpoint.save(held(model, optimizer, reg), checkpoint_id=folder)
    for step in range(3, 6):
        one_step(model, optimizer, step)
    return outcome(model, reg)


def resume(folder, every_n_steps):
    """Go on from what was saved, on however many processes there are."""
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model = sharded_net(init_device_mesh("cpu", (dist.get_world_size(),)))
    reg, optimizer = train(model, (), every_n_steps=every_n_steps, seed=99)
    state = held(model, optimizer, reg)
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    reg.load_state_dict(state["spectral"])
    for step in range(3, 6):
        one_step(model, optimizer, step)
    return outcome(model, reg)
