"""Reports in English and Chinese, from the truth: eye, finding, place and severity in varied words."""

from __future__ import annotations

import numpy as np

from fundusfm.recipe.phrases import sentence
from fundusfm.shards.synth.findings import (
    DR_GRADES,
    MACULA,
    NORMAL,
    QUADRANTS,
    EyeTruth,
    Finding,
    PatientTruth,
)
from fundusfm.shards.synth.rng import Stream, generator
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

_SHARE_WITH_NEGATIVE, _SHARE_WITH_GRADE, _SHARE_WITH_AGE = 0.3, 0.8, 0.3
_BETWEEN = {"en": "; ", "zh": "；"}
_MANY = 3  # phrases from which an eye gets one sentence: a report must fit a text tower's context
_SPACE = {"en": " ", "zh": ""}


def write_reports(seed: int, patient: PatientTruth) -> dict[str, str]:
    """Language -> report. Each eye is named before its findings, in either order."""
    return {
        language: _report(generator(seed, patient.number, Stream.REPORT, part=part), language, patient)
        for part, language in enumerate(LANGUAGES)
    }


def _report(rng: np.random.Generator, language: str, patient: PatientTruth) -> str:
    parts = []
    if rng.random() < _SHARE_WITH_AGE:
        parts.append(f"{patient.age}-year-old patient." if language == "en" else f"患者{patient.age}岁。")
    for index in rng.permutation(len(patient.eyes)):
        parts += _eye_sentences(rng, language, patient.eyes[index])
    return _SPACE[language].join(parts)


def _eye_sentences(rng: np.random.Generator, language: str, truth: EyeTruth) -> list[str]:
    """One sentence for the eye, or one for each finding."""
    phrases = [describe(rng, language, f) for f in truth.findings]
    phrases = [phrases[i] for i in rng.permutation(len(phrases))]
    if not phrases:
        phrases = [_pick(rng, PHRASES[NORMAL][language])]
    if truth.dr_grade > 0 and rng.random() < _SHARE_WITH_GRADE:
        phrases.append(_pick(rng, PHRASES[DR_GRADES[truth.dr_grade]][language]))
    if len(phrases) < _MANY and rng.random() < _SHARE_WITH_NEGATIVE:
        phrases.append(_pick(rng, _true_negatives(language, truth)))
    if len(phrases) >= _MANY or rng.random() < 0.5:
        return [sentence(language, truth.eye, _BETWEEN[language].join(phrases))]
    return [sentence(language, truth.eye, phrase) for phrase in phrases]


def _true_negatives(language: str, truth: EyeTruth) -> list[str]:
    ruled_out = [
        p for names, words in ABSENT.items() if not any(map(truth.find, names)) for p in words[language]
    ]
    if truth.dr_grade == 0:
        ruled_out += PHRASES["dr_none"][language]
    return ruled_out or PHRASES[DR_GRADES[truth.dr_grade]][language]


def describe(rng: np.random.Generator, language: str, finding: Finding) -> str:
    """A finding with its severity, and its place where it has one worth telling."""
    noun = _pick(rng, PHRASES[finding.name][language])
    with_place = finding.name in WITH_PLACE
    scale = COUNTED if with_place else MEASURED
    severity = _pick(rng, list(scale[language][finding.severity]))
    place = _places(rng, language, [p for p, _ in finding.places]) if with_place else ""
    if language == "zh":
        order = (place, severity, noun) if with_place else (noun, "，", severity)
        return "".join(order)
    words = [severity, noun, place] if with_place and rng.random() < 0.6 else [noun, place]
    text = " ".join(w for w in words if w)
    return text if severity in words else f"{text}, {severity}"


def _places(rng: np.random.Generator, language: str, places: list[str]) -> str:
    quadrants = [p for p in places if p in QUADRANTS]
    parts = []
    if len(quadrants) == len(QUADRANTS):
        parts.append(_pick(rng, list(ALL_QUADRANTS[language])))
    elif quadrants:
        names = [_pick(rng, list(QUADRANT_WORDS[language][q])) for q in quadrants]
        parts.append(_quadrant_phrase(language, names))
    if MACULA in places:
        parts.append(_pick(rng, list(MACULA_WORDS[language])))
    return (" and " if language == "en" else "及").join(parts)


def _quadrant_phrase(language: str, names: list[str]) -> str:
    if language == "zh":
        return "、".join(names) + "象限"
    joined = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return f"in the {joined} quadrant{'s' if len(names) > 1 else ''}"


def _pick(rng: np.random.Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]
