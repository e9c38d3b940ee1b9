"""An objective without text or contrast, to stand beside RET-CLIP: it tells the mean colour of an image.

Legend: B exams, one image of each, C colours, D shared width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fundusfm.losses.means import global_mean
from fundusfm.models.vision import build_vision
from fundusfm.objectives.base import Objective
from fundusfm.objectives.cached import Features
from fundusfm.recipe.schema import ObjectiveConfig, Recipe
from fundusfm.stream.view_image import SingleImageBatch

COLOUR = f"{__name__}:Colour"


@dataclass
class ColourConfig(ObjectiveConfig):
    scale: float = 1.0
    hidden: int = 8

    @property
    def reads_text(self) -> bool:
        return False

    def impossible(self) -> dict[str, str]:
        return {} if self.scale > 0 else {"scale": f"{self.scale} must be above 0"}


class Colour(Objective):
    """Squared error of the mean colour, a mean over the exams of all ranks."""

    Config = ColourConfig
    view: ClassVar[str] = "image_only"
    aligns_text = False

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.objective, ColourConfig)
        width = recipe.model.embed_dim
        self.vision = build_vision(recipe.model.vision, recipe.data.image_size, width)
        self.head = nn.Sequential(
            nn.Linear(width, recipe.objective.hidden), nn.GELU(), nn.Linear(recipe.objective.hidden, 3)
        )
        self.scale = recipe.objective.scale

    def encode(self, batch: SingleImageBatch) -> Features:
        told_BC = self.head(self.vision(batch.images))
        return {"error": self.scale * (told_BC - batch.images.mean(dim=(2, 3))).square().sum(dim=1)}

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        error_B = features["error"]
        return {
            "loss_colour": global_mean(error_B, torch.ones_like(error_B), None if self.training else "rank")
        }

    def term_weights(self) -> dict[str, float]:
        return {"loss_colour": 2.0}

    def gauges(self) -> dict[str, float]:
        return {"scale": self.scale}

    def probe_features(self, image_NCHW: Tensor) -> Tensor:
        feature_ND: Tensor = self.vision(image_NCHW)
        return feature_ND
