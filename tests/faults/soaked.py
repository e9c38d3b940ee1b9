"""A run that is started again and again: its legs, the harm that is done to them, and all their losses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from fundusfm.training.checkpoint import newest_whole
from tests.faults.processes import MARK, processes_of, ranks_of, workers_of
from tests.training.launch import PROJECT, SLOW

# How long a run may take to be gone, whatever was done to it.
GONE_WITHIN_S = 60.0
USR1, KILL_RANK, KILL_MAIN, KILL_WORKER = "USR1", "KILL rank 1", "KILL rank 0", "KILL worker"
KINDS = (USR1, KILL_RANK, KILL_MAIN, KILL_WORKER)
_TIMING = ("exams_per_s", "data_wait")
_SAVED = 128 + signal.SIGUSR1
# What a run may still log that has lost what it needs: the step it is in, and what was not yet written.
_STEPS_AT_ONCE = 2

Key = tuple[int, bool]  # step, is validation
Values = dict[str, float]


class Curve:
    """Every line that was ever logged. A step that is taken again must give what it gave before."""

    def __init__(self) -> None:
        self.values: dict[Key, Values] = {}
        self.num_again, self.ended_at = 0, 0
        self.differing: list[str] = []

    def add(self, metrics: Path, since: int = 0) -> None:
        """The lines of a leg, which began after step `since`; those that are there already are compared."""
        lines = _lines(metrics)
        self.ended_at = max((step for step, _ in lines), default=0)
        for key, values in lines.items():
            before = self.values.setdefault(key, values)
            self.num_again += before is not values and key[0] > since
            if before != values:
                self.differing.append(f"step {key[0]}: {values}, before a restart {before}")

    def compare_with(self, undisturbed: Curve) -> None:
        """Note every line, of training or of validation, that differs or is missing.

        None is missing from where the last leg ended: it was stopped before it took again what another had
        been killed in, or before the validation of its last step.
        """
        theirs, end = undisturbed.values, self.ended_at
        wanted = {key for key in theirs if key[0] < end or key == (end, False)}
        for key in sorted(wanted | self.values.keys()):
            if self.values.get(key) != theirs.get(key):
                self.differing.append(f"step {key[0]}: {self.values.get(key)}, undisturbed {theirs.get(key)}")

    @property
    def last_step(self) -> int:
        return max((step for step, _ in self.values), default=0)


def _lines(metrics: Path) -> dict[Key, Values]:
    lines: dict[Key, Values] = {}
    for text in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill: the last one
        values = {name: value for name, value in line.items() if name not in _TIMING}
        lines[line["step"], "val/loss" in line] = values
    return lines


def _step_of(checkpoint: str | None) -> int:
    return int(checkpoint.rpartition("-")[2]) if checkpoint else 0


@dataclass
class Soaked:
    """A run on two ranks, started as a user does. `faults`: what went otherwise than it should."""

    recipe: Path
    name: str
    overrides: tuple[str, ...]
    step_s: float
    curve: Curve = field(default_factory=Curve)
    faults: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    slowest_end_s: float = 0.0
    num_starts: int = 0
    process: subprocess.Popen[bytes] | None = None
    _inode_before: int | None = None

    @property
    def mark(self) -> str:
        return f"{self.recipe.parent}/{self.name}"

    @property
    def folder(self) -> Path:
        return self.recipe.parent / self.name

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def start(self) -> None:
        """The same command every time."""
        inode = self._inode()
        command = [sys.executable, "-m", "fundusfm", "pretrain", str(self.recipe), *SLOW, *self.overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
        with self.recipe.with_name(f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, f"name={self.name}", "trainer.devices=2", "--resume-if-any"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**environment, MARK: self.mark, "STEP_S": str(self.step_s)},
            )
        self.num_starts += 1
        self._inode_before = inode

    def is_training(self) -> bool:
        """Whether this leg has logged a step of its own, after it has cut off those that were not saved."""
        begun_at = self._starts()[-1:]
        if self.process is None or not begun_at or begun_at[0][0] != self.process.pid:
            return False
        return self._inode() != self._inode_before and self.curve_now().last_step > begun_at[0][1]

    def _starts(self) -> list[tuple[int, int]]:
        """The process of each start that came as far as to note it, and the step from which it went on."""
        starts = self.folder / "starts.jsonl"
        lines = starts.read_text().splitlines() if starts.exists() else []
        facts = [json.loads(line) for line in lines]
        return [(one["process"], _step_of(one["from"])) for one in facts]

    def _inode(self) -> int | None:
        """Of the file of losses, which is written anew where lines are cut off."""
        return self.metrics.stat().st_ino if self.metrics.exists() else None

    def curve_now(self) -> Curve:
        """What the file says now."""
        curve = Curve()
        curve.add(self.metrics)
        return curve

    def harm(self, kind: str, draw: random.Random) -> None:
        """Do it, then see that all of the run is gone in time, and has saved where it was asked to."""
        was_training = self.is_training()
        self._send(kind, draw)
        sent_s = time.monotonic()
        while kind == KILL_WORKER and self.goes_on(sent_s):
            self._send(kind, draw)
            sent_s = time.monotonic()
        self._wait_until_gone(kind, sent_s)
        starts = self._starts()
        self.curve.add(self.metrics, since=starts[-1][1] if starts else 0)
        if kind == USR1 and was_training:
            self._see_that_it_saved()
        elif self.process is not None and self.process.returncode == 0:
            self.faults.append(f"start {self.num_starts}: after {kind} code 0")

    def stop(self) -> None:
        """Ask it to save and end."""
        self.harm(USR1, random.Random(0))

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def goes_on(self, since_s: float) -> bool:
        """Whether it does without the worker that was killed: one that had read the last of a validation."""
        reached = self.curve_now().last_step
        while processes_of(self.mark) and time.monotonic() - since_s < GONE_WITHIN_S:
            if self.curve_now().last_step > reached + _STEPS_AT_ONCE:
                return True
            self.has_ended()  # or it stays as a zombie
            time.sleep(0.1)
        return False

    def clear(self) -> None:
        """End whatever is left of it."""
        for one in processes_of(self.mark):
            os.kill(one.pid, signal.SIGKILL)

    def _send(self, kind: str, draw: random.Random) -> None:
        assert self.process is not None
        deadline_s = time.monotonic() + GONE_WITHIN_S
        while self.process.poll() is None and time.monotonic() < deadline_s:
            processes = processes_of(self.mark)
            ranks = ranks_of(processes)
            choice = {
                USR1: [one.pid for one in ranks.values()],
                KILL_RANK: [ranks[1].pid] if 1 in ranks else [],
                KILL_MAIN: [self.process.pid],
                KILL_WORKER: [one.pid for one in workers_of(processes)],
            }[kind]
            if choice:
                os.kill(draw.choice(sorted(choice)), signal.SIGUSR1 if kind == USR1 else signal.SIGKILL)
                return
            time.sleep(0.05)
        self.faults.append(f"start {self.num_starts}: found nothing for {kind}")

    def _wait_until_gone(self, kind: str, since_s: float) -> None:
        assert self.process is not None
        while (left := processes_of(self.mark)) and time.monotonic() - since_s < GONE_WITHIN_S:
            self.process.poll()  # or it stays as a zombie
            time.sleep(0.1)
        self.slowest_end_s = max(self.slowest_end_s, time.monotonic() - since_s)
        self.leaked += [f"{one.pid} after {kind}: {one.command}" for one in left]
        for one in left:
            os.kill(one.pid, signal.SIGKILL)
        self.process.wait()

    def _see_that_it_saved(self) -> None:
        assert self.process is not None
        newest, torn = newest_whole(self.folder / "checkpoints")
        saved = _step_of(newest.name if newest else None)
        reached = self.curve_now().last_step
        if self.process.returncode != _SAVED or saved != reached or torn:
            self.faults.append(
                f"start {self.num_starts}: after USR1 code {self.process.returncode}, "
                f"step {reached} reached, {saved} saved, torn: {torn}"
            )
