"""A small objective and a whole small recipe, so that these tests know nothing of real objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fundusfm.errors import UserError
from fundusfm.recipe.load import ResolvedRecipe, load_recipe
from fundusfm.recipe.schema import Fidelity, ObjectiveConfig

WHOLE = """\
name: whole
data:
  sources: [{shards: a}]
  tokenizer: tokens.json
trainer: {max_steps: 100}
"""


@dataclass
class AlphaConfig(ObjectiveConfig):
    temperature: float = 90.0
    margin: int | None = None

    def num_contrasted(self, of_rank: int, num_ranks: int) -> int:
        return of_rank if self.fidelity is Fidelity.released else of_rank * num_ranks

    def impossible(self) -> dict[str, str]:
        return {"temperature": "must be above 0"} if self.temperature <= 0 else {}


@dataclass
class BetaConfig(ObjectiveConfig):
    ratio: float = 0.5
    cap: float | None = None


def config_of(name: str) -> type[ObjectiveConfig]:
    known = {"ret_clip": AlphaConfig, "beta": BetaConfig}
    if name not in known:
        raise UserError(f"there is no objective {name!r}", fix="known: ret_clip, beta")
    return known[name]


def load(path: Path, *overrides: str) -> ResolvedRecipe:
    return load_recipe(path, overrides, objective_config=config_of)


def resolve(tmp_path: Path, text: str = WHOLE, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """The recipe of a YAML text."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file, *overrides)
