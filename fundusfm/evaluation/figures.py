"""Figures of the report, each as a self-contained SVG in a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fundusfm.evaluation.arrays import Flags
from fundusfm.evaluation.metrics import Ranking
from fundusfm.evaluation.results import (
    HISTOGRAM,
    METHODS,
    PRETRAINED,
    PROBE,
    SOURCE,
    UNTRAINED,
    ZERO_SHOT,
    MethodResult,
    Results,
)

COLORS = {PRETRAINED: "#1b5e9e", UNTRAINED: "#8c8c8c", HISTOGRAM: "#c58a1d", SOURCE: "#a8504a"}
_INK, _FAINT = "#222222", "#dddddd"
_STYLE: Any = {
    "svg.hashsalt": "fundusfm",  # the same numbers give the same file
    "font.size": 9,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
}
# Metrics of a run that are losses, in the order in which they are drawn.
_LOSS_KEYS = ("train/loss", "val/loss")
_ROC_COLUMNS = 4
_PANEL_COLUMNS = 3


def gain_figure(results: Results) -> str:
    """Macro AUROC with intervals: one row a method, one mark a tower."""
    with mpl.rc_context(_STYLE):
        methods = [m for m in reversed(METHODS) if results.find(PRETRAINED, m)]
        figure = Figure(figsize=(9.2, 0.7 + 0.6 * len(methods)), layout="constrained")
        axes = figure.add_subplot()
        for row, method in enumerate(methods):
            _draw_method(axes, results, row, method)
        source = next((m for m in results.methods if m.tower == SOURCE), None)
        if source is not None:
            level = source.scores.macro_auroc.value
            axes.axvline(level, color=COLORS[SOURCE], lw=1, ls=(0, (4, 3)), label="source alone, no pixels")
        axes.axvline(0.5, color="#bbbbbb", lw=1, zorder=0)
        axes.set_yticks(range(len(methods)), methods)
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set_ylim(-0.6, len(methods) - 0.4)
        axes.set_xlabel("macro AUROC, 95% interval over patients (0.5 is chance)")
        _legend_once(axes)
        return _data_uri(figure)


def _draw_method(axes: Axes, results: Results, row: int, method: str) -> None:
    for shift, tower in enumerate((PRETRAINED, UNTRAINED, HISTOGRAM)):
        found = results.find(tower, method)
        if found is None or not found.scores.macro_auroc.defined:
            continue
        y, estimate = row + 0.2 - 0.2 * shift, found.scores.macro_auroc
        axes.plot([estimate.low, estimate.high], [y, y], color=COLORS[tower], lw=2, solid_capstyle="round")
        axes.plot(estimate.value, y, "o", color=COLORS[tower], ms=6, label=tower)


def roc_figure(results: Results, labels: Sequence[str], target_NL: Flags) -> str:
    """ROC curves of the labels in the mean: zero-shot and probe, pretrained; probe, untrained."""
    wanted = ((PRETRAINED, ZERO_SHOT), (PRETRAINED, PROBE), (UNTRAINED, PROBE))
    shown = [found for found in (results.find(*names) for names in wanted) if found is not None]
    counted = [label.label for label in shown[0].scores.labels if label.in_macro and label.auroc.defined]
    num_rows = max(1, -(-len(counted) // _ROC_COLUMNS))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 2.5 * num_rows + 0.5), layout="constrained")
        grid = figure.subplots(num_rows, _ROC_COLUMNS, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(counted) :]:
            axes.set_axis_off()
        for axes in grid.flat[max(0, len(counted) - _ROC_COLUMNS) : len(counted)]:
            axes.tick_params(labelbottom=True)
        for axes, label in zip(grid.flat, counted, strict=False):
            column = labels.index(label)
            _draw_curves(axes, shown, column, target_NL[:, column])
            axes.set_title(label.replace("_", " "), color=_INK)
        figure.supxlabel("1 − specificity", fontsize=9)
        figure.supylabel("sensitivity", fontsize=9)
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
        return _data_uri(figure)


def _draw_curves(axes: Axes, shown: Sequence[MethodResult], column: int, positive_N: Flags) -> None:
    axes.plot([0, 1], [0, 1], color=_FAINT, lw=1)
    for found in shown:
        score_N = found.score_NL[:, column]
        if not np.isnan(score_N).any():
            style = "--" if found.method == ZERO_SHOT else "-"
            name = f"{found.tower}, {found.method}"
            curve = Ranking(score_N, positive_N).curve()
            axes.plot(*curve, style, color=COLORS[found.tower], lw=1.5, label=name)
    axes.set(aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])


def curves_figure(metrics: Sequence[Mapping[str, float]]) -> str:
    """Losses of training and validation, and exams per second, by step."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 2.6), layout="constrained")
        losses, pace = figure.subplots(1, 2, width_ratios=(2.2, 1))
        terms = sorted(
            {key for line in metrics for key in line if key.startswith("train/") and key != "train/loss"}
        )
        for key in terms:
            losses.plot(*_series(metrics, key), color=_FAINT, lw=1, label="terms of the loss")
        for key, color in zip(_LOSS_KEYS, (COLORS[PRETRAINED], COLORS[HISTOGRAM]), strict=True):
            steps, values = _series(metrics, key)
            if steps:
                marker = "o" if len(steps) < 3 else None
                losses.plot(steps, values, color=color, lw=1.5, label=key, marker=marker)
        losses.set(xlabel="step", title="loss")
        pace.plot(*_series(metrics, "exams_per_s"), color="#555555", lw=1)
        pace.set(xlabel="step", title="exams per second")
        pace.set_ylim(bottom=0)
        _legend_once(losses)
        return _data_uri(figure)


def grid_figure(names: Sequence[str], draw: Callable[[Axes, str], None], x_label: str) -> str:
    """A panel a name, drawn by `draw`, under one legend."""
    num_rows = -(-len(names) // _PANEL_COLUMNS)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 2.4 * num_rows + 0.5), layout="constrained")
        grid = figure.subplots(num_rows, _PANEL_COLUMNS, squeeze=False, sharex=True)
        for axes in grid.flat[len(names) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, names, strict=False):
            draw(axes, name)
            axes.tick_params(labelbottom=True)
        figure.supxlabel(x_label, fontsize=9)
        named = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        columns = max(1, min(_PANEL_COLUMNS, len(named)))
        figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=columns)
        return _data_uri(figure)


def _series(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    found = [(line["step"], line[key]) for line in metrics if key in line]
    return [step for step, _ in found], [value for _, value in found]


def _legend_once(axes: Axes) -> None:
    """One legend entry a name, beside the axes."""
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(named.values(), named.keys(), loc="center left", bbox_to_anchor=(1.01, 0.5))


def _data_uri(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
