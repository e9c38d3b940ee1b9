"""Before the first step: ranks that differ in anything that shapes the numbers are named, and all end.

A node with an older checkout or another copy of the shards would train on without a word.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import pytorch_lightning as pl
import torch.distributed as dist

import fundusfm
from fundusfm.errors import EveryRankError
from fundusfm.recipe.schema import Recipe
from fundusfm.recipe.values import flatten
from fundusfm.stream.datamodule import Stream
from fundusfm.stream.tokens import Tokens
from fundusfm.training.facts import PACKAGES

_MOST_LINES = 8


class Agreement(pl.Callback):
    """Compares the facts of all ranks as soon as they can talk."""

    def __init__(self, recipe: Recipe, stream: Stream, tokens: Tokens, start: str) -> None:
        self._facts = facts_of(recipe, stream, tokens) | {"start": start or "from the beginning"}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            agree(self._facts | {"number of ranks": str(trainer.world_size)})


def facts_of(recipe: Recipe, stream: Stream, tokens: Tokens) -> dict[str, str]:
    """What every rank must have alike: each key of the recipe, digests of data and code, versions."""
    vocabulary = json.dumps(sorted(tokens.vocabulary.items()), ensure_ascii=False)
    return {
        **{f"recipe key {key}": str(value) for key, value in flatten(recipe).items()},
        **{f"shards {index.root}": index.digest for index in stream.indices},
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "code of fundusfm": f"{fundusfm.__version__} {source_digest(Path(fundusfm.__file__).parent)}",
        "version of python": platform.python_version(),
        **{f"version of {name}": metadata.version(name) for name in PACKAGES},
    }


@functools.cache
def source_digest(package: Path) -> str:
    """Digest of the names and contents of all Python files of a package."""
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        total.update(f"{path.relative_to(package)} {len(content)}\n".encode())
        total.update(content)
    return total.hexdigest()


def agree(facts: Mapping[str, str]) -> None:
    """EveryRankError naming the ranks that differ from most, and in what. Collective."""
    digest = hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    all_facts: list[tuple[str, dict[str, str]]] = [("", {})] * dist.get_world_size()
    dist.all_gather_object(all_facts, (platform.node(), dict(facts)))
    lines = differences([f for _, f in all_facts], [host for host, _ in all_facts])
    more = f"; and {len(lines) - _MOST_LINES} more" if len(lines) > _MOST_LINES else ""
    raise EveryRankError(
        "the ranks do not agree: " + "; ".join(lines[:_MOST_LINES]) + more,
        where="before the first step",
        fix="bring the same code, recipe and data to every node, then start again",
    )


def differences(all_facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """One line a fact and a rank that has another value than most ranks; of two, the first rank is right."""
    lines = []
    for name in dict.fromkeys(name for facts in all_facts for name in facts):
        values = [facts.get(name, "nothing") for facts in all_facts]
        usual, _ = Counter(values).most_common(1)[0]
        lines += [
            f"{name} of rank {rank} ({hosts[rank]}) is {value}, of most {usual}"
            for rank, value in enumerate(values)
            if value != usual
        ]
    return lines
