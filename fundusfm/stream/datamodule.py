"""The stream as a Lightning data module: loaders from a recipe, augmentation's tail, one number of state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from fundusfm.errors import UserError
from fundusfm.recipe.schema import Recipe
from fundusfm.shards.index import ShardIndex
from fundusfm.stream.cache import ShardCache
from fundusfm.stream.loader import EvalStream, TrainStream, World, make_loader
from fundusfm.stream.reader import ShardReader
from fundusfm.stream.tokens import Tokens
from fundusfm.stream.transforms import DeviceTail
from fundusfm.stream.view import Remarking, ViewInputs
from fundusfm.stream.view_composite import CompositeBatch
from fundusfm.stream.views import VIEWS


class Stream(pl.LightningDataModule):
    """Training batches from `data.sources`; validation on their `val` split where they have one.

    Its state is `exams_seen`, the exams that optimiser steps have consumed, over all ranks.
    """

    def __init__(self, recipe: Recipe, view_name: str, tokens: Tokens) -> None:
        super().__init__()
        self.recipe, self.config = recipe, recipe.data
        self.indices = [ShardIndex.load(source.shards) for source in recipe.data.sources]
        self.view = VIEWS[view_name](ViewInputs(recipe, tokens, tuple(self.indices)))
        self._cache = shard_cache(recipe)
        self.readers = [ShardReader(index, "train", self.view, self._cache) for index in self.indices]
        # Else a run would end well and have learned nothing.
        held = [reader.holding for reader in self.readers]
        if refusal := self.view.refusal(held):
            raise refusal
        self.remarks = self.view.remarks(held) if isinstance(self.view, Remarking) else {}
        self.exams_seen = 0
        self._tail = DeviceTail(recipe.data.mean, recipe.data.std)

    @property
    def num_exams(self) -> int:
        """Exams in one pass over every source."""
        return sum(reader.num_exams for reader in self.readers)

    @property
    def has_val(self) -> bool:
        """Whether any source has a val split."""
        return any("val" in index.splits for index in self.indices)

    def train_stream(self, world: World) -> TrainStream[Any, Any]:
        """The endless training stream as one rank sees it."""
        weights = [source.weight for source in self.config.sources]
        return TrainStream(
            list(zip(self.readers, weights, strict=True)),
            self.view,
            seed=self.recipe.seed,
            batch_size=self.config.global_batch_size,
            window=self.config.shuffle_window,
            world=world,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        start = self.exams_seen // self.config.global_batch_size
        return self._loader(self.train_stream(self._world()), self.config.workers, start)

    def val_dataloader(self) -> DataLoader[Any]:
        """The val splits of all sources that have one, with equal shares of `val_exams`; no batch mixes."""
        trainer = self.recipe.trainer
        with_val = [index for index in self.indices if "val" in index.splits]
        streams = [
            EvalStream(
                ShardReader(index, "val", self.view, self._cache),
                self.view,
                batch_size=trainer.val_batch_size,
                world=self._world(),
                max_exams=trainer.val_exams // len(with_val),
            )
            for index in with_val
        ]
        return self._loader(ConcatDataset(streams), min(1, self.config.workers))

    def _loader(self, stream: Dataset[Any], workers: int, start: int | None = None) -> DataLoader[Any]:
        loader = make_loader(stream, workers=workers, start=start, pin=self._on_gpu())
        loader.raises = False  # all ranks have to hear of it first
        return loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, UserError):
            return batch
        return normalised(batch, self._tail)

    def note_step(self) -> None:
        """One optimiser step has consumed one global batch."""
        self.exams_seen += self.config.global_batch_size

    def state_dict(self) -> dict[str, Any]:
        return {"exams_seen": self.exams_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.exams_seen = state_dict["exams_seen"]

    def _world(self) -> World:
        return World(self.trainer.global_rank, self.trainer.world_size) if self.trainer else World()

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def normalised(batch: Any, tail: DeviceTail) -> Any:
    """A batch whose images went through the tail of the augmentation; those of every part of a composite."""
    if isinstance(batch, CompositeBatch):
        return batch.map_parts(lambda part: normalised(part, tail))
    return replace(batch, images=tail.normalise(batch.images, batch.color_N34, batch.erase_N4))


def shard_cache(recipe: Recipe) -> ShardCache:
    """The bounded local cache of remote shards, by default in the user's cache folder."""
    folder = (
        Path(recipe.data.cache_dir)
        if recipe.data.cache_dir
        else Path.home() / ".cache" / "fundusfm" / "shards"
    )
    return ShardCache(folder, int(recipe.data.cache_gib * 2**30))
