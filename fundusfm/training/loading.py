"""An objective back from a checkpoint, for evaluation and export."""

from __future__ import annotations

from pathlib import Path

from fundusfm.objectives import build_objective, config_of
from fundusfm.objectives.base import Objective
from fundusfm.recipe.load import recipe_from_yaml_text
from fundusfm.recipe.schema import Recipe
from fundusfm.stream.tokens import load_tokens
from fundusfm.training.checkpoint import load_weights


def load_objective(folder: Path) -> tuple[Objective, Recipe]:
    """The objective of a whole checkpoint folder, in evaluation mode, and its recipe.

    The recipe's tokenizer is the checkpoint's own copy, so that nothing outside the folder is needed.
    """
    saved = folder / "recipe.yaml"
    recipe = recipe_from_yaml_text(
        saved.read_text(encoding="utf-8"), objective_config=config_of, where=str(saved)
    )
    if recipe.data.tokenizer is not None:
        recipe.data.tokenizer = str(folder / "tokenizer")
    # The weights below replace whatever these files would give, and they may be gone.
    recipe.model.weights = recipe.model.vision.weights = None
    tokens = load_tokens(recipe.data.tokenizer, recipe.data.context_length)
    objective = build_objective(recipe, tokens.vocab_size)
    objective.load_state_dict(load_weights(folder))
    return objective.eval(), recipe
