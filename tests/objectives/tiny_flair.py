"""FLAIR and KeepFIT with tiny towers, and batches of labelled images in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fundusfm.objectives.flair import Flair, FlairConfig
from fundusfm.objectives.keepfit import KeepFit, KeepFitConfig
from fundusfm.recipe.schema import Fidelity, ObjectiveConfig, Recipe
from fundusfm.stream.view_category import CategoryBatch
from tests.objectives.tiny import VOCAB_SIZE, tiny_recipe

NUM_LABELS = 5


def recipe_with(objective: ObjectiveConfig) -> Recipe:
    recipe = tiny_recipe()
    recipe.objective = objective
    return recipe


def tiny_flair(fidelity: Fidelity = Fidelity.corrected, **objective: float) -> Flair:
    torch.manual_seed(0)
    return Flair(recipe_with(FlairConfig(fidelity=fidelity, **objective)), VOCAB_SIZE)


def tiny_keepfit(
    fidelity: Fidelity = Fidelity.corrected, *, embed_dim: int = 16, **objective: Any
) -> KeepFit:
    torch.manual_seed(0)
    recipe = recipe_with(KeepFitConfig(fidelity=fidelity, **{"attention_dropout": 0.0, **objective}))
    recipe.model.embed_dim = embed_dim
    return KeepFit(recipe, VOCAB_SIZE)


def category_batch(
    num_exams: int, seed: int = 0, *, experts: tuple[int, ...] = (), lacking: bool = True
) -> CategoryBatch:
    """Random pixels, words and one to three labels; with `lacking`, every fifth image has no label.

    `experts`: rows of the expert set; the last of several repeats the caption of the first.
    """
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    token_BT = torch.randint(5, VOCAB_SIZE, (num_exams, 10), generator=generator)
    token_BT[:, 0] = 2
    token_BT[::2, 6:] = 0
    labels_BC = torch.zeros(num_exams, NUM_LABELS, dtype=torch.uint8)
    category_B = torch.full((num_exams,), -1)
    for row in range(num_exams):
        own = rng.permutation(NUM_LABELS)[: 1 + row % 3].tolist()
        if not (lacking and row % 5 == 4):
            labels_BC[row, own] = 1
            category_B[row] = -1 if row in experts else own[0]
    expert_B = torch.zeros(num_exams, dtype=torch.bool)
    expert_B[list(experts)] = True
    caption_B = torch.where(expert_B, torch.arange(num_exams) + 100, -1)
    if len(experts) > 1:
        caption_B[experts[-1]] = caption_B[experts[0]]
    return CategoryBatch(
        images=torch.randn(num_exams, 3, 32, 32, generator=generator),
        modality_B=torch.zeros(num_exams, dtype=torch.long),
        mask_seed_B=torch.arange(num_exams),
        color_N34=None,
        erase_N4=None,
        token_BT=token_BT,
        mask_BT=token_BT != 0,
        text_valid_B=(category_B >= 0) | expert_B,
        labels_BC=labels_BC,
        category_B=category_B,
        expert_B=expert_B,
        caption_B=caption_B,
        keys=[f"exam {row}" for row in range(num_exams)],
        faults=[],
    )


def in_dtype(batch: CategoryBatch, dtype: torch.dtype) -> CategoryBatch:
    batch.images = batch.images.to(dtype)
    return batch
