"""Killed anywhere and resumed, a run gives the losses of an undisturbed one, bit for bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from fundusfm.training.checkpoint import newest_whole
from tests.conftest import Cohort
from tests.training.launch import LIMIT_S, SLOW, finish, losses, signal_at_step, start, write_recipe


@pytest.fixture(scope="module")
def undisturbed(synth_cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    output = finish(start(write_recipe(folder / "recipe.yaml", synth_cohort), *SLOW))
    assert "unique exams" in output
    assert "passes" in output
    return folder / "run" / "metrics.jsonl"


@pytest.mark.parametrize(("seed", "workers"), [(0, 0), (1, 1), (2, 4)])
def test_sigkill_twice__bit_equal(
    synth_cohort: Cohort, undisturbed: Path, tmp_path: Path, seed: int, workers: int
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", synth_cohort)
    metrics = tmp_path / "run" / "metrics.jsonl"
    draw = random.Random(seed)
    first, second = sorted(draw.sample(range(5, 23), 2))
    for step, resume in ((first, ()), (second, ("--resume",))):
        process = start(recipe, *SLOW, *resume)
        signal_at_step(process, metrics, step, signal.SIGKILL)
        process.communicate(timeout=LIMIT_S)
    finish(start(recipe, *SLOW, "--resume", f"data.workers={workers}"))
    assert losses(metrics) == losses(undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop__saves_at_the_step_and_goes_on_exactly(
    synth_cohort: Cohort, undisturbed: Path, tmp_path: Path, number: int, code: int
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", synth_cohort)
    process = start(recipe, *SLOW, "checkpoint.every_steps=100")
    signal_at_step(process, tmp_path / "run" / "metrics.jsonl", 8, number)
    output = finish(process, code)
    assert f", signal {number.name}; go on with --resume" in output
    newest, torn = newest_whole(tmp_path / "run" / "checkpoints")
    assert not torn
    assert newest is not None
    assert 8 <= int(newest.name.rpartition("-")[2]) < 24
    finish(start(recipe, *SLOW, "--resume"))
    assert losses(tmp_path / "run" / "metrics.jsonl") == losses(undisturbed)


def test_finished_run__resuming_changes_nothing(undisturbed: Path) -> None:
    before = losses(undisturbed)
    output = finish(start(undisturbed.parent.parent / "recipe.yaml", *SLOW, "--resume"))
    assert "step-00000024" in output
    assert losses(undisturbed) == before


def test_same_name__refused(undisturbed: Path) -> None:
    output = finish(start(undisturbed.parent.parent / "recipe.yaml"), 2)
    assert "a run of this name exists" in output
    assert "Traceback" not in output
