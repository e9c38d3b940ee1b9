"""Unreadable exams: skipped, replaced, counted by cause, listed; too many of them stop the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fundusfm.errors import RESUME_ELSEWHERE, UserError, plain_write_errors


@dataclass(frozen=True)
class Fault:
    """An exam that could not be read: where it lies and why. `cause` is a short word to count by."""

    shards: str
    shard: str
    key: str
    cause: str
    message: str


class ExamUnreadableError(Exception):
    """Raised where an exam is read; carries the fault. Never reaches a user."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


class Quarantine:
    """The unreadable exams of a run, each written once to `quarantine.jsonl`.

    `num_exams` is the number of exams in the training order; the budget is a share of it.
    """

    def __init__(self, path: Path, num_exams: int, error_budget: float) -> None:
        self._path = path
        self._num_exams, self._budget = num_exams, error_budget
        self._seen = {(f.shards, f.shard, f.key): f for f in _read(path)}

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, faults: Iterable[Fault], *, write: bool) -> None:
        """Note a step's faults; UserError with the list once they exceed the budget. `write` on one rank."""
        fresh = {
            (f.shards, f.shard, f.key): f for f in faults if (f.shards, f.shard, f.key) not in self._seen
        }
        self._seen.update(fresh)
        if fresh and write:
            with (
                plain_write_errors("the list of unreadable exams", self._path, RESUME_ELSEWHERE),
                self._path.open("a", encoding="utf-8") as stream,
            ):
                stream.writelines(json.dumps(asdict(f), ensure_ascii=False) + "\n" for f in fresh.values())
        if fresh and len(self._seen) > self._budget * self._num_exams:
            self._stop()

    def _stop(self) -> None:
        causes = Counter((f.cause, f.shard) for f in self._seen.values())
        listed = "; ".join(f"{n} x {cause} in {shard}" for (cause, shard), n in causes.most_common(8))
        raise UserError(
            f"{len(self._seen)} of {self._num_exams} exams cannot be read, "
            f"more than data.error_budget = {self._budget:g}",
            where=f"{listed}; all of them in {self._path}",
            fix="run `fundusfm shards check`, rebuild the shards, or raise data.error_budget",
        )


def _read(path: Path) -> list[Fault]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, TypeError):  # cut short by a kill or a full disk; it will be met again
            found.append(Fault(**json.loads(line)))
    return found
