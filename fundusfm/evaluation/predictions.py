"""What each method said of each image, beside the results: two runs can then be compared patient by patient.

Legend: N images, L labels.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fundusfm.evaluation.arrays import Floats
from fundusfm.evaluation.measure import Measurement
from fundusfm.evaluation.results import PRETRAINED, Results
from fundusfm.evaluation.scoring import Question

PREDICTIONS = "predictions.npz"
_SCORES = "score_NL "


@dataclass(frozen=True)
class Predictions:
    """Scores of the pretrained tower by method, and the question they answer; `images` names its rows."""

    question: Question
    images: tuple[str, ...]
    scores: Mapping[str, Floats]

    def asks_the_same(self, other: Predictions) -> bool:
        """Whether both are about the same images of the same patients with the same labels."""
        ours, theirs = self.question, other.question
        return (
            self.images == other.images
            and ours.patients == theirs.patients
            and ours.labels == theirs.labels
            and np.array_equal(ours.target_NL, theirs.target_NL)
            and np.array_equal(ours.in_macro_L, theirs.in_macro_L)
        )

    def to_bytes(self) -> bytes:
        """A file of plain arrays (npz); patients are the pseudonyms of the shards."""
        stream = io.BytesIO()
        arrays = {
            "images": np.asarray(self.images, dtype=np.str_),
            "patients": np.asarray(self.question.patients, dtype=np.str_),
            "labels": np.asarray(self.question.labels, dtype=np.str_),
            "target_NL": self.question.target_NL,
            "in_macro_L": self.question.in_macro_L,
            **{_SCORES + method: score_NL for method, score_NL in self.scores.items()},
        }
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        return stream.getvalue()


def predictions_of(results: Results, measurement: Measurement) -> Predictions:
    """The predictions of an evaluation that has just been measured."""
    facts = measurement.sets.reported.facts
    images = tuple(f"{key} {eye}" for key, eye in zip(facts.keys, facts.eyes, strict=True))
    scores = {m.method: m.score_NL for m in results.methods if m.tower == PRETRAINED}
    return Predictions(measurement.question, images, scores)


def load_predictions(path: Path) -> Predictions | None:
    """The predictions in a file; None where there is no whole one."""
    try:
        with np.load(path, allow_pickle=False) as held:
            names = {name: tuple(held[name].tolist()) for name in ("images", "patients", "labels")}
            question = Question(names["labels"], held["target_NL"], names["patients"], held["in_macro_L"])
            scores = {n.removeprefix(_SCORES): held[n] for n in held.files if n.startswith(_SCORES)}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return Predictions(question, names["images"], scores)
