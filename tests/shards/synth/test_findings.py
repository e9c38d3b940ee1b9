"""The truth: frequencies, co-occurrence, and the rules of the retinopathy scale."""

from __future__ import annotations

from collections import Counter

import pytest

from fundusfm.shards.synth.camera import CAMERAS
from fundusfm.shards.synth.findings import (
    DR_GRADES,
    DRUSEN,
    EXUDATES,
    FINDINGS,
    FLUID,
    HAEMORRHAGES,
    LARGE_CUP,
    MICROANEURYSMS,
    NORMAL,
    QUADRANTS,
    EyeTruth,
    PatientTruth,
    draw_patient,
)
from fundusfm.shards.synth.source import SynthSource

DIABETIC = {MICROANEURYSMS, HAEMORRHAGES, EXUDATES}


@pytest.fixture(scope="module")
def patients() -> list[PatientTruth]:
    return [draw_patient(5, number) for number in range(2500)]


@pytest.fixture(scope="module")
def eyes(patients: list[PatientTruth]) -> list[EyeTruth]:
    return [truth for patient in patients for truth in patient.eyes]


def test_draw_patient__each_finding_in_8_to_30_percent_of_eyes(
    patients: list[PatientTruth], eyes: list[EyeTruth]
) -> None:
    share = Counter(label for truth in eyes for label in truth.labels("CFP"))
    for label in {*FINDINGS, *DR_GRADES} - {FLUID, "dr_none"}:
        assert 0.08 <= share[label] / len(eyes) <= 0.30, label
    assert 0.3 < share[NORMAL] / len(eyes) < 0.5
    scanned = [truth for patient in patients if patient.has_oct for truth in patient.eyes]
    assert 0.08 <= sum(FLUID in t.labels("OCT") for t in scanned) / len(scanned) <= 0.30


def test_draw_patient__missing_eyes_and_reports_occur(patients: list[PatientTruth]) -> None:
    assert 0.04 < sum(len(p.eyes) == 1 for p in patients) / len(patients) < 0.13
    assert 0.05 < sum(not p.has_report for p in patients) / len(patients) < 0.15


def test_draw_patient__diabetic_lesions_come_together(eyes: list[EyeTruth]) -> None:
    with_exudates = [t for t in eyes if t.find(EXUDATES)]
    together = sum(t.find(HAEMORRHAGES) is not None for t in with_exudates) / len(with_exudates)
    alone = sum(t.find(HAEMORRHAGES) is not None for t in eyes) / len(eyes)
    assert together > 2.5 * alone


def test_draw_patient__severities_are_spread(eyes: list[EyeTruth]) -> None:
    for name in FINDINGS:
        levels = Counter(f.severity for t in eyes for f in t.findings if f.name == name)
        assert min(levels[s] for s in range(3)) > 0.1 * levels.total(), name


def test_draw_patient__grade_follows_the_lesions(eyes: list[EyeTruth]) -> None:
    for truth in eyes:
        lesions = {f.name for f in truth.findings} & DIABETIC
        if truth.dr_grade == 0:
            assert not lesions
        elif truth.dr_grade == 1:
            assert lesions == {MICROANEURYSMS}
        else:
            assert lesions & {HAEMORRHAGES, EXUDATES}
        blood = truth.find(HAEMORRHAGES)
        everywhere = (
            blood is not None and {p for p, _ in blood.places} == set(QUADRANTS) and blood.severity == 2
        )
        assert (truth.dr_grade == 3) == everywhere


def test_labels__normal_means_nothing_else(eyes: list[EyeTruth]) -> None:
    for truth in eyes:
        assert (NORMAL in truth.labels("CFP")) == (not truth.findings)
        assert sum(label in DR_GRADES for label in truth.labels("CFP")) == 1


def test_labels__name_what_the_modality_shows(eyes: list[EyeTruth]) -> None:
    assert not any(FLUID in t.labels("CFP") for t in eyes)
    assert not any({LARGE_CUP, EXUDATES} & set(t.labels("OCT")) for t in eyes)
    assert any(DRUSEN in t.labels("OCT") for t in eyes)


def test_cameras_do_not_follow_the_findings() -> None:
    source = SynthSource(patients=3000, seed=2, size=64)
    share = {c.name: Counter[str]() for c in CAMERAS}
    num_eyes = Counter[str]()
    for number in range(3000):
        camera = source.camera(number).name
        for truth in draw_patient(2, number).eyes:
            num_eyes[camera] += 1
            share[camera].update(truth.labels("CFP"))
    for label in (*FINDINGS[:-1], NORMAL):
        rates = [share[c][label] / num_eyes[c] for c in num_eyes]
        assert max(rates) - min(rates) < 0.07, label
