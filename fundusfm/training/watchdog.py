"""A run that hangs says where, on every rank, and ends, so that its launcher can start it again."""

from __future__ import annotations

import faulthandler
import os
import platform
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
import torch

_STDERR = 2  # the descriptor: sys.stderr may be a bar or a captured stream
_LOOK_EVERY_S = 1.0
_MOST_GRACE_S = 10.0


def collective_timeout(stall_minutes: float) -> timedelta:
    """For the process group: long enough that the watchdog is the first to speak."""
    return timedelta(minutes=2 * stall_minutes + 10)


class Watchdog(pl.Callback):
    """Hears of every phase; if none ends for `stall_minutes`, prints phase and stacks and ends the process.

    All ranks of a hanging run stall within a step of each other, and each speaks for itself; the time between
    speaking and ending lets the last one speak before the first one's end takes it down.

    Only time in which the watchdog's own thread ran counts: a process that was stopped (Ctrl-Z, `scontrol
    suspend`, a machine that slept) did not hang. Where an extension keeps the interpreter for ever the thread
    cannot run either; then the stacks are printed all the same, but the end is left to the other ranks.
    """

    def __init__(self, stall_minutes: float, rank: int, process_of_first_rank: int | None = None) -> None:
        """`process_of_first_rank`: this one ends with it; None where a launcher sees to that."""
        self._limit_s, self._rank = stall_minutes * 60, rank
        self._grace_s = min(_MOST_GRACE_S, self._limit_s)
        self._parent = process_of_first_rank
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._phase, self._num_phases = "the start", 0

    def __enter__(self) -> Watchdog:
        self.enter("meeting the other ranks and setting up")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def enter(self, phase: str) -> None:
        """A new phase has begun: the run is alive."""
        self._phase = phase
        self._num_phases += 1
        # The thread needs the interpreter's lock; this one does not, should an extension keep it for ever. It
        # must not end the process: it cannot tell that from having been stopped.
        faulthandler.dump_traceback_later(self._limit_s + 3 * self._grace_s, file=_STDERR)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.enter("waiting for the first batch")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.enter(f"in the forward or backward pass of step {trainer.global_step}")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.enter(f"in the optimiser of step {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.enter(f"after step {trainer.global_step}: logging, agreeing, waiting for a batch")

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.enter(f"in batch {batch_idx} of the validation at step {trainer.global_step}")

    def _watch(self) -> None:
        every_s = min(_LOOK_EVERY_S, self._limit_s / 4)
        num_phases, stalled_s, looked_s = 0, 0.0, time.monotonic()
        while not self._over.wait(every_s):
            if self._parent not in (None, os.getppid()):
                os._exit(1)  # the first rank is gone, and nobody else would end this one
            passed_s = time.monotonic() - looked_s
            looked_s += passed_s
            if passed_s > self._limit_s:
                self._say(f"did not run for {passed_s / 60:.1f} minutes and goes on; it is {self._phase}")
            if num_phases != self._num_phases:
                num_phases, stalled_s = self._num_phases, 0.0
            else:
                stalled_s += min(passed_s, 2 * every_s)
            if stalled_s > self._limit_s:
                self._give_up(stalled_s)

    def _give_up(self, stalled_s: float) -> None:
        self._say(f"no progress for {stalled_s / 60:.1f} minutes; it is {self._phase}")
        with suppress(OSError):
            faulthandler.dump_traceback(file=_STDERR)
        time.sleep(self._grace_s)
        os._exit(1)

    def _say(self, words: str) -> None:
        with suppress(OSError):
            os.write(
                _STDERR, f"\nrank {self._rank} ({platform.node()}, process {os.getpid()}): {words}\n".encode()
            )
