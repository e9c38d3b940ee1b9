"""Every text of a split, once, in the order of the files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fundusfm.errors import UserError
from fundusfm.shards.files import mapped
from fundusfm.shards.index import REBUILD, Offsets, ShardEntry, ShardIndex
from fundusfm.shards.reading import exam_at


def iterate_texts(index: ShardIndex, split: str) -> Iterator[str]:
    """The texts of all exams of a split of a local shard set, with every language and origin.

    UserError naming the shard if one of them is missing or damaged.
    """
    for shard in index.of_split(split):
        try:
            yield from _texts(index, shard)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the shard cannot be read: {error}",
                where=index.path(shard.name),
                fix=f"run `fundusfm shards check`; {REBUILD}",
            ) from error


def _texts(index: ShardIndex, shard: ShardEntry) -> Iterator[str]:
    offsets = Offsets.load(index.path(shard.offsets))
    with mapped(Path(index.path(shard.name))) as buffer:
        for start, end in zip(offsets.start_E, offsets.end_E, strict=True):
            stored = exam_at(buffer, int(start), int(end), split=shard.split)
            yield from (stored.read(text.name).decode() for text in stored.exam.texts)
