"""An objective back from a checkpoint, for evaluation and export."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from fundusfm.objectives import build_objective, config_of
from fundusfm.objectives.base import Objective
from fundusfm.recipe.load import recipe_from_yaml_text
from fundusfm.recipe.schema import Recipe
from fundusfm.stream.tokens import load_tokens
from fundusfm.training.checkpoint import load_weights


def without_files(recipe: Recipe) -> Recipe:
    """The recipe without files of weights: a checkpoint replaces what they give, and they may be gone."""
    bare = deepcopy(recipe)
    bare.model.weights = bare.model.vision.weights = None
    return bare


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
    recipe = without_files(recipe)
    tokens = load_tokens(recipe.data.tokenizer, recipe.data.context_length)
    objective = build_objective(recipe, tokens.vocab_size)
    objective.load_state_dict(load_weights(folder))
    return objective.eval(), recipe
