"""What experts wrote of images that look alike: attention from images over images, whose texts it mixes.

Legend: B images, M images and texts of experts, H heads, D shared width, E width of a head.
"""

from __future__ import annotations

from enum import Enum

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fundusfm.errors import UserError


class SoftmaxOver(str, Enum):
    """Over what the weights of attention add up to 1: the experts' images, or (a slip) the heads."""

    experts = "experts"
    heads = "heads"


class Revision(nn.Module):
    """Four bias-free projections around an attention with dropout on its weights."""

    def __init__(self, width: int, heads: int, dropout: float, over: SoftmaxOver) -> None:
        super().__init__()
        if width % heads:
            raise UserError(
                f"the shared width {width} is not divisible by {heads} heads",
                where="model.embed_dim, objective.heads",
            )
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self._heads, self._dropout, self._over = heads, dropout, over

    def forward(self, image_BD: Tensor, expert_image_MD: Tensor, expert_text_MD: Tensor) -> Tensor:
        """Revised texts (B, D), not of unit length; zero where there are no experts."""
        weight_HBM = self.weights(image_BD, expert_image_MD)
        weight_HBM = F.dropout(weight_HBM, self._dropout, self.training)
        mixed_HBE = weight_HBM @ self._split(self.v(expert_text_MD))
        revised_BD: Tensor = self.o(rearrange(mixed_HBE, "h b e -> b (h e)"))
        return revised_BD

    def weights(self, image_BD: Tensor, expert_image_MD: Tensor) -> Tensor:
        """How much each image listens to each expert, (H, B, M), before dropout."""
        query_HBE, key_HME = self._split(self.q(image_BD)), self._split(self.k(expert_image_MD))
        score_HBM = query_HBE @ key_HME.mT / query_HBE.shape[-1] ** 0.5
        return torch.softmax(score_HBM, dim=0 if self._over is SoftmaxOver.heads else -1)

    def _split(self, rows_XD: Tensor) -> Tensor:
        return rearrange(rows_XD, "x (h e) -> h x e", h=self._heads)
