"""Training inside the test process, which spares the seconds that a process of its own takes to start."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from fundusfm.training import fit
from fundusfm.training.fit import Outcome
from tests.conftest import Cohort
from tests.training.launch import write_recipe

SHORT = ("data.workers=0", "trainer.max_steps=6", "trainer.val_every_steps=3", "checkpoint.every_steps=3")
PICTURES = ("telemetry.images_every_steps=3",)


class Finished:
    """A run that has ended: where it lies, what it said, how it ended."""

    def __init__(self, recipe: Path, *overrides: str, **how: Any) -> None:
        heard = io.StringIO()
        with contextlib.redirect_stderr(heard):
            self.outcome: Outcome = fit.pretrain(recipe, overrides, **how)
        self.recipe, self.said = recipe, heard.getvalue()
        self.folder = recipe.parent / "run"
        self.metrics = self.folder / "metrics.jsonl"


@pytest.fixture
def recipe(synth_cohort: Cohort, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", synth_cohort)


@pytest.fixture(scope="session")
def short_run(synth_cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Six steps with validation, pictures and checkpoints at 3 and 6. Read only: tests share it."""
    torch.set_num_threads(1)  # as in every test: sums over another number of threads round differently
    folder = tmp_path_factory.mktemp("short")
    return Finished(write_recipe(folder / "recipe.yaml", synth_cohort), *SHORT, *PICTURES)
