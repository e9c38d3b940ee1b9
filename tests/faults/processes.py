"""What a run takes of the machine, and leaves on it: processes, their memory and handles, shared memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

MARK = "SOAK_MARK"  # in the environment of a run, and so in that of whatever it starts
WORKER = "a loader worker"
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Process:
    """A living process of a run. Of its ranks the first was started by us, the others by the first."""

    pid: int
    parent: int
    command: str
    local_rank: int


def processes_of(mark: str) -> list[Process]:
    """Every living process that carries the mark, wherever it has gone."""
    found = []
    for one in psutil.process_iter():
        with suppress(psutil.Error), one.oneshot():  # it may end meanwhile
            environment = one.environ()
            if environment.get(MARK) == mark and one.status() not in (
                psutil.STATUS_ZOMBIE,
                psutil.STATUS_DEAD,
            ):
                rank = int(environment.get("LOCAL_RANK", "0"))
                found.append(Process(one.pid, one.ppid(), " ".join(one.cmdline()), rank))
    return found


def ranks_of(processes: list[Process]) -> dict[int, Process]:
    """The ranks by number: those that were started, not forked."""
    by_pid = {one.pid: one for one in processes}
    return {
        one.local_rank: one
        for one in processes
        if "pretrain" in one.command and _is_started(one, by_pid.get(one.parent))
    }


def _is_started(process: Process, parent: Process | None) -> bool:
    """A fork keeps its parent's environment, in which a rank that is started has a number of its own."""
    return parent is None or (process.command, process.local_rank) != (parent.command, parent.local_rank)


def workers_of(processes: list[Process]) -> list[Process]:
    """The loader workers of all ranks: their forks."""
    ranks = {one.pid: one for one in ranks_of(processes).values()}
    return [
        one
        for one in processes
        if one.pid not in ranks and one.parent in ranks and one.command == ranks[one.parent].command
    ]


@dataclass(frozen=True)
class Sample:
    """A process at a time. `own_mib`: without files that it has mapped, which it reads through as it ends."""

    at_s: float
    role: str
    rss_mib: float
    own_mib: float
    handles: int


def samples_of(mark: str, at_s: float) -> Iterator[Sample]:
    """One sample of each rank and each loader worker of a run."""
    processes = processes_of(mark)
    roles = [(f"rank {rank}", one) for rank, one in ranks_of(processes).items()]
    for role, process in [*roles, *((WORKER, one) for one in workers_of(processes))]:
        with suppress(psutil.Error):
            looked_at = psutil.Process(process.pid)
            memory = looked_at.memory_info()
            own = memory.rss - memory.shared
            yield Sample(at_s, role, memory.rss / 2**20, own / 2**20, looked_at.num_fds())


class Sampler:
    """Looks at runs every few seconds, in a thread of its own."""

    def __init__(self, marks: list[str], every_s: float) -> None:
        self.samples: dict[str, list[Sample]] = {mark: [] for mark in marks}
        self._every_s, self._over = every_s, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(self._every_s):
            for mark, samples in self.samples.items():
                samples.extend(samples_of(mark, time.monotonic()))


@dataclass(frozen=True)
class Growth:
    """A value in an early and in a late fifth of the time."""

    early: float
    late: float
    num_samples: int

    def is_flat(self, share: float, slack: float) -> bool:
        """Whether the late value is within `share` of the early one, and `slack`; without samples, no."""
        return self.num_samples > 0 and self.late <= self.early * (1 + share) + slack


def growth(
    samples: list[Sample], role: str, what: str, value: Callable[[list[float]], float] = median
) -> Growth:
    """How memory or `handles` of the processes of a role went, after a first fifth of warming up.

    `value`: of all in a fifth. Where processes come and go, a median tells how many are young: take `max`.
    """
    of_role = sorted((one for one in samples if one.role == role), key=lambda one: one.at_s)
    values = [float(getattr(one, what)) for one in of_role]
    fifth = len(values) // 5
    if not fifth:
        return Growth(0.0, 0.0, 0)
    return Growth(value(values[fifth : 2 * fifth]), value(values[-fifth:]), len(values))


def shared_memory() -> set[str]:
    """Names of what lies in shared memory."""
    return {path.name for path in _SHARED_MEMORY.iterdir()}


def left_in_shared_memory(before: set[str]) -> list[str]:
    """What has come since and that no living process holds: nobody will take it away."""
    return sorted(shared_memory() - before - set(_held()))


def _held() -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        for text in (*_mapped(folder), *_open(folder)):
            _, found, name = text.partition(f"{_SHARED_MEMORY}/")
            if found:
                yield name


def _mapped(process: Path) -> list[str]:
    try:
        return (process / "maps").read_text().splitlines()
    except OSError:
        return []


def _open(process: Path) -> Iterator[str]:
    with suppress(OSError):
        for handle in list((process / "fd").iterdir()):
            with suppress(OSError):  # closed meanwhile
                yield str(handle.readlink())
