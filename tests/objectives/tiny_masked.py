"""Masked objectives at tiny sizes, and batches of images and sentences in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fundusfm.objectives import config_of
from fundusfm.recipe.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    TextConfig,
    TrainerConfig,
    VisionConfig,
)
from fundusfm.stream.view_image import SingleImageBatch
from fundusfm.stream.view_prompt import PromptBatch

# Of the published tiny model: 32 px, patch 8.
GOLDEN_SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
MODALITIES = ["CFP", "OCT"]
VOCAB_SIZE, MASK_ID = 40, 4


def masked_recipe(name: str, sizes: dict[str, int] = GOLDEN_SIZES, **objective: Any) -> Recipe:
    config = config_of(name)(name=name, **{**DECODER, **objective})
    text = TextConfig(layers=2, width=24, heads=4, mlp_width=48, max_positions=12, dropout=0.0)
    return Recipe(
        name="tiny",
        objective=config,
        model=ModelConfig(
            vision=VisionConfig(name="vit_base_patch16_224", options=dict(sizes)), text=text, embed_dim=16
        ),
        data=DataConfig(
            image_size=32,
            context_length=12,
            tokenizer="none" if config.reads_text else None,
            modalities=list(MODALITIES),
        ),
        optim=OptimConfig(lr=5e-3, warmup_steps=2),
        trainer=TrainerConfig(max_steps=4),
    )


def image_batch(images: Tensor) -> SingleImageBatch:
    """Images of both modalities in turn."""
    return SingleImageBatch(images=images, **facts_of(len(images)))


def facts_of(count: int) -> dict[str, Any]:
    """What a batch says of its images besides their pixels."""
    return {
        "modality_B": torch.arange(count) % len(MODALITIES),
        "mask_seed_B": torch.arange(count) * 7919 + 5,
        "color_N34": None,
        "erase_N4": None,
        "keys": [f"exam {row}" for row in range(count)],
        "faults": [],
    }


def batch_for(name: str, count: int) -> SingleImageBatch:
    """Random images in float64 and words, as an objective's view gives them.

    Of three sentences one is short, and of four one is missing.
    """
    generator = torch.Generator().manual_seed(0)
    side = 64 if name == "urfound" else 32
    images = torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)
    if name == "mae":
        return image_batch(images)
    row_B = torch.arange(count)
    token_BT = torch.randint(5, VOCAB_SIZE, (count, 12), generator=generator)
    mask_BT = torch.arange(12) < torch.where(row_B % 3 == 0, 5, 12)[:, None]
    token_BT[:, 0], last_B = 2, mask_BT.sum(1) - 1
    token_BT[row_B, last_B] = 3
    word_BT = torch.arange(-1, 11).expand(count, -1) // 2  # the pieces of a word are two
    word_BT = word_BT.masked_fill(~mask_BT, -1)
    word_BT[:, 0] = word_BT[row_B, last_B] = -1
    return PromptBatch(
        images=images,
        **facts_of(count),
        token_BT=token_BT.masked_fill(~mask_BT, 0),
        mask_BT=mask_BT,
        word_BT=word_BT,
        text_valid_B=row_B % 4 != 1,
        hidden_id=MASK_ID,
    )
