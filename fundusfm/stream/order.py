"""Sample order as a pure function: exam at position p of an endless stream = order(seed, p).

Per epoch the shards are permuted and cut into windows; inside a window the exams are permuted, so that reads
stay local. Nothing is ever iterated up to a position: finding it costs one search over the shards and one
permutation of a window, both cached. A step that ends an epoch flows into the next one; nothing is dropped or
padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fundusfm.errors import UserError
from fundusfm.stream.hashing import Indices, hash_words, permutation

# What a draw is for; part of every hash, so that no two uses share their random numbers.
_SHARDS, _EXAMS, _REPLACEMENT, _SLOTS = 1, 2, 3, 4


@dataclass(frozen=True)
class Slot:
    """Where an exam lies: shard number, and its number among the shard's exams that the view can use."""

    shard: int
    exam: int


class EpochOrder:
    """The order of one source. `sizes`: usable exams of each shard; `window`: shards shuffled together."""

    def __init__(self, sizes: list[int], seed: int, window: int) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._seed, self._window = seed, window
        self.num_exams = int(self._sizes.sum())
        if self.num_exams == 0:
            raise UserError(
                "no exam of this shard set can be used",
                fix="check data.modalities and data.languages against `fundusfm shards stats`",
            )
        self._epoch_shards = lru_cache(maxsize=4)(self._shards_of_epoch)
        self._window_order = lru_cache(maxsize=8)(self._order_of_window)

    def __call__(self, position: int) -> Slot:
        """The exam at `position` of the endless stream."""
        epoch, within = divmod(position, self.num_exams)
        shards, window_ends = self._epoch_shards(epoch)
        window = int(np.searchsorted(window_ends, within, side="right"))
        start = int(window_ends[window - 1]) if window else 0
        chosen = int(self._window_order(epoch, window)[within - start])
        members = shards[window * self._window : (window + 1) * self._window]
        return self._slot(members, chosen)

    def replacement(self, position: int, attempt: int) -> Slot:
        """Another exam for a position whose own cannot be read; uniform over the epoch, fixed by the seed."""
        drawn = hash_words(self._seed, _REPLACEMENT, position, attempt) % self.num_exams
        return self._slot(np.arange(len(self._sizes), dtype=np.int64), drawn)

    def _slot(self, shards: Indices, number: int) -> Slot:
        ends = np.cumsum(self._sizes[shards])
        place = int(np.searchsorted(ends, number, side="right"))
        return Slot(int(shards[place]), number - (int(ends[place - 1]) if place else 0))

    def _shards_of_epoch(self, epoch: int) -> tuple[Indices, Indices]:
        shards = permutation(len(self._sizes), self._seed, _SHARDS, epoch)
        ends = np.cumsum(self._sizes[shards])
        last_of_window = np.append(np.arange(self._window, len(shards), self._window) - 1, len(shards) - 1)
        return shards, ends[last_of_window]

    def _order_of_window(self, epoch: int, window: int) -> Indices:
        _, ends = self._epoch_shards(epoch)
        size = int(ends[window] - (ends[window - 1] if window else 0))
        return permutation(size, self._seed, _EXAMS, epoch, window)


@dataclass(frozen=True)
class Draw:
    """One place of the stream: which source, and the position in that source's own endless stream."""

    source: int
    position: int


class Mixture:
    """Which source each place of a global batch is drawn from.

    After b batches a source has given `round(b * G * share)` exams, so that its part of every batch is its
    share rounded down or up; the source with the largest share takes what the others leave. Shares that are
    whole numbers of exams are exact in each batch.
    """

    def __init__(self, weights: list[float], batch_size: int, seed: int) -> None:
        num_sources = len(weights)
        if batch_size < num_sources * (
            num_sources - 1
        ):  # the largest share might not cover what rounding takes
            raise UserError(
                f"a global batch of {batch_size} exams is too small to mix {num_sources} sources in it",
                where="data.global_batch_size, data.sources",
                fix=f"use a batch of at least {num_sources * (num_sources - 1)} exams",
            )
        shares = np.asarray(weights, dtype=np.float64)
        self._exams_a_batch = shares / shares.sum() * batch_size
        self._largest = int(shares.argmax())
        self._batch_size, self._seed = batch_size, seed
        self._batch = lru_cache(maxsize=4)(self._draws_of_batch)

    def __call__(self, place: int) -> Draw:
        """Source and position of place `place` (counted in exams from the start of the stream)."""
        batch, slot = divmod(place, self._batch_size)
        return self._batch(batch)[slot]

    def counts(self, num_batches: int) -> Indices:
        """Exams that each source has given after `num_batches` global batches."""
        given: Indices = np.floor(num_batches * self._exams_a_batch + 0.5).astype(np.int64)
        given[self._largest] += num_batches * self._batch_size - given.sum()
        return given

    def _draws_of_batch(self, batch: int) -> list[Draw]:
        before, after = self.counts(batch), self.counts(batch + 1)
        draws = [Draw(s, p) for s in range(len(before)) for p in range(int(before[s]), int(after[s]))]
        if len(before) == 1:
            return draws
        return [draws[i] for i in permutation(len(draws), self._seed, _SLOTS, batch)]
