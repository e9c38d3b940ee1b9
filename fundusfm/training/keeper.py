"""When a checkpoint is due: what goes into it, and telling every rank if it could not be written."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console

from fundusfm.recipe.load import ResolvedRecipe
from fundusfm.stream.datamodule import Stream
from fundusfm.stream.tokens import Tokens
from fundusfm.training.boundary import TAME, NonFiniteError, is_due, raise_together
from fundusfm.training.checkpoint import Manifest, step_folder
from fundusfm.training.facts import made_with
from fundusfm.training.pieces import Piece, deal
from fundusfm.training.saving import Saver, Snapshot
from fundusfm.training.strategies.portable import Portable, tied_names
from fundusfm.training.watchdog import collective_timeout


class Keeper(pl.Callback):
    """Saves steps as folders. Comes after the callback that asks for it, whose last save it waits for."""

    def __init__(
        self, folder: Path, resolved: ResolvedRecipe, tokens: Tokens, stream: Stream, strategy: Portable
    ) -> None:
        self._folder, self._resolved, self._tokens = folder, resolved, tokens
        self._stream, self._strategy = stream, strategy
        self._saver: Saver | None = None
        self._made_with = made_with()  # now: what is installed over it later is not what trains
        strategy.save = self._write

    def folder_of(self, step: int) -> Path:
        """The checkpoint folder of a step."""
        return self._folder / step_folder(step)

    def save(self, trainer: pl.Trainer, *, whole: bool = False) -> None:
        """Save the current step; the disk may be busy with it for longer, unless `whole`. Collective."""
        assert self._saver is not None
        final = self.folder_of(trainer.global_step)
        raise_together(trainer, self._saver.wait())
        raise_together(trainer, self._saver.open(final))
        trainer.save_checkpoint(final)
        if whole or not self._resolved.recipe.checkpoint.in_background:
            raise_together(trainer, self._saver.wait())

    def settle(self, limit_s: float, console: Console) -> None:
        """Give a checkpoint that is being written some time to be whole. No collective."""
        told = (
            f"waiting for the checkpoint that is being written, {limit_s:.0f} s at most; Ctrl-C ends at once"
        )
        if self._saver:
            self._saver.settle(limit_s, lambda: console.print(told, highlight=False, soft_wrap=True))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        config = self._resolved.recipe.checkpoint
        timeout = collective_timeout(self._resolved.recipe.trainer.stall_minutes)
        self._saver = Saver(self._add_files, config.keep, timeout, in_background=config.in_background)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Loader workers of a validation are forked next: never with locks that a thread of ours holds."""
        if self._saver and is_due(trainer.global_step, self._resolved.recipe.trainer.val_every_steps):
            self._saver.join()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._saver is not None
        raise_together(trainer, self._saver.wait())

    def _write(self, state: dict[str, Any], final: Path) -> None:
        assert self._saver is not None
        strategy, recipe = self._strategy, self._resolved.recipe
        trainer = strategy.objective.trainer
        rank, world_size = trainer.global_rank, trainer.world_size
        weights = deal(strategy.weights(), rank, world_size)
        trained = {name for name, tensor in strategy.objective.named_parameters() if tensor.requires_grad}
        raise_together(trainer, non_finite(final, [piece for piece in weights if piece.name in trained]))
        snapshot = Snapshot(
            weights=[piece.copied() for piece in weights],
            optimiser=[piece.copied() for piece in deal(strategy.optimiser(), rank, world_size)],
            aliases=tied_names(strategy.objective),
            state=deepcopy(state) if rank == 0 else {},  # the next steps change what it refers to
            manifest=Manifest(
                step=state["global_step"],
                exams_seen=self._stream.exams_seen,
                world_size=world_size,
                strategy=recipe.trainer.strategy.value,
                made_with=self._made_with,
                shards=shards_of(self._stream),
            ),
        )
        self._saver.write(final, snapshot)

    def _add_files(self, folder: Path) -> None:
        (folder / "recipe.yaml").write_text(self._resolved.to_yaml(), encoding="utf-8")
        self._tokens.save(folder / "tokenizer")


def non_finite(final: Path, pieces: Iterable[Piece]) -> NonFiniteError | None:
    """What is wrong with weights that are no numbers: saved, they would be the one checkpoint that is kept.

    A finite loss may have such a gradient; the loss of the next step would show it, after the save.
    """
    broken = [piece.name for piece in pieces if not torch.isfinite(piece.values).all()]
    if not broken:
        return None
    return NonFiniteError(
        f"{len(broken)} weights are not finite after this step, among them {broken[0]}; they are not saved",
        where=str(final),
        fix=TAME,
    )


def shards_of(stream: Stream) -> dict[str, str]:
    """Digests by place, since two sets may well have one name; a set that serves twice is there once."""
    return {index.root: index.digest for index in stream.indices}
