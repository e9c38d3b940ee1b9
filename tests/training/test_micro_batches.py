"""Whole runs in micro-batches, by the real trainer and the real launcher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.training.conftest import Finished
from tests.training.launch import finish, losses, start

# Dropout masks belong to micro-batches; sums over more pieces round differently.
SAME = ("model.text.dropout=0", "data.workers=0", "trainer.max_steps=10", "telemetry.images_every_steps=100")
RTOL = 2e-3


def _close(found: Path, wanted: Path) -> None:
    ours, theirs = losses(found), losses(wanted)
    assert ours.keys() == theirs.keys()
    for key, line in theirs.items():
        assert ours[key] == pytest.approx(line, rel=RTOL), key


def test_global_negatives__the_losses_of_the_big_batch(recipe: Path) -> None:
    whole = Finished(recipe, *SAME, "name=whole")
    micro = Finished(recipe, *SAME, "data.micro_batch_size=4", "name=micro")
    _close(micro.folder.parent / "micro" / "metrics.jsonl", whole.folder.parent / "whole" / "metrics.jsonl")
    assert (
        "12 exams = 4 a rank x 3 micro-batches x 1 ranks; contrasted as a whole, all but one encoded twice"
        in " ".join(micro.said.replace("│", " ").split())
    )


def test_one_micro_batch__as_if_it_were_none(recipe: Path) -> None:
    """Gradients of the last step are cleared then, too."""
    Finished(recipe, *SAME, "name=whole", "optim.clip_norm=null")
    Finished(recipe, *SAME, "name=one", "optim.clip_norm=null", "data.micro_batch_size=12")
    ours, theirs = (losses(recipe.parent / run / "metrics.jsonl") for run in ("one", "whole"))
    assert ours == theirs


def test_micro_negatives__another_loss_and_said_so(recipe: Path) -> None:
    whole = Finished(recipe, *SAME, "name=whole")
    micro = Finished(recipe, *SAME, "data.micro_batch_size=4", "objective.negatives=micro", "name=micro")
    assert "contrasted within each 4, not the whole batch" in " ".join(micro.said.replace("│", " ").split())
    ours, theirs = (losses(recipe.parent / run / "metrics.jsonl") for run in ("micro", "whole"))
    first = (1, False)
    # Chance is log(candidates): 4 instead of 12, in each of three terms.
    assert ours[first]["train/loss"] < theirs[first]["train/loss"] - 2
    last = max(key for key in ours if not key[1])
    assert ours[last]["train/loss"] < ours[first]["train/loss"], "nothing was learned"
    assert whole.outcome.step == micro.outcome.step == 10


def test_two_ranks__the_losses_of_one(recipe: Path) -> None:
    said = finish(start(recipe, *SAME, "data.micro_batch_size=2", "trainer.devices=2", "name=two"))
    assert "12 exams = 2 a rank x 3 micro-batches x 2 ranks" in " ".join(said.split())
    Finished(recipe, *SAME, "name=one")
    _close(recipe.parent / "two" / "metrics.jsonl", recipe.parent / "one" / "metrics.jsonl")


def test_resumed__as_if_never_stopped(recipe: Path) -> None:
    """With dropout: the random state of each micro-batch is a function of the step."""
    options = (*SAME[1:], "data.micro_batch_size=4")
    whole = Finished(recipe, *options, "name=whole")
    assert whole.outcome.step == 10
    Finished(recipe, *options, "name=cut", "trainer.max_steps=10")
    metrics = recipe.parent / "cut" / "metrics.jsonl"
    wanted = metrics.read_text()
    shutil.rmtree(recipe.parent / "cut" / "checkpoints" / "step-00000010")
    Finished(recipe, *options, "name=cut", resume=True)
    assert losses(metrics) == losses(recipe.parent / "whole" / "metrics.jsonl")
    assert wanted.count("\n") == metrics.read_text().count("\n")


def test_resumed_in_smaller_pieces__the_losses_of_the_big_batch(recipe: Path) -> None:
    """Fewer GPUs may need them, and blocks that run twice; what is compared with what does not change."""
    whole = losses(Finished(recipe, *SAME).metrics)
    shutil.rmtree(recipe.parent / "run" / "checkpoints" / "step-00000010")
    spared = ("data.micro_batch_size=3", "model.vision.gradient_checkpointing=true")
    again = losses(Finished(recipe, *SAME, *spared, resume=True).metrics)
    assert again.keys() == whole.keys()
    found, wanted = ([line[n, False]["train/loss"] for n in range(6, 11)] for line in (again, whole))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found != wanted, "resumed in one piece"
