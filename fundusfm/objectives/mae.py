"""Masked autoencoding (He et al., arXiv 2111.06377) of retinal images: RETFound and EyeFound.

Most patches of an image are hidden; the encoder sees the others alone, a light decoder redraws the hidden
ones, and the loss is the mean squared error there, a mean over all hidden patches of all ranks.

`corrected` against `released` (RETFound's pre-training code):

=============  ==============================================  ================================
switch         corrected                                       released
=============  ==============================================  ================================
weight decay   none on vectors, class and mask token           also on the class and mask token
warm-up        every step learns                               the first step has rate 0
=============  ==============================================  ================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fundusfm.models.masked import visible_tokens
from fundusfm.objectives.cached import Features
from fundusfm.objectives.masked import MaskedConfig, MaskedObjective
from fundusfm.recipe.schema import Recipe
from fundusfm.stream.view_image import SingleImageBatch


@dataclass
class MaeConfig(MaskedConfig):
    """Masked autoencoding of images alone; keys as in `MaskedConfig`."""

    @property
    def reads_text(self) -> bool:
        return False


class Mae(MaskedObjective):
    """The objective; there is no vocabulary to know the size of."""

    Config = MaeConfig
    view: ClassVar[str] = "image_only"

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe)

    def term_weights(self) -> dict[str, float]:
        return {"loss_patches": 1.0}

    def encode(self, batch: SingleImageBatch) -> Features:
        masking = self.masking(batch)
        return self.patch_features(visible_tokens(self.trunk, batch.images, masking), masking, batch.images)

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        return {"loss_patches": self.patch_term(features)}
