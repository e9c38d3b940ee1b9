"""Objectives by name. A user's own is named in a recipe by its import path, `package.module:Class`."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

import torch

from fundusfm.errors import UserError
from fundusfm.models.text import refuse_longer_texts
from fundusfm.models.weights import load_strictly, read_weights
from fundusfm.objectives.base import Objective
from fundusfm.objectives.rates import refuse_other_than_blocks
from fundusfm.recipe.schema import ObjectiveConfig, Recipe

OBJECTIVES = {
    "composite": "fundusfm.objectives.composite:Composite",
    "mae": "fundusfm.objectives.mae:Mae",
    "urfound": "fundusfm.objectives.urfound:UrFound",
    "ret_clip": "fundusfm.objectives.ret_clip:RetClip",
    "flair": "fundusfm.objectives.flair:Flair",
    "keepfit": "fundusfm.objectives.keepfit:KeepFit",
    "caption": "fundusfm.objectives.caption:Caption",
    "eyeclip": "fundusfm.objectives.eyeclip:EyeClip",
}


def objective_class(name: str) -> type[Objective]:
    """The class of an objective; UserError listing the known names."""
    path = OBJECTIVES.get(name, name)
    module_name, _, class_name = path.partition(":")
    if not class_name:
        near = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"there is no objective {name!r}",
            where="objective.name",
            fix=f"{hint}known: {', '.join(OBJECTIVES)}, or an import path package.module:Class",
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the objective cannot be imported: {error}", where=f"objective.name: {path}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise UserError(
            f"{path} is no subclass of fundusfm.objectives.base.Objective", where="objective.name"
        )
    return found


def config_of(name: str) -> type[ObjectiveConfig]:
    """The recipe keys of an objective."""
    return objective_class(name).Config


def build_objective(recipe: Recipe, vocab_size: int) -> Objective:
    """The objective a recipe describes; `vocab_size` is the tokenizer's; `recipe.seed` fixes the start."""
    torch.manual_seed(recipe.seed)
    objective = objective_class(recipe.objective.name)(recipe, vocab_size)  # type: ignore[call-arg]
    refuse_longer_texts(objective, recipe.data.context_length)
    if recipe.optim.layer_decay < 1:
        refuse_other_than_blocks(name for name, _ in objective.named_parameters())
    if recipe.model.weights:
        path = Path(recipe.model.weights)
        objective.fresh = load_strictly(
            objective,
            objective.adapt(read_weights(path)),
            path,
            may_lack=objective.may_be_fresh,
            aligned=objective.aligned_positions,
        )
    return objective
