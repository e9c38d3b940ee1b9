"""RET-CLIP at the tiny size of the goldens, and batches in memory."""

from __future__ import annotations

import numpy as np
import torch

from fundusfm.objectives.ret_clip import RetClip, RetClipConfig
from fundusfm.recipe.schema import (
    DataConfig,
    Fidelity,
    ModelConfig,
    OptimConfig,
    Recipe,
    TextConfig,
    TrainerConfig,
    VisionConfig,
)
from fundusfm.stream.views import LEFT, RIGHT, UNKNOWN, PatientPairBatch

VOCAB_SIZE = 64


def tiny_recipe(fidelity: Fidelity = Fidelity.corrected, **objective: float) -> Recipe:
    """The configuration of the tiny goldens: 32 px, patch 8, two layers of width 32 on both sides."""
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return Recipe(
        name="tiny",
        objective=RetClipConfig(fidelity=fidelity, **objective),
        model=ModelConfig(
            vision=VisionConfig(options=options),
            text=TextConfig(layers=2, width=32, heads=4, mlp_width=64, max_positions=24, dropout=0.0),
            embed_dim=16,
        ),
        data=DataConfig(image_size=32, context_length=12, tokenizer="none"),
        optim=OptimConfig(lr=5e-3, warmup_steps=2),
        trainer=TrainerConfig(max_steps=4),
    )


def tiny_ret_clip(fidelity: Fidelity = Fidelity.corrected, **objective: float) -> RetClip:
    torch.manual_seed(0)
    return RetClip(tiny_recipe(fidelity, **objective), VOCAB_SIZE)


def golden_batch(left: np.ndarray, right: np.ndarray, tokens: np.ndarray) -> PatientPairBatch:
    """Both eyes of every patient: all left images, then all right ones."""
    num_patients = len(tokens)
    token_BT = torch.from_numpy(tokens)
    return PatientPairBatch(
        images=torch.from_numpy(np.concatenate([left, right])),
        patient_N=torch.arange(num_patients).repeat(2),
        eye_N=torch.tensor([LEFT] * num_patients + [RIGHT] * num_patients),
        color_N34=None,
        erase_N4=None,
        token_BT=token_BT,
        mask_BT=token_BT != 0,
        text_valid_B=torch.ones(num_patients, dtype=torch.bool),
        keys=[str(i) for i in range(num_patients)],
        faults=[],
    )


def random_batch(num_patients: int, seed: int = 0, *, lacking: bool = True) -> PatientPairBatch:
    """Patients with random pixels and words; with `lacking`, some have one eye or none of known side.

    In turn: both eyes, the left alone, the right alone, one of unknown side. Every third has no report.
    """
    generator = torch.Generator().manual_seed(seed)
    eyes = [[LEFT, RIGHT], [LEFT], [RIGHT], [UNKNOWN]] if lacking else [[LEFT, RIGHT]]
    owned = [(row, eye) for row in range(num_patients) for eye in eyes[row % len(eyes)]]
    token_BT = torch.randint(5, VOCAB_SIZE, (num_patients, 12), generator=generator)
    token_BT[:, 0] = 2
    token_BT[::2, 8:] = 0
    row_B = torch.arange(num_patients)
    return PatientPairBatch(
        images=torch.randn(len(owned), 3, 32, 32, generator=generator),
        patient_N=torch.tensor([row for row, _ in owned]),
        eye_N=torch.tensor([eye for _, eye in owned]),
        color_N34=None,
        erase_N4=None,
        token_BT=token_BT,
        mask_BT=token_BT != 0,
        text_valid_B=(row_B % 3 != 2) if lacking else torch.ones(num_patients, dtype=torch.bool),
        keys=[f"exam {row}" for row in range(num_patients)],
        faults=[],
    )
