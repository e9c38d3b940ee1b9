"""A cohort as a source of exams: rows grouped by patient and visit, split by patient, loaded one by one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fundusfm.shards.draft import ExamDraft, Reject
from fundusfm.shards.exam import ORIGIN_LABELS, Exam, ImageRecord, TextRecord, image_member, text_member
from fundusfm.shards.image import ImageError, decode_image, encode_jpeg
from fundusfm.shards.labeltext import Prompts, texts_from_labels
from fundusfm.shards.pseudonym import pseudonym
from fundusfm.shards.rows import Row
from fundusfm.shards.secondtable import ExamNotes


@dataclass(frozen=True)
class Visit:
    """An exam before its images are opened; `patient` and `exam_id` are pseudonyms already."""

    patient: str
    exam_id: str
    split: str
    rows: tuple[Row, ...]
    labels: tuple[str, ...] | None
    texts: tuple[tuple[str, str], ...]  # (language, text)


@dataclass(frozen=True)
class Options:
    """What changes the images and texts that are written."""

    size: int
    crop: str
    languages: tuple[str, ...] = ()
    variants: int = 1
    prompts: Prompts = field(default_factory=dict)


@dataclass(frozen=True)
class CohortSource:
    """An `ExamSource` over the photographs in `folder`."""

    name: str
    digest: str
    num_items: int
    rejects: tuple[Reject, ...]
    folder: str
    visits: tuple[Visit, ...]
    options: Options
    about: dict[str, Any]

    def splits(self) -> list[str]:
        return [visit.split for visit in self.visits]

    def card(self) -> dict[str, Any]:
        return self.about

    def load(self, number: int) -> tuple[ExamDraft | None, list[Reject]]:
        """The exam with its images decoded, cropped, resized and encoded anew."""
        visit = self.visits[number]
        contents: dict[str, bytes] = {}
        images: list[ImageRecord] = []
        kept: list[Row] = []
        rejects = []
        for row in visit.rows:
            try:
                jpeg, width, height = self._convert(row)
            except ImageError as error:
                rejects.append(Reject(row.number, row.image, str(error)))
                continue
            count = sum((i.eye, i.modality.lower()) == (row.eye, row.modality.lower()) for i in images)
            name = image_member(row.eye, row.modality, count)
            images.append(ImageRecord(name, row.eye, row.modality, width, height, row.source, row.labels))
            contents[name] = jpeg
            kept.append(row)
        if not images:
            return None, rejects
        texts = self._texts(visit, images, number, contents)
        extra = combine_extra([row.extra for row in kept])
        exam = Exam(visit.patient, visit.exam_id, visit.split, tuple(images), texts, visit.labels, extra)
        return ExamDraft(exam, contents), rejects

    def _convert(self, row: Row) -> tuple[bytes, int, int]:
        try:
            raw = (Path(self.folder) / row.image).read_bytes()
        except OSError as error:
            raise ImageError(f"the file cannot be read ({error.strerror})") from error
        image = decode_image(raw, size=self.options.size, crop=self.options.crop)
        return encode_jpeg(image), image.width, image.height

    def _texts(
        self, visit: Visit, images: Sequence[ImageRecord], number: int, contents: dict[str, bytes]
    ) -> tuple[TextRecord, ...]:
        """Reports, and for languages without one texts from labels; the bytes go into `contents`."""
        reports = [(lang, text) for lang, text in visit.texts]
        written = {lang for lang, _ in reports}
        made = [
            (lang, text)
            for lang in self.options.languages
            if lang not in written
            for text in texts_from_labels(
                images, visit.labels, self.options.prompts, lang, self.options.variants, number
            )
        ]
        records: list[TextRecord] = []
        for lang, text in (*reports, *made):
            name = text_member(lang, sum(record.lang == lang for record in records))
            contents[name] = text.encode()
            records.append(TextRecord(name, lang, *([] if lang in written else [ORIGIN_LABELS])))
        return tuple(records)


def combine_extra(extras: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Further columns of an exam: one value where all images agree, else a list in image order."""
    names = dict.fromkeys(name for extra in extras for name in extra)
    values = {name: [extra.get(name, "") for extra in extras] for name in names}
    return {name: column[0] if len(set(column)) == 1 else column for name, column in values.items()}


def group_visits(
    rows: Sequence[Row], notes: ExamNotes, key: bytes, shares: tuple[float, float, float]
) -> tuple[Visit, ...]:
    """Rows of one patient and exam id as one visit; without exam ids a patient has one visit."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.patient_id, row.exam_id].append(row)
    visits = []
    for (patient_id, exam_id), members in groups.items():
        labels, texts = notes.of(patient_id, exam_id)
        reports = [(row.lang, row.report) for row in members if row.report]
        visits.append(
            Visit(
                patient=pseudonym(key, patient_id),
                exam_id=pseudonym(key, f"{patient_id}\n{exam_id}"),
                split=members[0].split or split_of(patient_id, shares),
                rows=tuple(members),
                labels=labels,
                texts=tuple(dict.fromkeys([*reports, *texts])),
            )
        )
    return tuple(visits)


def split_of(patient_id: str, shares: tuple[float, float, float]) -> str:
    """The split of a patient without one: a hash of the id alone, so it holds when patients are added."""
    digest = hashlib.sha256(patient_id.encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    train, val, _ = shares
    if draw < train:
        return "train"
    return "val" if draw < train + val or not shares[2] else "test"
