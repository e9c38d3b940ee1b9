"""Jobs over processes that end with their parent, whether it returns, fails, is interrupted or is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, TypeVar, cast

from fundusfm.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Tick = Callable[[int], None]
_DONE, _TICK, _FAILED = "done", "tick", "failed"


def default_workers() -> int:
    """As many processes as this one may use cores, at most eight: beyond that the disk is the limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def run_jobs(
    work: Callable[[Job, Tick], Result], jobs: Sequence[Job], num_workers: int, tick: Tick
) -> Generator[Result, None, None]:
    """`work(job, tick)` for every job, results in the order they finish.

    `work` travels once to each worker. The modules that it names in `preload`, if it has that, are imported
    once for all workers of a process's first call, where the system can fork them. `tick(n)` runs in this
    process when a worker reports n things done. With one worker or one job everything happens here. An
    exception in a worker is raised here, and every worker has ended before this generator returns or raises.
    """
    num_workers = min(num_workers, len(jobs))
    if num_workers <= 1:
        for job in jobs:
            yield work(job, tick)
        return
    with _workers(work, num_workers) as connections:
        waiting = list(reversed(jobs))
        for connection in connections:
            connection.send(waiting.pop())
        busy: list[Any] = list(connections)
        while busy:
            for connection in cast("list[Any]", wait(busy)):
                kind, value = _receive(connection)
                if kind == _TICK:
                    tick(value)
                    continue
                if waiting:
                    connection.send(waiting.pop())
                else:
                    busy.remove(connection)
                yield value


def _receive(connection: Any) -> tuple[str, Any]:
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise UserError(
            "a worker process was ended from outside, most likely because the machine ran out of memory",
            fix="run the same command again with fewer workers: what is finished is kept",
        ) from error
    if kind == _FAILED:
        raise value
    return kind, value


@contextmanager
def _workers(work: Callable[..., Any], num_workers: int) -> Iterator[list[Any]]:
    """Connections to started workers; the workers are gone when the block is left in any way."""
    name = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(name)
    if name == "forkserver":
        # Imported once, not once a worker.
        context.set_forkserver_preload([type(work).__module__, *getattr(work, "preload", ())])
    pairs = [context.Pipe() for _ in range(num_workers)]
    processes = [context.Process(target=_serve, args=(theirs,)) for _, theirs in pairs]
    try:
        with interrupts_blocked():
            for process in processes:
                process.start()
        for _, theirs in pairs:
            theirs.close()
        for ours, _ in pairs:
            ours.send(work)
        yield [ours for ours, _ in pairs]
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """For the start of workers: a Ctrl-C waits until they are there.

    At a fork Python would drop the exception that its handler raises. Workers inherit the mask, so a Ctrl-C
    in their first moments prints no traceback for each of them; the handler is there for a signal that
    another thread of this process takes.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and callable(handler) and hasattr(signal, "pthread_sigmask")):
        yield
        return
    resource_tracker.ensure_running()  # started with the first worker, it would lift the mask
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(signal.SIGINT, None)


def _serve(connection: Any) -> None:
    """A worker's life: receive the work, then job after job, until it is terminated or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work = connection.recv()
    while True:
        job = connection.recv()
        try:
            result = _DONE, work(job, lambda count: connection.send((_TICK, count)))
        except Exception as error:
            result = _FAILED, error
        connection.send(result)


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers; without this they would write into the next run's folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
