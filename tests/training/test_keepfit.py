"""KeepFIT from shards to checkpoint: two sources, labels and reports, a bank that survives a resumption."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fundusfm.training import saving
from tests.conftest import Cohort
from tests.training.conftest import SHORT, Finished
from tests.training.launch import write_recipe

OPTIONS = (
    *SHORT,
    "objective={name: keepfit, bank_size: 5}",
    "model.text.layers=2",
    "trainer.max_steps=4",
    "trainer.val_every_steps=2",
    "checkpoint.every_steps=2",
    "data.languages=[en]",
)


def _options(synth_cohort: Cohort, folder: Path) -> tuple[str, ...]:
    experts = folder / "experts"
    shutil.copytree(synth_cohort.shards, experts)
    sources = [{"shards": str(synth_cohort.shards)}, {"shards": str(experts), "expert": True}]
    return (*OPTIONS, f"data.sources={json.dumps(sources)}")


def _bank(run: Finished, step: int) -> dict[str, torch.Tensor]:
    file = run.folder / "checkpoints" / f"step-{step:08d}" / "trainer.pt"
    bank: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["expert_bank"]
    return bank


def test_run__stopped_and_resumed_as_if_it_had_gone_on(synth_cohort: Cohort, tmp_path: Path) -> None:
    options = _options(synth_cohort, tmp_path)
    run = Finished(write_recipe(tmp_path / "recipe.yaml", synth_cohort), *options)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    for term in ("public", "expert", "revision"):
        assert all(line[f"train/loss_{term}"] > 0 for line in trained)
        assert all(line[f"val/loss_{term}"] > 0 for line in lines if "val/loss" in line)
    assert trained[0]["train/loss_revision"] < 1
    wanted = _bank(run, 4)
    assert wanted["num_pushed"] == 4 * 6  # half of each batch of twelve
    assert wanted["num_pushed"] > _bank(run, 2)["num_pushed"]
    shutil.rmtree(run.folder / "checkpoints" / "step-00000004")
    again = Finished(run.recipe, *options, resume=True)
    for name in ("image", "text"):
        torch.testing.assert_close(_bank(again, 4)[name], wanted[name])


def test_bank_in_a_checkpoint__as_it_was_at_the_step(
    synth_cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written while the next steps push. The first save is waited for, the second one is not."""
    options = (*_options(synth_cohort, tmp_path), "trainer.val_every_steps=null", "trainer.max_steps=6")
    run = Finished(
        write_recipe(tmp_path / "recipe.yaml", synth_cohort), *options, "checkpoint.in_background=false"
    )
    wanted = _bank(run, 4)
    shutil.rmtree(run.folder)
    quick = saving.write_rank_files

    def slow(partial: Path, *given: Any) -> dict[str, str]:
        deadline_s = time.monotonic() + 60
        while "04" in partial.name and '"step": 6,' not in run.metrics.read_text():
            assert time.monotonic() < deadline_s, "training waits for the disk"
            time.sleep(0.01)
        return quick(partial, *given)

    monkeypatch.setattr(saving, "write_rank_files", slow)
    bank = _bank(Finished(run.recipe, *options), 4)
    for name in ("image", "text"):
        assert torch.equal(bank[name], wanted[name])
