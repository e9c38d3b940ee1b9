"""One image of each exam with a sentence about it, for models that must name what they see.

Legend: B exams, one image of each, T tokens, E exams of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.recipe.phrases import knowledge_prompt
from fundusfm.recipe.schema import DataConfig
from fundusfm.shards.exam import Exam, ImageRecord
from fundusfm.shards.index import Offsets
from fundusfm.shards.reading import StoredExam
from fundusfm.stream.faults import Fault
from fundusfm.stream.phrasebook import Phrasebook, Prompts, gather_prompts
from fundusfm.stream.refusals import Holding, without_labels, without_texts
from fundusfm.stream.tokens import Tokens
from fundusfm.stream.view import Mask, ViewInputs, choose_text, labels_of, pick
from fundusfm.stream.view_image import (
    ImageOnlyView,
    SingleImage,
    SingleImageBatch,
    draw_mask_seed,
    stacked,
)


class TextSource(str, Enum):
    """Where the sentence of an image comes from: its labels, or the texts of its exam."""

    labels = "labels"
    texts = "texts"


@dataclass(kw_only=True)
class PromptBatch(SingleImageBatch):
    """One image of each exam and a sentence about it.

    `token_BT`, `mask_BT`: the sentence; `word_BT`: the number of the word that a token is a piece of, -1 for
    tokens that stand for no text; `text_valid_B` false where nothing was said of the image. `hidden_id`: the
    token that takes the place of a hidden one.
    """

    token_BT: Tensor
    mask_BT: Tensor
    word_BT: Tensor
    text_valid_B: Tensor
    hidden_id: int


class ImagePromptView:
    """UrFound's item: an image of an exam, one drawn from all, and a sentence.

    Of labels: one of the image's or of its exam's is drawn, told by its own name or, as often as by this, by
    each of the phrases that `prompts` (label -> language -> phrases) has for it.
    Of texts: one of the exam's is drawn. `source` None: no sentences at all. `scale`: how many times larger
    than `data.image_size` images are read; `bare`: an image without labels gets the sentence without its end,
    else none; `padded`: sentences are padded to `data.context_length`.
    """

    def __init__(
        self,
        config: DataConfig,
        tokens: Tokens,
        prompts: Prompts,
        *,
        scale: int = 1,
        source: TextSource | None = TextSource.labels,
        bare: bool = False,
        padded: bool = False,
    ) -> None:
        self._config, self._tokens = config, tokens
        self._book = Phrasebook(prompts, config.languages)
        self._source, self._bare, self._padded = source, bare, padded
        self._images = ImageOnlyView(config, scale * config.image_size)

    @classmethod
    def of(cls, inputs: ViewInputs) -> ImagePromptView:
        """As the objective of a recipe wants it."""
        prompts = gather_prompts(inputs.recipe.data, inputs.indices)
        options = inputs.recipe.objective.view_options()
        return cls(inputs.recipe.data, inputs.tokens, prompts, **options)

    def usable(self, offsets: Offsets) -> Mask:
        return self._images.usable(offsets)

    def refusal(self, held: Sequence[Holding]) -> UserError | None:
        refusal = self._images.refusal(held)
        if refusal or self._source is None:
            return refusal
        if self._source is TextSource.texts:
            return without_texts(held, self._config.languages)
        return without_labels(held)

    def load(self, stored: StoredExam, rng: np.random.Generator | None) -> SingleImage:
        # A fixed number of draws before the image: what an exam lacks never shifts the draws of what it has.
        draws = [0.0] * 4 if rng is None else [rng.random() for _ in range(4)]
        image = self._images.choose_image(stored.exam, draws[0])
        text = None
        if self._source is TextSource.labels:
            text = self._of_labels(stored.exam, image, draws[1:])
        elif self._source is TextSource.texts:
            text = self._of_texts(stored, draws[1])
        item = self._images.read_image(stored, image, rng)
        return replace(item, text=text, mask_seed=draw_mask_seed(stored.exam, image, rng))

    def _of_texts(self, stored: StoredExam, draw: float) -> str | None:
        chosen = choose_text(stored.exam, self._config.languages, draw)
        return None if chosen is None else stored.read(chosen.name).decode()

    def _of_labels(self, exam: Exam, image: ImageRecord, draws: Sequence[float]) -> str | None:
        labels = labels_of(exam, image)
        if not labels:
            return knowledge_prompt("en", image.modality, "") if self._bare else None
        return self._book.tell(pick(labels, draws[0]), image, draws[1:])

    def collate(self, items: Sequence[SingleImage], keys: list[str], faults: list[Fault]) -> PromptBatch:
        token_BT, mask_BT, word_BT, hidden_id = self._encoded([item.text or "" for item in items])
        return PromptBatch(
            **stacked(items),
            token_BT=token_BT,
            mask_BT=mask_BT,
            word_BT=word_BT,
            text_valid_B=torch.tensor([item.text is not None for item in items]),
            hidden_id=hidden_id,
            keys=keys,
            faults=faults,
        )

    def _encoded(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Tokens, which of them are real, the words they are of, and the token that hides one."""
        if self._source is None:
            none_B0 = torch.zeros(len(texts), 0, dtype=torch.long)
            return none_B0, none_B0.bool(), none_B0, 0
        return *self._tokens.with_words(texts, padded=self._padded), self._tokens.mask_id
