"""The page of a comparison: its values, its figure of curves, its HTML that needs no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fundusfm.evaluation.bootstrap import Estimate
from fundusfm.evaluation.figures import grid_figure
from fundusfm.evaluation.report import DASH, number
from fundusfm.evaluation.runs import RunRecord

# Told apart by most eyes; more runs than these begin again with other dashes.
COLORS = ("#1b5e9e", "#c58a1d", "#2f8f6b", "#a8504a", "#7a5aa6", "#4aa3c7", "#8c6d46", "#666666")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)))
_MOST_POINTS = 240


@dataclass(frozen=True)
class Line:
    """One run on one set. `gains`: its differences to the base by method; `excuse`: why there are none."""

    label: str
    step: int
    values: Mapping[str, Estimate]
    gains: Mapping[str, Estimate]
    excuse: str


@dataclass(frozen=True)
class SetTable:
    """All runs on one set, `base` the one that others are compared with; `lacking` have not been measured."""

    measured_on: str
    digest: str
    base: str
    measures: tuple[str, ...]
    lines: tuple[Line, ...]
    lacking: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """A key of the recipes and its value in each run, as an override spells it."""

    key: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs under their labels, tables, and the keys in which recipes differ."""

    runs: tuple[RunRecord, ...]
    labels: tuple[str, ...]
    sets: tuple[SetTable, ...]
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def base(self) -> int:
        """The place of the first run that is one: recipes are compared with its recipe."""
        return next(place for place, run in enumerate(self.runs) if run.recipe)

    def facts(self, label: str, run: RunRecord) -> dict[str, str]:
        """How far a run is, in words; empty where it is not known."""
        steps, exams = (run.last(key) for key in ("step", "exams"))
        return {
            "run": label,
            "folder": str(run.path),
            "steps": "" if math.isnan(steps) else f"{steps:.0f}",
            "exams": "" if math.isnan(exams) else f"{exams:.0f}",
            "train_loss": _plain(run.last("train/loss")),
            "val_loss": _plain(run.last("val/loss")),
            "state": run.problem or ("" if run.evaluations else "no evaluation yet"),
        }


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def render_comparison(comparison: Comparison) -> str:
    """The HTML."""
    environment = Environment(
        loader=PackageLoader("fundusfm.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    rows = [
        {**comparison.facts(label, run), "color": color_of(place)}
        for place, (label, run) in enumerate(zip(comparison.labels, comparison.runs, strict=True))
    ]
    return environment.get_template("compare.html.j2").render(
        comparison=comparison,
        rows=rows,
        colors={row["run"]: row["color"] for row in rows},
        dash=DASH,
        curves=curves_of_runs(comparison) if any(run.metrics for run in comparison.runs) else "",
    )


def color_of(place: int) -> str:
    """The colour of a run by its place."""
    return COLORS[place % len(COLORS)]


def curves_of_runs(comparison: Comparison) -> str:
    """A panel a loss term over exams seen: training as a line, validation as a line with points."""
    terms = dict.fromkeys(
        key.partition("/")[2]
        for run in comparison.runs
        for line in run.metrics
        for key in line
        if key.startswith(("train/", "val/"))
    )

    def draw(axes: Axes, term: str) -> None:
        for place, (label, run) in enumerate(zip(comparison.labels, comparison.runs, strict=True)):
            style = {"color": color_of(place), "ls": _DASHES[place // len(COLORS) % len(_DASHES)]}
            train, val = smoothed(run.metrics, f"train/{term}"), _points(run.metrics, f"val/{term}")
            if not train[0] and not val[0]:
                continue
            axes.plot(*train, lw=1.2, alpha=0.75, label=label, **style)  # type: ignore[arg-type]
            axes.plot(*val, lw=1.2, marker="o", ms=3.5, label=label, **style)  # type: ignore[arg-type]
        axes.set_title(term)
        axes.xaxis.set_major_locator(MaxNLocator(4))

    return grid_figure([*terms], draw, "exams seen")


def _points(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    found = [(line["exams"], line[key]) for line in metrics if key in line and "exams" in line]
    return [exams for exams, _ in found], [value for _, value in found]


def smoothed(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """A metric over exams seen; of a long run the means of neighbouring steps, at most a few hundred."""
    exams, values = _points(metrics, key)
    width = -(-len(exams) // _MOST_POINTS)
    if width <= 1:
        return exams, values
    starts = np.arange(0, len(exams), width)
    counts = np.diff([*starts, len(exams)])
    means = (
        np.add.reduceat(np.asarray(column, dtype=np.float64), starts) / counts for column in (exams, values)
    )
    thin_exams, thin_values = (column.tolist() for column in means)
    return thin_exams, thin_values
