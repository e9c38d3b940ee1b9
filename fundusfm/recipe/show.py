"""`fundusfm recipe show` and `recipe diff`: one line a key, the value that will run, and where it is from."""

from __future__ import annotations

from enum import Enum
from typing import Any

from rich.console import Console
from rich.text import Text

from fundusfm.recipe.layers import COMMAND_LINE
from fundusfm.recipe.load import ResolvedRecipe
from fundusfm.recipe.schema import Recipe
from fundusfm.recipe.values import diff_recipes, flatten

_VALUE_WIDTH = 44  # longer values push what follows out rather than on all lines
_NO_KEY = "–"


def show_recipe(resolved: ResolvedRecipe, console: Console) -> None:
    """Print every key and value as an override spells them, with the place the value came from."""
    values = flatten(resolved.recipe)
    key_width = max(map(len, values)) + 1
    value_width = min(max(len(spelt(value)) for value in values.values()), _VALUE_WIDTH)
    section = ""
    for key, value in values.items():
        if "." in key and key.partition(".")[0] != section:
            section = key.partition(".")[0]
            console.print()
        origin = resolved.origin[key]
        style = {"default": "dim", COMMAND_LINE: "bold yellow"}.get(origin, "cyan")
        line = Text.assemble(
            (key.ljust(key_width), "bold"), f" {spelt(value).ljust(value_width)}  ", (origin, style)
        )
        console.print(line, soft_wrap=True)


def show_diff(a: ResolvedRecipe, b: ResolvedRecipe, names: tuple[str, str], console: Console) -> None:
    """Print every key whose value differs between two recipes, with both values under the recipes' names.

    A dash stands for a key that one of them does not have: another objective's, or a source more.
    """
    rows = diff_rows(a.recipe, b.recipe)
    if not rows:
        console.print(Text(f"{names[0]} and {names[1]} do not differ"), soft_wrap=True)
        return
    key_width = max(len(key) for key, *_ in rows)
    old_width = min(max(len(old) for old in (names[0], *(old for _, old, _ in rows))), _VALUE_WIDTH)
    lines = [("", *names), *rows]
    for number, (key, old, new) in enumerate(lines):
        styles = ("bold", "red", "green") if number else ("", "bold red", "bold green")
        cells = (key.ljust(key_width), old.ljust(old_width), new)
        line = Text("  ").join(Text(cell, style) for cell, style in zip(cells, styles, strict=True))
        console.print(line, soft_wrap=True)


def diff_rows(a: Recipe, b: Recipe) -> list[tuple[str, str, str]]:
    """Key, value in `a` and value in `b`, as overrides spell them, of every key in which recipes differ."""
    flat_a, flat_b = flatten(a), flatten(b)

    def cell(flat: dict[str, Any], key: str) -> str:
        return spelt(flat[key]) if key in flat else _NO_KEY

    return [(key, cell(flat_a, key), cell(flat_b, key)) for key, _, _ in diff_recipes(a, b)]


def spelt(value: Any) -> str:
    """A value as an override takes it: `null`, `true`, `[en, zh]`, `bf16`."""
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(spelt(item) for item in value)}]"
    return str(value)
