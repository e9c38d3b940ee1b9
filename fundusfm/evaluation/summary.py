"""The table that ends an evaluation on the console."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich import box
from rich.markup import escape
from rich.table import Table

from fundusfm.evaluation.bootstrap import Estimate
from fundusfm.evaluation.report import DASH, gain_rows, number, percent, source_level
from fundusfm.evaluation.results import PRETRAINED, UNTRAINED, CaptionResult, Results

_CAPTION_ROWS: Mapping[str, Callable[[CaptionResult], Estimate]] = {
    "BLEU-4": lambda found: found.bleu[3],
    "ROUGE-L": lambda found: found.rouge_l,
    "CIDEr": lambda found: found.cider,
}


def summary_table(results: Results) -> Table:
    """What pretraining brought: macro AUROC by method and tower, then retrieval."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=escape(f"What pretraining brought, on {results.facts['measured on']}"),
        title_justify="left",
    )
    table.add_column("macro AUROC")
    for name in ("pretrained", "untrained", "histogram", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in gain_rows(results):
        values = [_cell(e) for e in (row.pretrained, row.untrained, row.histogram)]
        table.add_row(f"{row.name}\n[dim]{row.setting}[/]", *values, _cell(row.gain, signed=True))
    found = {(r.tower, r.retrieval.direction): r.retrieval for r in results.retrieval}
    for direction in dict.fromkeys(direction for _, direction in found):
        ours, theirs = found[PRETRAINED, direction], found[UNTRAINED, direction]
        shares = [f"{percent(r.recall[10].value)} %" for r in (ours, theirs)]
        table.add_row(f"{direction}\n[dim]R@10, chance {percent(ours.chance[10])}[/]", *shares, DASH, "")
    if results.captions:
        _add_captions(table, results)
    level = source_level(results)
    if level.defined:
        table.caption = f"The source alone, without pixels: macro AUROC {number(level.value)}"
    return table


def _add_captions(table: Table, results: Results) -> None:
    written = {found.method: found for found in results.captions}
    for name, value_of in _CAPTION_ROWS.items():
        ours, theirs = (_cell(value_of(written[tower])) for tower in (PRETRAINED, UNTRAINED))
        table.add_row(f"written reports\n[dim]{name}[/]", ours, theirs, DASH, "")


def _cell(estimate: Estimate, signed: bool = False) -> str:
    if not estimate.defined:
        return DASH
    low, high = number(estimate.low, signed), number(estimate.high, signed)
    return f"{number(estimate.value, signed)}\n[dim]{low}–{high}[/]"
