"""UrFound (arXiv 2408.05618): hidden patches are redrawn, and hidden words of what experts say are named.

Legend: B images, T tokens, S W tokens of the encoder and their width, F width of the text tower.

One encoder reads fundus photographs and OCT scans at half the size of the pictures that are to be redrawn.
The mean of its visible patches, projected, is added to every embedding of a sentence about the image; a BERT
then names the words hidden in it. So what words teach reaches the encoder through its visible patches alone.

`corrected` against `released` (the published code):

====================  ========================================  ===========================================
switch                corrected                                 released
====================  ========================================  ===========================================
words that count      `loss_over`                               all positions, padding too (`loss_over`)
what may be hidden    words                                     also the end token
in its place          the tokenizer's [MASK]                    token 3, whatever that is
length of a batch     its longest text                          `data.context_length`
image without label   no sentence                               a sentence without its end
downsizing            anti-aliased                              not
fresh positions       MAE's table                               its own, whose frequencies end at 1/10
weight decay          none on vectors and tokens                also on the class and mask token
warm-up               every step learns                         the first step has rate 0
====================  ========================================  ===========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundusfm.errors import UserError
from fundusfm.losses import global_mean, word_errors
from fundusfm.models.masked import Masking, mean_of_patches, visible_tokens
from fundusfm.models.text import build_text
from fundusfm.models.words import WordScores, hide_words, read_with, with_end_token
from fundusfm.objectives.cached import Features
from fundusfm.objectives.masked import MaskedConfig, MaskedObjective
from fundusfm.recipe.schema import Fidelity, Recipe, TextKind
from fundusfm.stream.hashing import uniforms
from fundusfm.stream.view_prompt import PromptBatch, TextSource

_RELEASED_HIDDEN_ID = 3
_WORD_ROWS = ("text.trunk.embeddings.word_embeddings.weight", "words.scores.weight", "words.scores.bias")


class LossOver(str, Enum):
    """Which tokens the loss of words is a mean over."""

    hidden = "hidden"
    non_pad = "non_pad"
    all = "all"


@dataclass
class UrFoundConfig(MaskedConfig):
    """Beside the keys of `MaskedConfig`:

    `text_source`: where sentences come from, `labels` or `texts`; `word_probability`: chance that a word is
    hidden; `loss_over`: hidden, non_pad or all tokens; weights of the two terms, of which 0 leaves one out
    altogether; `target_scale`: how many times larger than `data.image_size` the redrawn pictures are.
    """

    text_source: TextSource = TextSource.labels
    word_probability: float = 0.5
    loss_over: LossOver = LossOver.hidden
    image_weight: float = 1.0
    text_weight: float = 1.0
    target_scale: int = 2

    @property
    def reads_text(self) -> bool:
        return self.text_weight > 0

    def view_options(self) -> dict[str, Any]:
        released = self.fidelity is Fidelity.released
        return {
            "scale": self.target_scale,
            "source": self.text_source if self.reads_text else None,
            "bare": released,
            "padded": released,
        }

    def impossible(self) -> dict[str, str]:
        wrong = super().impossible()
        if not 0 < self.word_probability <= 1:
            wrong["word_probability"] = f"{self.word_probability} must be above 0 and at most 1"
        if min(self.image_weight, self.text_weight) < 0 or self.image_weight + self.text_weight == 0:
            wrong["image_weight"] = "and text_weight must not be below 0, and not both 0"
        if self.target_scale < 1:
            wrong["target_scale"] = f"{self.target_scale} must be at least 1"
        if self.fidelity is Fidelity.released and self.loss_over is not LossOver.all:
            wrong["loss_over"] = "must be all with fidelity: released, whose loss counts every position"
        return wrong


class UrFound(MaskedObjective):
    """The objective; `vocab_size` is the tokenizer's."""

    Config = UrFoundConfig
    view: ClassVar[str] = "image_prompt"

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        config = recipe.objective
        assert isinstance(config, UrFoundConfig)
        super().__init__(
            recipe,
            target_scale=config.target_scale,
            compressed=config.fidelity is Fidelity.released,
            draws=config.image_weight > 0,
        )
        self.config: UrFoundConfig = config
        if config.text_weight > 0:
            if recipe.model.text.kind is not TextKind.bert:
                raise UserError(
                    "UrFound's text tower is a BERT", where="model.text.kind", fix="set it to bert"
                )
            self.text = build_text(recipe.model.text, vocab_size)
            self.image_to_text = nn.Linear(self.trunk.embed_dim, self.text.width)
            self.words = WordScores(self.text.width, vocab_size)

    def may_be_fresh(self, name: str) -> bool:
        """Only the encoder must be there: UrFound itself starts from an image model without its decoder."""
        return not name.startswith("vision.")

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The published tables of words end before the tokenizer does: the rest keeps its start."""
        own, adapted = self.state_dict(), dict(state)
        for name in _WORD_ROWS:
            if name in own and name in adapted and len(adapted[name]) < len(own[name]):
                adapted[name] = torch.cat([adapted[name], own[name][len(adapted[name]) :]])
        # A term that is left out needs nothing of what the file holds for it.
        unused: tuple[str, ...] = () if self.config.text_weight > 0 else ("text.", "image_to_text.", "words.")
        unused += () if self.config.image_weight > 0 else ("decoder.",)
        return {name: tensor for name, tensor in adapted.items() if not name.startswith(unused)}

    def term_weights(self) -> dict[str, float]:
        return {"loss_patches": self.config.image_weight, "loss_words": self.config.text_weight}

    def small(self, image_BCHW: Tensor) -> Tensor:
        if self.config.target_scale == 1:
            return image_BCHW
        side = self.recipe.data.image_size
        return F.interpolate(
            image_BCHW, size=(side, side), mode="bicubic", align_corners=False, antialias=not self.released
        )

    def encode(self, batch: PromptBatch) -> Features:
        masking = self.masking(batch)
        token_BSW = visible_tokens(self.trunk, self.small(batch.images), masking)
        features: Features = {}
        if self.config.image_weight > 0:
            features |= self.patch_features(token_BSW, masking, batch.images)
        if self.config.text_weight > 0:
            features |= self._word_features(token_BSW, masking, batch)
        return features

    def _word_features(self, token_BSW: Tensor, masking: Masking, batch: PromptBatch) -> Features:
        """By row: the errors of the tokens that count, and how many these are."""
        hidden_BT = self.hidden_words(batch)
        hidden_id = _RELEASED_HIDDEN_ID if self.released else batch.hidden_id
        shown_BT = batch.token_BT.masked_fill(hidden_BT, hidden_id)
        patch_BKW = token_BSW[:, self.trunk.num_prefix_tokens :]
        image_BF = self.image_to_text(mean_of_patches(patch_BKW, masking))
        state_BTF = read_with(self.text, shown_BT, batch.mask_BT, image_BF)
        counted_BT = self._counted(batch, hidden_BT)
        logits_HV = self.words(state_BTF[counted_BT])
        error_B, count_B = word_errors(logits_HV, batch.token_BT[counted_BT], counted_BT)
        return {"word_error": error_B, "word_count": count_B}

    def hidden_words(self, batch: PromptBatch) -> Tensor:
        """Which tokens (B, T) are hidden: a matter of each sample, as the patches are."""
        num_patches, num_tokens = self.side**2, batch.token_BT.shape[1]
        # The first numbers of a seed are those of patches.
        draw_BT = uniforms(batch.mask_seed_B, num_patches + num_tokens)[:, num_patches:]
        word_BT = batch.word_BT
        if self.released:
            word_BT = with_end_token(word_BT, batch.mask_BT, num_tokens)
        return hide_words(draw_BT, word_BT, self.config.word_probability) & batch.text_valid_B[:, None]

    def _counted(self, batch: PromptBatch, hidden_BT: Tensor) -> Tensor:
        """The tokens (B, T) that the loss is a mean over."""
        if self.config.loss_over is LossOver.hidden:
            return hidden_BT
        if self.config.loss_over is LossOver.non_pad:
            return batch.mask_BT & batch.text_valid_B[:, None]
        return batch.text_valid_B[:, None].expand_as(hidden_BT)

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        terms = {}
        if self.config.image_weight > 0:
            terms["loss_patches"] = self.patch_term(features)
        if self.config.text_weight > 0:
            terms["loss_words"] = global_mean(features["word_error"], features["word_count"], self.group)
        return terms
