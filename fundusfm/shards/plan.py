"""Which exam goes into which shard: a pure function of the splits, so that a resumed build repeats it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fundusfm.errors import UserError
from fundusfm.shards.exam import SPLITS


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: exam numbers of the source, in tar order. Keys count from `first_key`."""

    name: str
    split: str
    numbers: tuple[int, ...]
    first_key: int


@dataclass(frozen=True)
class Part:
    """Part `number` of `count`, from 1 on: every count-th shard of a build, so that parts are alike."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`3/8`; UserError if it is none."""
        number, _, count = text.partition("/")
        if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return cls(int(number), int(count))
        raise UserError(f"{text!r} is no part", where="--part", fix="write 3/8 for the third of eight parts")

    def of(self, plans: Sequence[ShardPlan]) -> list[ShardPlan]:
        """The shards of this part."""
        return list(plans[self.number - 1 :: self.count])


def plan_shards(splits: Sequence[str], exams_per_shard: int) -> list[ShardPlan]:
    """Shards of one split each, exams hash-shuffled, of nearly equal size, at most `exams_per_shard`.

    Shuffled, because a cohort table is usually sorted by hospital or by disease and training shuffles only
    within a window of shards; equal, because a last shard of three exams would upset that window.
    """
    plans = []
    for split in SPLITS:
        numbers = sorted((n for n, s in enumerate(splits) if s == split), key=_shuffle_key)
        num_shards = -(-len(numbers) // exams_per_shard)
        cuts = [len(numbers) * i // max(1, num_shards) for i in range(num_shards + 1)]
        plans += [
            ShardPlan(f"{split}-{i:06d}", split, tuple(numbers[cuts[i] : cuts[i + 1]]), cuts[i])
            for i in range(num_shards)
        ]
    return plans


def _shuffle_key(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()
