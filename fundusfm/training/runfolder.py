"""The folder of a run: `runs/<name>/`, used by one job at a time and never by two runs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from fundusfm.errors import UserError, plain_write_errors
from fundusfm.recipe.schema import Recipe
from fundusfm.shards.index import write_atomically

# A job that SLURM starts again after a node has failed may meet what is left of itself.
WAIT_FOR_OWN_S = 120.0
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
ANOTHER_RUNS_DIR = "free some space, or set runs_dir to a folder that can be written"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S%z")


@dataclass(frozen=True)
class Holder:
    """Who writes a run: enough for a person to find the process, and for a job to know itself."""

    host: str
    process: int
    job: str | None
    restart: int

    @classmethod
    def this_process(cls) -> Holder:
        """`restart` counts how often SLURM has started this very job again."""
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(platform.node(), os.getpid(), os.environ.get("SLURM_JOB_ID"), int(restart))

    def __str__(self) -> str:
        of_job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}{of_job}"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    root: Path

    @classmethod
    def of(cls, recipe: Recipe) -> RunFolder:
        """Where a recipe's run lies."""
        return cls(Path(recipe.runs_dir) / recipe.name)

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine.jsonl"

    @property
    def forked_from(self) -> Path:
        """Names the checkpoint that a fork began with."""
        return self.root / "forked_from"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def starts(self) -> Path:
        """One line a start of the run: when, where, from which checkpoint."""
        return self.root / "starts.jsonl"

    @property
    def done(self) -> Path:
        """There once the run has taken all its steps; launchers look for it."""
        return self.root / "DONE"

    def note_start(self, facts: dict[str, Any]) -> int:
        """Add a line to `starts`; returns the number of this start, counted from 1."""
        with plain_write_errors("the run folder", self.root, ANOTHER_RUNS_DIR):
            with self.starts.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"time": _now(), **asdict(Holder.this_process()), **facts}) + "\n")
            return len(self.starts.read_text(encoding="utf-8").splitlines())

    def note_done(self, step: int) -> None:
        """The run has taken all its steps."""
        with plain_write_errors("the run folder", self.root, ANOTHER_RUNS_DIR):
            write_atomically(self.done, f"step {step} at {_now()}\n".encode())

    def create(self, *, resume: bool) -> None:
        """Make the folder of a new run, or find that of an old one; UserError where the other was meant."""
        if self.recipe.exists() and not resume:
            raise UserError(
                "a run of this name exists",
                where=str(self.root),
                fix="continue it with --resume, or give another one: name=...",
            )
        if not self.recipe.exists() and resume:
            raise UserError(
                "there is no run to resume", where=str(self.root), fix="start it without --resume"
            )
        with plain_write_errors("the run folder", self.root, ANOTHER_RUNS_DIR):
            self.checkpoints.mkdir(parents=True, exist_ok=True)


class RunHeldError(UserError):
    """What is left of an earlier start still holds the run, and is about to end: no user has to mend that."""

    exit_code = 1  # launchers start a run again that ended so


class RunLock:
    """One job a run: held by the first rank while it lives, gone with the process however it ends.

    The file says who holds it. Where the storage knows no locks, this record is all there is: a process that
    was killed leaves it behind, and only the same SLURM job, or one on the same host that sees the process
    gone, takes over.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.root / ".lock"
        self._stream: IO[str] | None = None
        self._fix = "wait for it, stop it, or give this one another name=..."

    def __enter__(self) -> RunLock:
        with plain_write_errors("the run folder", self._path.parent, ANOTHER_RUNS_DIR):
            self._stream = self._path.open("a+")
        me = Holder.this_process()
        deadline_s = time.monotonic() + WAIT_FOR_OWN_S
        while not self._try_lock(me):
            holder = self._holder()
            if not _ends_soon(holder, me) or time.monotonic() > deadline_s:
                self._stream.close()
                raise self._held_by(holder, me)
            time.sleep(0.5)
        with plain_write_errors("the run folder", self._path.parent, ANOTHER_RUNS_DIR):
            self._record(json.dumps(asdict(me)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        with plain_write_errors("the run folder", self._path.parent, ANOTHER_RUNS_DIR):
            self._record("")
        self._stream.close()

    def _held_by(self, holder: Holder | None, me: Holder) -> UserError:
        where = str(self._path.parent)
        if holder and _ends_soon(holder, me):
            what = "an earlier start of this job" if _is_own(holder, me) else "what a process has left behind"
            return RunHeldError(
                f"{what} still holds this run: {holder}", where, "start it again once that has ended"
            )
        who = f": {holder}" if holder else ""
        return UserError(f"another job is writing this run{who}", where, self._fix)

    def _try_lock(self, me: Holder) -> bool:
        assert self._stream is not None
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._fix += f"; if it was killed, delete {self._path}"
            holder = self._holder()
            return holder is None or (holder.job == me.job if me.job else _is_gone(holder, me))
        return True

    def _holder(self) -> Holder | None:
        """Who wrote the record; None if nobody did or it is half written."""
        assert self._stream is not None
        self._stream.seek(0)
        try:
            return Holder(**json.loads(self._stream.read()))
        except (ValueError, TypeError):
            return None

    def _record(self, text: str) -> None:
        assert self._stream is not None
        self._stream.truncate(0)
        os.write(self._stream.fileno(), text.encode())  # not buffered: a full disk is met here, and only here


def _is_gone(holder: Holder, me: Holder) -> bool:
    return holder.host == me.host and not Path(f"/proc/{holder.process}").exists()


def _ends_soon(holder: Holder | None, me: Holder) -> bool:
    """Whether the lock is about to be free: its holder is an earlier start of this job, or is no more.

    Loader workers inherit the lock, and outlive a killed process by seconds.
    """
    if holder is None:
        return False
    return _is_own(holder, me) or (holder.host == me.host and not _lives(holder.process))


def _is_own(holder: Holder, me: Holder) -> bool:
    return me.job is not None and holder.job == me.job


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
