"""Several images of each exam, of any modality and eye, and a text where there is one.

Legend: N images of a batch, B exams, T tokens, E exams of a shard, C H W channels and pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.recipe.schema import DataConfig
from fundusfm.shards.exam import Exam, ImageRecord
from fundusfm.shards.index import Offsets
from fundusfm.shards.reading import StoredExam
from fundusfm.stream.faults import Fault
from fundusfm.stream.hashing import hash_text
from fundusfm.stream.refusals import Holding, without_pairs, without_texts
from fundusfm.stream.tokens import Tokens
from fundusfm.stream.view import EYE_NUMBERS, Mask, ViewInputs, choose_text
from fundusfm.stream.view_image import ImageOnlyView, SingleImage, stacked

_NO_TEXT = -1
_PUBLISHED_IMAGES = 2


class PairRule(str, Enum):
    """Which two images of an exam belong together: those of two modalities, or any two."""

    cross_modality = "cross_modality"
    any = "any"


class EyeRule(str, Enum):
    """Whether two images must show the same eye, known as such, to belong together."""

    same = "same"
    any = "any"


@dataclass
class ExamBatch:
    """Exams with their images and a text.

    `images`: only those that exist, (N, C, H, W), uint8 until the device tail makes them float. Of each:
    `exam_N` its row, `slot_N` its place among the at most `num_slots` of its exam, `modality_N` the place in
    `data.modalities`, `eye_N` LEFT, RIGHT or UNKNOWN, `mask_seed_N` what decides which patches are hidden
    (see `hashing.uniforms`). `color_N34` and `erase_N4` are the deferred part of the augmentation, None in
    evaluation. `token_BT`, `mask_BT`: the text; `text_valid_B` false where there is none. `patient_B` and
    `text_B`: ids, equal where patients or texts are; -1 of no text. `keys`, `faults`, `padding` as
    everywhere.
    """

    images: Tensor
    exam_N: Tensor
    slot_N: Tensor
    modality_N: Tensor
    eye_N: Tensor
    mask_seed_N: Tensor
    color_N34: Tensor | None
    erase_N4: Tensor | None
    token_BT: Tensor
    mask_BT: Tensor
    text_valid_B: Tensor
    patient_B: Tensor
    text_B: Tensor
    num_slots: int
    keys: list[str]
    faults: list[Fault]
    padding: bool = False

    def to(self, device: torch.device, non_blocking: bool = False) -> ExamBatch:
        return self._map(lambda _, t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ExamBatch:
        return self._map(lambda _, t: t.pin_memory())

    def pieces(self, size: int) -> list[ExamBatch]:
        """Batches of `size` exams each, the last perhaps smaller."""
        starts = range(0, len(self.keys), size)
        return [self._exams(start, min(start + size, len(self.keys))) for start in starts]

    def _exams(self, start: int, stop: int) -> ExamBatch:
        chosen_N = (self.exam_N >= start) & (self.exam_N < stop)
        part = self._map(lambda name, t: t[start:stop] if _is_of_exams(name) else t[chosen_N])
        return replace(part, exam_N=part.exam_N - start, keys=self.keys[start:stop])

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> ExamBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: change(k, v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def _is_of_exams(name: str) -> bool:
    """Whether a tensor of the batch has a row an exam, and not one an image."""
    return name.rpartition("_")[2].startswith("B")


@dataclass(frozen=True)
class ExamImage:
    """One image of an exam before batching."""

    image: SingleImage
    eye: int


@dataclass(frozen=True)
class ExamItem:
    """One exam before batching; `text` None where there is none."""

    images: list[ExamImage]
    patient: str
    text: str | None


class MultiModalView:
    """EyeCLIP's item: several images of one exam, and one of its texts, drawn; an exam may lack a text.

    Of an exam with more than `data.max_images_per_exam` images some are drawn: every modality once before any
    twice, and those of one eye before those of another, so that pairs are there where the exam has them.
    `pairs`, `eyes`: which pairs the objective learns from, None for none at all; `texts`: whether it learns
    from texts. `published`: two images drawn from all, and the first text, as the published code does.
    """

    def __init__(
        self,
        config: DataConfig,
        tokens: Tokens,
        *,
        pairs: PairRule | None = PairRule.cross_modality,
        eyes: EyeRule = EyeRule.same,
        texts: bool = True,
        published: bool = False,
    ) -> None:
        self._config, self._tokens = config, tokens
        self._pairs, self._eyes, self._texts, self._published = pairs, eyes, texts, published
        self._images = ImageOnlyView(config)
        self._modalities = [m.lower() for m in config.modalities]
        most = config.max_images_per_exam
        self._num_slots = min(most, _PUBLISHED_IMAGES) if published else most

    @classmethod
    def of(cls, inputs: ViewInputs) -> MultiModalView:
        """As the objective of a recipe wants it."""
        return cls(inputs.recipe.data, inputs.tokens, **inputs.recipe.objective.view_options())

    def usable(self, offsets: Offsets) -> Mask:
        return self._images.usable(offsets)

    def refusal(self, held: Sequence[Holding]) -> UserError | None:
        refusal = self._images.refusal(held)
        if refusal is None and self._pairs is not None:
            across, same_eye = self._pairs is PairRule.cross_modality, self._eyes is EyeRule.same
            refusal = without_pairs(held, self._modalities, across=across, same_eye=same_eye)
        if refusal is None and self._texts:
            refusal = without_texts(held, self._config.languages)
        return refusal

    def load(self, stored: StoredExam, rng: np.random.Generator | None) -> ExamItem:
        draw = 0.0 if rng is None else rng.random()  # drawn first: images never shift it
        chosen = self._choose_images(stored.exam, rng)
        images = [
            ExamImage(self._images.load_image(stored, image, rng), EYE_NUMBERS[image.eye]) for image in chosen
        ]
        text = choose_text(stored.exam, self._config.languages, 0.0 if self._published else draw)
        return ExamItem(
            images, stored.exam.patient, None if text is None else stored.read(text.name).decode()
        )

    def _choose_images(self, exam: Exam, rng: np.random.Generator | None) -> list[ImageRecord]:
        images = [image for image in exam.images if image.modality.lower() in self._modalities]
        if rng is not None:
            images = [images[place] for place in rng.permutation(len(images))]
        if self._published:
            return images[: self._num_slots]
        eyes = list(dict.fromkeys(image.eye for image in images))
        seen: Counter[tuple[str, str]] = Counter()
        ranked = []
        for image in images:
            group = (image.modality.lower(), image.eye)
            ranked.append((seen[group], eyes.index(image.eye), image))
            seen[group] += 1
        ranked.sort(key=lambda one: one[:2])
        chosen = [image for _, _, image in ranked[: self._num_slots]]
        # In the order of modalities: of every pair the first is contrasted with seconds of the same kinds.
        return sorted(chosen, key=lambda image: self._modalities.index(image.modality.lower()))

    def collate(self, items: Sequence[ExamItem], keys: list[str], faults: list[Fault]) -> ExamBatch:
        images = [image for item in items for image in item.images]
        of_images = stacked([one.image for one in images])
        token_BT, mask_BT = self._tokens([item.text or "" for item in items])
        texts = [_NO_TEXT if item.text is None else hash_text(item.text) for item in items]
        return ExamBatch(
            images=of_images["images"],
            exam_N=torch.tensor([row for row, item in enumerate(items) for _ in item.images]),
            slot_N=torch.tensor([slot for item in items for slot in range(len(item.images))]),
            modality_N=of_images["modality_B"],
            eye_N=torch.tensor([one.eye for one in images]),
            mask_seed_N=of_images["mask_seed_B"],
            color_N34=of_images["color_N34"],
            erase_N4=of_images["erase_N4"],
            token_BT=token_BT,
            mask_BT=mask_BT,
            text_valid_B=torch.tensor([item.text is not None for item in items]),
            patient_B=torch.tensor([hash_text(item.patient) for item in items]),
            text_B=torch.tensor(texts),
            num_slots=self._num_slots,
            keys=keys,
            faults=faults,
        )
