"""One image of each exam, for what is learned from images alone.

Legend: B exams, one image of each, E exams of a shard, C H W channels and pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.recipe.schema import DataConfig
from fundusfm.shards.exam import Exam, ImageRecord
from fundusfm.shards.index import Offsets
from fundusfm.shards.reading import StoredExam
from fundusfm.stream.decode import Bytes
from fundusfm.stream.faults import Fault
from fundusfm.stream.hashing import hash_text
from fundusfm.stream.refusals import Holding, without_images
from fundusfm.stream.transforms import Augment, augment_on_host, sample_augment
from fundusfm.stream.view import Mask, exams_with_images, pick

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(kw_only=True)
class SingleImageBatch:
    """One image of each exam.

    `images` (B, C, H, W), uint8 until the device tail makes them float; `modality_B`: its place in
    `data.modalities`; `mask_seed_B`: what decides which of its patches are hidden and which words (see
    `hashing.uniforms`). `color_N34` and `erase_N4` are the deferred part of the augmentation, None in
    evaluation. `keys`, `faults`, `padding` as everywhere.
    """

    images: Tensor
    modality_B: Tensor
    mask_seed_B: Tensor
    color_N34: Tensor | None
    erase_N4: Tensor | None
    keys: list[str]
    faults: list[Fault]
    padding: bool = False

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(lambda t: t.pin_memory())

    def pieces(self, size: int) -> list[Self]:
        """Batches of `size` exams each, the last perhaps smaller."""
        starts = range(0, len(self.keys), size)
        return [
            replace(self._map(lambda t, s=s: t[s : s + size]), keys=self.keys[s : s + size])  # type: ignore[misc]
            for s in starts
        ]

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: change(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class SingleImage:
    """One image before batching; `text` None where there is none."""

    pixels_HWC: Bytes
    modality: int
    augment: Augment | None
    text: str | None = None
    mask_seed: int = 0


class ImageOnlyView:
    """One image of an exam, drawn from all those of the recipe's modalities; `size`: its side in pixels."""

    def __init__(self, config: DataConfig, size: int | None = None) -> None:
        self._config, self._size = config, size or config.image_size
        self._modalities = [m.lower() for m in config.modalities]

    def usable(self, offsets: Offsets) -> Mask:
        return exams_with_images(offsets, self._modalities)

    def refusal(self, held: Sequence[Holding]) -> UserError | None:
        return without_images(held, self._config.modalities)

    def load(self, stored: StoredExam, rng: np.random.Generator | None) -> SingleImage:
        image = self.choose_image(stored.exam, 0.0 if rng is None else rng.random())
        return self.load_image(stored, image, rng)

    def choose_image(self, exam: Exam, draw: float) -> ImageRecord:
        """One of the exam's images, by a number in [0, 1)."""
        return pick(self.candidates(exam), draw)

    def candidates(self, exam: Exam) -> list[ImageRecord]:
        """The exam's images of the recipe's modalities."""
        return [i for i in exam.images if i.modality.lower() in self._modalities]

    def load_image(
        self, stored: StoredExam, image: ImageRecord, rng: np.random.Generator | None
    ) -> SingleImage:
        """An image with what decides which of its patches are hidden."""
        return replace(self.read_image(stored, image, rng), mask_seed=draw_mask_seed(stored.exam, image, rng))

    def read_image(
        self, stored: StoredExam, image: ImageRecord, rng: np.random.Generator | None
    ) -> SingleImage:
        """The pixels of an image, augmented unless `rng` is None."""
        raw = stored.read(image.name)
        augment = None if rng is None else sample_augment(rng, raw, self._config.augment_for(image.modality))
        pixels_HWC = augment_on_host(raw, augment, self._size, fit=self._config.fit)
        return SingleImage(pixels_HWC, self._modalities.index(image.modality.lower()), augment)

    def collate(self, items: Sequence[SingleImage], keys: list[str], faults: list[Fault]) -> SingleImageBatch:
        return SingleImageBatch(**stacked(items), keys=keys, faults=faults)


def draw_mask_seed(exam: Exam, image: ImageRecord, rng: np.random.Generator | None) -> int:
    """Drawn while training; else always the same for an image, so that evaluations can be compared."""
    return hash_text(f"{exam.exam_id} {image.name}") if rng is None else int(rng.integers(2**63))


def stacked(items: Sequence[SingleImage]) -> dict[str, Any]:
    """The tensors of a `SingleImageBatch`."""
    augments = [item.augment for item in items if item.augment is not None]
    return {
        "images": torch.from_numpy(np.stack([i.pixels_HWC for i in items])).permute(0, 3, 1, 2),
        "modality_B": torch.tensor([item.modality for item in items]),
        "mask_seed_B": torch.tensor([item.mask_seed for item in items]),
        "color_N34": torch.from_numpy(np.stack([a.color_34 for a in augments])) if augments else None,
        "erase_N4": torch.from_numpy(np.stack([a.erase_4 for a in augments])) if augments else None,
    }
