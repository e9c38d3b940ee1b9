"""The report: results, figures and examples in one HTML file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from fundusfm.evaluation.arrays import Flags
from fundusfm.evaluation.bootstrap import UNDEFINED, Estimate
from fundusfm.evaluation.captions import WrittenExample
from fundusfm.evaluation.examples import Example, Sample
from fundusfm.evaluation.figures import curves_figure, gain_figure, roc_figure
from fundusfm.evaluation.results import (
    FEW_SHOT,
    HISTOGRAM,
    METHODS,
    PRETRAINED,
    PREVALENCE,
    PROBE,
    REPORTED,
    SOURCE,
    UNTRAINED,
    ZERO_SHOT,
    Results,
)

DASH = "–"
# Of an ordered scale; the other rates are in results.json.
_RATE_COLUMNS = {
    **{name: name for name in ("accuracy", "sensitivity", "specificity", "precision")},
    "f1": "F1",
    "mcc": "MCC",
}


@dataclass(frozen=True)
class Exhibits:
    """What the report shows besides numbers; `sample_method` ranks the findings of `samples`.

    `pictures`: what the objective itself draws, by name.
    """

    target_NL: Flags
    metrics: Sequence[Mapping[str, float]]
    samples: Sequence[Sample]
    sample_method: str
    examples: Sequence[Example]
    pictures: Mapping[str, str]
    written: Sequence[WrittenExample] = ()


@dataclass(frozen=True)
class GainRow:
    """One line of the first table; `gain` is pretrained minus untrained, paired."""

    name: str
    setting: str
    pretrained: Estimate
    untrained: Estimate
    histogram: Estimate
    gain: Estimate


def gain_rows(results: Results) -> list[GainRow]:
    """Macro AUROC of each method by tower."""
    rows = []
    for method in METHODS:
        ours = results.find(PRETRAINED, method)
        if ours is None:
            continue
        untrained, histogram = (_macro(results, tower, method) for tower in (UNTRAINED, HISTOGRAM))
        pairs = ((d.method, d.against, d.macro_auroc) for d in results.differences)
        gain = next(
            (value for name, other, value in pairs if (name, other) == (method, UNTRAINED)), UNDEFINED
        )
        rows.append(GainRow(method, ours.setting, ours.scores.macro_auroc, untrained, histogram, gain))
    return rows


def source_level(results: Results) -> Estimate:
    """Macro AUROC of knowing the source alone; undefined for a set from one source."""
    return _macro(results, SOURCE, PREVALENCE)


def _macro(results: Results, tower: str, method: str) -> Estimate:
    found = results.find(tower, method)
    return UNDEFINED if found is None else found.scores.macro_auroc


def render(results: Results, exhibits: Exhibits) -> str:
    """The HTML of a report."""
    environment = Environment(
        loader=PackageLoader("fundusfm.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, words=words, grade_shade=grade_shade)
    columns = _label_columns(results)
    labels = [label.label for label in results.methods[0].scores.labels]
    return environment.get_template("report.html.j2").render(
        results=results,
        reported=next(s.split for s in results.splits if s.role == REPORTED),
        exhibits=exhibits,
        gains=gain_rows(results),
        rate_columns=_RATE_COLUMNS,
        source_level=source_level(results),
        label_columns=columns,
        source_columns=[
            found for found in map(results.find, *zip(*columns, strict=True)) if found and found.sources
        ],
        gain_figure=gain_figure(results),
        roc_figure=roc_figure(results, labels, exhibits.target_NL),
        curves_figure=curves_figure(exhibits.metrics) if exhibits.metrics else "",
        names={"pretrained": PRETRAINED, "untrained": UNTRAINED, "zero_shot": ZERO_SHOT, "probe": PROBE},
        few_shot=results.find(PRETRAINED, FEW_SHOT) is not None,
    )


def _label_columns(results: Results) -> list[tuple[str, str]]:
    """Tower and method of each AUROC column of the per-label table."""
    wanted = ((PRETRAINED, ZERO_SHOT), (PRETRAINED, PROBE), (UNTRAINED, PROBE), (HISTOGRAM, PROBE))
    return [pair for pair in wanted if results.find(*pair)]


def number(value: float, signed: bool = False) -> str:
    """Three decimals, a dash for what is not defined, a true minus sign."""
    if math.isnan(value):
        return DASH
    return f"{value:{'+' if signed else ''}.3f}".replace("-", "−")


def percent(value: float) -> str:
    """A share as a percentage with one decimal."""
    return DASH if math.isnan(value) else f"{100 * value:.1f}"


def words(label: str) -> str:
    """`large_cup` as a person writes it."""
    return label.replace("_", " ")


def grade_shade(count: int, total: int) -> str:
    """Background of a cell of a confusion matrix: deeper for a larger share of its row."""
    share = count / total if total else 0.0
    return f"rgba(27, 94, 158, {0.55 * share:.2f})"
