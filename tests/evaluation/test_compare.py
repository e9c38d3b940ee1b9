"""Runs side by side: folders as training and evaluation leave them, and such that lack something."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundusfm.errors import UserError
from fundusfm.evaluation import output
from fundusfm.evaluation.compare import PAGE, TABLE, compare, compare_runs
from fundusfm.evaluation.compare_page import Comparison, render_comparison, smoothed
from fundusfm.evaluation.predictions import PREDICTIONS, predictions_of
from fundusfm.evaluation.report import number
from fundusfm.evaluation.results import PRETRAINED, PROBE, ZERO_SHOT
from fundusfm.evaluation.runs import RunRecord, read_run
from fundusfm.evaluation.scoring import difference
from fundusfm.objectives.ret_clip import RetClipConfig
from fundusfm.recipe.load import recipe_to_yaml
from fundusfm.recipe.schema import Recipe, SourceConfig
from tests.evaluation.conftest import Evaluated, run_evaluation
from tests.evaluation.fakes import FakeTower, make_source
from tests.evaluation.test_report import Page

FACTS = {"measured on": "fake", "shards digest": "d" * 64, "steps": "40"}


def _recipe(name: str, **objective: float) -> Recipe:
    recipe = Recipe(name=name, objective=RetClipConfig(**objective))
    recipe.data.sources, recipe.data.tokenizer = [SourceConfig("shards/x")], "tokens.json"
    recipe.trainer.max_steps = 100
    recipe.evaluation.num_resamples = 60
    return recipe


def _run(folder: Path, recipe: Recipe, evaluated: Evaluated | None = None, **facts: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    lines: list[dict[str, float]] = []
    for step in range(10, 50, 10):
        exams = step * recipe.data.global_batch_size
        lines.append({"step": step, "exams": exams, "train/loss": 3 / step, "train/loss_left": 1 / step})
    lines.append({"step": 40, "exams": lines[-1]["exams"], "val/loss": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluated:
        results = replace(evaluated.results, facts={**evaluated.results.facts, **FACTS, **facts})
        predictions = predictions_of(evaluated.results, evaluated.measurement)
        output.write(folder / "evaluation-fake", results, "<html></html>", predictions)
    return folder


@pytest.fixture(scope="module")
def blind() -> Evaluated:
    """The same cohort read by a tower that sees nothing."""
    tower = FakeTower(sees=False)
    return run_evaluation(make_source(), {"pretrained": tower, "untrained": tower})


@pytest.fixture
def folders(tmp_path: Path, evaluated: Evaluated, blind: Evaluated) -> list[Path]:
    return [
        _run(tmp_path / "runs" / "base", _recipe("base"), evaluated),
        _run(tmp_path / "runs" / "bare", _recipe("bare [red] & co", patient_weight=0.0), blind),
    ]


def _compared(folders: list[Path]) -> Comparison:
    return compare_runs([read_run(folder) for folder in folders])


def _rows(out: Path) -> list[dict[str, str]]:
    with (out / TABLE).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_differences__paired_on_the_same_resamples(
    folders: list[Path], evaluated: Evaluated, blind: Evaluated
) -> None:
    (table,) = _compared(folders).sets
    base, other = table.lines
    assert (table.base, base.gains, base.excuse, other.excuse) == ("base", {}, "", "")
    for method in (PROBE, ZERO_SHOT):
        ours, theirs = (one.results.find(PRETRAINED, method) for one in (blind, evaluated))
        assert ours is not None and theirs is not None
        assert other.gains[method] == difference(ours.scores, theirs.scores)
        assert other.values[method] == ours.scores.macro_auroc
    assert other.gains[ZERO_SHOT].high < 0, "a tower that sees nothing reads worse"
    assert "R@10" in table.measures[-1] and table.measures[-1] not in other.gains


def _without_predictions(folder: Path) -> None:
    (folder / "evaluation-fake" / PREDICTIONS).unlink()


def _torn_predictions(folder: Path) -> None:
    path = folder / "evaluation-fake" / PREDICTIONS
    path.write_bytes(path.read_bytes()[:-50])


def _other_patients(folder: Path) -> None:
    path = folder / "evaluation-fake" / PREDICTIONS
    arrays: dict[str, Any] = dict(np.load(path))
    np.savez(path, **{**arrays, "patients": arrays["patients"][::-1]})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_without_predictions, "no predictions are stored"),
        (_torn_predictions, "no predictions are stored"),
        (_other_patients, "other images"),
    ],
)
def test_differences__else_side_by_side_and_said(folders: list[Path], change: Any, told: str) -> None:
    change(folders[1])
    comparison = _compared(folders)
    other = comparison.sets[0].lines[1]
    assert other.gains == {} and told in other.excuse and other.values[PROBE].defined
    assert f"not paired: {other.excuse}" in Page(render_comparison(comparison)).text


def test_compare__what_is_no_run_and_what_is_not_evaluated(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    young = _run(tmp_path / "runs" / "young", _recipe("young"))
    (tmp_path / "runs" / "notes").mkdir()
    broken = _run(tmp_path / "runs" / "broken", _recipe("broken"))
    (broken / "recipe.yaml").write_text("nme: x\n")
    torn = _run(tmp_path / "runs" / "torn", _recipe("torn"))
    (torn / "evaluation-x").mkdir()
    (torn / "evaluation-x" / "results.json").write_text('{"facts": ')
    wanted = [*folders, young, tmp_path / "runs" / "notes", tmp_path / "gone", broken, torn]
    out = tmp_path / "out"
    assert compare(wanted, out) == out / PAGE
    states = {row["run"]: row["state"] for row in _rows(out)}
    assert states["base"] == "" and states["young"] == states["torn"] == "no evaluation yet"
    assert states["notes"] == "no run: the folder has no recipe.yaml"
    assert states["gone"] == "there is no such folder" and "the recipe has" in states["broken"]
    page, said = Page((out / PAGE).read_text()).text, capsys.readouterr().out
    for run, state in states.items():
        assert state in page and run in page and run in said
    assert "results.json cannot be read" in page
    assert page.count("not measured on this set") == 5


def test_compare__page_and_table_hold_the_same_numbers(tmp_path: Path, folders: list[Path]) -> None:
    out = tmp_path / "out"
    compare(folders, out)
    html = (out / PAGE).read_text()
    page, rows = Page(html), _rows(out)
    assert [row["run"] for row in rows] == ["base"] * 5 + ["bare [red] & co"] * 5
    for row in rows:
        assert all(number(float(row[key])) in page.text for key in ("value", "low", "high"))
        if row["difference"]:
            assert number(float(row["difference"]), signed=True) in page.text
    assert sum(bool(row["difference"]) for row in rows) == 3
    assert (rows[0]["steps"], rows[0]["exams"], rows[0]["val_loss"]) == ("40", "10240", "0.5000")
    assert page.assets and all(asset.startswith("data:image/") for asset in page.assets)
    assert not re.search(r"https?://|@import|url\(|<script|<link|\[red\] & ", html)


def test_changes__against_the_first_run(tmp_path: Path, folders: list[Path]) -> None:
    large = _recipe("large", patient_weight=0.0)
    large.data.global_batch_size, large.model.vision.options = 512, {"depth": 2}
    folders.append(_run(tmp_path / "runs" / "large", large))
    folders.append(tmp_path / "gone")
    changes = {change.key: change.cells for change in _compared(folders).changes}
    assert [key.partition(".")[0] for key in changes] == ["objective", "model", "model", "data"]
    assert changes == {
        "objective.patient_weight": ("1.0", "0.0", "0.0", "–"),
        "model.vision.options": ("{}", "{}", "–", "–"),
        "model.vision.options.depth": ("–", "–", "2", "–"),
        "data.global_batch_size": ("256", "256", "512", "–"),
    }


def test_several_evaluations__by_set_and_the_latest_of_each(
    tmp_path: Path, folders: list[Path], evaluated: Evaluated
) -> None:
    predictions = predictions_of(evaluated.results, evaluated.measurement)
    for name, facts in {"a": {"steps": "90"}, "z": {"steps": "10"}, "other": {"measured on": "else"}}.items():
        results = replace(evaluated.results, facts={**evaluated.results.facts, **FACTS, **facts})
        output.write(folders[0] / name, results, "", predictions)
    tables = {table.measured_on: table for table in _compared(folders).sets}
    assert tables["fake"].lines[0].step == 90
    assert tables["else"].lacking == ("bare [red] & co",)


def test_runs_of_one_name__told_apart_by_their_folders(tmp_path: Path, folders: list[Path]) -> None:
    twin = _run(tmp_path / "elsewhere" / "base", _recipe("base"))
    assert _compared([*folders, twin]).labels == (str(folders[0]), "bare [red] & co", str(twin))


def test_refused(tmp_path: Path, folders: list[Path]) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="none of these is a run"):
        compare([tmp_path, tmp_path / "gone"], out)
    with pytest.raises(UserError, match="named twice"):
        compare([folders[0], folders[0].parent / "." / "base"], out)
    with pytest.raises(UserError, match="something else"):
        compare(folders, folders[0])
    assert not out.exists()
    compare(folders, out)
    compare(folders, out)  # an earlier page is replaced


def test_smoothed__means_of_neighbours() -> None:
    metrics = [{"step": n, "exams": 2 * n, "train/loss": float(n % 7)} for n in range(1000)]
    exams, values = smoothed(metrics, "train/loss")
    assert len(exams) == len(values) == 200
    assert (exams[0], values[0]) == (4.0, 2.0)  # of steps 0 to 4
    assert np.mean(values) == pytest.approx(np.mean([line["train/loss"] for line in metrics]))
    assert smoothed(metrics[:9], "train/loss")[1] == [float(n % 7) for n in range(9)]
    assert smoothed(metrics, "train/absent") == ([], [])


def test_curves__more_runs_than_colours_and_no_metrics(folders: list[Path]) -> None:
    runs = [replace(read_run(folders[0]), path=Path(str(n))) for n in range(10)]
    assert "data:image/svg" in render_comparison(compare_runs(runs))
    bare: list[RunRecord] = [replace(run, metrics=()) for run in runs]
    assert "<img" not in render_comparison(compare_runs(bare))
