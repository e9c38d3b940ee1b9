"""EyeCLIP at the tiny size of its goldens, and batches in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fundusfm.objectives.eyeclip import EyeClip, EyeClipConfig
from fundusfm.recipe.schema import (
    DataConfig,
    Fidelity,
    ModelConfig,
    Recipe,
    TextConfig,
    TextKind,
    TrainerConfig,
    VisionConfig,
)
from fundusfm.stream.hashing import hash_text
from fundusfm.stream.view import LEFT, RIGHT, UNKNOWN
from fundusfm.stream.view_multi import ExamBatch

VOCAB_SIZE = 300
CONTEXT = 12
CFP, OCT, FFA = range(3)


def golden_recipe(fidelity: Fidelity = Fidelity.released, image_size: int = 128, **objective: Any) -> Recipe:
    """The configuration of the tiny goldens: patch 32, two layers of width 64, one text layer of width 32."""
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return Recipe(
        name="tiny",
        objective=EyeClipConfig(name="eyeclip", fidelity=fidelity, **{**decoder, **objective}),
        model=ModelConfig(
            vision=VisionConfig(
                name="vit_base_patch32_clip_quickgelu_224",
                options={"embed_dim": 64, "depth": 2, "num_heads": 1},
            ),
            text=TextConfig(
                kind=TextKind.clip, layers=1, width=32, heads=1, mlp_width=128, max_positions=12, dropout=0.0
            ),
            embed_dim=24,
        ),
        data=DataConfig(
            modalities=["CFP", "OCT", "FFA"], image_size=image_size, context_length=CONTEXT, tokenizer="none"
        ),
        trainer=TrainerConfig(max_steps=4),
    )


def tiny_recipe(fidelity: Fidelity = Fidelity.corrected, **objective: Any) -> Recipe:
    """Smaller still: 16 patches of 8 pixels."""
    recipe = golden_recipe(fidelity, image_size=32, **objective)
    recipe.model.vision.options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return recipe


def tiny_eyeclip(fidelity: Fidelity = Fidelity.corrected, **objective: Any) -> EyeClip:
    torch.manual_seed(0)
    return EyeClip(tiny_recipe(fidelity, **objective), VOCAB_SIZE)


def golden_batch(*images: np.ndarray, tokens: np.ndarray | None = None) -> ExamBatch:
    """Exams with one image out of each of `images`; the end token has the highest id."""
    num_exams = len(images[0])
    token_BT = torch.zeros(num_exams, CONTEXT, dtype=torch.int64)
    mask_BT = torch.ones_like(token_BT, dtype=torch.bool)
    if tokens is not None:
        token_BT = torch.from_numpy(tokens).long()
        mask_BT = torch.arange(CONTEXT) <= token_BT.argmax(dim=1, keepdim=True)
    slot_N = torch.arange(len(images)).repeat_interleave(num_exams)
    row_B = torch.arange(num_exams)
    return ExamBatch(
        images=torch.from_numpy(np.concatenate(images)),
        exam_N=row_B.repeat(len(images)),
        slot_N=slot_N,
        modality_N=torch.full_like(slot_N, CFP),
        eye_N=torch.full_like(slot_N, UNKNOWN),
        mask_seed_N=torch.arange(len(slot_N)),
        color_N34=None,
        erase_N4=None,
        token_BT=token_BT,
        mask_BT=mask_BT,
        text_valid_B=torch.full((num_exams,), tokens is not None),
        patient_B=row_B,
        text_B=row_B,
        num_slots=len(images),
        keys=[str(row) for row in range(num_exams)],
        faults=[],
    )


# What exams hold, in turn: pairs of one eye, a single, a pair of two eyes, both, a pair of unknown eyes.
EXAMS = [
    [(CFP, LEFT), (OCT, LEFT), (FFA, LEFT)],
    [(CFP, RIGHT)],
    [(CFP, LEFT), (OCT, RIGHT)],
    [(CFP, LEFT), (CFP, RIGHT), (OCT, RIGHT), (FFA, LEFT)],
    [(OCT, UNKNOWN), (FFA, UNKNOWN)],
]


def random_batch(
    num_exams: int, seed: int = 0, exams: list[list[tuple[int, int]]] | None = None
) -> ExamBatch:
    """Exams with random pixels and words. Every third has no text; exams 0 and 3 are of one patient, texts of
    exams 1 and 4 read alike."""
    generator = torch.Generator().manual_seed(seed)
    kinds = exams or EXAMS
    owned = [(e, slot, *kind) for e in range(num_exams) for slot, kind in enumerate(kinds[e % len(kinds)])]
    exam_N, slot_N, modality_N, eye_N = (torch.tensor(column) for column in zip(*owned, strict=True))
    token_BT = torch.randint(5, VOCAB_SIZE, (num_exams, CONTEXT), generator=generator)
    token_BT[:, 0] = 2
    token_BT[::2, 8:] = 0
    row_B = torch.arange(num_exams)
    text_valid_B = row_B % 3 != 2
    text_B = torch.where(text_valid_B, torch.where(row_B == 4, 1, row_B), -1)
    return ExamBatch(
        images=torch.randn(len(owned), 3, 32, 32, generator=generator),
        exam_N=exam_N,
        slot_N=slot_N,
        modality_N=modality_N,
        eye_N=eye_N,
        mask_seed_N=torch.tensor([hash_text(f"{seed} {number}") for number in range(len(owned))]),
        color_N34=None,
        erase_N4=None,
        token_BT=token_BT,
        mask_BT=token_BT != 0,
        text_valid_B=text_valid_B,
        patient_B=torch.where(row_B == 3, 0, row_B),
        text_B=text_B,
        num_slots=4,
        keys=[f"exam {row}" for row in range(num_exams)],
        faults=[],
    )
