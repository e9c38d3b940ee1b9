"""`fundusfm compare`: several runs in one table and on one page, with what their recipes change.

The first run is the one that the others are measured against.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fundusfm.errors import UserError
from fundusfm.evaluation.bootstrap import UNDEFINED, Estimate
from fundusfm.evaluation.compare_page import Change, Comparison, Line, SetTable, render_comparison
from fundusfm.evaluation.output import refuse_other_content, write_folder
from fundusfm.evaluation.report import DASH, number
from fundusfm.evaluation.runs import Evaluated, RunRecord, labels_of_runs, read_run
from fundusfm.evaluation.scoring import difference, measure
from fundusfm.recipe.schema import Recipe
from fundusfm.recipe.show import diff_rows
from fundusfm.recipe.values import flatten, in_one_order

PAGE, TABLE = "comparison.html", "comparison.csv"
_NOT_COMPARED = ("name", "runs_dir")
_COLUMNS = (
    *("run", "folder", "steps", "exams", "train_loss", "val_loss", "state", "measured_on", "measure"),
    *("value", "low", "high", "difference", "difference_low", "difference_high"),
)


@dataclass(frozen=True)
class _Bootstrap:
    """The resamples that paired differences are taken over."""

    num_resamples: int
    seed: int


def compare(paths: Sequence[Path], out: Path) -> Path:
    """Write the page and the table of several runs into `out`; returns the path of the page.

    A folder that is no run, or has not been evaluated, is shown as such. UserError if none is a run.
    """
    refuse_other_content(out, TABLE)
    runs = [read_run(path) for path in paths]
    _refuse_nonsense(runs, out)
    comparison = compare_runs(runs)
    files = {TABLE: table_of(comparison).encode(), PAGE: render_comparison(comparison).encode()}
    write_folder(out, files)
    console = Console()
    for table in summary_tables(comparison):
        console.print(table)
    console.print(f"page: {out / PAGE}", soft_wrap=True, highlight=False, markup=False)
    return out / PAGE


def _refuse_nonsense(runs: Sequence[RunRecord], out: Path) -> None:
    if all(run.recipe is None for run in runs):
        told = "; ".join(f"{run.path}: {run.problem}" for run in runs)
        raise UserError("none of these is a run", where=told, fix="name folders like runs/<name>")
    twice = {run.path for run in runs if [r.path.resolve() for r in runs].count(run.path.resolve()) > 1}
    if twice:
        raise UserError("a run is named twice", where=", ".join(sorted(map(str, twice))), fix="name it once")
    if out.resolve() in [run.path.resolve() for run in runs]:
        raise UserError("the page would replace a run", where=str(out), fix="give another folder with --out")


def compare_runs(runs: Sequence[RunRecord]) -> Comparison:
    """Everything that the page shows."""
    labels = labels_of_runs(runs)
    about = dict.fromkeys(key for run in runs for key in run.evaluations)
    return Comparison(
        runs=tuple(runs),
        labels=tuple(labels),
        sets=tuple(_set_table(runs, labels, key) for key in about),
        changes=_changes(runs),
        notes=tuple(note for run in runs for note in run.notes),
    )


def _set_table(runs: Sequence[RunRecord], labels: Sequence[str], about: tuple[str, str]) -> SetTable:
    """What was measured on one set, run by run; differences are those to the first run measured on it."""
    measured = [(label, run, run.evaluations[about]) for label, run in zip(labels, runs, strict=True)
                if about in run.evaluations]  # fmt: skip
    base_label, base_run, base = measured[0]
    assert base_run.recipe is not None
    bootstrap = _Bootstrap(base_run.recipe.evaluation.num_resamples, base_run.recipe.seed)
    lines = []
    for label, _, found in measured:
        gains, excuse = ({}, "") if found is base else _gains(found, base, bootstrap)
        lines.append(Line(label, found.step, found.values, gains, excuse))
    lacking = [label for label in labels if label not in [line.label for line in lines]]
    measures = tuple(dict.fromkeys(name for _, _, found in measured for name in found.values))
    return SetTable(about[0], about[1], base_label, measures, tuple(lines), tuple(lacking))


def _gains(ours: Evaluated, base: Evaluated, bootstrap: _Bootstrap) -> tuple[dict[str, Estimate], str]:
    """Differences with paired intervals by method, or why there can be none."""
    if ours.predictions is None or base.predictions is None:
        return {}, "no predictions are stored; evaluate again to have them"
    if not ours.predictions.asks_the_same(base.predictions):
        return {}, "measured on other images, or asked for other labels"
    gains = {}
    for method in ours.predictions.scores:
        if method not in base.predictions.scores:
            continue
        pair = [
            measure(
                one.scores[method], one.question, num_resamples=bootstrap.num_resamples, seed=bootstrap.seed
            )
            for one in (ours.predictions, base.predictions)
        ]
        gains[method] = difference(*pair)
    return gains, ""


def _changes(runs: Sequence[RunRecord]) -> tuple[Change, ...]:
    """Every key in which a recipe differs from the first one, with the value of each run."""
    recipes: list[Recipe | None] = [run.recipe for run in runs]
    base = next(recipe for recipe in recipes if recipe is not None)
    cells: dict[str, list[str]] = {}
    keys: list[str] = []
    for place, recipe in enumerate(recipes):
        rows = [row for row in diff_rows(base, recipe) if row[0] not in _NOT_COMPARED] if recipe else []
        keys = in_one_order(keys, [*flatten(recipe)]) if recipe else keys
        for key, old, new in rows:
            cells.setdefault(key, [DASH if r is None else old for r in recipes])[place] = new
    return tuple(Change(key, tuple(cells[key])) for key in keys if key in cells)


def table_of(comparison: Comparison) -> str:
    """One line a run and measure (CSV); a run without any has one line that says so."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for label, run in zip(comparison.labels, comparison.runs, strict=True):
        facts = comparison.facts(label, run)
        rows = [
            {
                "measured_on": table.measured_on,
                "measure": name,
                **_numbers("value", "low", "high", line.values[name]),
                **_numbers(
                    "difference", "difference_low", "difference_high", line.gains.get(name, UNDEFINED)
                ),
            }
            for table in comparison.sets
            for line in table.lines
            if line.label == label
            for name in line.values
        ]
        writer.writerows({**facts, **row} for row in rows or [{}])
    return stream.getvalue()


def _numbers(value: str, low: str, high: str, estimate: Estimate) -> dict[str, str]:
    if not estimate.defined:
        return {}
    return {name: f"{x:.6f}" for name, x in zip((value, low, high), vars(estimate).values(), strict=True)}


def summary_tables(comparison: Comparison) -> list[Table]:
    """What ends the command on the console: the runs, then what was measured on each set."""
    runs = Table("run", "steps", "train loss", "val loss", "state", box=box.SIMPLE_HEAD)
    for label, run in zip(comparison.labels, comparison.runs, strict=True):
        facts = comparison.facts(label, run)
        losses = (facts[key] or DASH for key in ("train_loss", "val_loss"))
        runs.add_row(escape(label), facts["steps"] or DASH, *losses, escape(facts["state"]))
    tables = [runs]
    for found in comparison.sets:
        title = escape(f"Measured on {found.measured_on}; differences are to {found.base}, paired")
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for name in ("run", "measure"):
            table.add_column(name, overflow="fold")
        for name in ("value", "95%", "difference"):
            table.add_column(name, justify="right", no_wrap=True)
        for line in found.lines:
            for place, (name, value) in enumerate(line.values.items()):
                gain = _signed(line.gains.get(name, UNDEFINED))
                label = "" if place else escape(line.label)
                table.add_row(label, escape(name), number(value.value), _interval(value), gain)
        tables.append(table)
    return tables


def _interval(estimate: Estimate) -> str:
    return f"{number(estimate.low)}–{number(estimate.high)}" if estimate.defined else ""


def _signed(gain: Estimate) -> str:
    if not gain.defined:
        return ""
    value, low, high = (number(one, signed=True) for one in (gain.value, gain.low, gain.high))
    return f"{value} ({low} to {high})"
