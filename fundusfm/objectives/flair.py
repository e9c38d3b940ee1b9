"""FLAIR (arXiv 2308.07898): an image and an expert's words for one of its labels, with soft targets.

Legend: B exams, one image of each, D shared width, F trunk width, T tokens, C labels, W text width.

Of each image one label is drawn and put into a sentence. A sentence belongs to every image that shows what it
names, so that the same finding in two images of a batch is no negative. Both towers end in a bias-free
projection with unit rows before and after it; one learned temperature.

`corrected` against `released` (the code that made the published weights):

======================  =========================================  ===========================================
switch                  corrected                                  released
======================  =========================================  ===========================================
targets                 every image that has the named label       images of which the same label was drawn
negatives               all ranks                                  this rank's own rows
pooling of words        words only                                 padding counts as words do
weight decay            none on vectors, position tables           on everything, the temperature included
temperature cap         `temperature_max`                          a logarithm of 4.6052
rate                    falls to 0 at the end of the run           falls over 100 times the steps of warm-up
zero-shot prototypes    of unit length                             means of unit rows as they are
======================  =========================================  ===========================================

The temperature is clamped before each use and the clamp passes the gradient on, in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundusfm.losses import LabelOverlap, SameGroup, contrastive_loss
from fundusfm.losses.ranks import Group
from fundusfm.losses.targets import Target
from fundusfm.models.pooling import PooledTextTower
from fundusfm.models.text import build_text
from fundusfm.models.vision import build_vision
from fundusfm.objectives.base import Eye, Objective, warmup_cosine
from fundusfm.objectives.cached import Features
from fundusfm.recipe.schema import Fidelity, ObjectiveConfig, Recipe
from fundusfm.stream.view_category import CategoryBatch

_RELEASED_LOG_CAP = 4.6052
_RELEASED_HORIZON = 100  # epochs, of which the warm-up is one


@dataclass
class FlairConfig(ObjectiveConfig):
    """Temperatures are multipliers of the cosine."""

    temperature_init: float = 1 / 0.07
    temperature_max: float = 100.0

    def num_contrasted(self, of_rank: int, num_ranks: int) -> int:
        return of_rank if self.fidelity is Fidelity.released else of_rank * num_ranks

    def impossible(self) -> dict[str, str]:
        if not 1 <= self.temperature_init <= self.temperature_max < math.inf:
            told = f"{self.temperature_init} must be at least 1 and at most temperature_max"
            return {"temperature_init": told}
        return {}


class Flair(Objective):
    """The objective; `vocab_size` is the tokenizer's."""

    Config = FlairConfig
    view: ClassVar[str] = "image_text"

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.objective, FlairConfig)
        self.config: FlairConfig = recipe.objective
        self.released = self.config.fidelity is Fidelity.released
        self.unit_prototypes = not self.released
        width = recipe.model.embed_dim
        self.vision = build_vision(recipe.model.vision, recipe.data.image_size, width)
        self.text = PooledTextTower(build_text(recipe.model.text, vocab_size).trunk, masked=not self.released)
        self.text_proj = nn.Linear(self.text.width, width, bias=False)
        # Shape (1,): sharding strategies refuse parameters without an axis.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(self.config.temperature_init)))

    def term_weights(self) -> dict[str, float]:
        return {"loss_public": 1.0}

    def encode(self, batch: CategoryBatch) -> Features:
        return {
            "image": self.embed_images(batch.images, ""),
            "text": self.embed_texts(batch.token_BT, batch.mask_BT, ""),
            "valid": batch.text_valid_B,
            "labels": batch.labels_BC,
            "category": batch.category_B,
        }

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        return {"loss_public": self.public_loss(features, features["text"], features["valid"], self.scale())}

    def public_loss(self, features: Features, text_BD: Tensor, valid_B: Tensor, scale: Tensor) -> Tensor:
        """Images against sentences about labels; rows that are not `valid_B` stay out. Collective."""
        return contrastive_loss(
            features["image"],
            text_BD,
            scale,
            target=self.target(features["labels"], features["category"]),
            valid_a_B=valid_B,
            valid_b_B=valid_B,
            group=self.group(),
        )

    def target(self, labels_BC: Tensor, category_B: Tensor) -> Target:
        """Which sentence belongs to which image.

        `corrected` asks whether the image has the label that the sentence names. Labels that the image of the
        sentence has besides are not in the sentence: they make no pair.
        """
        if self.released:
            return SameGroup(category_B)
        number_C = torch.arange(labels_BC.shape[1], device=category_B.device)
        return LabelOverlap(labels_BC.float(), (category_B[:, None] == number_C).float())

    def group(self) -> Group:
        """Whose rows are contrasted: a validation batch belongs to one rank, a training batch to all."""
        return "rank" if self.released or not self.training else None

    def scale(self) -> Tensor:
        """The temperature, clamped in place, so that the gradient does not stop at the bounds."""
        with torch.no_grad():
            self._clamp()
        return self.log_scale.exp()

    def after_step(self) -> None:
        self._clamp()

    def _clamp(self) -> None:
        cap = _RELEASED_LOG_CAP if self.released else math.log(self.config.temperature_max)
        self.log_scale.clamp_(0, cap)

    def gauges(self) -> dict[str, float]:
        return {"scale": float(self.log_scale.detach().exp())}

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        return not self.released and super().no_decay(name, parameter)

    def rate_factor(self) -> Callable[[int], float]:
        if not self.released:
            return super().rate_factor()
        config = self.recipe.optim
        return warmup_cosine(config, max(self.total_steps, _RELEASED_HORIZON * config.warmup_steps))

    def probe_features(self, image_NCHW: Tensor) -> Tensor:
        """The published linear-probe feature: what the trunk pools, without the projection."""
        return self.vision.pooled(image_NCHW)

    def contrast_scale(self, eye: Eye) -> float:
        return float(self.log_scale.detach().exp())

    def embed_images(self, image_NCHW: Tensor, eye: Eye) -> Tensor:
        """Unit rows of single images; both eyes are seen alike."""
        return unit_projection(self.vision.pooled(image_NCHW), self.vision.proj)

    def embed_texts(self, token_BT: Tensor, mask_BT: Tensor, eye: Eye) -> Tensor:
        """Unit rows of texts; both eyes are spoken of alike."""
        return unit_projection(self.text(token_BT, mask_BT), self.text_proj)

    def embed_exams(self, batch: CategoryBatch) -> tuple[Tensor, Tensor]:
        """Unit rows of images and of the sentences about them."""
        return self.embed_images(batch.images, ""), self.embed_texts(batch.token_BT, batch.mask_BT, "")


def unit_projection(feature_BF: Tensor, projection: nn.Module) -> Tensor:
    """Unit rows, projected, made unit rows again, (B, D)."""
    return F.normalize(projection(F.normalize(feature_BF, dim=-1)), dim=-1)
