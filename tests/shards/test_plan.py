from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fundusfm.shards.plan import plan_shards


@given(st.lists(st.sampled_from(["train", "val", "test"]), max_size=300), st.integers(1, 50))
def test_every_exam_once_in_shards_of_its_split(splits: list[str], exams_per_shard: int) -> None:
    plans = plan_shards(splits, exams_per_shard)
    assert sorted(n for plan in plans for n in plan.numbers) == list(range(len(splits)))
    for split in set(splits):
        sizes = [len(plan.numbers) for plan in plans if plan.split == split]
        assert max(sizes) <= exams_per_shard
        assert max(sizes) - min(sizes) <= 1
        first_keys = [plan.first_key for plan in plans if plan.split == split]
        assert first_keys == [sum(sizes[:i]) for i in range(len(sizes))]
    assert all(splits[n] == plan.split for plan in plans for n in plan.numbers)


def test_order_is_shuffled() -> None:
    numbers = plan_shards(["train"] * 1000, 1000)[0].numbers
    neighbours = sum(b - a == 1 for a, b in pairwise(numbers))
    assert neighbours < 20
