from __future__ import annotations

from typing import Any, Literal, Optional

import pytest

from fundusfm.recipe.schema import Precision, SourceConfig
from fundusfm.recipe.types import describe, item_config, misfit

FITS: list[tuple[Any, Any]] = [
    (3, int), (3, float), (0.5, float), ("x", str), (True, bool), (None, int | None),
    (4, Optional[int]),  # noqa: UP045
    ("bf16", Precision), ([1, 2.5], tuple[float, float]), ([], list[str]), (["a"], list[str]),
    ({"a": [1]}, dict[str, Any]),
    ({}, dict[str, str]), ("b", Literal["a", "b"]), ("???", int), ("${seed}", int), (None, Any),
]  # fmt: skip
MISFITS: list[tuple[Any, Any]] = [
    (True, int), (True, float), (2.0, int), ("3", int), (3, str), (False, str), (None, str), ("yes", bool),
    (1, bool),
    ("fp16", Precision), (1, Precision), ([1], tuple[float, float]), ([1, "a"], tuple[float, float]),
    ("ab", list[str]), ([["a"]], list[str]), ([None], list[str]), ({1: "a"}, dict[str, str]),
    ({"a": 1}, dict[str, str]), ("c", Literal["a"]), ({}, int), ([], int),
]  # fmt: skip


@pytest.mark.parametrize(("value", "hint"), FITS, ids=str)
def test_misfit__fits(value: Any, hint: Any) -> None:
    assert misfit(value, hint) == ""


@pytest.mark.parametrize(("value", "hint"), MISFITS, ids=str)
def test_misfit__does_not(value: Any, hint: Any) -> None:
    assert misfit(value, hint) == describe(hint) != ""


def test_describe() -> None:
    assert describe(int | None) == "a whole number or null"
    assert describe(Precision) == "one of fp32, bf16"
    assert describe(tuple[float, float]) == "a list of 2: a number, a number"
    assert describe(dict[str, int]) == "a mapping, each value a whole number"


def test_item_config() -> None:
    assert item_config(list[SourceConfig]) is SourceConfig
    assert item_config(list[str]) is None and item_config(str) is None
