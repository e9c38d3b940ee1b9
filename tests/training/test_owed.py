"""Stopped or killed before a validation, a run makes it when it goes on, with the numbers of a quiet run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fundusfm.objectives.ret_clip import RetClip
from tests.training.conftest import SHORT, Finished
from tests.training.launch import losses
from tests.training.ranked import train

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")


def has_validation(metrics: Path, step: int) -> bool:
    return (step, True) in losses(metrics)


class Killed(BaseException):
    """Nobody catches it, as nobody outlives a SIGKILL."""


@pytest.fixture
def dies_validating(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The steps whose next validation ends the run."""
    steps: list[int] = []
    whole = RetClip.validation_step

    def dying(self: RetClip, *given: Any) -> None:
        if self.global_step in steps:
            steps.remove(self.global_step)
            raise Killed
        whole(self, *given)

    monkeypatch.setattr(RetClip, "validation_step", dying)
    yield steps
    assert not steps


def ask_to_stop_at(step: int, patch: pytest.MonkeyPatch) -> list[int]:
    """SIGUSR1 during a step; returns where it has been sent."""
    whole, asked_at = RetClip.after_step, []

    def asked(self: RetClip) -> None:
        whole(self)
        if self.global_step + 1 == step:  # counted after this
            asked_at.append(step)
            os.kill(os.getpid(), signal.SIGUSR1)

    patch.setattr(RetClip, "after_step", asked)
    return asked_at


@pytest.mark.parametrize("step", [3, 6])
def test_killed_in_a_validation__made_on_going_on(
    recipe: Path, short_run: Finished, dies_validating: list[int], step: int
) -> None:
    dies_validating.append(step)
    with pytest.raises(Killed):
        Finished(recipe, *SHORT)
    again = Finished(recipe, *SHORT, resume=True)
    assert ("step 3 lacks its validation" in again.said) == (step == 3)
    assert losses(again.metrics) == losses(short_run.metrics)
    assert (again.folder / "DONE").exists()


def test_killed_in_an_owed_validation__made_the_next_time(
    recipe: Path, short_run: Finished, dies_validating: list[int]
) -> None:
    dies_validating += [3, 3]
    for resume in (False, True):
        with pytest.raises(Killed):
            Finished(recipe, *SHORT, resume=resume)
    assert losses(Finished(recipe, *SHORT, resume=True).metrics) == losses(short_run.metrics)


def test_killed_in_the_middle_of_its_line__made_again(
    recipe: Path, short_run: Finished, dies_validating: list[int]
) -> None:
    dies_validating.append(3)
    with pytest.raises(Killed):
        Finished(recipe, *SHORT)
    with (recipe.parent / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "exams": 36, "val/lo')
    assert losses(Finished(recipe, *SHORT, resume=True).metrics) == losses(short_run.metrics)


def test_asked_to_stop_at_the_last_step_and_killed_then__made_on_going_on(
    recipe: Path, short_run: Finished, dies_validating: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dies_validating.append(6)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        ask_to_stop_at(6, patch)
        Finished(recipe, *SHORT)
    assert losses(Finished(recipe, *SHORT, resume=True).metrics) == losses(short_run.metrics)


def test_validated_before_it_was_stopped__not_made_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, dies_validating: list[int]
) -> None:
    dies_validating.append(6)
    with pytest.raises(Killed):
        Finished(recipe, *SHORT)
    monkeypatch.setattr(RetClip, "validation_step", _only_at_step_6)
    assert Finished(recipe, *SHORT, resume=True).outcome.step == 6


def test_fork__owes_nothing(recipe: Path, short_run: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetClip, "validation_step", _only_at_step_6)
    origin = short_run.folder / "checkpoints" / "step-00000003"
    assert Finished(recipe, *SHORT, fork=origin).outcome.step == 6


def test_fork_of_a_whole_run__goes_on_and_validates(recipe: Path, short_run: Finished) -> None:
    origin = short_run.folder / "checkpoints" / "step-00000006"
    fork = Finished(recipe, *SHORT, "trainer.max_steps=9", fork=origin)
    assert list(losses(fork.metrics)) == [(7, False), (8, False), (9, False), (9, True)]


def _only_at_step_6(self: RetClip, batch: Any, batch_idx: int, *_: Any) -> None:
    assert self.global_step == 6
    self.log("val/loss", 1.0, batch_size=1)


@pytest.mark.parametrize("step", [3, 6])
def test_asked_to_stop_at_a_validation__made_on_going_on_or_if_it_is_the_last(
    recipe: Path, short_run: Finished, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        asked_at = ask_to_stop_at(step, patch)
        first = Finished(recipe, *SHORT)
    assert asked_at == [step]
    assert first.outcome.step == step
    assert first.outcome.signal_number == (signal.SIGUSR1 if step == 3 else None)
    assert has_validation(first.metrics, step) == (step == 6)
    assert (first.folder / "DONE").exists() == (step == 6)
    assert losses(Finished(recipe, *SHORT, resume=True).metrics) == losses(short_run.metrics)


@pytest.fixture
def imported_once() -> None:
    """The forked ranks find DeepSpeed imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401


MANY = ("trainer.max_steps=6", "trainer.val_every_steps=2", "trainer.val_batch_size=2")


@pytest.mark.usefixtures("imported_once")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks__the_numbers_of_a_quiet_run(recipe: Path, strategy: str) -> None:
    """With several batches a validation, and one validation before."""
    options = (*MANY, f"trainer.strategy={strategy}")
    train(2, recipe, *options, "name=quiet")
    train(2, recipe, *options, stop_after=4)
    assert not has_validation(recipe.parent / "run" / "metrics.jsonl", 4)
    assert "step 4 lacks its validation" in train(2, recipe, *options, resume=True)
    assert losses(recipe.parent / "run" / "metrics.jsonl") == losses(
        recipe.parent / "quiet" / "metrics.jsonl"
    )


def test_fewer_ranks__the_same_validation(recipe: Path) -> None:
    train(2, recipe, *MANY, "name=quiet")
    train(2, recipe, *MANY, stop_after=4)
    train(1, recipe, *MANY, resume=True)
    ours, quiet = (losses(recipe.parent / name / "metrics.jsonl") for name in ("run", "quiet"))
    assert ours.keys() == quiet.keys()
    assert ours[4, True] == pytest.approx(quiet[4, True], rel=1e-5)
