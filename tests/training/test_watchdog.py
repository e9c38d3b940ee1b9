"""A run that hangs says where and ends."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch.distributed as dist

from fundusfm.training import fit
from fundusfm.training import watchdog as watchdog_module
from fundusfm.training.watchdog import Watchdog
from tests.faults.processes import MARK, processes_of, ranks_of
from tests.faults.soaked import GONE_WITHIN_S
from tests.training.conftest import SHORT, Finished
from tests.training.launch import start
from tests.training.own import fall_asleep

LIMIT_S = 250


def _in_forked_ranks(function: Callable[[int, Path], None], num_ranks: int, folder: Path) -> list[str]:
    """What each rank says before the watchdog ends it with code 1."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_speaking, args=(function, rank, folder)) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(LIMIT_S)
        assert rank.exitcode == 1
    return [(folder / f"said.{rank}").read_text() for rank in range(num_ranks)]


def _speaking(function: Callable[[int, Path], None], rank: int, folder: Path) -> None:
    os.dup2(os.open(folder / f"said.{rank}", os.O_WRONLY | os.O_CREAT), 2)
    function(rank, folder)


def _enter_step(watchdog: Watchdog) -> None:
    trainer: Any = SimpleNamespace(global_step=7)
    watchdog.on_train_batch_start(trainer, None, None, 0)  # type: ignore[arg-type]


def _asleep_in_a_barrier(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    dist.barrier()  # so that the limits of both begin together
    with Watchdog(0.1, rank) as watchdog:
        _enter_step(watchdog)
        if rank == 1:
            fall_asleep()
        with suppress(RuntimeError):  # of the other rank's end, if that comes first
            dist.barrier()
        fall_asleep()


def test_hang_of_one_rank__every_rank_tells_phase_and_stack(tmp_path: Path) -> None:
    waiting, sleeping = _in_forked_ranks(_asleep_in_a_barrier, 2, tmp_path)
    for rank, said in enumerate((waiting, sleeping)):
        assert f"rank {rank} (" in said
        assert "it is in the forward or backward pass of step 7" in said
    assert "barrier" in waiting
    assert "fall_asleep" in sleeping


def _locked_up(rank: int, folder: Path) -> None:
    watchdog_module._MOST_GRACE_S = 0.0
    foreign = ctypes.PyDLL(None)  # unlike others its calls keep the interpreter
    with Watchdog(0.05, rank) as watchdog:
        _enter_step(watchdog)
        foreign.sleep(3600)


def test_hang__with_the_interpreter_locked_up(tmp_path: Path) -> None:
    """The watchdog's own thread cannot run, so the stack must come without it."""
    process = multiprocessing.get_context("fork").Process(target=_speaking, args=(_locked_up, 0, tmp_path))
    process.start()
    try:
        deadline_s = time.monotonic() + LIMIT_S
        while "_locked_up" not in (said := _read(tmp_path / "said.0")) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert "Timeout" in said
        assert "_locked_up" in said
    finally:
        process.kill()
        process.join()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _busy(rank: int, folder: Path) -> None:
    watchdog_module._MOST_GRACE_S = 0.0
    with Watchdog(0.05, rank) as watchdog:
        while not (folder / "go on").exists():
            _enter_step(watchdog)
            (folder / "is busy").touch()
            time.sleep(0.01)


def test_stopped_process__is_no_hang(tmp_path: Path) -> None:
    """As `kill -STOP`, Ctrl-Z and `scontrol suspend` do, for longer than any limit."""
    process = multiprocessing.get_context("fork").Process(target=_speaking, args=(_busy, 0, tmp_path))
    process.start()
    try:
        assert process.pid is not None
        deadline_s = time.monotonic() + LIMIT_S
        while not (tmp_path / "is busy").exists() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4)
        (tmp_path / "go on").touch()
        os.kill(process.pid, signal.SIGCONT)
        process.join(LIMIT_S)
        assert process.exitcode == 0, (tmp_path / "said.0").read_text()
    finally:
        process.kill()
        process.join()


def test_time_that_the_watchdog_did_not_run__does_not_count(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, enough, ended = [0.0], threading.Event(), []

    def an_hour_later() -> float:
        now_s[0] += 3600
        if now_s[0] > 20 * 3600:
            enough.set()
        return now_s[0]

    monkeypatch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=an_hour_later, sleep=time.sleep))
    monkeypatch.setattr(watchdog_module, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(os, "_exit", ended.append)
    with Watchdog(30, 0) as watchdog:
        _enter_step(watchdog)
        assert enough.wait(LIMIT_S)
    assert not ended
    said = capfd.readouterr().err
    assert "did not run for 60.0 minutes and goes on; it is in the forward or backward pass of step 7" in said


def test_progress__keeps_it_quiet(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    trainer = SimpleNamespace(global_step=1)
    with Watchdog(60, 1, os.getppid()) as watchdog:
        watchdog._thread.join(0.2)
        watchdog.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert not watchdog._thread.is_alive()
    assert not ended
    assert not capfd.readouterr().err


def test_first_rank_gone__its_ranks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    watchdog = Watchdog(0.05, 1, os.getppid())
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(os, "_exit", lambda code: (ended.append(code), watchdog._over.set()))
    with watchdog:
        deadline_s = time.monotonic() + LIMIT_S
        while not ended and time.monotonic() < deadline_s:
            time.sleep(0.01)
    assert ended == [1]


def test_first_rank_killed_while_the_other_imports__nothing_is_left(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orphan would wait for the first rank until it is stalled: half an hour."""
    mark = str(tmp_path)
    monkeypatch.setenv(MARK, mark)
    first = start(recipe, *SHORT, "trainer.devices=2")
    deadline_s = time.monotonic() + LIMIT_S
    while 1 not in ranks_of(processes_of(mark)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert 1 in ranks_of(processes_of(mark))
    try:
        first.kill()
        first.wait()
        deadline_s = time.monotonic() + GONE_WITHIN_S
        while processes_of(mark):
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
    finally:
        for one in processes_of(mark):
            os.kill(one.pid, signal.SIGKILL)


def test_watchdog__hears_of_a_phase_before_the_others_work_in_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers: list[pl.Trainer] = []
    make = fit.make_trainer
    monkeypatch.setattr(fit, "make_trainer", lambda *given: trainers.append(make(*given)) or trainers[0])
    Finished(recipe, *SHORT)
    assert isinstance(trainers[0].callbacks[0], Watchdog)
