from __future__ import annotations

from pathlib import Path

from fundusfm.recipe.schema import Recipe, SourceConfig
from fundusfm.recipe.values import diff_recipes, flatten
from tests.recipe.stub import WHOLE, resolve


def test_flatten() -> None:
    recipe = Recipe(name="x")
    recipe.model.vision.options = {"depth": 2}
    recipe.data.sources = [SourceConfig("a"), SourceConfig("b", 2.0)]
    flat = flatten(recipe)
    assert flat["name"] == "x" and flat["model.vision.options.depth"] == 2
    assert flat["data.sources[1].weight"] == 2.0 and flat["data.modalities"] == ["CFP"]
    assert flat["evaluation.templates"] == {} and flat["optim.betas"] == (0.9, 0.98)
    assert flatten(Recipe())["data.sources"] == []


def test_diff_recipes(tmp_path: Path) -> None:
    a = resolve(tmp_path).recipe
    b = resolve(tmp_path, WHOLE + "seed: 1\nobjective: {name: beta}\n", ["data.sources=[{shards: z}]"]).recipe
    assert diff_recipes(a, a) == []
    assert diff_recipes(a, b) == [
        ("seed", 0, 1),
        ("objective.name", "ret_clip", "beta"),
        ("objective.ratio", None, 0.5),
        ("objective.cap", None, None),
        ("objective.temperature", 90.0, None),
        ("objective.margin", None, None),
        ("data.sources[0].shards", "a", "z"),
    ]
