from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from fundusfm.errors import UserError
from fundusfm.shards.workers import Tick, interrupts_blocked, run_jobs


@dataclass(frozen=True)
class Square:
    """Squares; a negative job fails in the way that `fault` says."""

    fault: str = ""

    def __call__(self, job: int, tick: Tick) -> tuple[int, int]:
        tick(job)
        if job < 0 and self.fault == "user":
            raise UserError("a bad thing", where="here", fix="mend it")
        if job < 0:
            os._exit(9)
        return job * job, os.getpid()


@dataclass(frozen=True)
class Sleep:
    """Says its pid, then sleeps for a minute."""

    folder: str

    def __call__(self, job: int, tick: Tick) -> None:
        (Path(self.folder) / str(os.getpid())).touch()
        tick(1)
        time.sleep(60)


@dataclass(frozen=True)
class Preloading:
    """Whether a module is there before the work begins, and whether it was imported in this very process."""

    preload = ("tests.shards.preloaded",)

    def __call__(self, job: int, tick: Tick) -> bool:
        module = sys.modules.get(self.preload[0])
        return module is not None and os.getpid() != module.PID


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_and_ticks(num_workers: int) -> None:
    ticks: list[int] = []
    results = list(run_jobs(Square(), range(20), num_workers, ticks.append))
    assert sorted(square for square, _ in results) == [n * n for n in range(20)]
    assert sum(ticks) == sum(range(20))
    assert (os.getpid() in {pid for _, pid in results}) == (num_workers == 1)


def test_preload__once_before_the_workers_begin() -> None:
    # A process of its own: the server from which workers are forked starts once in the life of a process.
    code = "import sys; from fundusfm.shards.workers import run_jobs\n"
    code += "from tests.shards.test_workers import Preloading\n"
    code += "print(*run_jobs(Preloading(), range(4), 2, int), Preloading.preload[0] in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4 + ["False"]


def test_errors_travel() -> None:
    with pytest.raises(UserError) as caught:
        list(run_jobs(Square("user"), [1, -1, 2], 2, lambda _: None))
    assert (caught.value.where, caught.value.fix) == ("here", "mend it")


def test_killed_worker_is_a_plain_error() -> None:
    with pytest.raises(UserError, match="ended from outside"):
        list(run_jobs(Square(), [1, -1, 2, 3], 2, lambda _: None))


def test_interrupted_run_leaves_no_worker(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        if len(list(tmp_path.iterdir())) == 2:
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(run_jobs(Sleep(str(tmp_path)), [1, 2], 2, interrupt))
    assert time.monotonic() - started < 30
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_killed_parent_takes_its_workers_along(tmp_path: Path) -> None:
    code = (
        "from fundusfm.shards.workers import run_jobs; from tests.shards.test_workers import Sleep\n"
        f"if __name__ == '__main__': list(run_jobs(Sleep({str(tmp_path)!r}), [1, 2], 2, lambda _: None))"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    deadline = time.monotonic() + 40
    while len(list(tmp_path.iterdir())) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_interrupts_blocked__one_that_comes_meanwhile_is_raised_afterwards() -> None:
    reached = False
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_blocked():
            os.kill(os.getpid(), signal.SIGINT)
            reached = True
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached
