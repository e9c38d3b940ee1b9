"""Adapters on frozen towers: they start from the phrases of zero-shot reading and learn from a few images.

CLIP-Adapter (Gao et al., arXiv 2110.04544) adds a small correction to an image's row. Tip-Adapter (Zhang et
al., arXiv 2111.03930) adds to the phrases the labels of the support images that look alike; its trained kind
moves the rows of these. Passes, rates and constants are those of FLAIR's published comparison: images one by
one, always in the same order, forty times.

Legend: S support images, N images, D shared width, E eyes, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NUM_PASSES = 40
_RATE, _EPS, _DECAY = 1e-3, 1e-4, 1e-2
_CORRECTION = 0.2
_SHRINK = 4
_TIP_SCALE, _TIP_SHARPNESS = 100.0, 5.0


@dataclass(frozen=True)
class Rows:
    """Unit rows of images (N, D), and of which eye each is: a place in the prototypes (N,)."""

    row_ND: Tensor
    eye_N: Tensor

    def only(self, place: int) -> Rows:
        """One image."""
        return Rows(self.row_ND[place, None], self.eye_N[place, None])


@dataclass(frozen=True)
class Prototypes:
    """What each class looks like in words, (E, K, D), and the scale (E,) that pretraining gave cosines."""

    text_EKD: Tensor
    scale_E: Tensor

    def cosines(self, rows: Rows) -> Tensor:
        """(N, K), each image with the prototypes of its own eye."""
        of_all_eyes = torch.einsum("nd,ekd->nek", rows.row_ND, self.text_EKD)
        return of_all_eyes[torch.arange(len(rows.eye_N)), rows.eye_N]

    def logits(self, rows: Rows) -> Tensor:
        """Scaled as in pretraining, (N, K)."""
        return self.scale_E[rows.eye_N, None] * self.cosines(rows)


class ClipAdapter(nn.Module):
    """Rows (N, D) to unit rows: four fifths of the old one, one fifth of what two layers make of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, max(1, width // _SHRINK), bias=False)
        self.up = nn.Linear(self.down.out_features, width, bias=False)

    def forward(self, row_ND: Tensor) -> Tensor:
        corrected_ND = self.up(self.down(row_ND).relu()).relu()
        return F.normalize(_CORRECTION * corrected_ND + (1 - _CORRECTION) * row_ND, dim=-1)

    def logits(self, rows: Rows, prototypes: Prototypes) -> Tensor:
        """Scores (N, K) of images by their corrected rows."""
        return prototypes.logits(Rows(self(rows.row_ND), rows.eye_N))

    def learn(self, support: Rows, class_S: Tensor, prototypes: Prototypes, order: Sequence[int]) -> None:
        """Train on support images of known classes, in this order; the rate falls to 0 along a cosine."""

        def logits_of(place: int) -> Tensor:
            return self.logits(support.only(place), prototypes)

        _learn([*self.parameters()], logits_of, class_S, order, falling=True)


def tip_logits(rows: Rows, key_SD: Tensor, class_SK: Tensor, prototypes: Prototypes) -> Tensor:
    """Scores (N, K) by phrases and by likeness to keys, the rows of support images; `class_SK`: one-hot."""
    return _TIP_SCALE * prototypes.cosines(rows) + _likeness(rows.row_ND, key_SD) @ class_SK


def learn_keys(
    support: Rows, class_SK: Tensor, prototypes: Prototypes, order: Sequence[int], *, released: bool
) -> Tensor:
    """Keys (S, D) of the trained Tip-Adapter, which start as the support images' own rows.

    `released`: as the published code of FLAIR learns them. There the questions share memory with the keys and
    move with them, phrases are scaled as in pretraining, and likeness is scaled by the same over S: the keys
    are learned for other logits than those that are read in the end.
    """
    keys_SD = support.row_ND.clone().requires_grad_()

    def logits_of(place: int) -> Tensor:
        if not released:
            return tip_logits(support.only(place), keys_SD, class_SK, prototypes)
        moved = Rows(keys_SD.detach(), support.eye_N).only(place)
        weight_11 = prototypes.scale_E[moved.eye_N, None] / len(keys_SD)
        return prototypes.logits(moved) + weight_11 * (_likeness(moved.row_ND, keys_SD) @ class_SK)

    _learn([keys_SD], logits_of, class_SK.argmax(dim=1), order, falling=False)
    return keys_SD.detach()


def _likeness(row_ND: Tensor, key_SD: Tensor) -> Tensor:
    return (-_TIP_SHARPNESS * (1 - row_ND @ key_SD.T)).exp()


def _learn(
    parameters: Sequence[Tensor],
    logits_of: Callable[[int], Tensor],
    class_S: Tensor,
    order: Sequence[int],
    *,
    falling: bool,
) -> None:
    optimiser = torch.optim.AdamW(parameters, lr=_RATE, eps=_EPS, weight_decay=_DECAY)
    total = _NUM_PASSES * len(order) if falling else None
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total) if total else None
    for _ in range(_NUM_PASSES):
        for place in order:
            optimiser.zero_grad()
            torch.autograd.backward(F.cross_entropy(logits_of(place), class_S[place, None]))
            optimiser.step()
            if schedule:
                schedule.step()
