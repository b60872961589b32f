"""Weights that processes share: two of them timed, and an account of a large model on 256 GPUs.

For the account one process runs the library's code on its shards. What it reads, writes and would
send is counted. Seconds follow from assumptions: `python -m benchmarks.speed.sharded --help`.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import read_json, write_json

from .cases import Case, llama
from .peers_torch import adapter, tensors
from .report import EMPTY, NOTES, Result
from .report import account as account_table
from .timing import WARM_UPS, sample, summarized

PROCESSES, ROUNDS = 2, 30
OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "n_vectors=4": {"n_vectors": 4}}


def measure(cases: Iterable[Case]) -> Result:
    """Return the times of sharded and of whole weights in the first of the processes."""
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(process, (Path(folder), [*cases]), PROCESSES)
        return read_json(Path(folder) / "times.json")


def process(rank: int, folder: Path, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    store, found = dist.FileStore(str(folder / "store"), PROCESSES), {}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for case in cases:
        whole = tensors(case, "cpu", 0), tensors(case, "cpu", 1)
        parts = ({n: distribute_tensor(x, mesh, [Shard(0)]) for n, x in w.items()} for w in whole)
        steps = {"whole": adapter(*whole), "sharded": adapter(*parts)}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(WARM_UPS + ROUNDS):  # as many in each process: they wait for each other
            for name, step in steps.items():
                dist.barrier()
                seconds[name].append(sample(step, 1, "cpu"))
        found[case.name] = summarized({name: taken[WARM_UPS:] for name, taken in seconds.items()})
    if rank == 0:
        write_json(folder / "times.json", found, 6)
    dist.destroy_process_group()


class Traffic(TorchDispatchMode):
    """Counts operations, the bytes that they read and write, and messages."""

    counts: Counter[str]

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        used, made = (
            sum(x.nbytes for x in tree_leaves(tree) if isinstance(x, Tensor))
            for tree in ((args, kwargs), found)
        )
        if func.namespace == "c10d":
            self.counts.update({"messages": 1, "sent": used})
        elif not func.is_view:
            self.counts.update({"operations": 1, "moved": used + made})
        return found


def account(assumed: dict[str, Any] = NOTES["account"]) -> Result:
    """Return what a step moves and sends in one process, and how long that would take."""
    layers = llama(80, hidden=8192, kv=1024, mlp=28672) | {"head": (128256, 8192)}
    size, gpus = sum(m * n for m, n in layers.values()), assumed["gpus"]
    step_s, found = 6 * size * assumed["tokens"] / (gpus * assumed["flops"]), {}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    mesh = init_device_mesh("cpu", (gpus,))
    arrays: tuple[dict[str, Tensor], ...] = ({}, {})
    for (name, (rows, columns)), shards in product(layers.items(), arrays):
        local, whole = torch.full((rows // gpus, columns), 0.01), torch.Size((rows, columns))
        options = {"run_check": False, "shape": whole, "stride": (columns, 1)}
        shards[name] = DTensor.from_local(local, mesh, [Shard(0)], **options)
    for name, options in OPTIONS.items():
        step = adapter(*arrays, kernels=False, **options)
        with Traffic() as traffic:
            traffic.counts = Counter()
            step()
        row: Result = dict(traffic.counts)
        # A ring sends each byte almost twice, once to sum and once to spread the sums.
        bits = 8 * 2 * (1 - 1 / gpus) * row["sent"]
        row["network_s"] = row["messages"] * assumed["latency"] + bits / assumed["link"]
        row["memory_s"] = row["moved"] / assumed["bandwidth"]
        row["launch_s"] = row["operations"] * assumed["launch"]
        total = max(row["memory_s"], row["launch_s"]) + row["network_s"]
        found[name] = row | {"share": total / step_s}
    dist.destroy_process_group()
    about = {"weights": len(layers), "parameters": size, "step_s": step_s}
    return {**about, "assumed": assumed, "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.speed.sharded")
    for name, default in NOTES["account"].items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    print(account_table(EMPTY | {"account": account(vars(parser.parse_args()))}))


if __name__ == "__main__":
    main()
