"""Every tiny recipe as it ships: it begins, validates, draws its pictures, saves, and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fundusfm.errors import UserError
from fundusfm.objectives.base import Objective
from fundusfm.training import fit
from tests.conftest import Cohort

RECIPES = Path(__file__).parents[2] / "recipes"
CHECKPOINTED = "model.vision.gradient_checkpointing=true"
TINY = sorted(path.stem for path in RECIPES.glob("*_tiny.yaml"))


def tiny_overrides(name: str, cohort: Cohort, folder: Path) -> list[str]:
    expert = ""
    if name == "keepfit_tiny":
        expert = f", {{shards: {shutil.copytree(cohort.shards, folder / 'experts')}, expert: true}}"
    tokenizer = "null" if name == "mae_tiny" else cohort.tokenizer
    return [
        f"runs_dir={folder}",
        f"data.sources=[{{shards: {cohort.shards}, weight: 1}}{expert}]",
        f"data.tokenizer={tokenizer}",
        "data.global_batch_size=8",
        "data.workers=0",
        "optim.warmup_steps=1",
        "trainer.max_steps=4",
        "trainer.val_every_steps=2",
        "trainer.val_exams=8",
        "checkpoint.every_steps=2",
        "telemetry.images_every_steps=2",
    ]


@pytest.mark.parametrize("name", TINY)
def test_tiny_recipe__begins_saves_and_goes_on(name: str, synth_cohort: Cohort, tmp_path: Path) -> None:
    overrides = tiny_overrides(name, synth_cohort, tmp_path)
    checkpoints = tmp_path / name / "checkpoints"
    fit.pretrain(RECIPES / f"{name}.yaml", overrides)
    shutil.rmtree(checkpoints / "step-00000004")
    fit.pretrain(RECIPES / f"{name}.yaml", overrides, resume=True)
    assert (checkpoints / "step-00000004" / "manifest.json").exists()


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_released_captions__refused_where_gradients_are_out_of_reach(
    strategy: str, synth_cohort: Cohort, tmp_path: Path
) -> None:
    released = ["objective.fidelity=released", f"trainer.strategy={strategy}"]
    with pytest.raises(UserError, match=r"(?s)cuts each value of a gradient.*where: trainer\.strategy"):
        fit.pretrain(
            RECIPES / "caption_tiny.yaml",
            [*tiny_overrides("caption_tiny", synth_cohort, tmp_path), *released],
        )


def test_resume__of_groups_that_were_empty(
    synth_cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions had a group of what decay spares, also where it spares nothing."""
    overrides = [*tiny_overrides("flair_tiny", synth_cohort, tmp_path), "objective.fidelity=released"]
    groups_now = Objective.optimiser_groups

    def groups_before(self: Objective) -> list[dict[str, Any]]:
        groups = groups_now(self)
        assert len(groups) == 1
        return [*groups, {"params": [], "weight_decay": 0.0, "lr": groups[0]["lr"]}]

    recipe, run = RECIPES / "flair_tiny.yaml", tmp_path / "flair_tiny"
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "optimiser_groups", groups_before)
        fit.pretrain(recipe, overrides)
    wanted = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    fit.pretrain(recipe, overrides, resume=True)
    for before, now in zip(
        wanted.splitlines(), (run / "metrics.jsonl").read_text().splitlines(), strict=True
    ):
        for key in ("train/loss", "val/loss", "lr"):
            assert json.loads(now).get(key) == json.loads(before).get(key)


def test_gradient_checkpointing__averages_of_batches_count_each_once(
    synth_cohort: Cohort, tmp_path: Path
) -> None:
    """The tower normalises batches: what validation reads from its averages, and training does not."""
    read = []
    for runs_dir, options in (tmp_path / "plain", []), (tmp_path / "again", [CHECKPOINTED]):
        overrides = [
            *tiny_overrides("ret_clip_tiny", synth_cohort, tmp_path),
            f"runs_dir={runs_dir}",
            *options,
        ]
        fit.pretrain(RECIPES / "ret_clip_tiny.yaml", overrides)
        lines = (runs_dir / "ret_clip_tiny" / "metrics.jsonl").read_text().splitlines()
        read.append([loss for line in lines if (loss := json.loads(line).get("val/loss"))])
    assert len(read[0]) == 2 and read[1] == pytest.approx(read[0], rel=1e-6)
