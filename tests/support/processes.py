"""Processes that talk by gloo, each of which runs what it is told."""

import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from time import monotonic

import torch
import torch.distributed as dist
from torch import multiprocessing

LIMIT = 180  # seconds: more than the slowest function needs on a busy machine


class Processes:
    """``run(function, *args)`` gives what ``function(*args)`` returned on each rank."""

    def __init__(self, size):
        self._size = size
        self._start()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp()
        self._pipes, self._workers = [], []
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            args = rank, self._size, Path(folder, "store"), theirs
            worker = context.Process(target=_serve, args=args, daemon=True)
            worker.start()
            self._pipes.append(ours)
            self._workers.append(worker)

    def run(self, function, *args):
        answers = self._answers(function, args)
        if answers is None:
            # Seen once in thousands of runs: one rank waits for ever in a collective of PyTorch's
            # that the others have left. What hangs twice is ours.
            warnings.warn(f"{function.__name__}{args} hung, and is run again", stacklevel=2)
            for worker in self._workers:
                worker.kill()
            self._start()
            answers = self._answers(function, args)
        assert answers is not None, f"{function.__name__}{args} hangs"
        failed = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(answers) if error]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def _answers(self, function, args):
        """Return the answers of all ranks, or None if one of them hangs."""
        for pipe in self._pipes:
            pipe.send((function, args))
        end = monotonic() + LIMIT
        if not all(pipe.poll(max(0.0, end - monotonic())) for pipe in self._pipes):
            return None
        return [pipe.recv() for pipe in self._pipes]

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
