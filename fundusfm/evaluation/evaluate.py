"""`fundusfm evaluate`: a checkpoint and a shard set -> a folder with `report.html` and `results.json`."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from rich.console import Console

from fundusfm.evaluation.features import Source, Towers
from fundusfm.evaluation.output import REPORT, check_out, read_metrics, write
from fundusfm.evaluation.pipeline import make_exhibits, measure_reading, read
from fundusfm.evaluation.predictions import predictions_of
from fundusfm.evaluation.report import render
from fundusfm.evaluation.results import PRETRAINED, UNTRAINED
from fundusfm.evaluation.summary import summary_table
from fundusfm.objectives import build_objective
from fundusfm.objectives.base import Objective
from fundusfm.recipe.schema import Device, Recipe
from fundusfm.shards.index import ShardIndex
from fundusfm.stream.tokens import load_tokens
from fundusfm.training.checkpoint import Manifest, find_checkpoint, verify
from fundusfm.training.loading import load_objective, without_files
from fundusfm.training.runfolder import RunFolder

_UNSAFE = re.compile(r"[^\w.-]+")


def evaluate(
    checkpoint: Path,
    shards: str,
    *,
    out: Path | None = None,
    batch_size: int | None = None,
    shots: int | None = None,
    workers: int = 2,
) -> Path:
    """Measure a checkpoint on a shard set; returns the path of the report.

    `batch_size` and `shots` (images a label for few-shot methods) are by default those of its recipe.
    By default the report lies in the run's folder. An earlier one is replaced once the new one is whole.
    """
    console = Console()
    folder = find_checkpoint(checkpoint)
    manifest = verify(folder)
    index = ShardIndex.load(shards)
    run = RunFolder(folder.parent.parent)
    final = out or run.root / f"evaluation-{_UNSAFE.sub('-', index.name)}"
    check_out(final, index)
    objective, recipe = load_objective(folder)
    recipe.evaluation.shots = recipe.evaluation.shots if shots is None else shots
    tokens = load_tokens(recipe.data.tokenizer, recipe.data.context_length)
    source = Source(index, recipe, batch_size or recipe.evaluation.batch_size, workers, _device(recipe))
    towers = _towers(objective, recipe, tokens.vocab_size, source.device)
    with console.status("opening") as status:
        reading = read(source, towers, tokens, status.update)
        status.update("measuring")
        results, measurement = measure_reading(source, reading, run_facts(source, folder, manifest))
        exhibits = make_exhibits(results, measurement, reading, read_metrics(run.metrics, manifest.step))
        write(final, results, render(results, exhibits), predictions_of(results, measurement))
    console.print(summary_table(results))
    console.print(f"report: {final / REPORT}", soft_wrap=True, highlight=False)
    return final / REPORT


def _device(recipe: Recipe) -> torch.device:
    wanted = recipe.trainer.device
    cuda = wanted is not Device.cpu and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def _towers(objective: Objective, recipe: Recipe, vocab_size: int, device: torch.device) -> Towers:
    """The pretrained towers, and the same architecture as the seed of the recipe leaves it."""
    untrained = build_objective(without_files(recipe), vocab_size)
    return {PRETRAINED: objective.to(device).eval(), UNTRAINED: untrained.to(device).eval()}


def run_facts(source: Source, folder: Path, manifest: Manifest) -> dict[str, str]:
    """What a reader needs to repeat the measurement."""
    recipe, index = source.recipe, source.index
    size = f"{recipe.data.image_size} px, {', '.join(recipe.data.modalities)}"
    seen = "yes" if index.digest in manifest.shards.values() else "no"
    return {
        "run": recipe.name,
        "checkpoint": folder.name,
        "steps": str(manifest.step),
        "exams seen": str(manifest.exams_seen),
        "objective": f"{recipe.objective.name}, {recipe.objective.fidelity.value}",
        "vision tower": f"{recipe.model.vision.name}, {size}",
        "measured on": index.name,
        "shards digest": index.digest,
        "licence": index.licence or "not stated",
        "pretrained on this set": seen,
        "intervals": f"{recipe.evaluation.num_resamples} resamples of patients, seed {recipe.seed}",
        "made with": ", ".join(
            f"{name} {version}" for name, version in manifest.made_with.items() if version
        ),
    }
