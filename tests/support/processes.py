"""Processes that talk by gloo, each of which runs what it is told."""

import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing


class Processes:
    """``run(function, *args)`` gives what ``function(*args)`` returned on each rank."""

    def __init__(self, size):
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp()
        self._pipes, self._workers = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = rank, size, Path(folder, "store"), theirs
            worker = context.Process(target=_serve, args=args, daemon=True)
            worker.start()
            self._pipes.append(ours)
            self._workers.append(worker)

    def run(self, function, *args):
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [pipe.recv() for pipe in self._pipes]
        failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self):
        for pipe in self._pipes:
            pipe.send(None)
        for worker in self._workers:
            worker.join(timeout=30)
            if worker.is_alive():
                worker.kill()


def _serve(rank, size, store, pipe):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    while (told := pipe.recv()) is not None:
        function, args = told
        try:
            pipe.send((None, function(*args)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
    dist.destroy_process_group()
