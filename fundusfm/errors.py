"""The one exception a user sees: what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

RESUME_ELSEWHERE = "free some space, or set runs_dir to another disk and take the folder along; then --resume"


class UserError(Exception):
    """A mistake in the user's input: ends without a traceback and with exit code 2.

    `what` is one sentence; `where` names the file, key, row or shard; `fix` says what to do next.
    """

    exit_code = 2
    ends_every_rank = False  # whether all other ranks end by themselves, with code 0

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        # All three stay in `args`, so the error survives the way back from a worker process.
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  to do: {self.fix}")
        return "\n".join(lines)


class EveryRankError(UserError):
    """Raised by all ranks alike, at the same place: one of them is enough to tell it."""

    ends_every_rank = True


class ToldByAnotherRank(SystemExit):
    """The end, with code 0, of a rank that leaves an error to another one to tell."""

    def __init__(self, error: UserError) -> None:
        super().__init__(0)
        self.error = error


@contextmanager
def plain_write_errors(what: str, where: object, fix: str) -> Iterator[None]:
    """A full disk or a place that cannot be written, met in the block, is the user's to solve."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{what} cannot be written: {reason}", where=str(where), fix=fix) from error
