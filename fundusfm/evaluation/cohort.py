"""What is asked of which images: the splits, the annotated images, the labels that count.

Legend: N images, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fundusfm.errors import UserError
from fundusfm.evaluation.arrays import Features, Flags, Integers
from fundusfm.evaluation.scoring import Question
from fundusfm.shards.index import ShardIndex


@dataclass(frozen=True)
class Plan:
    """Which split does what; without `select`, a part of the training patients chooses the regularisation."""

    train: str
    select: str | None
    reported: str

    @property
    def splits(self) -> list[str]:
        return [split for split in (self.train, self.select, self.reported) if split]


def plan_splits(index: ShardIndex) -> Plan:
    """Train on train, choose on val, report on test; without a test split report on val."""
    if not index.labels:
        raise UserError(
            "the shard set has no labels to measure against",
            where=index.root,
            fix="name a label column in the dataset card and build the shards again",
        )
    have = set(index.splits)
    if "train" not in have or have == {"train"}:
        raise UserError(
            f"an evaluation needs train and val or test, there is only: {', '.join(index.splits)}",
            where=index.root,
            fix="build the shards with a split column, or without one to have patients split for you",
        )
    if "test" in have:
        return Plan("train", "val" if "val" in have else None, "test")
    return Plan("train", None, "val")


@dataclass(frozen=True)
class ImageFacts:
    """Images in the order of the files; labels None means nobody annotated, keys are those of the exams."""

    eyes: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...] | None] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.eyes)

    def take(self, rows: Sequence[int] | Integers) -> ImageFacts:
        """The facts of some rows."""
        columns = (self.eyes, self.labels, self.patients, self.sources, self.keys)
        return ImageFacts(*([column[row] for row in rows] for column in columns))  # type: ignore[arg-type]


@dataclass(frozen=True)
class SplitFeatures:
    """One split, read once: its facts, and by tower probe features (N, F) and embeddings (N, D).

    `num_unreadable` counts exams that had to be left out.
    """

    facts: ImageFacts
    features: dict[str, Features]
    embeddings: dict[str, Features] = field(default_factory=dict)
    num_unreadable: int = 0

    def take(self, rows: Sequence[int] | Integers) -> SplitFeatures:
        """Some of the images."""
        return SplitFeatures(
            self.facts.take(rows),
            {name: row_NF[rows] for name, row_NF in self.features.items()},
            {name: row_ND[rows] for name, row_ND in self.embeddings.items()},
            self.num_unreadable,
        )

    def annotated(self, split: str, where: str) -> SplitFeatures:
        """Only images that somebody annotated; UserError if there is none."""
        rows = [row for row, labels in enumerate(self.facts.labels) if labels is not None]
        if not rows:
            raise UserError(
                f"no image of the split {split!r} is annotated",
                where=where,
                fix="leave unlabelled images to pretraining and evaluate on a set with labels",
            )
        return self.take(rows)


def targets(facts: ImageFacts, labels: Sequence[str]) -> Flags:
    """target_NL: which annotated image has which label."""
    has = [[label in (own or ()) for label in labels] for own in facts.labels]
    return np.asarray(has, dtype=bool).reshape(len(facts), len(labels))


def findings(labels: Sequence[str], ordered: Mapping[str, Sequence[str]]) -> Flags:
    """True for labels that are no grade of an ordered scale; for all where a set has nothing but grades."""
    grades = {grade for scale in ordered.values() for grade in scale}
    is_finding_L = np.asarray([label not in grades for label in labels])
    return is_finding_L if is_finding_L.any() else np.ones(len(labels), dtype=bool)


def visible(index: ShardIndex, image_size: int) -> Flags:
    """True for labels that images of this size can show, by the card's `visible_from_px`."""
    from_px = index.card.get("visible_from_px", {})
    shown_px = min(image_size, index.image_size or image_size)
    return np.asarray([from_px.get(label, 0) <= shown_px for label in index.labels])


def question_of(index: ShardIndex, facts: ImageFacts, image_size: int) -> Question:
    """The labels asked of the reported images; findings that the image size can show enter the mean.

    UserError if none of them has both classes.
    """
    target_NL = targets(facts, index.labels)
    in_macro_L = findings(index.labels, index.ordered) & visible(index, image_size)
    if not (in_macro_L & target_NL.any(axis=0) & ~target_NL.all(axis=0)).any():
        shown_px = min(image_size, index.image_size or image_size)
        raise UserError(
            f"no label that images of {shown_px} px can show has both images with it and images without it",
            where=index.root,
            fix="evaluate on a set whose reported split shows findings and their absence",
        )
    return Question(index.labels, target_NL, tuple(facts.patients), in_macro_L)


def grades_of(facts: ImageFacts, grades: Sequence[str]) -> tuple[Integers, Integers]:
    """Rows of the images that carry exactly one grade of a scale, and the grade of each, 0 the lowest."""
    own = [[grades.index(label) for label in labels or () if label in grades] for labels in facts.labels]
    rows = [row for row, found in enumerate(own) if len(found) == 1]
    return np.asarray(rows, dtype=np.int64), np.asarray([own[row][0] for row in rows], dtype=np.int64)
