"""One image of each exam with one of its labels in words, and with all of its labels as a set.

Legend: B exams, one image of each, T tokens, C labels, E exams of a shard.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.recipe.schema import DataConfig
from fundusfm.shards.exam import ImageRecord
from fundusfm.shards.index import Offsets
from fundusfm.shards.reading import StoredExam
from fundusfm.stream.faults import Fault
from fundusfm.stream.phrasebook import Phrasebook, gather_prompts
from fundusfm.stream.refusals import Holding, without_labels
from fundusfm.stream.tokens import Tokens
from fundusfm.stream.view import Mask, ViewInputs, choose_text, labels_of, pick
from fundusfm.stream.view_image import ImageOnlyView, SingleImage, SingleImageBatch, stacked

_SHOWN = 12  # labels without phrases


@dataclass(kw_only=True)
class CategoryBatch(SingleImageBatch):
    """One image of each exam and a sentence about it.

    `token_BT`, `mask_BT`: the sentence, `text_valid_B` false where there is nothing to say. `labels_BC`: all
    labels of the image, 0 and 1. `category_B`: the label that the sentence names, -1 for none. `expert_B`:
    whether the exam is of the expert set; `caption_B`: there, equal for equal sentences, -1 elsewhere.
    """

    token_BT: Tensor
    mask_BT: Tensor
    text_valid_B: Tensor
    labels_BC: Tensor
    category_B: Tensor
    expert_B: Tensor
    caption_B: Tensor


@dataclass(frozen=True)
class CategoryImage(SingleImage):
    """A `SingleImage` with its labels and the one that `text` names, by number."""

    labels: tuple[int, ...] = ()
    category: int = -1
    is_expert: bool = False


class ImageCategoryView:
    """FLAIR's and KeepFIT's item: an image and a sentence naming one of its labels, drawn from all.

    An exam's labelled images come before its others. The label is told by its name or by one of its phrases.
    `experts`: with them, exams of sources marked `expert` speak by a text of theirs, where they have one.
    """

    def __init__(
        self,
        config: DataConfig,
        tokens: Tokens,
        book: Phrasebook,
        labels: Sequence[str],
        *,
        experts: bool = False,
    ) -> None:
        self._config, self._tokens, self._book = config, tokens, book
        self._numbers = {label: number for number, label in enumerate(labels)}
        self._experts = {source.shards for source in config.sources if source.expert} if experts else set()
        self._wants_experts = experts
        self._images = ImageOnlyView(config)

    @classmethod
    def of(cls, inputs: ViewInputs) -> ImageCategoryView:
        """As the objective of a recipe wants it."""
        config = inputs.recipe.data
        prompts = gather_prompts(config, inputs.indices)
        book = Phrasebook(prompts, config.languages, config.templates, english_names=True)
        labels = dict.fromkeys(label for index in inputs.indices for label in index.labels)
        options = inputs.recipe.objective.view_options()
        return cls(config, inputs.tokens, book, list(labels), **options)

    def usable(self, offsets: Offsets) -> Mask:
        return self._images.usable(offsets)

    def refusal(self, held: Sequence[Holding]) -> UserError | None:
        if refusal := self._images.refusal(held):
            return refusal
        experts = [source for source in held if source.root in self._experts]
        if self._wants_experts and not experts:
            return UserError(
                f"none of the {len(held)} sources is marked as the expert set",
                where="data.sources",
                fix="add `expert: true` to the source of few images with careful texts, or set "
                "objective.expert_weight and objective.revision_weight to 0",
            )
        public = [source for source in held if source not in experts]
        return without_labels(public) if public else _only_experts(held)

    def remarks(self, held: Sequence[Holding]) -> dict[str, str]:
        """The labels that no dictionary knows, with their images: they are trained under their own name."""
        counts: Counter[str] = Counter()
        for source in held:
            counts.update(source.labels)
        unknown = self._book.unknown(label for label, _ in counts.most_common())
        if not unknown:
            return {}
        shown = ", ".join(f"{label} ({counts[label]:,})" for label in unknown[:_SHOWN])
        more = f", and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        return {"no phrases": f"{len(unknown)} labels are told by their own name: {shown}{more}"}

    def load(self, stored: StoredExam, rng: np.random.Generator | None) -> CategoryImage:
        # A fixed number of draws before the image: what an exam lacks never shifts the draws of what it has.
        draws = [0.0] * 5 if rng is None else [rng.random() for _ in range(5)]
        image = self._choose_image(stored, draws[0])
        labels = labels_of(stored.exam, image) or ()
        is_expert = stored.root in self._experts
        caption = choose_text(stored.exam, self._config.languages, draws[4]) if is_expert else None
        category, text = -1, None
        if caption is not None:
            text = stored.read(caption.name).decode()
        elif labels:
            label = pick(labels, draws[1])
            category, text = self._numbers[label], self._book.tell(label, image, draws[2:4])
        read = vars(self._images.read_image(stored, image, rng)) | {"text": text}
        numbers = tuple(self._numbers[label] for label in labels)
        return CategoryImage(**read, labels=numbers, category=category, is_expert=is_expert)

    def _choose_image(self, stored: StoredExam, draw: float) -> ImageRecord:
        images = self._images.candidates(stored.exam)
        labelled = [image for image in images if labels_of(stored.exam, image)]
        return pick(labelled or images, draw)

    def collate(self, items: Sequence[CategoryImage], keys: list[str], faults: list[Fault]) -> CategoryBatch:
        token_BT, mask_BT = self._tokens([item.text or "" for item in items])
        return CategoryBatch(
            **stacked(items),
            token_BT=token_BT,
            mask_BT=mask_BT,
            text_valid_B=torch.tensor([item.text is not None for item in items]),
            labels_BC=_flags([item.labels for item in items], len(self._numbers)),
            category_B=torch.tensor([item.category for item in items]),
            expert_B=torch.tensor([item.is_expert for item in items]),
            caption_B=torch.tensor([_number(item) for item in items]),
            keys=keys,
            faults=faults,
        )


def _only_experts(held: Sequence[Holding]) -> UserError:
    return UserError(
        "every source is marked as the expert set, and nothing is left to learn categories from",
        where=", ".join(source.root for source in held),
        fix="add a source of labelled images without `expert: true`",
    )


def _flags(numbers: Iterable[tuple[int, ...]], num_labels: int) -> Tensor:
    """One row of 0 and 1 for each tuple."""
    rows = [[number in own for number in range(num_labels)] for own in numbers]
    return torch.tensor(rows, dtype=torch.uint8).reshape(-1, num_labels)


def _number(item: CategoryImage) -> int:
    """The same for the same words, on any rank; the sampled label stands for all of its phrases."""
    if not item.is_expert or item.text is None:
        return -1
    if item.category >= 0:
        return item.category
    # Above all labels; two captions of a batch of thousands meet by chance once in 10^11 batches.
    digest = hashlib.blake2b(item.text.encode(), digest_size=7).digest()
    return (1 << 57) + int.from_bytes(digest, "big")
