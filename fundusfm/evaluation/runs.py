"""What the folder of a run holds: its recipe, its curves, its evaluations; and what it lacks, in words."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fundusfm.errors import UserError
from fundusfm.evaluation.bootstrap import UNDEFINED, Estimate
from fundusfm.evaluation.output import RESULTS, read_metrics
from fundusfm.evaluation.predictions import PREDICTIONS, Predictions, load_predictions
from fundusfm.evaluation.results import PRETRAINED
from fundusfm.objectives import config_of
from fundusfm.recipe.load import recipe_from_yaml_text
from fundusfm.recipe.schema import Recipe
from fundusfm.training.runfolder import RunFolder

RECALL_AT = "10"


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of a run. `values`: what was measured -> its estimate, of the pretrained tower."""

    measured_on: str
    digest: str
    step: int
    values: Mapping[str, Estimate]
    predictions: Predictions | None

    @property
    def about(self) -> tuple[str, str]:
        """The set by name and digest."""
        return self.measured_on, self.digest


@dataclass(frozen=True)
class RunRecord:
    """One run. `problem` says why there is no recipe, `notes` what else could not be read."""

    path: Path
    recipe: Recipe | None = None
    metrics: Sequence[Mapping[str, float]] = ()
    evaluations: Mapping[tuple[str, str], Evaluated] = field(default_factory=dict)
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.recipe.name if self.recipe else self.path.name

    def last(self, key: str) -> float:
        """The newest value of a metric; nan where there is none."""
        return next((line[key] for line in reversed(self.metrics) if key in line), math.nan)


def read_run(path: Path) -> RunRecord:
    """Everything that the folder of a run holds; a folder that is none has its `problem`."""
    folder = RunFolder(path)
    if not path.is_dir():
        return RunRecord(path, problem="there is no such folder")
    if not folder.recipe.is_file():
        return RunRecord(path, problem=f"no run: the folder has no {folder.recipe.name}")
    try:
        text = folder.recipe.read_text(encoding="utf-8")
        recipe = recipe_from_yaml_text(text, objective_config=config_of, where=str(folder.recipe))
    except (UserError, OSError, UnicodeDecodeError) as error:
        reason = error.what if isinstance(error, UserError) else str(error)
        return RunRecord(path, problem=f"the recipe cannot be read: {reason}")
    evaluations, notes = _evaluations(path)
    return RunRecord(path, recipe, read_metrics(folder.metrics, sys.maxsize), evaluations, notes=tuple(notes))


def _evaluations(path: Path) -> tuple[dict[tuple[str, str], Evaluated], list[str]]:
    """The evaluations below a run by what they measured on, of several the one of the latest checkpoint."""
    found: dict[tuple[str, str], Evaluated] = {}
    notes = []
    for file in sorted(path.glob(f"*/{RESULTS}")):
        try:
            one = _evaluated(json.loads(file.read_text(encoding="utf-8")), file.parent)
        except (OSError, ValueError, KeyError, TypeError):
            notes.append(f"{file} cannot be read; evaluate again")
            continue
        if one.about not in found or found[one.about].step <= one.step:
            found[one.about] = one
    return found, notes


def _evaluated(record: Mapping[str, Any], folder: Path) -> Evaluated:
    facts = record["facts"]
    values = {
        method["method"]: _estimate(method["scores"]["macro_auroc"])
        for method in record["methods"]
        if method["tower"] == PRETRAINED
    }
    for one in record["retrieval"]:
        if one["tower"] == PRETRAINED:
            found = one["retrieval"]
            values[f"{found['direction']}, R@{RECALL_AT}"] = _estimate(found["recall"][RECALL_AT])
    predictions = load_predictions(folder / PREDICTIONS)
    return Evaluated(facts["measured on"], facts["shards digest"], int(facts["steps"]), values, predictions)


def _estimate(record: Mapping[str, float | None]) -> Estimate:
    value, low, high = (record[key] for key in ("value", "low", "high"))
    return UNDEFINED if value is None or low is None or high is None else Estimate(value, low, high)


def labels_of_runs(runs: Sequence[RunRecord]) -> list[str]:
    """A name for each run, told apart by their paths where two runs share one."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]
