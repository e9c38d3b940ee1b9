"""Numbers of a run: `metrics.jsonl` line by line, TensorBoard scalars, sample images, similarity map."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fundusfm.errors import RESUME_ELSEWHERE, UserError, plain_write_errors
from fundusfm.objectives.base import Objective
from fundusfm.recipe.schema import Recipe
from fundusfm.shards.index import write_atomically
from fundusfm.training.boundary import raise_together
from fundusfm.training.runfolder import RunFolder
from fundusfm.training.strategies.portable import Portable

_SHOWN_IMAGES, _SHOWN_PATIENTS = 8, 32
_TRAIN, _VAL = "train/", "val/"


class Pace:
    """Exams per second and the share of time spent waiting for data, since the last reading."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Begin a new reading; also called after validation, whose time is not training's."""
        self._start_s = self._ended_s = time.perf_counter()
        self._waited_s, self._num_steps = 0.0, 0

    def step_begins(self) -> None:
        self._waited_s += time.perf_counter() - self._ended_s

    def step_ends(self) -> None:
        self._ended_s = time.perf_counter()
        self._num_steps += 1

    def read(self) -> dict[str, float]:
        """`exams_per_s` over all ranks and `data_wait`, a share of 1."""
        passed_s = max(self._ended_s - self._start_s, 1e-9)
        values = {
            "exams_per_s": self._num_steps * self._batch_size / passed_s,
            "data_wait": self._waited_s / passed_s,
        }
        self.restart()
        return values


class Telemetry(pl.Callback):
    """Writes the first rank's numbers. Comes before the checkpoints, so that no saved step lacks its line.

    `validated_step`: on the first rank, the last step that had a validation when training began.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self._recipe, self._folder = recipe, folder
        self._config = recipe.telemetry
        self.pace = Pace(recipe.data.global_batch_size)
        self.validated_step: int | None = None
        self._writer: SummaryWriter | None = None
        self._before = threading.excepthook

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_rank(trainer, lambda: self._open(trainer.global_step))
        self.pace.restart()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.pace.step_begins()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Objective)
        self.pace.step_ends()
        step = trainer.global_step
        if step % self._config.log_every_steps == 0 or step == pl_module.total_steps:
            values = {**_scalars(trainer, _TRAIN), **pl_module.gauges(), **_rates(trainer)}
            self._first_rank(trainer, lambda: self._write(step, {**values, **self.pace.read()}))
        if self._config.tensorboard and step % self._config.images_every_steps == 0:
            # On every rank: a model that is spread over ranks runs on all of them or on none.
            assert isinstance(trainer.strategy, Portable)
            with trainer.strategy.gathered():
                pictures = pictures_of(pl_module, batch)
            self._first_rank(trainer, lambda: self._write_pictures(step, batch, pictures))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first_rank(trainer, lambda: self._write(trainer.global_step, _scalars(trainer, _VAL)))
        self.pace.restart()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer:
            with suppress(OSError):  # a full disk has been told where it was met
                self._writer.close()
        threading.excepthook = self._before

    def _first_rank(self, trainer: pl.Trainer, write: Callable[[], None]) -> None:
        """Let the first rank write; a disk that takes no more ends every rank. Collective."""
        error = None
        if trainer.is_global_zero:
            try:
                with plain_write_errors("the numbers of the run", self._folder.root, RESUME_ELSEWHERE):
                    write()
            except UserError as caught:
                error = caught
        raise_together(trainer, error)

    def _open(self, step: int) -> None:
        lines = keep_lines_until(self._folder.metrics, step)
        validated = [line["step"] for line in lines if any(name.startswith(_VAL) for name in line)]
        self.validated_step = max(validated, default=None)
        if self._config.tensorboard:
            threading.excepthook = self._unless_told
            self._writer = SummaryWriter(str(self._folder.root), purge_step=step + 1)

    def _unless_told(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard's own thread hands a full disk on to the main one; its traceback would say it twice."""
        if not isinstance(failed.exc_value, OSError):
            self._before(failed)

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = {"step": step, "exams": step * self._recipe.data.global_batch_size, **values}
        with self._folder.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def _write_pictures(self, step: int, batch: Any, pictures: dict[str, Tensor]) -> None:
        assert self._writer is not None
        data = self._recipe.data
        shape = (1, 3, 1, 1)
        std, mean = (torch.tensor(v).view(shape) for v in (data.std, data.mean))
        images = (batch.images[:_SHOWN_IMAGES].float().cpu() * std + mean).clamp(0, 1)
        self._writer.add_images("samples", images, step)
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step)


def pictures_of(objective: Objective, batch: Any) -> dict[str, Tensor]:
    """The objective's own pictures of a batch and, where it aligns text, the similarity map."""
    was_training = objective.training
    objective.eval()
    with torch.no_grad():
        pictures = {name: picture.float().cpu() for name, picture in objective.pictures(batch).items()}
        if objective.aligns_text:
            pictures["similarity"] = similarity_map(objective, batch)
    objective.train(was_training)
    return pictures


def similarity_map(objective: Objective, batch: Any) -> Tensor:
    """Cosines of a batch's patients (rows) and reports as a picture (1, rows, columns); 0.5 means 0."""
    image_BD, text_BD = objective.embed_exams(batch)
    cosine = image_BD[:_SHOWN_PATIENTS].float() @ text_BD[:_SHOWN_PATIENTS].float().T
    return ((cosine + 1) / 2).clamp(0, 1).cpu()[None]


def keep_lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop lines of steps after `step`: an interrupted run had gone further than its checkpoint.

    Returns those that are left.
    """
    kept: list[dict[str, Any]] = []
    if not path.exists():
        return kept
    texts = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break  # a line cut short by a kill is the last one
        if line["step"] <= step:
            kept.append(line)
            texts.append(text + "\n")
    write_atomically(path, "".join(texts).encode())
    return kept


def _scalars(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}


def _rates(trainer: pl.Trainer) -> dict[str, float]:
    return {"lr": float(trainer.optimizers[0].param_groups[0]["lr"])}
