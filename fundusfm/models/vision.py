"""Vision towers: a timm trunk and a bias-free projection into the shared space.

Legend: N images, C H W channels and pixels, F trunk width, D shared width.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fundusfm.errors import UserError
from fundusfm.models.weights import load_strictly, read_weights
from fundusfm.recipe.schema import VisionConfig


class VisionTower(nn.Module):
    """image_NCHW -> feature_ND: pooled trunk features (a CLIP-style ViT's class token), then a projection.

    `embed_dim` None: no projection.
    """

    def __init__(self, trunk: nn.Module, embed_dim: int | None) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = int(trunk.num_features)  # type: ignore[arg-type]
        self.proj: nn.Module = nn.Identity()
        if embed_dim is not None:
            self.proj = nn.Linear(self.width, embed_dim, bias=False)
            nn.init.normal_(self.proj.weight, std=self.width**-0.5)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        feature_ND: Tensor = self.proj(self.pooled(image_NCHW))
        return feature_ND

    def pooled(self, image_NCHW: Tensor) -> Tensor:
        """The pooled features (N, F) of the trunk alone."""
        # Channels last in memory: convolutions run 1.4 times faster on a CPU. The weights stay as they are,
        # since sharding strategies refuse weights in that layout.
        image_NCHW = image_NCHW.contiguous(memory_format=torch.channels_last)
        feature_NF: Tensor = self.trunk(image_NCHW)
        return feature_NF


def build_vision(config: VisionConfig, image_size: int, embed_dim: int | None) -> VisionTower:
    """A tower by its timm name at `image_size` pixels, from random values or from `config.weights`."""
    if not timm.is_model(config.name):
        close = difflib.get_close_matches(config.name, timm.list_models(), n=6, cutoff=0.5)
        near = ", ".join(close) or "see timm.list_models()"
        raise UserError(
            f"timm has no model {config.name!r}", where="model.vision.name", fix=f"choose one of: {near}"
        )
    options: dict[str, Any] = dict(config.options)
    if timm.get_pretrained_cfg(config.name).fixed_input_size:
        options.setdefault("img_size", image_size)
    try:
        trunk = timm.create_model(config.name, pretrained=False, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"timm cannot build {config.name} at {image_size} pixels with these options: {error}",
            where="model.vision.options, data.image_size",
        ) from error
    _refuse_ragged_grid(trunk, config.name, image_size)
    if config.weights:
        path = Path(config.weights)
        state = {k: v for k, v in read_weights(path).items() if not k.startswith(("head.", "fc."))}
        load_strictly(trunk, state, path)
    if config.gradient_checkpointing:
        trunk.set_grad_checkpointing(True)
    return VisionTower(trunk, embed_dim)


def _refuse_ragged_grid(trunk: nn.Module, name: str, image_size: int) -> None:
    """timm would cut off the rows and columns of pixels that fill no patch, without a word."""
    patch_px = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    if isinstance(patch_px, tuple) and image_size % patch_px[0]:
        below = image_size - image_size % patch_px[0]
        raise UserError(
            f"{image_size} pixels are no whole number of the {patch_px[0]}-pixel patches of {name}",
            where="data.image_size",
            fix=f"set data.image_size to {below or patch_px[0]} or {below + patch_px[0]}",
        )
