"""Ranks that write a checkpoint together: what they wait for, and whose fault it is if one does not come."""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.distributed as dist

from fundusfm.training import saving
from fundusfm.training.checkpoint import Manifest, is_of_the_disk, step_folder
from fundusfm.training.conduct import _lost_rank
from fundusfm.training.saving import Saver, Snapshot
from tests.distributed.ranks import run_ranks


def _snapshot() -> Snapshot:
    manifest = Manifest(step=1, exams_seen=8, world_size=1, strategy="ddp", made_with={}, shards={})
    return Snapshot(weights=[], optimiser=[], aliases={}, state={}, manifest=manifest)


def _wait_for_a_silent_rank(rank: int, folder: Path) -> str:
    dist.barrier()
    saver = Saver(lambda partial: None, 1, timedelta(seconds=8), in_background=True)
    told = ""
    if rank == 0:
        final = folder / step_folder(1)
        assert saver.open(final) is None
        saver.write(final, _snapshot())
        with pytest.raises(RuntimeError) as silent:
            saver.wait()
        told = str(_lost_rank(silent.value))
    dist.barrier()
    return told


def test_silent_rank__waited_for_as_long_as_said_and_no_fault_of_the_disk(tmp_path: Path) -> None:
    told, _ = run_ranks(2, _wait_for_a_silent_rank, tmp_path)
    assert told.startswith("another rank of this run does not answer\n"), told
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("size", [0, 100_000])
def test_full_disk__recognised_in_the_words_of_torch(size: int) -> None:
    with pytest.raises(RuntimeError) as full:
        torch.save({"tensor": torch.zeros(size)}, "/dev/full")
    assert is_of_the_disk(full.value)
    assert not is_of_the_disk(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_settle__says_what_for_and_ctrl_c_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_FELT_S", 0.01)
    slow = threading.Event()
    saver = Saver(lambda partial: slow.wait() and None, 1, timedelta(minutes=5), in_background=True)
    assert saver.open(tmp_path / step_folder(1)) is None
    said = []
    saver.settle(3600, lambda: said.append("early"))
    saver.write(tmp_path / step_folder(1), _snapshot())

    def say_and_press() -> None:
        said.append("waiting")
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        saver.settle(20, say_and_press)
    assert said == ["waiting"]
    slow.set()
    saver.settle(3600, lambda: said.append("again"))
    assert (tmp_path / step_folder(1)).is_dir()


def test_worker_that_dies_during_a_save__its_error_costs_no_checkpoint(tmp_path: Path) -> None:
    """A handler raises while the save is waited for, as torch's does for a dead loader worker."""

    def raising(number: int, frame: FrameType | None) -> None:
        raise RuntimeError("DataLoader worker is killed")

    slow = threading.Event()
    saver = Saver(lambda partial: slow.wait() and None, 1, timedelta(minutes=5), in_background=True)
    assert saver.open(tmp_path / step_folder(1)) is None
    saver.write(tmp_path / step_folder(1), _snapshot())
    before = signal.signal(signal.SIGALRM, raising)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(RuntimeError, match="is killed"):
            saver.join()
    finally:
        signal.signal(signal.SIGALRM, before)
    threading.Timer(0.2, slow.set).start()
    saver.settle(60, lambda: None)
    assert (tmp_path / step_folder(1)).is_dir()
