"""When a run must stop though nothing is wrong: its launcher asks by a file, or its time runs out.

FUNDUSFM_STOP_FLAG   a file; once it exists, the run saves at the next step boundary and ends with code 0
SLURM_JOB_END_TIME   seconds since 1970 at which SLURM ends the job (set by SLURM 23.11 and by launch/)
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from fundusfm.errors import UserError

STOP_FLAG, END_TIME = "FUNDUSFM_STOP_FLAG", "SLURM_JOB_END_TIME"
# Reasons to stop beside the numbers of signals, and above them all: ranks agree on the highest.
ASKED, TIME_LIMIT, END_OF_JOB = 1000, 1001, 1002
_LOOK_EVERY_S = 1.0
# For what follows the save: workers end, the process ends, the launcher hears of it.
_WIND_UP_S = 10.0
# Before the first save nobody knows how long one takes: this much, but not more than a tenth of the time.
_GUESSED_SAVE_S = 60.0


class StopFile:
    """The launcher's flag, looked at now and then: on shared storage each look is a message to a server."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._found, self._looked_s = False, -float("inf")

    @classmethod
    def from_environment(cls) -> StopFile:
        name = os.environ.get(STOP_FLAG)
        return cls(Path(name) if name else None)

    def exists(self) -> bool:
        """Whether the run is asked to stop."""
        now_s = time.monotonic()
        if self.path and not self._found and now_s - self._looked_s >= _LOOK_EVERY_S:
            # Not `Path.exists`, which raises where a server does not answer; there is a next look.
            self._found, self._looked_s = os.path.exists(self.path), now_s  # noqa: PTH110
        return self._found


class TimeLimit:
    """The end of the time allotted, if it is known, and the time that stopping takes, as measured."""

    def __init__(self, end_s: float | None, reason: int = TIME_LIMIT) -> None:
        """`end_s` on the clock of `time.time()`; `reason`: TIME_LIMIT or END_OF_JOB, whichever ends there."""
        self.end_s, self.reason, self._begin_s = end_s, reason, time.time()
        self._save_s: float | None = None
        self._longest_step_s = 0.0
        self._boundary_s: float | None = None

    @classmethod
    def of_run(cls, minutes: float | None, began_s: float) -> TimeLimit:
        """The earlier of `minutes` after the start of the run's process and the end of the SLURM job."""
        ends = [] if minutes is None else [(began_s + minutes * 60, TIME_LIMIT)]
        text = os.environ.get(END_TIME)
        if text and text != "0":  # 0 for a job without a limit
            try:
                ends.append((float(text), END_OF_JOB))
            except ValueError as error:
                raise UserError(
                    f"{text!r} is not a time", where=END_TIME, fix="give seconds since 1970, or unset it"
                ) from error
        return cls(*min(ends)) if ends else cls(None)

    @property
    def lead_s(self) -> float:
        """How long before the end to stop: a step, a save that takes twice as long, the winding up."""
        save_s = self._save_s
        if save_s is None:
            allotted_s = float("inf") if self.end_s is None else self.end_s - self._begin_s
            save_s = min(_GUESSED_SAVE_S, allotted_s / 10)
        return self._longest_step_s + 2 * save_s + _WIND_UP_S

    @property
    def has_saved(self) -> bool:
        """Whether `lead_s` rests on a save that was measured."""
        return self._save_s is not None

    def note_boundary(self) -> None:
        """A step has ended; validation and logging since the one before count as part of it.

        The first one is not measured: workers start in it, and most blocks are compiled.
        """
        now_s = time.monotonic()
        if self._boundary_s is not None:
            self._longest_step_s = max(self._longest_step_s, now_s - self._boundary_s)
        self._boundary_s = now_s

    def note_save(self, took_s: float) -> None:
        """A save has ended; its time is not the next step's."""
        self._save_s = max(took_s, self._save_s or 0.0)
        self._boundary_s = time.monotonic()

    def is_near(self) -> bool:
        """Whether to stop now."""
        return self.end_s is not None and time.time() + self.lead_s > self.end_s

    def name(self, reason: int) -> str:
        """What ends at TIME_LIMIT or END_OF_JOB."""
        if reason == TIME_LIMIT:
            return "time limit: trainer.time_limit_minutes"
        assert self.end_s is not None
        return f"end of the SLURM job at {time.strftime('%F %T', time.localtime(self.end_s))}: {END_TIME}"

    def describe(self) -> str:
        """The measured lead time and, under SLURM, what to ask of it: its signals are exact to a minute."""
        assert self._save_s is not None
        advice = f"; give sbatch --signal=B:USR1@{self.lead_s + 60:.0f} or more"
        return (
            f"stopping takes {self.lead_s:.0f} s: a save {self._save_s:.1f} s, the longest step "
            f"{self._longest_step_s:.1f} s{advice if 'SLURM_JOB_ID' in os.environ else ''}"
        )
