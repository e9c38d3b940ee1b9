"""One pass over the images of a split: features of every tower, a colour histogram, some pictures to show.

Legend: N images, H W C pixels, F features, D shared width, T tokens, B texts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fundusfm.errors import UserError
from fundusfm.evaluation.arrays import Features
from fundusfm.evaluation.baselines import color_histogram
from fundusfm.evaluation.cohort import ImageFacts, SplitFeatures
from fundusfm.evaluation.measure import Ensembles
from fundusfm.evaluation.results import HISTOGRAM
from fundusfm.evaluation.zero_shot import Prompts, ensembles
from fundusfm.objectives.base import Eye, Objective
from fundusfm.recipe.schema import Recipe
from fundusfm.shards.exam import EYES
from fundusfm.shards.index import ShardIndex
from fundusfm.stream.datamodule import shard_cache
from fundusfm.stream.items import ImageBatch, ImagesView
from fundusfm.stream.loader import EvalStream, World, make_loader
from fundusfm.stream.reader import ShardReader
from fundusfm.stream.tokens import Tokens
from fundusfm.stream.transforms import DeviceTail
from fundusfm.stream.view import View

Towers = Mapping[str, Objective]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
_IMAGES_PER_EXAM = 2


@dataclass(frozen=True)
class Source:
    """Where images come from and how they are read."""

    index: ShardIndex
    recipe: Recipe
    batch_size: int
    workers: int
    device: torch.device

    def images(self, split: str) -> Iterable[ImageBatch]:
        """Every image of a split once, uint8; UserError if the recipe's modalities have none."""
        return self.batches(split, ImagesView(self.recipe.data))

    def normaliser(self) -> DeviceTail:
        """uint8 images to what the towers take."""
        return DeviceTail(self.recipe.data.mean, self.recipe.data.std)

    def batches(self, split: str, view: View[Any, Any]) -> Iterable[Any]:
        """Every exam of a split once, as a view sees it; exams that cannot be read are in `faults`."""
        reader = ShardReader(self.index, split, view, shard_cache(self.recipe))
        if not reader.num_exams:
            modalities = ", ".join(self.recipe.data.modalities)
            raise UserError(
                f"the split {split!r} has no image of the modalities {modalities}",
                where=self.index.root,
                fix="evaluate on a set with the modalities that the run was trained on",
            )
        # The stream counts exams, most of which have two images.
        batch_size = max(1, self.batch_size // _IMAGES_PER_EXAM)
        stream = EvalStream(reader, view, batch_size=batch_size, world=World())
        return make_loader(stream, workers=self.workers)


@dataclass
class Album:
    """Images to show, taken in the order of the files: the first of each label, and all of `wanted` exams.

    `samples`: row in the split -> pixels_HWC. `of_exam`: key of the exam -> its images.
    """

    wanted: frozenset[str] = frozenset()
    per_label: int = 2
    samples: dict[int, Pixels] = field(default_factory=dict)
    of_exam: dict[str, list[Pixels]] = field(default_factory=dict)
    _shown: Counter[str] = field(default_factory=Counter)

    def offer(self, batch: ImageBatch, first_row: int) -> None:
        """Look at a batch whose first image is `first_row` of the split."""
        for n, (labels, key) in enumerate(zip(batch.labels, batch.keys, strict=True)):
            fresh = [label for label in labels or () if self._shown[label] < self.per_label]
            pixels_HWC = batch.images[n].permute(1, 2, 0).cpu().numpy()
            if fresh:
                self._shown.update(fresh)
                self.samples[first_row + n] = pixels_HWC
            if key in self.wanted:
                self.of_exam.setdefault(key, []).append(pixels_HWC)


@torch.inference_mode()
def extract(
    source: Source, split: str, towers: Towers, *, embed: bool, album: Album | None = None
) -> SplitFeatures:
    """Features of all images of a split by every tower and the colour histogram; embeddings if `embed`."""
    normaliser = source.normaliser()
    columns: dict[str, list[Features]] = defaultdict(list)
    embedded: dict[str, list[Features]] = defaultdict(list)
    facts, num_unreadable = ImageFacts(), 0
    for batch in source.images(split):
        if album is not None:
            album.offer(batch, len(facts))
        _note(facts, batch)
        num_unreadable += len(batch.faults)
        on_device = batch.images.to(source.device)
        columns[HISTOGRAM].append(color_histogram(on_device.float() / 255))
        image_NCHW = normaliser.normalise(on_device)
        for name, tower in towers.items():
            columns[name].append(rows_of(tower.probe_features(image_NCHW)))
            if embed:
                embedded[name].append(_embed_by_eye(tower, image_NCHW, batch.eyes))
    features, embeddings = ({n: np.concatenate(c) for n, c in group.items()} for group in (columns, embedded))
    return SplitFeatures(facts, features, embeddings, num_unreadable)


def _note(facts: ImageFacts, batch: ImageBatch) -> None:
    facts.eyes.extend(batch.eyes)
    facts.labels.extend(batch.labels)
    facts.patients.extend(batch.patients)
    facts.sources.extend(batch.sources)
    facts.keys.extend(batch.keys)


def _embed_by_eye(tower: Objective, image_NCHW: Tensor, eyes: Sequence[str]) -> Features:
    """Each image through the head of its own eye."""
    rows: Features | None = None
    for eye in EYES:
        of_eye = [n for n, own in enumerate(eyes) if own == eye]
        if not of_eye:
            continue
        found = rows_of(tower.embed_images(image_NCHW[of_eye], eye_of(eye)))
        rows = np.empty((len(eyes), found.shape[1]), dtype=np.float32) if rows is None else rows
        rows[of_eye] = found
    assert rows is not None
    return rows


@torch.inference_mode()
def prompt_ensembles(
    tower: Objective, tokens: Tokens, prompts: Prompts, recipe: Recipe, eyes: Iterable[str]
) -> Ensembles:
    """eye -> label -> unit row, for the eyes that occur."""

    def embed_texts(texts: list[str], eye: str) -> Features:
        token_BT, mask_BT = (t.to(tower.device) for t in tokens(texts))
        return rows_of(tower.embed_texts(token_BT, mask_BT, eye_of(eye)))

    templates = recipe.evaluation.templates or recipe.data.templates
    options = (recipe.data.languages, templates, embed_texts)
    unit = tower.unit_prototypes
    return {eye: ensembles(prompts, eye, *options, unit=unit) for eye in sorted(set(eyes))}


def rows_of(tensor: Tensor) -> Features:
    """A tower's output as float32 on the host."""
    rows: Features = tensor.float().cpu().numpy()
    return rows


def eye_of(name: str) -> Eye:
    """The name, known to be one of `EYES`."""
    assert name in EYES
    return name  # type: ignore[return-value]
