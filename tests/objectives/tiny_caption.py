"""A small KeepFIT-FFA, and images with reports in memory."""

from __future__ import annotations

import torch

from fundusfm.objectives.caption import Caption, CaptionConfig
from fundusfm.recipe.schema import (
    DataConfig,
    Fidelity,
    ModelConfig,
    OptimConfig,
    Recipe,
    TrainerConfig,
    VisionConfig,
)
from fundusfm.stream.view_prompt import PromptBatch

VOCAB_SIZE, PAD, BEGIN, END = 40, 0, 2, 3
LONGEST = 9
VIT = ("vit_base_patch16_clip_quickgelu_224", {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2})
# Layer norm throughout: batch norm would mix the rows of a batch.
CONVNEXT = ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "output_stride": 8})


def tiny_caption(
    fidelity: Fidelity = Fidelity.corrected, vision: tuple[str, dict[str, object]] = VIT, **objective: float
) -> Caption:
    sizes = {"layers": 2, "width": 16, "heads": 2, "mlp_width": 24, "dropout": 0.0, "patch_dropout": 0.0}
    recipe = Recipe(
        name="tiny",
        objective=CaptionConfig(name="caption", fidelity=fidelity, **{**sizes, **objective}),  # type: ignore[arg-type]
        model=ModelConfig(vision=VisionConfig(name=vision[0], options=vision[1])),
        data=DataConfig(image_size=32, context_length=LONGEST, tokenizer="none"),
        optim=OptimConfig(lr=5e-3, warmup_steps=2),
        trainer=TrainerConfig(max_steps=4),
    )
    torch.manual_seed(0)
    return Caption(recipe, VOCAB_SIZE)


def caption_batch(num_exams: int, seed: int = 0, *, lacking: bool = True) -> PromptBatch:
    """Reports of 1 to 7 words, the longest cut; with `lacking`, every third exam has none."""
    generator = torch.Generator().manual_seed(seed)
    row_B = torch.arange(num_exams)
    valid_B = (row_B % 3 != 2) if lacking else torch.ones(num_exams, dtype=torch.bool)
    length_B = torch.where(valid_B, 3 + (row_B * 5) % 7, 2)  # with begin and end
    token_BT = torch.randint(5, VOCAB_SIZE, (num_exams, LONGEST), generator=generator)
    place_T = torch.arange(LONGEST)
    token_BT[:, 0] = BEGIN
    token_BT[row_B, length_B - 1] = END
    mask_BT = place_T < length_B[:, None]
    return PromptBatch(
        images=torch.randn(num_exams, 3, 32, 32, generator=generator),
        modality_B=torch.zeros(num_exams, dtype=torch.long),
        mask_seed_B=row_B,
        color_N34=None,
        erase_N4=None,
        token_BT=torch.where(mask_BT, token_BT, PAD),
        mask_BT=mask_BT,
        word_BT=torch.where(mask_BT, place_T - 1, -1),
        text_valid_B=valid_B,
        hidden_id=4,
        keys=[f"exam {row}" for row in range(num_exams)],
        faults=[],
    )
