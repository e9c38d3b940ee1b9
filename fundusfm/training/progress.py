"""The progress of a run for a person: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fundusfm.objectives.base import Objective

LOG_EVERY_S = 30.0


class ProgressLine(pl.Callback):
    """Shows loss terms, exams/s, the share of time spent waiting for data, the time left. First rank only."""

    def __init__(self, console: Console, batch_size: int) -> None:
        self._console, self._batch_size = console, batch_size
        self._progress: Progress | None = None
        self._smoothed: dict[str, float] = {}
        self._last_line_s = self._begin_s = self._end_s = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Objective)
        self._end_s = self._last_line_s = self._begin_s = time.perf_counter()
        self._first_step = trainer.global_step
        if trainer.is_global_zero and self._console.is_terminal:
            columns = (
                BarColumn(20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task(
                "", total=pl_module.total_steps, completed=trainer.global_step
            )
            self._progress.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._note("wait_s", time.perf_counter() - self._end_s)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Objective)
        if not trainer.is_global_zero:
            return
        now_s = time.perf_counter()
        self._note("step_s", now_s - self._end_s)
        self._end_s = now_s
        if self._progress:
            self._progress.update(
                self._task, completed=trainer.global_step, description=self._describe(trainer)
            )
        elif now_s - self._last_line_s > LOG_EVERY_S or trainer.global_step == pl_module.total_steps:
            self._last_line_s = now_s
            left_s = (pl_module.total_steps - trainer.global_step) * self._smoothed["step_s"]
            self._console.print(
                f"step {trainer.global_step}/{pl_module.total_steps}  {self._describe(trainer)}  "
                f"{left_s / 60:.1f} min left",
                highlight=False,
                soft_wrap=True,
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_s = time.perf_counter()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop()  # or the message would be written into the bar

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress:
            self._progress.stop()

    def _note(self, name: str, value: float) -> None:
        self._smoothed[name] = 0.9 * self._smoothed.get(name, value) + 0.1 * value

    def _describe(self, trainer: pl.Trainer) -> str:
        losses = {
            k.removeprefix("train/"): float(v)
            for k, v in trainer.callback_metrics.items()
            if k.startswith("train/")
        }
        terms = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
        step_s = max(self._smoothed["step_s"], 1e-9)
        wait = self._smoothed.get("wait_s", 0.0) / step_s
        return f"{terms}  {self._batch_size / step_s:.0f} exams/s  data wait {wait:.0%}"
