"""Exams out of tars by offset: a memory map a shard, no buffer, no scanning."""

from __future__ import annotations

import mmap
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fundusfm.errors import UserError
from fundusfm.shards.index import REBUILD, Offsets, ShardEntry, ShardIndex
from fundusfm.shards.reading import StoredExam, exam_at
from fundusfm.stream.cache import ShardCache
from fundusfm.stream.faults import ExamUnreadableError, Fault
from fundusfm.stream.hashing import Indices
from fundusfm.stream.order import Slot
from fundusfm.stream.refusals import Holding
from fundusfm.stream.view import View

MAX_OPEN_SHARDS = 64


class ShardReader:
    """The exams of one split of one shard set that a view can use; `sizes` counts them by shard.

    Instances travel to loader workers: files are opened on first use in each process.
    """

    def __init__(self, index: ShardIndex, split: str, view: View[Any, Any], cache: ShardCache) -> None:
        self.index, self.split = index, split
        self._cache = cache
        self._shards = index.of_split(split)
        self._offsets = [self._load_offsets(shard) for shard in self._shards]
        self._usable: list[Indices] = [np.flatnonzero(view.usable(o)).astype(np.int64) for o in self._offsets]
        self.sizes = [len(u) for u in self._usable]
        self._open: OrderedDict[int, mmap.mmap] = OrderedDict()

    @property
    def kinds(self) -> Counter[str]:
        """How many members of each kind the exams of the split hold: `left.cfp`, `report.en`, ..."""
        counts: Counter[str] = Counter()
        for offsets in self._offsets:
            of_shard = offsets.counts_EK.sum(axis=0, dtype=np.int64).tolist()
            counts.update(dict(zip(offsets.kinds, of_shard, strict=True)))
        return counts

    @property
    def patterns(self) -> frozenset[frozenset[str]]:
        """The sets of kinds that exams of the split hold together."""
        return frozenset(
            frozenset(kind for kind, has in zip(offsets.kinds, row, strict=True) if has)
            for offsets in self._offsets
            for row in np.unique(offsets.counts_EK > 0, axis=0)
        )

    @property
    def holding(self) -> Holding:
        """What there is to learn from, for the view to judge."""
        labels = self.index.totals.get(self.split, {}).get("labels", {})
        return Holding(self.index.root, self.num_exams, self.kinds, labels, self.patterns)

    @property
    def num_exams(self) -> int:
        return sum(self.sizes)

    def slots(self) -> list[Slot]:
        """Every usable exam once, in the order of the files."""
        return [Slot(shard, exam) for shard, size in enumerate(self.sizes) for exam in range(size)]

    def read(self, slot: Slot) -> StoredExam:
        """The exam at a slot; ExamUnreadableError if its bytes are damaged."""
        offsets, number = self._offsets[slot.shard], int(self._usable[slot.shard][slot.exam])
        try:
            start, end = int(offsets.start_E[number]), int(offsets.end_E[number])
            shard = self.shard_name(slot)
            stored = exam_at(self._buffer(slot.shard), start, end, split=self.split, shard=shard)
            return replace(stored, root=self.index.root)
        except ValueError as error:
            raise self.unreadable(slot, "torn exam", error) from error

    def shard_name(self, slot: Slot) -> str:
        """File name of the shard of a slot."""
        return self._shards[slot.shard].name

    def unreadable(self, slot: Slot, cause: str, error: Exception) -> ExamUnreadableError:
        """The exception that tells where an unreadable exam lies."""
        key = str(self._offsets[slot.shard].keys_E[self._usable[slot.shard][slot.exam]])
        return ExamUnreadableError(
            Fault(self.index.name, self._shards[slot.shard].name, key, cause, str(error))
        )

    def _load_offsets(self, shard: ShardEntry) -> Offsets:
        offsets = Offsets.load(self.index.path(shard.offsets))
        if len(offsets) != shard.num_exams:
            raise UserError(
                f"the offsets file lists {len(offsets)} exams, the index {shard.num_exams}",
                where=self.index.path(shard.offsets),
                fix=REBUILD,
            )
        self._check_size(shard)
        return offsets

    def _check_size(self, shard: ShardEntry) -> None:
        """A missing or shortened local tar is an error at the start, not a series of skipped exams."""
        where = self.index.path(shard.name)
        if "://" in where:
            return  # checked after the download
        path = Path(where)
        found = path.stat().st_size if path.exists() else None
        if found != shard.num_bytes:
            state = "is missing" if found is None else f"has {found} bytes, the index says {shard.num_bytes}"
            raise UserError(f"the shard {state}", where=where, fix=f"run `fundusfm shards check`; {REBUILD}")

    def _buffer(self, number: int) -> mmap.mmap:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self._shards[number]
        with self._cache.open(self.index.path(shard.name), shard.num_bytes) as stream:
            buffer = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._open[number] = buffer
        if len(self._open) > MAX_OPEN_SHARDS:
            # Only forgotten, not closed: an exam in use may still look into it.
            self._open.popitem(last=False)
        return buffer

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}
