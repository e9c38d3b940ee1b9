"""Ranks that differ are named before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from fundusfm.errors import EveryRankError
from fundusfm.training.agreement import agree, differences, facts_of, source_digest
from tests.distributed.ranks import run_ranks
from tests.training.conftest import Finished

FACTS = {"recipe key optim.lr": "0.001", "shards a": "12ab", "code of fundusfm": "1 ff"}


def _agree(rank: int, others: dict[int, dict[str, str]]) -> str:
    try:
        agree({**FACTS, **others.get(rank, {})})
    except EveryRankError as error:
        return error.what
    return "goes on"


def test_agree__the_same_facts() -> None:
    assert run_ranks(2, _agree, {}) == ["goes on"] * 2


@pytest.mark.parametrize("name", list(FACTS))
def test_agree__every_rank_names_the_one_that_differs(name: str) -> None:
    heard = run_ranks(3, _agree, {2: {name: "other"}})
    assert len(set(heard)) == 1
    assert f"{name} of rank 2 (" in heard[0]
    assert f"is other, of most {FACTS[name]}" in heard[0]


def test_differences__of_two_the_first_is_right_and_what_is_missing_counts() -> None:
    assert differences([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}], ["x", "y"]) == [
        "b of rank 1 (y) is 3, of most 2"
    ]
    assert differences([{"a": "1"}, {}, {"a": "1"}], ["x", "y", "z"]) == [
        "a of rank 1 (y) is nothing, of most 1"
    ]


def test_source_digest__hears_of_any_change(tmp_path: Path) -> None:
    digests = set()
    for place, text in (("a.py", "x = 1\n"), ("a.py", "x = 2\n"), ("b/c.py", "")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
        source_digest.cache_clear()
        digests.add(source_digest(tmp_path))
    assert len(digests) == 3


def test_facts__hold_the_recipe_the_data_and_the_code(short_run: Finished) -> None:
    from fundusfm.objectives import config_of
    from fundusfm.recipe.load import load_recipe
    from fundusfm.training.fit import assemble
    from fundusfm.training.runfolder import RunFolder

    resolved = load_recipe(short_run.recipe, objective_config=config_of)
    run = assemble(resolved, RunFolder.of(resolved.recipe))
    facts = facts_of(run.recipe, run.stream, run.tokens)
    assert facts["recipe key optim.lr"] == "0.001"
    assert facts[f"shards {run.stream.indices[0].root}"] == run.stream.indices[0].digest
    assert {"tokenizer", "code of fundusfm", "version of torch"} <= facts.keys()
