"""KeepFIT (arXiv 2405.11793): FLAIR beside a small expert set, whose texts revise those of similar images.

Legend: B exams, M experts of these ranks (and of the bank), D shared width, T tokens.

Sources marked `expert: true` give images with careful texts; their weights say how much of a batch is theirs.
Three terms: the public images against their labels' words, as in FLAIR; the experts' images against their own
texts; and the distance of each public text to what attention makes of the experts' texts, with the public
image as query and the experts' images as keys. One temperature. The expert rows of all ranks are keys for
each image (released: those of its own rank), and `bank_size` rows of earlier batches of all ranks, without
gradient.

Beyond the table of `flair.py`, `corrected` against `released`:

======================  =========================================  ===========================================
switch                  corrected                                  released
======================  =========================================  ===========================================
attention adds to 1     over the experts' images                   over the heads (or as `softmax` says)
experts' targets        equal texts belong together                every text is its own class
a tower's call sees     the whole batch, and batch norm with it    public and expert rows apart
fused texts             unit rows again                            as they are
======================  =========================================  ===========================================

The variants of the published ablation: `expert_weight: 0` and `revision_weight: 1` (revision alone),
`revision_weight: 0` (mixed training alone), and `fusion: true` with either revision weight: each text has
the other set's texts added, mixed by attention with one head, before it is contrasted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fundusfm.losses import Diagonal, SameGroup, contrastive_loss, global_mean
from fundusfm.losses.gathered import gather_rows
from fundusfm.losses.ranks import Group, Ranks
from fundusfm.losses.targets import Target
from fundusfm.models.bank import FeatureBank
from fundusfm.models.revision import Revision, SoftmaxOver
from fundusfm.objectives.cached import Features
from fundusfm.objectives.flair import Flair, FlairConfig
from fundusfm.recipe.schema import Recipe
from fundusfm.stream.view_category import CategoryBatch

Rows = tuple[Tensor, Tensor]  # images and texts
_BANK = "expert_bank"


@dataclass
class KeepFitConfig(FlairConfig):
    """Weights belong to the terms beside FLAIR's; `heads`, `attention_dropout` and `softmax` to the revision.

    `softmax`: over what its weights add up to 1, null as `fidelity` says. `bank_size`: rows of earlier expert
    batches that it sees besides, 0 for none. `fusion`: an ablation, see the module.
    """

    expert_weight: float = 1.0
    revision_weight: float = 100.0
    heads: int = 2
    attention_dropout: float = 0.5
    softmax: SoftmaxOver | None = None
    bank_size: int = 0
    fusion: bool = False

    @property
    def has_expert_set(self) -> bool:
        return self.expert_weight > 0 or self.revision_weight > 0 or self.fusion

    def view_options(self) -> dict[str, Any]:
        return {"experts": self.has_expert_set}

    def impossible(self) -> dict[str, str]:
        found = super().impossible()
        for key in ("expert_weight", "revision_weight"):
            if not 0 <= getattr(self, key) < float("inf"):
                found[key] = f"{getattr(self, key)} must be at least 0"
        if self.heads < 1:
            found["heads"] = f"{self.heads} must be at least 1"
        if not 0 <= self.attention_dropout < 1:
            found["attention_dropout"] = f"{self.attention_dropout} must lie in [0, 1)"
        if self.bank_size < 0 or (self.bank_size and not self.revision_weight):
            found["bank_size"] = f"{self.bank_size} must be 0 without revision, and never below"
        return found


class KeepFit(Flair):
    """The objective; `vocab_size` is the tokenizer's."""

    Config = KeepFitConfig

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe, vocab_size)
        assert isinstance(recipe.objective, KeepFitConfig)
        self.settings: KeepFitConfig = recipe.objective
        width, dropout = recipe.model.embed_dim, self.settings.attention_dropout
        over = self.settings.softmax or (SoftmaxOver.heads if self.released else SoftmaxOver.experts)
        self.revision = Revision(width, self.settings.heads, dropout, over)
        if self.settings.fusion:
            self.fuse_public, self.fuse_expert = (Revision(width, 1, dropout, over) for _ in range(2))
        self.bank = FeatureBank(self.settings.bank_size, width)
        self._arrived: list[Rows] = []

    def term_weights(self) -> dict[str, float]:
        settings = self.settings
        return {
            **super().term_weights(),
            "loss_expert": settings.expert_weight,
            "loss_revision": settings.revision_weight,
        }

    def encode(self, batch: CategoryBatch) -> Features:
        parts = self._parts(batch.expert_B)
        return {
            "image": _in_parts(parts, lambda rows: self.embed_images(rows, ""), batch.images),
            "text": _in_parts(parts, self._embed_trimmed, batch.token_BT, batch.mask_BT),
            "valid": batch.text_valid_B,
            "labels": batch.labels_BC,
            "category": batch.category_B,
            "expert": batch.expert_B,
            "caption": batch.caption_B,
        }

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        public_B = features["valid"] & ~features["expert"]
        expert_B = features["valid"] & features["expert"]
        experts = self._gathered(features, expert_B, self.group())
        if self.settings.bank_size and self.training:
            # Of all ranks, also where each contrasts its own: there is one bank, whatever the ranks.
            arrived = experts if self.group() is None else self._gathered(features, expert_B, None)
            self._arrived.append((arrived[0].detach(), arrived[1].detach()))
        loss_revision = self._revision_loss(features, public_B, self._remembered(experts))
        scale = self.scale()
        if self.settings.fusion:
            features = {**features, "text": self._fused(features, experts, public_B)}
            if self.released:
                features, scale = _made_unit(features, scale)
        return {
            "loss_public": self.public_loss(features, features["text"], public_B, scale),
            "loss_expert": contrastive_loss(
                features["image"],
                features["text"],
                scale,
                target=self._expert_target(features["caption"]),
                valid_a_B=expert_B,
                valid_b_B=expert_B,
                group=self.group(),
            ),
            "loss_revision": loss_revision,
        }

    def after_step(self) -> None:
        super().after_step()
        for rows in self._arrived:
            self.bank.push(*rows)
        self._arrived.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_BANK] = self.bank.content()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.bank.restore(checkpoint[_BANK])

    def _parts(self, expert_B: Tensor) -> list[Tensor]:
        """What a tower sees in one call: everything, or in the released form each set.

        A set that is not in this rank's batch is called for as well where there are other ranks: whatever is
        spread over ranks is fetched in calls. A tower with batch normalisation, which must not see a row
        twice, has no other ranks.
        """
        if not self.released:
            return [torch.ones_like(expert_B)]
        has_others = Ranks.of(None).size > 1
        return [part_B for part_B in (~expert_B, expert_B) if has_others or bool(part_B.any())]

    def _embed_trimmed(self, token_BT: Tensor, mask_BT: Tensor) -> Tensor:
        longest = int(mask_BT.sum(dim=1).max())
        return self.embed_texts(token_BT[:, :longest], mask_BT[:, :longest], "")

    def _expert_target(self, caption_B: Tensor) -> Target:
        return Diagonal() if self.released else SameGroup(caption_B)

    def _gathered(self, features: Features, chosen_B: Tensor, group: Group) -> Rows:
        """The chosen rows of all ranks of a group. Collective."""
        rows_nE = torch.cat([features["image"][chosen_B], features["text"][chosen_B]], dim=1)
        image_MD, text_MD = gather_rows(rows_nE, group).chunk(2, dim=1)
        return image_MD, text_MD

    def _remembered(self, experts: Rows) -> Rows:
        """The experts of this batch and those of earlier ones."""
        image_MD, text_MD = (
            torch.cat([rows_MD, kept_MD.to(rows_MD.dtype)])
            for rows_MD, kept_MD in zip(experts, self.bank.rows(), strict=True)
        )
        return image_MD, text_MD

    def _revision_loss(self, features: Features, public_B: Tensor, experts: Rows) -> Tensor:
        """Mean square of what revision would change in public texts; 0 without experts. Collective."""
        revised_BD = self.revision(features["image"][public_B], *experts)
        square_B = (features["text"][public_B] - revised_BD).square().sum(dim=1)
        width = revised_BD.shape[1] if len(experts[0]) else 0
        return global_mean(square_B, torch.full_like(square_B, width), self.group())

    def _fused(self, features: Features, experts: Rows, public_B: Tensor) -> Tensor:
        """Each text and what attention makes of the other set's texts, (B, D). Collective."""
        publics = self._gathered(features, public_B, self.group())
        to_public_BD = self.fuse_public(features["image"], *experts)
        to_expert_BD = self.fuse_expert(features["image"], *publics)
        fused_BD = features["text"] + torch.where(features["expert"][:, None], to_expert_BD, to_public_BD)
        return fused_BD if self.released else F.normalize(fused_BD, dim=-1)


def _in_parts(parts: list[Tensor], encode: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`encode` of the rows of each part by itself; the parts are disjoint and cover all rows.

    The first row stands in for those of an empty part, and what comes of it is thrown away.
    """
    places = [part_B.nonzero().flatten() for part_B in parts]
    called = [place_E if len(place_E) else place_E.new_zeros(1) for place_E in places]
    encoded = [encode(*(tensor[place_E] for tensor in tensors)) for place_E in called]
    rows = [rows_ED[: len(place_E)] for rows_ED, place_E in zip(encoded, places, strict=True)]
    return torch.cat(rows)[torch.cat(places).argsort()]


def _made_unit(features: Features, scale: Tensor) -> tuple[Features, Tensor]:
    """Texts of any length as unit rows that give the same logits: shortened alike, filled up by an axis more.

    That axis is zero for images, so it gets no gradient.
    """
    image_BD, text_BD = features["image"], features["text"]
    longest = text_BD.detach().norm(dim=1).max()
    short_BD = text_BD / longest
    fill_B1 = (1 - short_BD.detach().square().sum(dim=1, keepdim=True)).clamp(min=0).sqrt()
    image_BE = torch.cat([image_BD, torch.zeros_like(fill_B1)], dim=1)
    return {**features, "image": image_BE, "text": torch.cat([short_BD, fill_B1], dim=1)}, scale * longest
