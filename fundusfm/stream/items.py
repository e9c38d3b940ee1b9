"""Single images for evaluation: each image of a split exactly once, with who it belongs to and what it shows.

Legend: N images of a batch, C H W channels and pixels, E exams of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fundusfm.recipe.schema import DataConfig
from fundusfm.shards.exam import ImageRecord
from fundusfm.shards.index import Offsets
from fundusfm.shards.reading import StoredExam
from fundusfm.stream.decode import decode_crop
from fundusfm.stream.faults import Fault
from fundusfm.stream.view import Mask, exams_with_images, labels_of


@dataclass(frozen=True)
class ImageItem:
    """One image and its facts; `labels` None where nobody annotated it."""

    pixels_HWC: np.ndarray[Any, np.dtype[np.uint8]]
    eye: str
    modality: str
    source: str
    patient: str
    labels: tuple[str, ...] | None


@dataclass
class ImageBatch:
    """Images with their facts, in the order of the files. `images` (N, C, H, W) is uint8 until normalised."""

    images: Tensor
    eyes: list[str]
    modalities: list[str]
    sources: list[str]
    patients: list[str]
    labels: list[tuple[str, ...] | None]
    keys: list[str]
    faults: list[Fault] = field(default_factory=list)
    padding: bool = False

    def to(self, device: torch.device, non_blocking: bool = False) -> ImageBatch:
        return replace(self, images=self.images.to(device, non_blocking=non_blocking))


class ImagesView:
    """All images of the recipe's modalities, exam by exam; an exam's labels count for each of its images."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._modalities = {m.lower() for m in config.modalities}

    def usable(self, offsets: Offsets) -> Mask:
        return exams_with_images(offsets, self._modalities)

    def load(self, stored: StoredExam, rng: np.random.Generator | None) -> list[ImageItem]:
        images = [i for i in stored.exam.images if i.modality.lower() in self._modalities]
        return [self._item(stored, image) for image in images]

    def _item(self, stored: StoredExam, image: ImageRecord) -> ImageItem:
        pixels = decode_crop(stored.read(image.name), None, self._config.image_size, fit=self._config.fit)
        facts = (image.eye, image.modality, image.source, stored.exam.patient)
        return ImageItem(pixels, *facts, labels=labels_of(stored.exam, image))

    def collate(self, items: Sequence[list[ImageItem]], keys: list[str], faults: list[Fault]) -> ImageBatch:
        flat = [(item, key) for exam, key in zip(items, keys, strict=True) for item in exam]
        images = [item for item, _ in flat]
        return ImageBatch(
            images=torch.from_numpy(np.stack([i.pixels_HWC for i in images])).permute(0, 3, 1, 2),
            eyes=[i.eye for i in images],
            modalities=[i.modality for i in images],
            sources=[i.source for i in images],
            patients=[i.patient for i in images],
            labels=[i.labels for i in images],
            keys=[key for _, key in flat],
            faults=faults,
        )
