"""A short soak, and that each of its measurements notices what it is there for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.processes import (
    MARK,
    Sample,
    growth,
    left_in_shared_memory,
    processes_of,
    ranks_of,
    samples_of,
    shared_memory,
    workers_of,
)
from tests.faults.soak import Plan, Soak
from tests.faults.soaked import KINDS, Curve, Soaked

_FORKING = "import os, time; os.fork(); print(flush=True); time.sleep(60)  # pretrain"


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_soak__every_kind_of_event_twice(tmp_path: Path) -> None:
    soak = Soak(tmp_path, Plan(minutes=4, every_s=30, seed=0))
    soak.run()
    found = soak.what_happened()
    assert not found.off, found
    assert set(soak.events) == set(KINDS)
    assert soak.soaked.curve.num_again > 0, "nothing was taken again"


def _curve(folder: Path, lines: list[dict[str, float]], cut: str = "") -> Curve:
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"exams_per_s": 1, **line}) + "\n" for line in lines) + cut)
    curve = Curve()
    curve.add(metrics)
    return curve


def test_curve__what_differs_or_is_missing(tmp_path: Path) -> None:
    steps = [{"step": step, "train/loss": step / 7} for step in (1, 2, 3)]
    validation = {"step": 2, "val/loss": 1.0}
    quiet = _curve(tmp_path, [*steps, validation])
    for lines, differing in (
        ([*steps, validation], 0),
        ([*steps[:2], validation], 0),
        ([*steps[:2], {**steps[2], "train/loss": 3 / 7 + 1e-16}, validation], 1),
        ([steps[0], validation, steps[2]], 1),
        (steps, 1),
        ([*steps, validation, {"step": 4, "train/loss": 1.0}], 1),
    ):
        soaked = _curve(tmp_path, lines)
        soaked.compare_with(quiet)
        assert len(soaked.differing) == differing, lines


def test_curve__ended_before_what_it_was_killed_in_came_again(tmp_path: Path) -> None:
    """The killed leg had logged step 4 and not its validation; the last one ended at step 3, or went on."""
    steps = [{"step": step, "train/loss": step / 7} for step in (1, 2, 3, 4, 5)]
    quiet = _curve(tmp_path, [*steps, {"step": 4, "val/loss": 1.0}])
    for ended_at, differing in ((3, 0), (4, 0), (5, 1)):
        soaked = _curve(tmp_path, steps[:4])
        _curve(tmp_path, steps[:ended_at])
        soaked.add(tmp_path / "metrics.jsonl", since=2)
        soaked.compare_with(quiet)
        assert len(soaked.differing) == differing


def test_killed_worker__missed_or_not(tmp_path: Path) -> None:
    """Ten more steps are logged by a process that lives on, and two by one that ends."""
    for more, lives_on in ((10, True), (2, False)):
        run = Soaked(tmp_path / "recipe.yaml", f"{more}", (), 0.1)
        run.folder.mkdir()
        code = (
            f"import time\nwith open({str(run.metrics)!r}, 'a', 1) as file:\n"
            f"  for step in range({more}): print('{{\"step\": %d}}' % (step + 1), file=file); time.sleep(0.3)"
        )
        run.process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, MARK: run.mark})
        assert run.goes_on(time.monotonic()) is lives_on
        run.clear()
        run.process.wait()


def test_curve__a_step_taken_again(tmp_path: Path) -> None:
    curve = _curve(tmp_path, [{"step": step, "train/loss": 0.5} for step in (1, 2, 3)], cut='{"step": 4')
    assert curve.last_step == 3
    for loss, differing in ((0.5, 0), (0.25, 1)):
        _curve(tmp_path, [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": loss}])
        curve.add(tmp_path / "metrics.jsonl", since=1)
        assert len(curve.differing) == differing
    assert curve.num_again == 2


def test_processes__a_rank_its_fork_and_an_orphan() -> None:
    mark = f"test {os.getpid()}"
    rank = subprocess.Popen(
        [sys.executable, "-c", _FORKING], env={MARK: mark, "LOCAL_RANK": "1"}, stdout=subprocess.PIPE
    )
    try:
        assert rank.stdout is not None
        rank.stdout.readline()
        found = processes_of(mark)
        assert {number: one.pid for number, one in ranks_of(found).items()} == {1: rank.pid}
        (worker,) = workers_of(found)
        rank.kill()
        rank.wait()
        assert [one.pid for one in processes_of(mark)] == [worker.pid]
        assert processes_of(mark[:-1]) == []
    finally:
        for one in processes_of(mark):
            os.kill(one.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while processes_of(mark):
        assert time.monotonic() < deadline_s


def test_shared_memory__what_nobody_holds() -> None:
    before = shared_memory()
    path = Path(f"/dev/shm/test-{os.getpid()}")
    with path.open("wb"):
        assert path.name not in left_in_shared_memory(before)
    try:
        assert path.name in left_in_shared_memory(before)
        assert path.name not in left_in_shared_memory(shared_memory())
    finally:
        path.unlink()


def test_samples__own_memory_is_without_files(tmp_path: Path) -> None:
    """As libraries are at the end of a process, which reads through them."""
    file = tmp_path / "64 MiB"
    file.write_bytes(bytes(64 << 20))
    code = (
        f"import mmap, time\nwith open({str(file)!r}, 'rb') as file:\n"
        "  held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); sum(held[::4096]); print(flush=True)\n"
        "  time.sleep(60)  # pretrain"
    )
    mark = f"{tmp_path}/mapped"
    reader = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, MARK: mark}
    )
    try:
        assert reader.stdout is not None and reader.stdout.readline()
        [sample] = samples_of(mark, 0.0)
        assert sample.role == "rank 0" and 0 < sample.own_mib < sample.rss_mib - 60
    finally:
        reader.kill()
        reader.communicate()


@pytest.mark.parametrize(("mib_a_sample", "flat"), [(0.0, True), (0.04, True), (0.2, False)])
def test_growth(mib_a_sample: float, flat: bool) -> None:
    samples = [Sample(at, "rank 0", 600 + mib_a_sample * at, 0, 40) for at in range(700)]
    warm = [Sample(at - 700, "rank 0", 100, 0, 20) for at in range(70)]
    found = growth([*samples, *warm], "rank 0", "rss_mib")
    assert found.is_flat(0.05, 8) is flat
    young = [
        Sample(at, "rank 0", 0, 600 + mib_a_sample * at if at % 9 == 0 else 200, 40) for at in range(700)
    ]
    assert growth(young, "rank 0", "own_mib", max).is_flat(0.05, 8) is flat
    assert not growth(samples, "rank 1", "rss_mib").is_flat(0.05, 8)
    assert growth(samples, "rank 0", "handles").is_flat(0, 0)
    leaking = [Sample(at, "rank 0", 600, 600, 40 + at // 200) for at in range(700)]
    assert not growth(leaking, "rank 0", "handles").is_flat(0, 0)
