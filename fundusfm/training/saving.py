"""Writing a checkpoint by all ranks: a copy is taken at the step, the disk is waited for in the background.

The threads of the ranks agree over a process group of their own. On the group of training, their words and
those of the next steps would be taken for each other, and both would wait for ever.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fundusfm.errors import UserError
from fundusfm.training.checkpoint import (
    Manifest,
    cannot_write,
    complete,
    is_of_the_disk,
    open_partial,
    write_rank_files,
    write_trainer_state,
)
from fundusfm.training.pieces import Piece

_FELT_S = 1.0


@dataclass(frozen=True)
class Snapshot:
    """A rank's share of a checkpoint, in memory of its own; `state` is written by the first rank."""

    weights: list[Piece]
    optimiser: list[Piece]
    aliases: Mapping[str, str]
    state: Mapping[str, Any]
    manifest: Manifest


class Saver:
    """Writes one checkpoint at a time. `add_files` puts the recipe and the tokenizer into the folder.

    `timeout`: how long a rank waits for the others to have written theirs. Made by every rank alike.
    """

    def __init__(
        self, add_files: Callable[[Path], None], keep: int, timeout: timedelta, *, in_background: bool
    ) -> None:
        self._add_files, self._keep, self._in_background = add_files, keep, in_background
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._rank = dist.get_rank() if several else 0
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if several else None
        self._thread: threading.Thread | None = None
        self._written = threading.Event()
        self._error: Exception | None = None

    def open(self, final: Path) -> UserError | None:
        """Make the temporary folder: by the first rank, before any calls `write`. Returns what is wrong."""
        if self._rank:
            return None
        try:
            open_partial(final)
        except OSError as error:
            return cannot_write(final, error)
        return None

    def write(self, final: Path, snapshot: Snapshot) -> None:
        """Write a snapshot under its name, together with all other ranks; `wait` tells how it went."""
        self._written.clear()
        self._thread = threading.Thread(target=self._write, args=(final, snapshot), daemon=True)
        self._thread.start()
        if not self._in_background:
            self.join()

    def join(self) -> None:
        """Once the last checkpoint is written. What is wrong with it is for `wait` to tell. No collective."""
        if self._thread:
            # Not `Thread.join`: an exception that a signal handler raises in it, such as that of a loader
            # worker that died, leaves a thread that counts as ended and goes on writing.
            self._written.wait()

    def settle(self, limit_s: float, say: Callable[[], None]) -> None:
        """Wait that long for the last checkpoint; `say` what for, once it is felt. No collective.

        Training ends with an error already, which another one must not hide.
        """
        if self._thread is None:
            return
        if not self._written.wait(_FELT_S):
            say()
            self._written.wait(limit_s)

    def wait(self) -> UserError | None:
        """Once the last checkpoint is written: what was wrong with it, if anything was. No collective."""
        self.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None and not isinstance(error, UserError):
            raise error
        return error

    def _write(self, final: Path, snapshot: Snapshot) -> None:
        try:
            self._error = self._error_of_writing(final, snapshot)
        finally:
            self._written.set()

    def _error_of_writing(self, final: Path, snapshot: Snapshot) -> Exception | None:
        partial = final.parent / f".{final.name}.partial"
        digests: dict[str, str] = {}
        error: Exception | None = None
        try:
            digests = write_rank_files(
                partial, self._rank, snapshot.weights, snapshot.optimiser, snapshot.aliases
            )
            if self._rank == 0:
                write_trainer_state(partial, snapshot.state)
                self._add_files(partial)
        except Exception as caught:  # whatever it is: the other ranks wait for an answer
            error = _told(final, caught)
        try:
            answers = self._of_all_ranks((digests, error))
        except Exception as caught:  # a rank that is gone, or silent: its errors are not the disk's
            answers, error = [], caught
        else:
            error = next((theirs for _, theirs in answers if theirs), None)
        try:
            if self._rank == 0 and error is None:
                of_ranks = {name: digest for digests, _ in answers for name, digest in digests.items()}
                complete(partial, final, snapshot.manifest, of_ranks, self._keep)
        except Exception as caught:
            error = _told(final, caught)
        if self._rank == 0 and error is not None:
            shutil.rmtree(partial, ignore_errors=True)
        return error

    def _of_all_ranks(self, mine: tuple[dict[str, str], Exception | None]) -> list[Any]:
        if self._group is None:
            return [mine]
        answers: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(answers, mine, group=self._group)
        return answers


def _told(final: Path, error: Exception) -> Exception:
    return cannot_write(final, error) if is_of_the_disk(error) else error
