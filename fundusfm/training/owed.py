"""The validation that a run was stopped before: made when the run goes on, ahead of the next step."""

from __future__ import annotations

import pytorch_lightning as pl
from rich.console import Console

from fundusfm.training.boundary import is_due
from fundusfm.training.telemetry import Telemetry


class OwedValidation(pl.Callback):
    """Validates the step that a run goes on from, if that is due and its metrics lack it.

    A step is saved before its validation, so that a long one puts nothing at risk; who is stopped or killed
    between the two would never make it. Comes after all other callbacks, which have then begun.
    """

    def __init__(self, telemetry: Telemetry, every_steps: int | None, console: Console) -> None:
        """`every_steps`: None where nothing is ever due."""
        self._telemetry, self._every_steps, self._console = telemetry, every_steps, console

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if step == 0 or not is_due(step, self._every_steps):
            return
        is_lacking = trainer.is_global_zero and self._telemetry.validated_step != step
        if not trainer.strategy.broadcast(is_lacking):
            return
        told = f"step {step} lacks its validation; it is made first (not with trainer.val_every_steps=null)"
        self._console.print(told, highlight=False, soft_wrap=True)
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False  # it begins anew, whatever the loops of training do
        trainer.validating = True
        loop.run()
        trainer.training = True
