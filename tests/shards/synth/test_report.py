"""Reports tell the truth, all of it, of the right eye, in both languages."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

from fundusfm.shards.synth.findings import FINDINGS, MACULA, NORMAL, QUADRANTS, PatientTruth, draw_patient
from fundusfm.shards.synth.report import write_reports
from fundusfm.shards.synth.wording import (
    ABSENT,
    ALL_QUADRANTS,
    COUNTED,
    LANGUAGES,
    MACULA_WORDS,
    MEASURED,
    PHRASES,
    QUADRANT_WORDS,
    WITH_PLACE,
)

EYES = {"Left eye: ": "left", "Right eye: ": "right", "左眼：": "left", "右眼：": "right"}
PATIENTS = [draw_patient(8, number) for number in range(150)]


def by_eye(report: str) -> dict[str, str]:
    """What the report says of each eye."""
    said: dict[str, str] = defaultdict(str)
    pieces = re.split("(" + "|".join(EYES) + ")", report)
    for marker, text in zip(pieces[1::2], pieces[2::2], strict=True):
        said[EYES[marker]] += text
    return said


def without_negatives(language: str, text: str) -> str:
    ruled_out = [p for words in ABSENT.values() for p in words[language]] + PHRASES["dr_none"][language]
    for phrase in sorted(ruled_out, key=len, reverse=True):
        text = text.replace(phrase, "")
    return text


def names(language: str, text: str, label: str) -> bool:
    return any(phrase in text for phrase in PHRASES[label][language])


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("patient", PATIENTS[::3], ids=lambda p: str(p.number))
def test_write_reports__names_what_each_eye_has_and_nothing_else(
    language: str, patient: PatientTruth
) -> None:
    said = by_eye(write_reports(8, patient)[language])
    assert set(said) == {truth.eye for truth in patient.eyes}
    for truth in patient.eyes:
        text = without_negatives(language, said[truth.eye])
        for label in FINDINGS:
            assert names(language, text, label) == (truth.find(label) is not None), (label, text)
        assert names(language, text, NORMAL) == (not truth.findings)


@pytest.mark.parametrize("language", LANGUAGES)
def test_write_reports__tells_severity_and_place(language: str) -> None:
    for patient in PATIENTS:
        said = by_eye(write_reports(8, patient)[language])
        for truth in patient.eyes:
            for finding in truth.findings:
                scale = COUNTED if finding.name in WITH_PLACE else MEASURED
                assert any(word in said[truth.eye] for word in scale[language][finding.severity])
                if finding.name in WITH_PLACE:
                    check_places(language, said[truth.eye], [p for p, _ in finding.places])


def check_places(language: str, text: str, places: list[str]) -> None:
    if set(QUADRANTS) <= set(places):
        assert any(w in text for w in ALL_QUADRANTS[language])
        return
    for place in places:
        words = MACULA_WORDS[language] if place == MACULA else QUADRANT_WORDS[language][place]
        assert any(w in text for w in words), (place, text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_write_reports__a_negative_is_true(language: str) -> None:
    num_negatives = 0
    for patient in PATIENTS:
        said = by_eye(write_reports(8, patient)[language])
        for truth in patient.eyes:
            for absent, words in ABSENT.items():
                if any(w in re.split("[;.；。] ?", said[truth.eye]) for w in words[language]):
                    num_negatives += 1
                    assert not any(truth.find(name) for name in absent)
    assert num_negatives > 20


def test_write_reports__words_vary() -> None:
    normals = [p for p in PATIENTS if not any(t.findings for t in p.eyes)]
    assert len({write_reports(8, p)["en"] for p in normals}) > len(normals) / 3


def test_prompts__each_phrase_belongs_to_one_label() -> None:
    for language in LANGUAGES:
        phrases = [p for words in PHRASES.values() for p in words[language]]
        assert len(phrases) == len(set(phrases))
        assert all(PHRASES[label][language] for label in FINDINGS)
