"""What the header says of memory, and what a checkpoint is said to need."""

from __future__ import annotations

import pytest

from fundusfm.recipe.schema import Strategy
from fundusfm.training.checkpoint import find_checkpoint
from fundusfm.training.loading import load_objective
from fundusfm.training.strategies.memory import checkpoint_bytes, memory_line, memory_of
from fundusfm.training.strategies.portable import blocks_of
from tests.objectives.tiny import tiny_recipe, tiny_ret_clip
from tests.training.conftest import Finished


@pytest.mark.parametrize(
    ("strategy", "spread"),
    [
        (Strategy.ddp, (0, 0, 0)),
        (Strategy.fsdp, (1, 1, 1)),
        (Strategy.zero1, (0, 0, 1)),
        (Strategy.zero2, (0, 1, 1)),
        (Strategy.zero3, (1, 1, 1)),
    ],
)
def test_parts__by_strategy(strategy: Strategy, spread: tuple[int, int, int]) -> None:
    module = tiny_ret_clip()
    whole = sum(p.numel() * 4 for p in module.parameters())
    in_blocks = sum(p.numel() * 4 for block in blocks_of(module) for p in block.parameters())
    recipe = tiny_recipe()
    recipe.trainer.strategy, recipe.trainer.devices = strategy, 4
    parts = memory_of(recipe, module)
    copies = (1, 1, 2 if strategy in (Strategy.ddp, Strategy.fsdp) else 3)  # ZeRO: a master copy, too
    for size, number, is_spread in zip(parts.values(), copies, spread, strict=True):
        saved = 0 if not is_spread else (in_blocks if strategy is Strategy.fsdp else whole) * 3 / 4
        assert size == pytest.approx(number * (whole - saved), rel=1e-4)
    assert "a rank, and activations" in memory_line(recipe, module)


def test_blocks__of_both_towers() -> None:
    module = tiny_ret_clip()
    assert [type(block).__name__ for block in blocks_of(module)] == ["Block"] * 2 + ["BertLayer"] * 2


def test_checkpoint__as_large_as_said(short_run: Finished) -> None:
    folder = find_checkpoint(short_run.folder)
    said = checkpoint_bytes(load_objective(folder)[0])
    assert said < sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 1.1 * said
