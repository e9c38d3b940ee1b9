"""KeepFIT-FFA (arXiv 2405.11793): a report is written about an image, word by word.

Legend: B exams, one image of each, P patches, F their width, T tokens, W width, M tokens to be told.

A vision trunk gives its last grid of patches; an encoder relates them, a decoder reads them and tells each
token from those before it (teacher forcing). The loss is the sum of the negative log-likelihoods over the
number of tokens told, both over the global batch. An exam without a report is masked: it tells nothing.

`corrected` against `released` (the code behind the published numbers):

======================  =========================================  ===========================================
switch                  corrected                                  released
======================  =========================================  ===========================================
norms                   the usual layer norm                       unbiased deviation, epsilon outside root
place of a patch        sines and cosines, row by row              none: the encoder sees a bag of patches
begin, end, padding     tokens of their own                        one token, number 0
trigram blocking        wherever `block_ngrams` is set             ignored as soon as there are several beams
gradients               `optim.clip_norm`                          each value cut at 0.1, before that
======================  =========================================  ===========================================

Not reproduced, since recipes say it better or because it changes no number of a step: the strict
alternation of two sets (sources of equal weight mix one to one in every batch), the order of training that
never changes (a shuffle flag that is lost), the choice of the best epoch on the test set, Adam with amsgrad
and a rate that falls by steps beyond the end of the run (AdamW and a cosine), the vocabulary of whole words
(any tokenizer), and the swapping of "left" and "right" in reports of mirrored images (nothing is mirrored).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fundusfm.losses.means import global_mean
from fundusfm.losses.ranks import Group
from fundusfm.models.caption import Captioner, CaptionSizes
from fundusfm.models.decoding import Writing, write
from fundusfm.models.patches import PatchTrunk
from fundusfm.models.vision import build_vision
from fundusfm.objectives.base import Objective
from fundusfm.objectives.cached import Features
from fundusfm.recipe.schema import Fidelity, ObjectiveConfig, Recipe, TextConfig
from fundusfm.stream.view_prompt import PromptBatch, TextSource

_RELEASED_CLIP_VALUE = 0.1


@dataclass
class CaptionConfig(ObjectiveConfig):
    """Sizes of encoder and decoder (`layers` each), then how to write.

    `patch_dropout`: on what the linear layer makes of a patch. `trunk_rate`: the trunk's learning rate as a
    share of `optim.lr`. `beams`: texts kept while writing, 1 takes the likeliest token each time.
    `block_ngrams`: no sequence of so many tokens is written twice, 0 allows it. `length_power`: a text's
    log-probability is divided by this power of its length.
    """

    layers: int = 3
    width: int = 512
    heads: int = 8
    mlp_width: int = 512
    dropout: float = 0.1
    patch_dropout: float = 0.5
    trunk_rate: float = 0.5
    beams: int = 3
    block_ngrams: int = 3
    length_power: float = 0.0

    def language_part(self, text: TextConfig) -> str:
        return f"encoder and decoder {self.layers} x {self.width}"

    def view_options(self) -> dict[str, Any]:
        return {"source": TextSource.texts}

    def impossible(self) -> dict[str, str]:
        counts = ("layers", "width", "heads", "mlp_width", "beams")
        wrong = {k: f"{getattr(self, k)} must be at least 1" for k in counts if getattr(self, k) < 1}
        shares = [k for k in ("dropout", "patch_dropout") if not 0 <= getattr(self, k) < 1]
        wrong |= {key: f"{getattr(self, key)} must lie in [0, 1)" for key in shares}
        if not wrong and self.width % self.heads:
            wrong["width"] = f"{self.width} is not divisible by {self.heads} heads"
        if not 0 < self.trunk_rate < float("inf"):
            wrong["trunk_rate"] = f"{self.trunk_rate} must be above 0 and finite"
        if self.block_ngrams < 0 or self.block_ngrams == 1:
            wrong["block_ngrams"] = f"{self.block_ngrams} must be 0, or 2 or more: words do come twice"
        if not 0 <= self.length_power < float("inf"):
            wrong["length_power"] = f"{self.length_power} must be 0 or above, and finite"
        return wrong


class Caption(Objective):
    """The objective; `vocab_size` is the tokenizer's."""

    Config = CaptionConfig
    view: ClassVar[str] = "image_prompt"
    aligns_text = False
    writes_reports = True

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__(recipe)
        assert isinstance(recipe.objective, CaptionConfig)
        self.config: CaptionConfig = recipe.objective
        self.released = self.cuts_gradients = self.config.fidelity is Fidelity.released
        tower = build_vision(recipe.model.vision, recipe.data.image_size, recipe.model.embed_dim)
        self.vision = PatchTrunk(tower.trunk)
        self.leave_out(self.vision.head)
        sizes = ("layers", "width", "heads", "mlp_width", "dropout", "patch_dropout")
        self.captioner = Captioner(
            self.vision.width,
            vocab_size,
            CaptionSizes(
                **{name: getattr(self.config, name) for name in sizes},
                unbiased_norm=self.released,
                place_patches=not self.released,
            ),
        )

    def term_weights(self) -> dict[str, float]:
        return {"loss_words": 1.0}

    def encode(self, batch: PromptBatch) -> Features:
        given_BT, told_BT, counts_BT = self.teacher_forcing(batch)
        memory_BPW = self.captioner.encode(self.vision(batch.images))
        state_MW = self.captioner.states(given_BT, memory_BPW)[counts_BT]
        nll_M = F.cross_entropy(self.captioner.output(state_MW), told_BT[counts_BT], reduction="none")
        row_M = counts_BT.nonzero()[:, 0]
        sum_B = nll_M.new_zeros(len(given_BT)).index_add(0, row_M, nll_M)
        return {"nll": sum_B, "num_told": counts_BT.sum(dim=1)}

    def terms_of(self, features: Features) -> dict[str, Tensor]:
        # A validation batch belongs to one rank; a training batch is spread over all of them.
        group: Group = None if self.training else "rank"
        return {"loss_words": global_mean(features["nll"], features["num_told"], group)}

    def teacher_forcing(self, batch: PromptBatch) -> tuple[Tensor, Tensor, Tensor]:
        """given_BT and told_BT, one token apart, and which of the second count."""
        token_BT = batch.token_BT
        last_BT = batch.mask_BT & ~F.pad(batch.mask_BT[:, 1:], (0, 1))
        if self.released:
            inner_BT = batch.mask_BT & ~last_BT
            inner_BT[:, 0] = False
            token_BT = torch.where(inner_BT, token_BT, 0)
        counts_BT = batch.mask_BT & batch.text_valid_B[:, None]
        if token_BT.shape[1] == self.recipe.data.context_length:
            # The tokenizer ends a text that it cuts short with the end token; the report itself went on.
            counts_BT = counts_BT & ~F.pad(last_BT[:, -1:], (token_BT.shape[1] - 1, 0))
        return token_BT[:, :-1], token_BT[:, 1:], counts_BT[:, 1:]

    def write_reports(self, image_NCHW: Tensor, begin: int, end: int) -> list[list[int]]:
        """The tokens of a report about each image, by the recipe's way of searching.

        `begin` and `end`: the tokenizer's, as they stand around the texts that it makes.
        """
        config = self.config
        how = Writing(
            begin=0 if self.released else begin,
            end=0 if self.released else end,
            max_tokens=self.recipe.data.context_length - 1,
            beams=config.beams,
            block_ngrams=0 if self.released and config.beams > 1 else config.block_ngrams,
            length_power=config.length_power,
        )
        with torch.no_grad():
            state = self.captioner.begin(self.vision(image_NCHW), config.beams)
        return write(self.captioner.step, state, len(image_NCHW), how, image_NCHW.device)

    def probe_features(self, image_NCHW: Tensor) -> Tensor:
        """The mean over patches, the published global feature."""
        patch_NPF: Tensor = self.vision(image_NCHW)
        return patch_NPF.mean(dim=1)

    def optimiser_groups(self) -> list[dict[str, Any]]:
        """As everywhere, with the trunk apart: it learns at `trunk_rate` of the rate."""
        trunk = {id(parameter) for parameter in self.vision.parameters()}
        groups = []
        for is_trunk, factor in ((False, 1.0), (True, self.config.trunk_rate)):
            for group in super().optimiser_groups():
                own = [p for p in group["params"] if (id(p) in trunk) is is_trunk]
                if own:
                    groups.append({**group, "params": own, "lr": factor * group["lr"]})
        return groups

    def cut_gradients(self) -> None:
        # Not all at once: some are shards, and some, under FSDP, are not.
        nn.utils.clip_grad_value_(self.parameters(), _RELEASED_CLIP_VALUE, foreach=False)
