"""What all views share: the protocol, what they are made from, choices among images and texts.

A view says what one training item holds; the same shards serve every objective through its own view. The
table of views by name is in `views.py`. Legend: E exams of a shard.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from fundusfm.errors import UserError
from fundusfm.recipe.schema import Recipe
from fundusfm.shards.exam import EYES, UNKNOWN_EYE, Exam, ImageRecord, TextRecord
from fundusfm.shards.index import Offsets, ShardIndex
from fundusfm.shards.reading import StoredExam
from fundusfm.stream.faults import Fault
from fundusfm.stream.refusals import Holding
from fundusfm.stream.tokens import Tokens

LEFT, RIGHT, UNKNOWN = 0, 1, 2
EYE_NUMBERS = {"left": LEFT, "right": RIGHT, "": UNKNOWN}

Item = TypeVar("Item")


class Padded(Protocol):
    """What the loader asks of any batch: a flag that it only keeps ranks in step and is not counted."""

    padding: bool


Batch = TypeVar("Batch", bound=Padded, covariant=True)
Mask = np.ndarray[Any, np.dtype[np.bool_]]


class View(Protocol, Generic[Item, Batch]):
    """How exams become batches. Instances travel to loader workers."""

    def usable(self, offsets: Offsets) -> Mask:
        """Which exams of a shard can be an item, by what the offsets file says they hold."""
        ...

    def load(self, stored: StoredExam, rng: np.random.Generator | None) -> Item:
        """One item; `rng` gives every random choice, None is the evaluation item. ValueError: unreadable."""
        ...

    def collate(self, items: Sequence[Item], keys: list[str], faults: list[Fault]) -> Batch:
        """Items -> one batch of tensors."""
        ...


class TrainingView(View[Item, Batch], Protocol[Item, Batch]):
    """A view to train with."""

    def refusal(self, held: Sequence[Holding]) -> UserError | None:
        """Why nothing could be learned from what the sources hold; None if something can."""
        ...


@runtime_checkable
class Remarking(Protocol):
    """A view with something to say of what the sources hold that is no reason to refuse them."""

    def remarks(self, held: Sequence[Holding]) -> dict[str, str]:
        """What a user should know before training, by a short name."""
        ...


@dataclass(frozen=True)
class ViewInputs:
    """What a view can be made from."""

    recipe: Recipe
    tokens: Tokens
    indices: tuple[ShardIndex, ...]


def exams_with_images(offsets: Offsets, modalities: Collection[str], eyes: Collection[str] = EYES) -> Mask:
    """Which exams of a shard have an image of these modalities (in lower case) and one of these eyes."""
    wanted = [f"{eye or UNKNOWN_EYE}.{modality}" for eye in eyes for modality in modalities]
    columns = [k for k, kind in enumerate(offsets.kinds) if kind in wanted]
    found: Mask = offsets.counts_EK[:, columns].sum(axis=1) > 0
    return found


def choose_text(exam: Exam, languages: Collection[str], draw: float) -> TextRecord | None:
    """One of the texts in these languages (any if empty), by a number in [0, 1); None if there is none."""
    texts = [text for text in exam.texts if not languages or text.lang in languages]
    return pick(texts, draw) if texts else None


Candidate = TypeVar("Candidate")


def pick(candidates: Sequence[Candidate], draw: float) -> Candidate:
    """One of the candidates, by a number in [0, 1)."""
    return candidates[int(draw * len(candidates))]


def labels_of(exam: Exam, image: ImageRecord) -> tuple[str, ...] | None:
    """The labels of an image, those of its exam included; None where nobody annotated either."""
    if image.labels is None and exam.labels is None:
        return None
    return tuple(dict.fromkeys([*(image.labels or ()), *(exam.labels or ())]))
