"""`fundusfm shards stats`: what a set holds, by split, and a sheet of samples to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fundusfm.errors import UserError
from fundusfm.shards.contact import draw_sheet
from fundusfm.shards.index import ShardIndex
from fundusfm.shards.totals import COUNTED, add_totals

_PLAIN = ("patients", "exams", "images", "texts", "made_texts")
_TITLES = {"made_texts": "texts made from labels"}
_NO_VALUE = {"eyes": "unknown"}


def show_stats(root: str | Path, *, sheet: Path | None = None, console: Console | None = None) -> None:
    """Print the totals of the index and write a contact sheet (PNG), by default `./<name>-contact.png`.

    Nothing is written into the folder of the shards unless `sheet` says so.
    """
    if not Path(root).is_dir():
        raise UserError("there is no such folder", where=str(root), fix="give a local folder of shards")
    index = ShardIndex.load(root)
    console = console or Console()
    console.print(totals_table(index))
    sheet = sheet or Path(f"{index.name.replace('/', '-')}-contact.png")
    if sheet.suffix.lower() != ".png":
        raise UserError(
            "the contact sheet is a PNG", where=str(sheet), fix="give --sheet a name that ends in .png"
        )
    draw_sheet(index, sheet)
    console.print(f"contact sheet: {sheet}", markup=False, highlight=False, soft_wrap=True)


def totals_table(index: ShardIndex) -> Table:
    """One row a count, one column a split and one for all."""
    table = Table("", title=escape(f"{index.name}: {len(index.shards)} shards"))
    for name in (*index.splits, "all"):
        table.add_column(name, justify="right")
    parts = [index.totals.get(split, {}) for split in index.splits]
    for title, values in _rows([*parts, add_totals(parts)]):  # patients add up too: none is in two splits
        table.add_row(escape(title), *values)
    return table


def _rows(columns: list[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    for name in _PLAIN:
        if any(name in column for column in columns):
            yield _TITLES.get(name, name), [str(column.get(name, 0)) for column in columns]
    for name in COUNTED:
        for value in dict.fromkeys(v for column in columns for v in column.get(name, {})):
            shown = value or _NO_VALUE.get(name, "not given")
            yield f"{name}: {shown}", [str(column.get(name, {}).get(value, 0)) for column in columns]
