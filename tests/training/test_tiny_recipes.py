"""Every tiny recipe as it ships: it begins, validates, draws its pictures, saves, and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

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
