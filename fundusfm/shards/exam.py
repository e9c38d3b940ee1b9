"""The unit of data: one exam of one patient, and its place in a tar.

In a tar an exam is a run of members that share a key, readable by the webdataset library alone::

    000123.left.cfp.0.jpg   000123.right.cfp.0.jpg   000123.report.en.txt   000123.json

This file owns the json and the member names; every other room reads exams through it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1
EYES = ("left", "right", "")
SPLITS = ("train", "val", "test")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
UNKNOWN_EYE = "unknown"  # how an empty eye is written in a member name
ORIGIN_REPORT, ORIGIN_LABELS = "report", "labels"


@dataclass(frozen=True)
class ImageRecord:
    """One image of an exam.

    `name` is the member's suffix (`left.cfp.0.jpg`); `labels` is None where nobody annotated the image and
    `()` where somebody looked and found nothing to name.
    """

    name: str
    eye: str
    modality: str
    width: int
    height: int
    source: str = ""
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TextRecord:
    """One text of an exam; `origin` tells a written report from a text that was made from labels."""

    name: str
    lang: str
    origin: str = ORIGIN_REPORT


@dataclass(frozen=True)
class Exam:
    """One patient, one visit. `patient` and `exam_id` are pseudonyms (keyed hashes), never the hospital's.

    `labels` holds labels given for the exam as a whole, None where there are none; `extra` the further
    columns of the cohort table.
    """

    patient: str
    exam_id: str
    split: str
    images: tuple[ImageRecord, ...] = ()
    texts: tuple[TextRecord, ...] = ()
    labels: tuple[str, ...] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Canonical bytes: the same exam gives the same file, so that a rebuilt shard has the same digest."""
        record = {"schema": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Exam:
        """Parse the `json` member; ValueError if it is not an exam of this schema version."""
        record = json.loads(raw)
        if not isinstance(record, dict) or record.pop("schema", None) != SCHEMA_VERSION:
            raise ValueError(f"the json is no exam of schema version {SCHEMA_VERSION}")
        images = tuple(ImageRecord(**{**i, "labels": _labels(i["labels"])}) for i in record.pop("images"))
        texts = tuple(TextRecord(**t) for t in record.pop("texts"))
        return cls(images=images, texts=texts, labels=_labels(record.pop("labels")), **record)


def _labels(value: list[str] | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(value)


def image_member(eye: str, modality: str, number: int, extension: str = "jpg") -> str:
    """Member suffix of an image: `left.cfp.0.jpg`, `unknown.oct.2.jpg`."""
    return f"{eye or UNKNOWN_EYE}.{modality.lower()}.{number}.{extension}"


def text_member(lang: str, number: int) -> str:
    """Member suffix of a text: `report.en.txt`, then `report.en.1.txt` for a second one in that language."""
    return f"report.{lang}.txt" if number == 0 else f"report.{lang}.{number}.txt"


def exam_kinds(exam: Exam) -> list[str]:
    """What an exam holds, one word a member: `left.cfp`, `unknown.oct`, `report.en`, `labels.en`.

    Views choose exams by these words, from the offsets file alone, without opening a tar.
    """
    images = [f"{i.eye or UNKNOWN_EYE}.{i.modality.lower()}" for i in exam.images]
    return images + [f"{t.origin}.{t.lang}" for t in exam.texts]


def text_languages(kinds: Iterable[str]) -> set[str]:
    """The languages of the texts among such words; an unknown language is empty."""
    words = (kind.partition(".") for kind in kinds)
    return {language for origin, _, language in words if origin in (ORIGIN_REPORT, ORIGIN_LABELS)}


def foreign_exam(key: str, suffixes: list[str], split: str) -> Exam:
    """The exam of a sample that another tool wrote (`key.jpg`, `key.txt`): a patient a key, no eye, CFP."""
    images = [
        ImageRecord(s, "", "CFP", 0, 0) for s in suffixes if s.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
    ]
    texts = [TextRecord(s, "") for s in suffixes if s.rpartition(".")[2].lower() == "txt"]
    return Exam(patient=key, exam_id=key, split=split, images=tuple(images), texts=tuple(texts))
