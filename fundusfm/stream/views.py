"""Views: what one training item holds. The same shards serve every objective through its own view.

Legend: N images of a batch, B patients, T tokens, E exams of a shard, C H W channels and pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
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
from fundusfm.stream.refusals import Holding, without_images, without_texts
from fundusfm.stream.tokens import Tokens
from fundusfm.stream.transforms import Augment, augment_on_host, sample_augment
from fundusfm.stream.view import (
    LEFT,
    RIGHT,
    UNKNOWN,
    Mask,
    TrainingView,
    ViewInputs,
    choose_text,
    exams_with_images,
    pick,
)
from fundusfm.stream.view_category import ImageCategoryView
from fundusfm.stream.view_composite import CompositeView
from fundusfm.stream.view_image import ImageOnlyView
from fundusfm.stream.view_multi import MultiModalView
from fundusfm.stream.view_prompt import ImagePromptView

__all__ = ["LEFT", "RIGHT", "UNKNOWN", "VIEWS", "PatientPairBatch", "PatientPairView"]

_EYE_NAMES = {LEFT: "left", RIGHT: "right", UNKNOWN: ""}


@dataclass
class PatientPairBatch:
    """Patients with their eyes and a report.

    `images`: only those that exist, (N, C, H, W), uint8 until the device tail makes them float; `patient_N`
    the row of the patient, `eye_N` LEFT, RIGHT or UNKNOWN. `color_N34` and `erase_N4` are the deferred part
    of the augmentation, None in evaluation. `token_BT`, `mask_BT`: the report; `text_valid_B` false where
    there is none. `keys`: where each exam lies. `faults`: exams that could not be read. `padding` marks a
    batch that only keeps ranks in step and is not counted.
    """

    images: Tensor
    patient_N: Tensor
    eye_N: Tensor
    color_N34: Tensor | None
    erase_N4: Tensor | None
    token_BT: Tensor
    mask_BT: Tensor
    text_valid_B: Tensor
    keys: list[str]
    faults: list[Fault]
    padding: bool = False

    def to(self, device: torch.device, non_blocking: bool = False) -> PatientPairBatch:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PatientPairBatch:
        return self._map(lambda t: t.pin_memory())

    def pieces(self, size: int) -> list[PatientPairBatch]:
        """Batches of `size` patients each, the last perhaps smaller."""
        starts = range(0, len(self.keys), size)
        return [self._patients(start, min(start + size, len(self.keys))) for start in starts]

    def _patients(self, start: int, stop: int) -> PatientPairBatch:
        chosen_N = (self.patient_N >= start) & (self.patient_N < stop)
        return replace(
            self,
            images=self.images[chosen_N],
            patient_N=self.patient_N[chosen_N] - start,
            eye_N=self.eye_N[chosen_N],
            color_N34=None if self.color_N34 is None else self.color_N34[chosen_N],
            erase_N4=None if self.erase_N4 is None else self.erase_N4[chosen_N],
            token_BT=self.token_BT[start:stop],
            mask_BT=self.mask_BT[start:stop],
            text_valid_B=self.text_valid_B[start:stop],
            keys=self.keys[start:stop],
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> PatientPairBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: change(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class PatientPair:
    """One patient before batching: (eye, pixels_HWC, augmentation) of each image, and the report or None."""

    images: list[tuple[int, np.ndarray[Any, np.dtype[np.uint8]], Augment | None]]
    text: str | None


class PatientPairView:
    """RET-CLIP's item: a left and a right eye of one exam and its report, each of which may be missing.

    An image of unknown side is used only where neither side is known. With several images of an eye, or
    several reports, one is drawn. `eyes`: exams are usable with an image of one of these.
    """

    def __init__(self, config: DataConfig, tokens: Tokens, *, eyes: Collection[int] = (*_EYE_NAMES,)) -> None:
        self._config, self._tokens = config, tokens
        self._modalities = {m.lower() for m in config.modalities}
        self._eyes = [_EYE_NAMES[eye] for eye in eyes]

    def usable(self, offsets: Offsets) -> Mask:
        return exams_with_images(offsets, self._modalities, self._eyes)

    def refusal(self, held: Sequence[Holding]) -> UserError | None:
        images = without_images(held, self._told())
        return images or without_texts(held, self._config.languages)

    def _told(self) -> list[str]:
        """What is wanted of an image, in words."""
        if len(self._eyes) == len(_EYE_NAMES):
            return [*self._config.modalities]
        return [f"{modality} of a {' or '.join(self._eyes)} eye" for modality in self._config.modalities]

    def load(self, stored: StoredExam, rng: np.random.Generator | None) -> PatientPair:
        # A fixed number of draws before the images: what an exam lacks never shifts the draws of what it has.
        draws = [0.0] * 4 if rng is None else [rng.random() for _ in range(4)]
        chosen = self._choose_images(stored.exam, draws[:3])
        images = [(eye, *self._pixels(stored.read(image.name), image.modality, rng)) for eye, image in chosen]
        text = choose_text(stored.exam, self._config.languages, draws[3])
        return PatientPair(images, None if text is None else stored.read(text.name).decode())

    def _choose_images(self, exam: Exam, draws: list[float]) -> list[tuple[int, ImageRecord]]:
        of_modality = [i for i in exam.images if i.modality.lower() in self._modalities]
        by_eye = {eye: [i for i in of_modality if i.eye == name] for eye, name in _EYE_NAMES.items()}
        chosen = [(eye, pick(by_eye[eye], draws[eye])) for eye in (LEFT, RIGHT) if by_eye[eye]]
        return chosen or [(UNKNOWN, pick(by_eye[UNKNOWN], draws[UNKNOWN]))]

    def _pixels(
        self, raw: bytes, modality: str, rng: np.random.Generator | None
    ) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], Augment | None]:
        augment = None if rng is None else sample_augment(rng, raw, self._config.augment_for(modality))
        pixels_HWC = augment_on_host(raw, augment, self._config.image_size, fit=self._config.fit)
        return pixels_HWC, augment

    def collate(self, items: Sequence[PatientPair], keys: list[str], faults: list[Fault]) -> PatientPairBatch:
        images = [(row, *image) for row, item in enumerate(items) for image in item.images]
        slab_NHWC = np.stack([pixels for _, _, pixels, _ in images])
        augments = [augment for _, _, _, augment in images if augment is not None]
        token_BT, mask_BT = self._tokens([item.text or "" for item in items])
        return PatientPairBatch(
            images=torch.from_numpy(slab_NHWC).permute(0, 3, 1, 2),
            patient_N=torch.tensor([row for row, *_ in images]),
            eye_N=torch.tensor([eye for _, eye, *_ in images]),
            color_N34=torch.from_numpy(np.stack([a.color_34 for a in augments])) if augments else None,
            erase_N4=torch.from_numpy(np.stack([a.erase_4 for a in augments])) if augments else None,
            token_BT=token_BT,
            mask_BT=mask_BT,
            text_valid_B=torch.tensor([item.text is not None for item in items]),
            keys=keys,
            faults=faults,
        )


VIEWS: Mapping[str, Callable[[ViewInputs], TrainingView[Any, Any]]] = {
    "patient_pair": lambda given: PatientPairView(
        given.recipe.data, given.tokens, **given.recipe.objective.view_options()
    ),
    "image_only": lambda given: ImageOnlyView(given.recipe.data),
    "image_prompt": ImagePromptView.of,
    "image_text": ImageCategoryView.of,
    "composite": lambda given: CompositeView(
        {
            name: VIEWS[view](replace(given, recipe=replace(given.recipe, objective=config)))
            for name, (view, config) in given.recipe.objective.view_options().items()
        }
    ),
    "multi_modal": MultiModalView.of,
}
