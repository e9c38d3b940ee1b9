"""What an evaluation found, as one tree of values: the source of `results.json` and of the report."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from fundusfm.evaluation.arrays import Floats
from fundusfm.evaluation.bootstrap import Estimate
from fundusfm.evaluation.retrieval import Retrieval
from fundusfm.evaluation.scoring import Scores, SourceScores

PRETRAINED, UNTRAINED, HISTOGRAM, SOURCE = "pretrained", "untrained", "colour histogram", "source alone"
REPORTED = "report"
PROBE, NEIGHBOURS, ZERO_SHOT, PREVALENCE = "linear probe", "k-NN", "zero-shot", "label share"
FEW_SHOT, CLIP_ADAPTER, TIP_ADAPTER, TIP_ADAPTER_F = (
    *("few-shot probe", "CLIP-Adapter"),
    *("Tip-Adapter", "Tip-Adapter-F"),
)
METHODS = (
    ZERO_SHOT,
    FEW_SHOT,
    CLIP_ADAPTER,
    TIP_ADAPTER,
    TIP_ADAPTER_F,
    PROBE,
    NEIGHBOURS,
)  # as they are shown


@dataclass(frozen=True)
class MethodResult:
    """One way of reading one tower: `setting` says what was chosen, `score_NL` gave the numbers."""

    tower: str
    method: str
    setting: str
    scores: Scores
    sources: tuple[SourceScores, ...]
    score_NL: Floats = field(repr=False)


@dataclass(frozen=True)
class Difference:
    """Macro AUROC of the pretrained tower minus another, by the same method, with a paired interval."""

    method: str
    against: str
    macro_auroc: Estimate


@dataclass(frozen=True)
class ScaleResult:
    """An ordered scale read by one method; rows of `confusion` are true grades, columns predicted ones.

    `rates`: `accuracy`, and means over the grades of `metrics.one_against_rest`.
    """

    scale: str
    grades: tuple[str, ...]
    tower: str
    method: str
    setting: str
    kappa: Estimate
    confusion: tuple[tuple[int, ...], ...]
    num_images: int
    rates: dict[str, Estimate]


@dataclass(frozen=True)
class RetrievalResult:
    """One tower, one direction."""

    tower: str
    retrieval: Retrieval


@dataclass(frozen=True)
class CaptionResult:
    """One way of writing reports against the reports there are; `bleu` holds BLEU-1 to BLEU-4.

    `num_words` is the mean length of what was written.
    """

    method: str
    num_exams: int
    num_words: float
    bleu: tuple[Estimate, ...]
    rouge_l: Estimate
    cider: Estimate


@dataclass(frozen=True)
class SplitFacts:
    """What a split gave; `role` says what it was used for."""

    split: str
    role: str
    num_images: int
    num_annotated: int
    num_patients: int


@dataclass(frozen=True)
class Results:
    """Everything. `facts` describe run and data; `source_counts`: label -> source -> images with it."""

    facts: dict[str, str]
    splits: tuple[SplitFacts, ...]
    source_counts: dict[str, dict[str, int]]
    methods: tuple[MethodResult, ...]
    differences: tuple[Difference, ...]
    scales: tuple[ScaleResult, ...]
    retrieval: tuple[RetrievalResult, ...]
    notes: tuple[str, ...]
    captions: tuple[CaptionResult, ...] = ()

    def find(self, tower: str, method: str) -> MethodResult | None:
        """One method's result, None if it was not measured."""
        return next((m for m in self.methods if (m.tower, m.method) == (tower, method)), None)

    def to_json(self) -> bytes:
        """All numbers; arrays stay out, undefined values are null."""
        return json.dumps(_plain(self), ensure_ascii=False, indent=1, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        kept = ((f.name, getattr(value, f.name)) for f in fields(value))
        return {name: _plain(v) for name, v in kept if not isinstance(v, np.ndarray)}
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
