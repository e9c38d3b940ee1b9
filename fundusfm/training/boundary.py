"""What happens between two steps: ranks agree on errors, faults, saves and stops; signals only set a flag.

A rank that failed alone would leave the others waiting in a collective for ever. So an error is first told
to all ranks, and all end; the first rank alone speaks and sets the exit code.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from fundusfm.errors import ToldByAnotherRank, UserError
from fundusfm.objectives.base import Objective
from fundusfm.recipe.schema import CheckpointConfig
from fundusfm.stream.datamodule import Stream
from fundusfm.stream.faults import Fault, Quarantine
from fundusfm.training.limits import ASKED, StopFile, TimeLimit

TAME = "fork the last checkpoint with a lower optim.lr or with optim.clip_norm: --fork RUN name=..."
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by a signal or the launcher's file, read at the next step boundary. A second Ctrl-C stops at once.

    `is_hurried`: after that second one. `agreed`: why all ranks stop, once they do: a signal's number, ASKED,
    TIME_LIMIT or END_OF_JOB.
    """

    def __init__(self, file: StopFile | None = None, *, hears_ctrl_c: bool = True) -> None:
        """`hears_ctrl_c`: not for ranks that the first one started: it hears it, too, and ends them."""
        self._hears_ctrl_c = hears_ctrl_c
        self.signal_number: int | None = None
        self.agreed: int | None = None
        self.is_hurried = False
        self.file = file or StopFile(None)
        self._before = {number: signal.getsignal(number) for number in _SIGNALS}

    def watch(self) -> None:
        """Note an interrupt of the set-up as well as raising it.

        Python drops an exception that a handler raises in a callback, such as those run at each fork of a
        loader worker. Noted, it is met at the first step.
        """
        signal.signal(signal.SIGINT, self._note_and_raise if self._hears_ctrl_c else signal.SIG_IGN)

    def install(self) -> None:
        """Only note the signals from now on: training is about to begin."""
        for number in _SIGNALS:
            is_left_out = number == signal.SIGINT and not self._hears_ctrl_c
            signal.signal(number, signal.SIG_IGN if is_left_out else self._handle)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reason(self, *, look: bool) -> int:
        """Why this rank wants to stop, 0 if it does not. One rank a node is enough to `look` at the file."""
        if look and self.file.exists():
            return ASKED
        return self.signal_number or 0

    def _note_and_raise(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_number == signal.SIGINT:
            self.is_hurried = True
            raise KeyboardInterrupt
        self.signal_number = number


def is_due(step: int, every_steps: int | None) -> bool:
    """Whether something is due at a step; never, if it is due every None steps."""
    return every_steps is not None and step % every_steps == 0


class NonFiniteError(UserError):
    """A loss or weights that are no numbers: neither is saved, so the last checkpoint stays good."""


def raise_together(trainer: pl.Trainer, error: UserError | None) -> None:
    """Every rank ends if any has an error: the first by raising it, the others without a word. Collective."""
    errors = [error]
    if trainer.world_size > 1:
        failed = torch.tensor([error is not None], dtype=torch.int32, device=trainer.strategy.root_device)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed.item():
            errors = [None] * trainer.world_size
            dist.all_gather_object(errors, error)
    found = next((e for e in errors if e is not None), None)
    if found is None:
        return
    if not trainer.is_global_zero:
        raise ToldByAnotherRank(found)
    found.ends_every_rank = True
    raise found


def _of_all_ranks(trainer: pl.Trainer, faults: list[Fault]) -> list[Fault]:
    """The faults of every rank, in the order of ranks. Collective."""
    if trainer.world_size == 1:
        return faults
    gathered: list[list[Fault]] = [[] for _ in range(trainer.world_size)]
    dist.all_gather_object(gathered, faults)
    return [fault for of_rank in gathered for fault in of_rank]


class StepBoundary(pl.Callback):
    """Counts exams, keeps the error budget, saves when due, stops when asked. On every rank, step by step."""

    def __init__(
        self,
        config: CheckpointConfig,
        stream: Stream,
        quarantine: Quarantine,
        stop: StopFlag,
        save: Callable[[pl.Trainer], None],
        limit: TimeLimit | None = None,
        val_every_steps: int | None = None,
    ) -> None:
        self._config, self._stream, self._quarantine = config, stream, quarantine
        self._stop, self._save = stop, save
        self._limit = limit or TimeLimit(None)
        self._val_every_steps = val_every_steps
        self._saved_s = time.monotonic()
        self._saved_step = -1
        self._keys: list[str] = []
        self._val_faults: list[Fault] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_s, self._saved_step = time.monotonic(), trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        raise_together(trainer, batch if isinstance(batch, UserError) else None)
        self._keys = batch.keys

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, Objective)
        assert pl_module.last_loss is not None
        error = None
        if not torch.isfinite(pl_module.last_loss):
            error = NonFiniteError(
                f"the loss is {pl_module.last_loss.item()} at step {trainer.global_step}",
                where=f"exams of the batch of rank {trainer.global_rank}: {', '.join(self._keys)}",
                fix=TAME,
            )
        raise_together(trainer, error)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stream.note_step()
        self._limit.note_boundary()
        stopping, saving, faults = self._agree(trainer, batch.faults)
        self._note_faults(trainer, faults)
        if self._ends_validating(trainer, pl_module):
            return
        if stopping or saving:
            self._save_here(trainer)
        if stopping:
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # there may be little time left: no validation on the way out

    def _ends_validating(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether this is the last step and is validated: it is then saved after that, when training ends.

        With its last step saved a run is done; one that was stopped between the two could not make up for it.
        """
        assert isinstance(pl_module, Objective)
        step = trainer.global_step
        return step == pl_module.total_steps and is_due(step, self._val_every_steps)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        raise_together(trainer, batch if isinstance(batch, UserError) else None)
        self._val_faults += [] if batch.padding else batch.faults

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        faults, self._val_faults = self._val_faults, []
        self._note_faults(trainer, _of_all_ranks(trainer, faults))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save_here(trainer)

    def _note_faults(self, trainer: pl.Trainer, faults: list[Fault]) -> None:
        try:
            self._quarantine.add(faults, write=trainer.is_global_zero)
        except UserError as error:  # the same on every rank
            raise_together(trainer, error)

    def _save_here(self, trainer: pl.Trainer) -> None:
        self._save(trainer)
        self._saved_s, self._saved_step = time.monotonic(), trainer.global_step

    def _agree(self, trainer: pl.Trainer, faults: list[Fault]) -> tuple[bool, bool, list[Fault]]:
        """The same decision on every rank: whether to stop, whether to save, and the faults of all ranks."""
        saving, number = self._is_save_due(trainer), self._stop.reason(look=trainer.local_rank == 0)
        if self._limit.is_near():
            number = self._limit.reason
        if trainer.world_size == 1:
            self._stop.agreed = number or None
            return bool(number), saving, faults
        flags = torch.tensor(
            [number, saving, bool(faults)], dtype=torch.int32, device=trainer.strategy.root_device
        )
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        number, saving, any_faults = flags.tolist()
        # A signal that came while the ranks were agreeing is kept for the next step.
        self._stop.agreed = number or None
        if any_faults:
            faults = _of_all_ranks(trainer, faults)
        return bool(number), bool(saving), faults

    def _is_save_due(self, trainer: pl.Trainer) -> bool:
        minutes = self._config.every_minutes
        by_step = is_due(trainer.global_step, self._config.every_steps)
        # Clocks differ between ranks; one rank's word is enough, since flags are merged.
        by_clock = minutes is not None and time.monotonic() - self._saved_s > minutes * 60
        return by_step or by_clock
