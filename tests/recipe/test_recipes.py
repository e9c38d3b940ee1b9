"""Every recipe that is shipped resolves, and base.yaml tells the truth about the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from fundusfm.objectives import config_of
from fundusfm.recipe.layers import parse_layer
from fundusfm.recipe.load import load_recipe, recipe_from_yaml_text
from fundusfm.recipe.merge import leaf_keys
from fundusfm.recipe.schema import Recipe
from fundusfm.recipe.values import flatten

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in RECIPES.glob("**/*.yaml") if "prompts" not in path.relative_to(RECIPES).parts)
WHAT_BASE_LEAVES_OPEN = ["name=x", "data.tokenizer=x", "data.sources=[{shards: x}]", "trainer.max_steps=100"]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_resolves_and_survives_saving(file: Path) -> None:
    overrides = WHAT_BASE_LEAVES_OPEN if file.stem == "base" else []
    resolved = load_recipe(file, overrides, objective_config=config_of)
    assert recipe_from_yaml_text(resolved.to_yaml(), objective_config=config_of) == resolved.recipe


def test_base_is_the_schema() -> None:
    """Every key of the schema stands in base.yaml, in its order, with its default; and nothing else does."""
    written = parse_layer((RECIPES / "base.yaml").read_text(encoding="utf-8"), "base.yaml").tree
    assert _dotted(written) == leaf_keys(Recipe)
    resolved = load_recipe(RECIPES / "base.yaml", WHAT_BASE_LEAVES_OPEN, objective_config=config_of)
    defaults = flatten(Recipe())
    for key, value in flatten(resolved.recipe).items():
        if key in defaults and not any(key == one.partition("=")[0] for one in WHAT_BASE_LEAVES_OPEN):
            assert value == defaults[key], key


def test_base_explains_every_key() -> None:
    for line in (RECIPES / "base.yaml").read_text(encoding="utf-8").splitlines():
        key = line.partition(":")[0].strip()
        if key and not key.startswith("#") and not line.rstrip().endswith(":"):
            assert "#" in line or key in {"name", "template"}, line


def _dotted(tree: dict[str, object], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        is_section = isinstance(value, dict) and value
        keys += _dotted(value, f"{prefix}{key}.") if is_section else [f"{prefix}{key}"]  # type: ignore[arg-type]
    return keys
