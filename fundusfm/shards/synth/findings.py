"""The truth of a synthetic patient: which findings each eye has, where, how severe and how many.

Nothing here knows of cameras or pixels, so that no finding can hang on a camera.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fundusfm.shards.synth.rng import Stream, generator

MICROANEURYSMS, HAEMORRHAGES, EXUDATES = "microaneurysms", "haemorrhages", "exudates"
DRUSEN, LARGE_CUP, HAZE, FLUID = "drusen", "large_cup", "cataract_haze", "fluid"
NORMAL = "normal"
FINDINGS = (MICROANEURYSMS, HAEMORRHAGES, EXUDATES, DRUSEN, LARGE_CUP, HAZE, FLUID)
DR_GRADES = ("dr_none", "dr_mild", "dr_moderate", "dr_severe")
SEVERITIES = ("mild", "moderate", "severe")
QUADRANTS = ("superotemporal", "inferotemporal", "superonasal", "inferonasal")
MACULA, DISC, LENS = "macula", "disc", "lens"

# What a person can see in an image of each modality; an image is labelled with these findings only.
VISIBLE = {
    "CFP": (MICROANEURYSMS, HAEMORRHAGES, EXUDATES, DRUSEN, LARGE_CUP, HAZE),
    "FFA": (MICROANEURYSMS, HAEMORRHAGES, DRUSEN, HAZE),
    "OCT": (DRUSEN, FLUID),
}
# Short side in pixels from which an image shows it; below, a probe of that label would measure noise.
# An eye is seen to be normal where the smallest finding would be seen.
VISIBLE_FROM_PX = {
    NORMAL: 192,
    MICROANEURYSMS: 192,
    "dr_mild": 192,
    HAEMORRHAGES: 96,
    EXUDATES: 96,
    DRUSEN: 96,
    LARGE_CUP: 96,
    HAZE: 64,
    FLUID: 96,
}

_COUNTS = {
    MICROANEURYSMS: ((2, 6), (7, 15), (16, 34)),
    HAEMORRHAGES: ((1, 4), (5, 11), (16, 32)),
    EXUDATES: ((4, 9), (10, 24), (26, 60)),
    DRUSEN: ((8, 15), (16, 30), (32, 60)),
    FLUID: ((1, 2), (3, 5), (6, 10)),
}
_DR_SHARES = (0.67, 0.10, 0.13, 0.10)


@dataclass(frozen=True)
class Finding:
    """`severity` is 0 to 2 (mild, moderate, severe); `places` pairs each place with its number of lesions."""

    name: str
    severity: int
    places: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class EyeTruth:
    """What one eye has; `dr_grade` is 0 to 3."""

    eye: str
    findings: tuple[Finding, ...]
    dr_grade: int

    def find(self, name: str) -> Finding | None:
        """The finding of that name, None if this eye has not got it."""
        return next((f for f in self.findings if f.name == name), None)

    def labels(self, modality: str) -> tuple[str, ...]:
        """Labels of an image: what its modality shows, the grade where it can be told, or `normal`."""
        seen = tuple(f.name for f in self.findings if f.name in VISIBLE[modality])
        grade = () if modality == "OCT" else (DR_GRADES[self.dr_grade],)
        return (() if self.findings else (NORMAL,)) + seen + grade

    def rows(self) -> list[dict[str, Any]]:
        """The truth as plain rows, one a finding and place."""
        return [
            {
                "eye": self.eye,
                "finding": f.name,
                "severity": SEVERITIES[f.severity],
                "place": place,
                "count": count,
            }
            for f in self.findings
            for place, count in f.places
        ]


@dataclass(frozen=True)
class PatientTruth:
    """One patient and visit; `eyes` holds one or two."""

    number: int
    age: int
    eyes: tuple[EyeTruth, ...]
    has_oct: bool
    has_ffa: bool
    has_report: bool


def draw_patient(seed: int, number: int) -> PatientTruth:
    """Diseases belong to the patient, so the two eyes resemble each other without being equal."""
    rng = generator(seed, number, Stream.TRUTH)
    age = int(np.clip(rng.normal(61, 13), 22, 90))
    ageing = (age - 61) / 60
    prone = {
        DRUSEN: rng.random() < 0.21 + 0.25 * ageing,
        LARGE_CUP: rng.random() < 0.21 + 0.1 * ageing,
        HAZE: rng.random() < 0.22 + 0.3 * ageing,
    }
    dr_grade = int(rng.choice(4, p=_DR_SHARES))
    has_oct, has_ffa, has_report = rng.random() < 0.35, rng.random() < 0.2, rng.random() < 0.9
    lone = rng.choice(["", "left", "right"], p=[0.92, 0.04, 0.04])
    eyes = tuple(
        _draw_eye(generator(seed, number, Stream.TRUTH, eye), eye, dr_grade, prone, has_oct)
        for eye in ("right", "left")
        if not lone or eye == lone
    )
    return PatientTruth(number, age, eyes, has_oct, has_ffa, has_report)


def _draw_eye(
    rng: np.random.Generator, eye: str, patient_grade: int, prone: dict[str, bool], has_oct: bool
) -> EyeTruth:
    grade = _eye_grade(rng, patient_grade)
    found = _diabetic(rng, grade)
    for name, place in ((DRUSEN, MACULA), (LARGE_CUP, DISC), (HAZE, LENS)):
        if rng.random() < (0.82 if prone[name] else 0.01):
            severity = _severity(rng)
            found.append(Finding(name, severity, ((place, _count(rng, name, severity)),)))
    wet = grade >= 2 or any(f.name == DRUSEN for f in found)
    if has_oct and wet and rng.random() < 0.5:
        severity = _severity(rng)
        found.append(Finding(FLUID, severity, ((MACULA, _count(rng, FLUID, severity)),)))
    return EyeTruth(eye, tuple(found), grade)


def _eye_grade(rng: np.random.Generator, patient_grade: int) -> int:
    if patient_grade == 0:
        return 0
    step = int(rng.choice([-1, 0, 1], p=[0.15, 0.75, 0.1]))
    return int(np.clip(patient_grade + step, 0, 3))


def _diabetic(rng: np.random.Generator, grade: int) -> list[Finding]:
    """Lesions of a retinopathy grade: mild is microaneurysms alone, severe bleeds in all four quadrants."""
    if grade == 0:
        return []
    if grade == 1:
        return [_lesions(rng, MICROANEURYSMS, int(rng.integers(0, 2)))]
    found = []
    if rng.random() < 0.75:
        found.append(_lesions(rng, MICROANEURYSMS, int(rng.integers(grade - 2, 3))))
    bleeds = grade == 3 or rng.random() < 0.8
    if bleeds:
        found.append(_lesions(rng, HAEMORRHAGES, 2 if grade == 3 else int(rng.integers(0, 2))))
    if not bleeds or rng.random() < 0.65:
        found.append(_lesions(rng, EXUDATES, int(rng.integers(0, 3 if grade == 3 else 2))))
    return found


def _lesions(rng: np.random.Generator, name: str, severity: int) -> Finding:
    """Lesions of one kind in one to four quadrants or the macula."""
    if name == HAEMORRHAGES and severity == 2:
        places = list(QUADRANTS)
    else:
        choices = [*QUADRANTS, MACULA]
        shares = np.array([3, 3, 1.2, 1.2, 3 if name == EXUDATES else 1.2])
        num_places = 1 + int(rng.integers(0, severity + 1))
        picked = rng.choice(len(choices), size=num_places, replace=False, p=shares / shares.sum())
        places = [choices[i] for i in sorted(picked)]
    total = max(_count(rng, name, severity), len(places))
    extra = rng.multinomial(total - len(places), [1 / len(places)] * len(places))
    return Finding(name, severity, tuple((p, 1 + int(n)) for p, n in zip(places, extra, strict=True)))


def _severity(rng: np.random.Generator) -> int:
    return int(rng.choice(3, p=[0.35, 0.4, 0.25]))


def _count(rng: np.random.Generator, name: str, severity: int) -> int:
    if name not in _COUNTS:
        return 1
    low, high = _COUNTS[name][severity]
    return int(rng.integers(low, high + 1))
