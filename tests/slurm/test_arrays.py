"""Job arrays: a sweep that ends in one page, shards built in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fundusfm import cli
from fundusfm.shards.check import check_shards
from tests.conftest import Cohort
from tests.shards.conftest import draw_fundus, write_csv
from tests.slurm.conftest import TINY, Slurm
from tests.training.launch import PROJECT, losses, write_recipe

ONE = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=60", "--")


def _submit(slurm: Slurm, script: str, *arguments: str, **settings: str) -> tuple[str, str]:
    """The array and the job after it."""
    said = slurm.call(str(PROJECT / "launch" / script), *ONE, *arguments, **settings)
    words = said.replace(":", " ").split()
    return words[words.index("array") + 1], words[words.index("job") + 1]


def test_shards__parts_of_an_array_published_by_the_job_after(slurm: Slurm) -> None:
    source, rows = slurm.folder / "cohort", []
    source.mkdir()
    for patient in range(9):
        draw_fundus(patient).save(source / f"{patient}.png")
        rows.append(
            {"image": f"{patient}.png", "patient_id": f"p{patient}", "eye": "left", "modality": "CFP"}
        )
    table = write_csv(source / "cohort.csv", rows)
    options = ("--size", "32", "--exams-per-shard", "2")
    _, publish = _submit(slurm, "shards.sbatch", "2", str(table), "built/set", *options)
    slurm.wait(publish)
    assert check_shards(slurm.folder / "built" / "set", workers=1).ok
    assert slurm.said("*").count("built, not published") == 2


@pytest.mark.skipif(
    "compare" not in {command.name for command in cli.app.registered_commands},
    reason="`fundusfm compare` is not there yet",
)
def test_sweep__three_ablations_one_page(slurm: Slurm, synth_cohort: Cohort) -> None:
    base = write_recipe(slurm.folder / "base.yaml", synth_cohort)
    recipes = []
    for name, lr in (("slow", 0.0001), ("middle", 0.001), ("fast", 0.003)):
        recipe = {"extends": base.name, "name": name, "optim": {"lr": lr}}
        path: Path = slurm.folder / f"{name}.yaml"
        path.write_text(json.dumps(recipe))
        recipes.append(str(path))
    _, gather = _submit(slurm, "sweep.sbatch", *recipes, *TINY, FUNDUSFM_SWEEP_OUT="page")
    slurm.wait(gather)
    curves = [losses(slurm.folder / name / "metrics.jsonl") for name in ("slow", "middle", "fast")]
    assert all(len(curve) == 30 for curve in curves)
    assert curves[0] != curves[1] != curves[2]
    pages = list((slurm.folder / "page").glob("*.html"))
    assert len(pages) == 1
    assert all(name in pages[0].read_text() for name in ("slow", "middle", "fast"))
