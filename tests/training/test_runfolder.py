"""One run a folder, one job a run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import platform
import signal
from pathlib import Path
from typing import Any

import pytest

from fundusfm.errors import UserError
from fundusfm.training import runfolder
from fundusfm.training.runfolder import RunFolder, RunLock

LIMIT_S = 120


def test_second_run_of_a_name__refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create(resume=False)
    folder.create(resume=False)  # a start that failed before its recipe was written may be repeated
    folder.recipe.write_text("name: run")
    with pytest.raises(UserError, match="a run of this name exists"):
        folder.create(resume=False)
    folder.create(resume=True)


def test_resume_of_nothing__refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to resume"):
        RunFolder(tmp_path / "run").create(resume=True)


def test_lock__held_by_what_a_killed_process_has_left_is_no_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader worker, stuck in a read that does not end, has inherited the lock."""
    monkeypatch.setattr(runfolder, "WAIT_FOR_OWN_S", 0.0)
    folder = RunFolder(tmp_path)
    gone = {"host": platform.node(), "process": 2**22 + 1, "job": None, "restart": 0}
    with RunLock(folder):
        (tmp_path / ".lock").write_text(json.dumps(gone))
        with pytest.raises(UserError, match="what a process has left behind still holds") as held:
            RunLock(folder).__enter__()
    assert (held.value.exit_code, bool(held.value.fix)) == (1, True)


def _hold(folder: RunFolder, ready: Any) -> None:
    with RunLock(folder):
        ready.set()
        signal.pause()


def test_lock__held_by_a_living_job_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(folder, ready), daemon=True)
    holder.start()
    assert ready.wait(LIMIT_S)
    with pytest.raises(UserError, match="another job"), RunLock(folder):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(LIMIT_S)
    with RunLock(folder):
        pass


def test_lock__says_who_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with RunLock(RunFolder(tmp_path)):
        monkeypatch.setenv("SLURM_JOB_ID", "4712")
        with pytest.raises(UserError) as refused, RunLock(RunFolder(tmp_path)):
            pass
    assert f"process {os.getpid()} on {platform.node()}, SLURM job 4711" in refused.value.what


def test_lock__a_job_that_meets_itself_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started again by SLURM after a node failed, while what is left of it still runs."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    folder = RunFolder(tmp_path)
    first = RunLock(folder)
    first.__enter__()
    monkeypatch.setattr(runfolder.time, "sleep", lambda _: first.__exit__(None, None, None))
    with RunLock(folder):
        pass


@pytest.mark.parametrize(
    ("holder", "taken"),
    [
        ({"host": "elsewhere", "process": 1, "job": None}, False),
        ({"host": "elsewhere", "process": 1, "job": "4711"}, True),
        ({"host": "elsewhere", "process": 1, "job": "4712"}, False),
        ({"host": platform.node(), "process": 2**22 + 1, "job": None}, True),
        ({"host": platform.node(), "process": os.getppid(), "job": None}, False),
    ],
)
def test_lock__storage_that_knows_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: dict[str, Any], taken: bool
) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(runfolder.fcntl, "flock", unknown)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if holder["job"]:
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
    (tmp_path / ".lock").write_text(json.dumps({**holder, "restart": 0}))
    lock = RunLock(RunFolder(tmp_path))
    if taken:
        with lock:
            assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
        assert not (tmp_path / ".lock").read_text(), "left behind, it would keep others out"
    else:
        with pytest.raises(UserError, match="another job") as refused, lock:
            pass
        assert "delete" in refused.value.fix


def test_starts__are_counted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert [folder.note_start({"from": start}) for start in (None, "step-5")] == [1, 2]
    lines = [json.loads(line) for line in folder.starts.read_text().splitlines()]
    assert [line["from"] for line in lines] == [None, "step-5"]
    assert lines[0]["host"] == platform.node()


def test_lock__an_earlier_start_that_does_not_end_is_no_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 2 the launcher would never start the run again."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(runfolder, "WAIT_FOR_OWN_S", 0.0)
    with RunLock(RunFolder(tmp_path)):
        with pytest.raises(UserError, match="an earlier start of this job") as held:
            RunLock(RunFolder(tmp_path)).__enter__()
        assert held.value.exit_code == 1
        monkeypatch.setenv("SLURM_JOB_ID", "4712")
        with pytest.raises(UserError, match="another job") as refused:
            RunLock(RunFolder(tmp_path)).__enter__()
        assert refused.value.exit_code == 2
