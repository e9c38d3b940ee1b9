"""A tiny run on two ranks to which something happens every minute, beside one to which nothing does.

    make soak MINUTES=60

Both have the same recipe. The one is asked to save and end, or one of its processes is killed, and it is
started again, as launchers do, with --resume-if-any. The losses of all its legs must be those of the other,
bit for bit, and nothing of it may be left on the machine. The other is never started again: its handles must
stay as they were, and the memory of both. Ends with a table, and with code 1 if anything is otherwise.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.conftest import make_cohort
from tests.faults.processes import WORKER, Sampler, growth, left_in_shared_memory, shared_memory
from tests.faults.soaked import KINDS, Soaked
from tests.training.launch import write_recipe

# More than an hour can take: the rate of learning is that of a run which has just begun.
_MAX_STEPS = 1_000_000
_WAIT_S = 600.0  # what a start may take on a busy machine
_SHARE, _SLACK_MIB = 0.05, 8.0
_RANKS = ("rank 0", "rank 1")
_SAVE_EVERY, _VAL_EVERY, _PICTURES_EVERY = 10, 35, 50


@dataclass(frozen=True)
class Plan:
    """How long, how often, in which order, and the pause in each step that leaves the machine some air."""

    minutes: float = 60.0
    every_s: float = 60.0
    seed: int = 0
    step_s: float = 0.2
    sample_every_s: float = 5.0


@dataclass(frozen=True)
class Findings:
    """Rows of the table, and what is otherwise than it should be."""

    rows: list[tuple[str, str]]
    off: list[str]


class Soak:
    """The two runs and what is found out about them."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan, self._draw = plan, random.Random(plan.seed)
        self.events: Counter[str] = Counter()
        self._shared_before = shared_memory()
        cohort = make_cohort(folder)
        recipe = write_recipe(
            folder / "recipe.yaml", cohort, max_steps=_MAX_STEPS, val_every_steps=_VAL_EVERY
        )
        every = (f"checkpoint.every_steps={_SAVE_EVERY}", f"telemetry.images_every_steps={_PICTURES_EVERY}")
        self.soaked = Soaked(recipe, "soaked", every, plan.step_s)
        self.quiet = Soaked(recipe, "quiet", every, plan.step_s)
        self.sampler = Sampler([self.soaked.mark, self.quiet.mark], plan.sample_every_s)

    def run(self) -> None:
        """Until the time is over and the quiet run has come as far as the other."""
        with self.sampler:
            self.quiet.start()
            self.soaked.start()
            try:
                self._disturb()
                self._until(self.soaked, self.soaked.is_training, "the last start to train")
                self.soaked.stop()
                last = self.soaked.curve.last_step
                self._until(
                    self.quiet, lambda: self.quiet.curve_now().last_step >= last, f"step {last} undisturbed"
                )
                self.quiet.stop()
            finally:
                self.soaked.clear()
                self.quiet.clear()

    def _disturb(self) -> None:
        """One event in each stretch of time, anywhere in it: in training, in a save, in a start."""
        began_s, stretch = time.monotonic(), 0
        kinds: list[str] = []
        while (stretch + 1) * self.plan.every_s <= self.plan.minutes * 60:
            at_s = began_s + (stretch + self._draw.random()) * self.plan.every_s
            kinds = kinds or self._draw.sample(KINDS, len(KINDS))
            if stretch == 0:  # the first start has imports to do that the machine has not in memory
                self._until(self.soaked, self.soaked.is_training, "the first start to train")
            time.sleep(max(0.0, at_s - time.monotonic()))
            self._one_event(kinds.pop())
            stretch = max(stretch + 1, int((time.monotonic() - began_s) / self.plan.every_s))

    def _one_event(self, kind: str) -> None:
        if self.soaked.has_ended():
            self.soaked.faults.append(f"start {self.soaked.num_starts} ended by itself")
        self.soaked.harm(kind, self._draw)
        self.events[kind] += 1
        print(f"{time.strftime('%T')} {kind}, step {self.soaked.curve.last_step}", flush=True)
        self.soaked.start()

    def _until(self, run: Soaked, true: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + _WAIT_S
        while not true():
            if run.has_ended() or time.monotonic() > deadline_s:
                _show_logs(run.recipe.parent)
                raise SystemExit(f"waited in vain for {what}")
            time.sleep(0.5)

    def what_happened(self) -> Findings:
        """The runs compared, and what the soaked one has left behind."""
        soaked, quiet = self.soaked, self.quiet
        quiet.curve.add(quiet.metrics)
        soaked.curve.compare_with(quiet.curve)
        shared = left_in_shared_memory(self._shared_before)
        partial = [path.name for path in (soaked.folder / "checkpoints").glob(".*")]
        leaked = soaked.leaked + quiet.leaked
        rows = [
            ("seed", str(self.plan.seed)),
            *((kind, str(self.events[kind])) for kind in KINDS),
            ("starts", f"{soaked.num_starts}, undisturbed {quiet.num_starts}"),
            ("slowest end", f"{soaked.slowest_end_s:.1f} s"),
            ("steps", str(soaked.curve.last_step)),
            (
                "lines compared",
                f"{len(soaked.curve.values)}, and {soaked.curve.num_again} of steps taken again",
            ),
            ("differing or missing lines", str(len(soaked.curve.differing))),
            ("leaked processes", str(len(leaked))),
            ("left in shared memory", str(len(shared))),
            ("torn checkpoint folders", str(len(partial))),
        ]
        off = [*soaked.faults, *quiet.faults, *soaked.curve.differing[:5]]
        off += [f"left: {name}" for name in (*leaked, *shared, *partial)]
        return Findings(rows, off)

    def what_grew(self) -> Findings:
        """Handles of the undisturbed run, and memory of both; for some minutes they warm up."""
        looked_at = [(self.quiet, rank, "handles", median, 0.0, 0.0) for rank in _RANKS]
        looked_at += [
            (run, role, what, value, _SHARE, _SLACK_MIB)
            for run, what, value in ((self.quiet, "rss_mib", median), (self.soaked, "own_mib", max))
            for role in (*_RANKS, WORKER)
        ]
        found = Findings([], [])
        for run, role, what, value, share, slack in looked_at:
            one = growth(self.sampler.samples[run.mark], role, what, value)
            name = f"{what} of {role}, {run.name}"
            told = f"{one.early:.0f} early, {one.late:.0f} late, {one.num_samples} samples"
            found.rows.append((name, told))
            if not one.is_flat(share, slack):
                found.off.append(f"grows: {name}")
        return found


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    words.add_argument("--minutes", type=float, default=Plan.minutes)
    words.add_argument("--every-s", type=float, default=Plan.every_s, help="seconds from event to event")
    words.add_argument("--seed", type=int, default=Plan.seed, help="of the events")
    words.add_argument("--step-s", type=float, default=Plan.step_s, help="pause in each step, in seconds")
    plan = Plan(**vars(words.parse_args()))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing of the runs is left then either
    with tempfile.TemporaryDirectory(prefix="fundusfm-soak.") as name:
        print(f"seed {plan.seed}, {plan.minutes:g} minutes, in {name}", flush=True)
        soak = Soak(Path(name), plan)
        soak.run()
        found = (soak.what_happened(), soak.what_grew())
        for what, value in (row for part in found for row in part.rows):
            print(f"{what:36}{value}")
        off = [fault for part in found for fault in part.off]
        for fault in off:
            print(f"off: {fault}")
        print("off" if off else "all well")
        if off:
            _show_logs(Path(name))
    return int(bool(off))


def _show_logs(folder: Path) -> None:
    """What the runs said; the folder is deleted."""
    for log in sorted(folder.glob("*.log")):
        print(f"--- the end of {log.name}")
        print(log.read_text(errors="replace")[-20_000:])


if __name__ == "__main__":
    sys.exit(main())
