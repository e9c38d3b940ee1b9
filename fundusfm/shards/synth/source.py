"""The synthetic cohort as a source of exams for the shard writer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fundusfm.errors import UserError
from fundusfm.shards.draft import ExamDraft, Reject
from fundusfm.shards.exam import SPLITS, Exam, ImageRecord, TextRecord, image_member, text_member
from fundusfm.shards.synth.camera import CAMERAS, Camera
from fundusfm.shards.synth.eye import Picture, draw_eye
from fundusfm.shards.synth.findings import (
    DR_GRADES,
    FINDINGS,
    NORMAL,
    VISIBLE_FROM_PX,
    PatientTruth,
    draw_patient,
)
from fundusfm.shards.synth.report import write_reports
from fundusfm.shards.synth.rng import Stream, generator
from fundusfm.shards.synth.wording import LANGUAGES, PHRASES

VERSION = 1  # raise it whenever the same seed gives other bytes
_SPLIT_OF_TEN = np.array([0] * 7 + [1] + [2] * 2)
_SMALLEST_PX, _LARGEST_SEED = 48, 2**63 - 1


class SynthSource:
    """Patients 0 to `patients` - 1 of a seed, one exam each: same seed, number and size, same bytes."""

    name = "synth"
    rejects: Sequence[Reject] = ()

    def __init__(self, patients: int, seed: int, size: int) -> None:
        if patients < 1:
            raise UserError(
                f"{patients} patients make no cohort", where="--patients", fix="ask for 1 or more"
            )
        if size < _SMALLEST_PX:
            raise UserError(
                f"images of {size} pixels show no retina", where="--size", fix=f"use {_SMALLEST_PX} or more"
            )
        if not 0 <= seed <= _LARGEST_SEED:
            raise UserError(
                f"the seed {seed} is out of range", where="--seed", fix=f"use 0 to {_LARGEST_SEED}"
            )
        self.num_items, self.seed, self.size = patients, seed, size
        options = {"synth": VERSION, "patients": patients, "seed": seed, "size": size}
        self.digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()

    def splits(self) -> Sequence[str]:
        """Of each ten patients seven train, one val, two test, whatever the size of the cohort."""
        return [self._split(number) for number in range(self.num_items)]

    def load(self, number: int) -> tuple[ExamDraft | None, list[Reject]]:
        """Draw patient `number`. Nothing is ever rejected."""
        patient = draw_patient(self.seed, number)
        camera = self.camera(number)
        pictures = [
            p for truth in patient.eyes for p in draw_eye(self.seed, patient, truth, camera, self.size)
        ]
        contents = {_member(p): p.jpeg for p in pictures}
        reports = write_reports(self.seed, patient) if patient.has_report else {}
        contents |= {text_member(language, 0): text.encode() for language, text in reports.items()}
        exam = Exam(
            patient=self._pseudonym(number, "patient"),
            exam_id=self._pseudonym(number, "exam"),
            split=self._split(number),
            images=tuple(_record(p) for p in pictures),
            texts=tuple(TextRecord(text_member(language, 0), language) for language in reports),
            extra=_extra(patient, camera.name),
        )
        return ExamDraft(exam, contents), []

    def camera(self, number: int) -> Camera:
        """The camera of a patient, drawn without a look at the findings."""
        return CAMERAS[int(generator(self.seed, number, Stream.CAMERA).integers(len(CAMERAS)))]

    def card(self) -> dict[str, Any]:
        """What `index.json` says; `visible_from_px` tells from which image size on a label can be seen."""
        return {
            "labels": [NORMAL, *FINDINGS, *DR_GRADES],
            "ordered": {"diabetic_retinopathy_grade": list(DR_GRADES)},
            "prompts": PHRASES,
            "card": {
                "name": self.name,
                "description": "Procedural eyes with known truth; no patient was photographed.",
                "version": VERSION,
                "seed": self.seed,
                "patients": self.num_items,
                "languages": list(LANGUAGES),
                "sources": [camera.name for camera in CAMERAS],
                "visible_from_px": VISIBLE_FROM_PX,
            },
            "licence": "CC0-1.0 (synthetic)",
            "image_size": self.size,
        }

    def _split(self, number: int) -> str:
        block, place = divmod(number, len(_SPLIT_OF_TEN))
        shuffled = generator(self.seed, block, Stream.SPLIT).permutation(_SPLIT_OF_TEN)
        return SPLITS[int(shuffled[place])]

    def _pseudonym(self, number: int, kind: str) -> str:
        return hashlib.sha256(f"synth:{self.seed}:{number}:{kind}".encode()).hexdigest()[:16]


def _member(picture: Picture) -> str:
    return image_member(picture.eye, picture.modality, 0)


def _record(picture: Picture) -> ImageRecord:
    return ImageRecord(
        name=_member(picture),
        eye=picture.eye,
        modality=picture.modality,
        width=picture.width,
        height=picture.height,
        source=picture.source,
        labels=picture.labels,
    )


def _extra(patient: PatientTruth, camera: str) -> dict[str, Any]:
    grades = {truth.eye: DR_GRADES[truth.dr_grade] for truth in patient.eyes}
    rows = [row for truth in patient.eyes for row in truth.rows()]
    return {"age": patient.age, "camera": camera, "dr_grade": grades, "truth": rows}
