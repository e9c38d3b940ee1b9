"""Real processes that share a gloo group: `run_ranks(2, function, argument)` returns each rank's answer."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT_S = 120


def free_port() -> int:
    """Free again once this returns: a rank that is alone listens there itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, limit_s: float = LIMIT_S
) -> list[Any]:
    """Fork `world_size` ranks, call `function(rank, *arguments)` in each, end them all if one fails."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        processes = [
            context.Process(
                target=_work, args=(rank, world_size, folder, queue, function, arguments), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            received = [queue.get(timeout=limit_s) for _ in processes]
            answers = {rank: pickle.loads(answer) for rank, answer in received}
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
    failures = [answer for answer in answers.values() if isinstance(answer, _Failure)]
    if failures:
        raise AssertionError("\n".join(failure.text for failure in failures))
    return [answers[rank] for rank in range(world_size)]


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _work(
    rank: int, world_size: int, folder: str, queue: Any, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        answer = function(rank, *arguments)
        # Pickled here: a tensor that travels as shared memory dies with the process it came from.
        queue.put((rank, pickle.dumps(answer)))
    except BaseException:
        queue.put((rank, pickle.dumps(_Failure(f"rank {rank}:\n{traceback.format_exc()}"))))
        raise
    finally:
        dist.destroy_process_group()
