"""The real launcher with two processes: the numbers of one process, one voice, one end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from fundusfm.training.checkpoint import newest_whole, verify
from tests.conftest import Cohort
from tests.training.conftest import Finished
from tests.training.launch import (
    LIMIT_S,
    SLOW,
    break_val_exam,
    finish,
    losses,
    start,
    wait_for_step,
    write_recipe,
)

# No dropout: its masks belong to ranks. Everything else must not know how many ranks there are.
SAME = ("model.text.dropout=0", "data.workers=1", "telemetry.images_every_steps=100")
TWO = ("trainer.devices=2",)
RTOL = 2e-3


@pytest.fixture(scope="module")
def two_ranks(synth_cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two")
    recipe = write_recipe(folder / "recipe.yaml", synth_cohort)
    return folder, finish(start(recipe, *SAME, *TWO))


def _close(found: Path, wanted: Path) -> None:
    ours, theirs = losses(found), losses(wanted)
    assert ours.keys() == theirs.keys()
    for key, line in theirs.items():
        assert ours[key] == pytest.approx(line, rel=RTOL), key


def test_two_ranks__the_losses_of_one(two_ranks: tuple[Path, str], recipe: Path) -> None:
    """Step by step, validation too; with other exams in any batch the first losses would differ already."""
    alone = Finished(recipe, *SAME)
    _close(two_ranks[0] / "run" / "metrics.jsonl", alone.metrics)
    assert verify(alone.outcome.checkpoint).world_size == 1


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero2", "zero3"])
def test_every_strategy__the_losses_of_one(recipe: Path, strategy: str) -> None:
    short = (*SAME, "trainer.max_steps=10")
    finish(start(recipe, *short, *TWO, f"trainer.strategy={strategy}"))
    spread = shutil.move(recipe.parent / "run", recipe.parent / "spread")
    _close(spread / "metrics.jsonl", Finished(recipe, *short).metrics)


def test_two_ranks__say_everything_once(two_ranks: tuple[Path, str]) -> None:
    folder, said = two_ranks
    assert "12 exams = 6 a rank x 1 micro-batch x 2 ranks" in " ".join(said.split())
    for word in ("unique exams", "step 24/24", "done: "):
        assert said.count(word) == 1, said
    newest, torn = newest_whole(folder / "run" / "checkpoints")
    assert newest is not None
    assert not torn
    manifest = verify(newest)
    assert (manifest.step, manifest.exams_seen, manifest.world_size) == (24, 288, 2)


def test_resume__on_one_rank_what_two_began(two_ranks: tuple[Path, str], recipe: Path) -> None:
    folder = recipe.parent
    shutil.copytree(two_ranks[0] / "run", folder / "run", symlinks=True)
    for step in (20, 24):
        shutil.rmtree(folder / "run" / "checkpoints" / f"step-{step:08d}")
    (folder / "run" / "recipe.yaml").write_text(
        (folder / "run" / "recipe.yaml").read_text().replace(str(two_ranks[0]), str(folder))
    )
    again = Finished(recipe, *SAME, resume=True)
    assert "step-00000015, as it was left" in again.said
    assert again.outcome.step == 24
    _close(again.metrics, two_ranks[0] / "run" / "metrics.jsonl")


def _other_rank(pid: int) -> int:
    """The process of the second rank: the child that was started as this command."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if b"LOCAL_RANK=1" in environment and b"pretrain" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError("there is no second rank")


def test_sigterm_to_one_rank__both_save_and_stop(recipe: Path) -> None:
    process = start(recipe, *SAME, *TWO, *SLOW)
    metrics = recipe.parent / "run" / "metrics.jsonl"
    wait_for_step(process, metrics, 6)
    second = _other_rank(process.pid)
    os.kill(second, signal.SIGTERM)
    said = finish(process, 143)
    assert said.count("go on with --resume") == 1
    assert "Traceback" not in said
    deadline_s = time.monotonic() + LIMIT_S
    while Path(f"/proc/{second}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not Path(f"/proc/{second}").exists(), "the second rank lives on"
    newest, torn = newest_whole(recipe.parent / "run" / "checkpoints")
    assert newest is not None
    assert not torn
    assert 6 <= verify(newest).step < 24
    assert max(step for step, _ in losses(metrics)) == verify(newest).step


def test_crash_on_one_rank__its_traceback_once_and_the_end(recipe: Path) -> None:
    own = ("objective.name=tests.training.own:CrashOnOneRank", "objective.fidelity=corrected")
    process = start(recipe, *SAME, *TWO, *own)
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode != 0
    assert said.count("ZeroDivisionError: broken on purpose") == said.count("Traceback") == 1, said
    # Either the launcher kills the first rank before it can say a word, or it hears of the loss.
    assert said.count("another rank of this run has ended") <= 1, said


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ("NanOnOneRank", "the loss is nan at step 4"),
        ("NanFeaturesOnOneRank", "rank 1: 1 rows of b are not finite: 2"),
    ],
)
def test_error_on_one_rank__one_message_and_the_end(recipe: Path, objective: str, told: str) -> None:
    own = (f"objective.name=tests.training.own:{objective}", "objective.fidelity=corrected")
    said = finish(start(recipe, *SAME, *TWO, *own), 2)
    assert said.count(told) == said.count("error:") == 1, said
    assert "rank 1" in said
    assert "Traceback" not in said


def test_validation_that_fails_on_one_rank__one_message_and_the_end(
    synth_cohort: Cohort, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(synth_cohort.shards, tmp_path / "synth"))
    _, key = break_val_exam(place, 1)  # with one exam a batch: the first batch of rank 1
    recipe = write_recipe(tmp_path / "recipe.yaml", Cohort(place, synth_cohort.tokenizer), val_every_steps=2)
    said = finish(start(recipe, *SAME, *TWO, "trainer.val_batch_size=1"), 2)
    assert said.count("no exam of a whole batch can be read") == said.count("error:") == 1, said
    assert key in said
    assert "Traceback" not in said


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_parameter_without_gradient__refused_at_the_first_step(recipe: Path, strategy: str) -> None:
    own = ("objective.name=tests.training.own:Idle", "objective.fidelity=corrected")
    said = finish(start(recipe, *SAME, *TWO, *own, f"trainer.strategy={strategy}"), 2)
    assert said.count("idle got no gradient") == said.count("error:") == 1, said
    assert "Traceback" not in said
