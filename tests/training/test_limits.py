"""Stopping in time: the launcher's file, the clock."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from fundusfm.errors import UserError
from fundusfm.training import limits
from fundusfm.training.limits import StopFile, TimeLimit


def test_stop_file__seen_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setenv("FUNDUSFM_STOP_FLAG", str(tmp_path / "stop"))
    flag = StopFile.from_environment()
    assert not flag.exists()
    (tmp_path / "stop").touch()
    assert flag.exists()
    (tmp_path / "stop").unlink()
    assert flag.exists(), "a run that was asked to stop stops"


def test_stop_file__not_looked_at_every_step(tmp_path: Path) -> None:
    flag = StopFile(tmp_path / "stop")
    assert not flag.exists()
    (tmp_path / "stop").touch()
    assert not flag.exists()


def test_stop_file__storage_that_does_not_answer_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: object, **_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "stat", stale)
    assert not StopFile(tmp_path / "stop").exists()


def test_stop_file__none_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUNDUSFM_STOP_FLAG", raising=False)
    assert not StopFile.from_environment().exists()


def test_limit__the_earlier_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert TimeLimit.of_run(None, 1000.0).end_s is None
    assert TimeLimit.of_run(2, 1000.0).end_s == 1120
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1100")
    for minutes, end_s, reason in (
        (None, 1100, limits.END_OF_JOB),
        (2, 1100, limits.END_OF_JOB),
        (1, 1060, limits.TIME_LIMIT),
    ):
        limit = TimeLimit.of_run(minutes, 1000.0)
        assert (limit.end_s, limit.reason) == (end_s, reason)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "NONE")
    with pytest.raises(UserError, match="not a time"):
        TimeLimit.of_run(None, 1000.0)


def test_lead__grows_with_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock_s[0])
    monkeypatch.setattr(time, "time", lambda: clock_s[0])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    limit = TimeLimit(end_s=1000.0)
    assert limit.lead_s == 2 * 60 + 10, "a guess, before any save"
    clock_s[0] = 500.0
    limit.note_boundary()
    assert limit.lead_s == 2 * 60 + 10, (
        "the first step, with its start of workers and compiler, is no measure"
    )
    for now_s in (505.0, 507.0):
        clock_s[0] = now_s
        limit.note_boundary()
    clock_s[0] = 607.0
    limit.note_save(100.0)
    clock_s[0] = 609.0
    limit.note_boundary()
    assert limit.lead_s == 5 + 2 * 100 + 10, "the time of the save is no step's"
    assert "215 s" in limit.describe()
    assert "USR1" not in limit.describe()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "USR1@275" in limit.describe()
    for now_s, near in ((784.0, False), (786.0, True)):
        clock_s[0] = now_s
        assert limit.is_near() is near


def test_no_limit__never_near() -> None:
    assert not TimeLimit(None).is_near()
