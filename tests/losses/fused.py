"""The contrastive loss by the fused kernels."""

from __future__ import annotations

import importlib.util

import pytest
from torch import Tensor

from fundusfm.losses import Diagonal, contrastive_loss
from fundusfm.losses.prepare import Mask
from fundusfm.losses.targets import Target

Sides = tuple[Tensor | None, Tensor | None]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="this PyTorch came without triton"
)


def fused_loss(
    a_BD: Tensor,
    b_BD: Tensor,
    scale: Tensor,
    target: Target = Diagonal(),  # noqa: B008  (immutable)
    *,
    valid: Sides = (None, None),
    weights: Sides = (None, None),
    mask: Mask = None,
) -> Tensor:
    return contrastive_loss(
        a_BD,
        b_BD,
        scale,
        target=target,
        valid_a_B=valid[0],
        valid_b_B=valid[1],
        weight_a_B=weights[0],
        weight_b_B=weights[1],
        mask=mask,
        backend="triton",
    )
