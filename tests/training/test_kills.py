"""Killed at random steps and inside saves, a run under any strategy gives the losses of a quiet one."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fundusfm.training.checkpoint import newest_whole, verify
from tests.conftest import Cohort
from tests.training.launch import losses, write_recipe
from tests.training.ranked import train, train_until_killed

PLACES = ("step", "files", "whole", "renamed", "pruning")
STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> Iterator[None]:
    """The forked ranks find DeepSpeed imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401

    yield


def _killed_and_undisturbed(
    cohort: Cohort,
    folder: Path,
    strategy: str,
    world_size: int,
    places: list[str],
    draw: random.Random,
    *more: str,
) -> None:
    options = (
        f"trainer.strategy={strategy}",
        f"trainer.max_steps={STEPS}",
        "checkpoint.every_steps=2",
        *more,
    )
    whole = write_recipe(folder / "whole.yaml", cohort)
    train(world_size, whole, *options, "name=whole")
    recipe = write_recipe(folder / "recipe.yaml", cohort)
    run = folder / "run"
    for number, place in enumerate(places):
        newest, torn = newest_whole(run / "checkpoints")
        assert not torn, "a kill left a torn checkpoint under a final name"
        begun = verify(newest).step if newest else 0
        kill = place, begun + draw.randint(1, 3) if place == "step" else draw.randint(1, 2)
        train_until_killed(world_size, recipe, *options, resume=number > 0, kill=kill)
    train(world_size, recipe, *options, resume=True)
    assert losses(run / "metrics.jsonl") == losses(folder / "whole" / "metrics.jsonl")
    leftovers = [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not leftovers


def test_killed_in_a_save_and_between__bit_equal(synth_cohort: Cohort, tmp_path: Path) -> None:
    draw = random.Random(5)
    _killed_and_undisturbed(synth_cohort, tmp_path, "ddp", 2, ["whole", "step", "pruning"], draw)


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_killed_in_micro_batches__bit_equal(synth_cohort: Cohort, tmp_path: Path, strategy: str) -> None:
    places, draw = ["step", "whole", "step", "files"], random.Random(strategy)
    micro = "data.micro_batch_size=3"
    _killed_and_undisturbed(synth_cohort, tmp_path, strategy, 2, places, draw, micro)


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_killed_three_times__bit_equal(synth_cohort: Cohort, tmp_path: Path, strategy: str) -> None:
    places = ["step", "files", "renamed"]
    _killed_and_undisturbed(synth_cohort, tmp_path, strategy, 2, places, random.Random(strategy))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_killed_anywhere__bit_equal(synth_cohort: Cohort, tmp_path: Path, strategy: str, seed: int) -> None:
    """Five random kills each, thrice inside a save: fifty in all."""
    draw = random.Random(f"{strategy} {seed}")
    places = ["step", "step", *draw.sample(PLACES[1:], 3)]
    draw.shuffle(places)
    _killed_and_undisturbed(synth_cohort, tmp_path, strategy, draw.choice([1, 2]), places, draw)
